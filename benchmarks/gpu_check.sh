#!/usr/bin/env bash
# Every proof that needs a GPU, in one call of less than nine minutes, on a machine with nothing but
# a CUDA build of torch, nvcc, ninja, pybind11, pytest and pytest-benchmark, and no network:
#     OUT=folder bash benchmarks/gpu_check.sh
# Left in $OUT: check.log, one line a step in summary.txt, and the results *.cuda.json, which belong
# into benchmarks/results/. The exit status is the number of steps that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_check}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
deadline=530 # seconds for everything
failed=0
: >"$OUT/check.log"
: >"$OUT/summary.txt"

report() { # name, status, seconds
  local verdict=ok
  if [ "$2" -ne 0 ]; then
    verdict="FAILED ($2)"
    failed=$((failed + 1))
  fi
  printf '%-28s %-12s %4ss\n' "$1" "$verdict" "$3" | tee -a "$OUT/summary.txt"
}

step() { # name, limit in seconds, command: runs it, keeps its output
  local name=$1 limit=$2 start=$SECONDS status=0
  shift 2
  limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
  if [ "$limit" -le 0 ]; then
    report "$name: no time left" 124 0
    return 124
  fi
  printf '\n=== %s: %s\n' "$name" "$*" >>"$OUT/check.log"
  timeout --kill-after=5 "$limit" "$@" >>"$OUT/check.log" 2>&1 || status=$?
  report "$name" "$status" $((SECONDS - start))
  return "$status"
}

arch=$("$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + "a" * (a >= 9))') || {
  echo "no CUDA device, or no CUDA build of torch" | tee -a "$OUT/summary.txt"
  exit 1
}
step "device" 30 bash -c 'nvidia-smi; nvcc --version; "$0" -m torch.utils.collect_env' "$python"
RLSCUDA_CUDA=1 TORCH_CUDA_ARCH_LIST=$arch MAX_JOBS=$(nproc) \
  step "build for $arch" 170 "$python" setup.py build_ext --inplace || exit "$failed"

# the CPU's tests meanwhile, but for those that need more packages than this machine has
(
  ignored=$(printf -- '--ignore=tests/%s ' cli files package pruning ops/test_cuda.py \
    streaming/test_{regressor,rls_filter}.py optim/steps/test_{infos,numerics_long}.py)
  # shellcheck disable=SC2086
  OMP_NUM_THREADS=4 timeout 240 "$python" -m pytest -q -p no:cacheprovider tests $ignored \
    >"$OUT/cpu_tests.log" 2>&1
) &
cpu=$!
step "operators on the GPU" 110 env RLSCUDA_TEST_DEVICE=cuda "$python" -m pytest -q \
  -p no:cacheprovider -p no:benchmark tests/ops/test_rls_update.py tests/ops/test_weight_step.py tests/ops/test_nonfinite.py \
  tests/ops/test_foreach_ops.py tests/ops/test_rls_held.py tests/ops/filters tests/streaming/test_held_matrix.py -k 'not (opcheck or compiles or threads or wrong or errors)'
step "tests on the GPU" 110 "$python" -m pytest -q -p no:cacheprovider -p no:benchmark tests/ops/test_cuda.py

sanitizer=$(command -v compute-sanitizer || ls "$(dirname "$(readlink -f "$(command -v nvcc)")")"/compute-sanitizer \
  /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
short='patch_operators and (stride-torch.float32 or groups-torch.bfloat16) or rls_update and (33 or 3-9) and float32 and (1 or 16) or rls_held and (33 or 3-5) and float32 or trains_short'
for tool in memcheck racecheck; do
  step "compute-sanitizer $tool" 60 "${sanitizer:-compute-sanitizer}" --tool "$tool" \
    --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider -p no:benchmark \
    tests/ops/test_cuda.py -k "$short"
done

start=$SECONDS
wait "$cpu"
report "tests on the CPU" $? $((SECONDS - start))

for file in operators/bench_{rls_update,patch} steps/bench_{optimizer,training}_step; do
  step "benchmark ${file#*/bench_}" 70 "$python" -m pytest -q -p no:cacheprovider "benchmarks/${file}_cuda.py"
done
cp benchmarks/results/*.cuda.json "$OUT" 2>/dev/null
"$python" -m benchmarks.tables $(cd benchmarks/results && ls *.cuda.json 2>/dev/null | sed 's/\.json$//') \
  >>"$OUT/check.log" 2>&1
tail -n 60 "$OUT/check.log"
cat "$OUT/summary.txt"
exit "$failed"
