#!/usr/bin/env bash
# Everything that needs a GPU, in two stages of five minutes at most, on a machine with nothing but
# a CUDA build of torch, nvcc, ninja, pybind11, numpy, pytest and pytest-benchmark, and no network:
#     OUT=folder bash benchmarks/gpu_check.sh prove      build, operators, test_cuda.py, sanitizers
#     OUT=folder bash benchmarks/gpu_check.sh measure    benchmarks, what was predicted beside
# What is left in $OUT is written as it happens, so that a kill loses only the rest: check.jsonl,
# with steps, failures and timed cases; check.log; prove adds sanitizers.log and the library
# _C*.so, which LIBRARY=file hands to a measure on another machine; measure adds the results
# *.cuda.json of files that ran as a whole, which belong into benchmarks/results/.
# The exit status is the number of steps that failed. Without a GPU:
#     bash benchmarks/gpu_check.sh STAGE --plan          the steps as lines of JSON, and nothing else
#     bash benchmarks/gpu_check.sh STAGE --dry-run       tries all but the device, see gpu/dry_run.py
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} stage=${1:-} mode=${2:-} deadline=295 lane=0 # of steps one after another
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
case "$stage $mode" in
  "prove " | "measure ") ;;
  "prove --plan" | "measure --plan") ;;
  "prove --dry-run" | "measure --dry-run") exec "$python" -m benchmarks.gpu.dry_run "$stage" "${@:3}" ;;
  *) echo "usage: gpu_check.sh prove|measure [--plan|--dry-run], got '$*'" >&2 && exit 2 ;;
esac

quoted() { # a string of JSON
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

record() { # name, status, exit status, seconds
  printf '{"stage": "%s", "step": %s, "status": "%s", "exit": %s, "seconds": %s, %s}\n' \
    "$stage" "$(quoted "$1")" "$2" "$3" "$4" "$facts" >>"$OUT/check.jsonl"
  [ "$2" = started ] || printf '%-28s %-10s %4ss\n' "$1" "$2" "$4"
}

plan() { # name, limit in seconds, command
  local words="" separator=""
  for word in "${@:3}"; do
    words+=$separator$(quoted "$word") separator=", "
  done
  printf '{"stage": "%s", "lane": %s, "step": %s, "limit": %s, "command": [%s]}\n' \
    "$stage" "$lane" "$(quoted "$1")" "$2" "$words"
}

step() { # name, limit in seconds, command: runs it, keeps its output
  if [ "$mode" = --plan ]; then
    plan "$@"
    return
  fi
  local name=$1 start=$SECONDS code=0 status=ok left=$((deadline - SECONDS))
  local limit=$(($2 < left ? $2 : left))
  shift 2
  if [ "$limit" -le 0 ]; then
    record "$name" "no time" null 0
    return 124
  fi
  record "$name" started null 0
  printf '\n=== %s: %s\n' "$name" "$*" >>"$log"
  CHECK_STEP=$name timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$log" 2>&1 || code=$?
  case $code in
    0) ;;
    124 | 137) status="cut short" ;;
    *) status=failed ;;
  esac
  record "$name" "$status" "$code" $((SECONDS - start))
  return "$code"
}

tests() { # name, limit in seconds, arguments of pytest
  step "$1" "$2" ${prefix[@]+"${prefix[@]}"} "$python" -m pytest -q --tb=short -p no:cacheprovider -p benchmarks.gpu.journal "${@:3}"
}

prove() {
  step build 80 env "TORCH_CUDA_ARCH_LIST=$arch" "MAX_JOBS=$(nproc)" "$python" -m benchmarks.gpu.library || return
  # what is about the CPU, its messages, or complex numbers, which a GPU refuses
  local plain='not (opcheck or compiles or threads or wrong or errors or complex or conjugated or plain_update_refuses)'
  local tool prefix=()
  # of test_cuda.py, for the sanitizers: each part by itself must choose some test
  local short='patch_operators and (stride-torch.float32 or groups-torch.bfloat16)'
  short+=' or rls_update and (33 or 9) and float32 and (1 or 16)'
  short+=' or rls_held and (33 or 3-5) and float32 or trains_short'

  sanitizers() {
    log=$OUT/sanitizers.log lane=2
    for tool in memcheck racecheck; do
      # every tensor an allocation of its own, our kernels alone, no errors of calls that torch expects
      prefix=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9
        --report-api-errors no --kernel-name kns=rlscuda)
      tests "$tool" 92 -p no:benchmark -x tests/ops/test_cuda.py -k "$short"
    done
  }
  on_the_device() {
    lane=1
    prefix=(env RLSCUDA_TEST_DEVICE=cuda)
    tests operators 95 -p no:benchmark tests/ops/test_rls_update.py tests/ops/steps/test_weight_step.py \
      tests/ops/steps/test_nonfinite.py tests/ops/steps/test_nesterov.py \
      tests/ops/steps/test_spectral_root.py tests/ops/steps/test_many_layers.py \
      tests/ops/test_foreach_ops.py tests/ops/test_rls_held.py tests/ops/filters \
      tests/streaming/test_held_matrix.py -k "$plain"
    prefix=()
    tests test_cuda 90 -p no:benchmark tests/ops/test_cuda.py tests/ops/steps/test_steps_cuda.py
  }
  if [ "$mode" = --plan ] || timeout 5 nvidia-smi -q -d COMPUTE 2>/dev/null | grep -q Exclusive; then
    on_the_device
    sanitizers
  else
    sanitizers &
    on_the_device
    wait
  fi
}

measure() {
  step library 70 env "TORCH_CUDA_ARCH_LIST=$arch" "MAX_JOBS=$(nproc)" "$python" -m benchmarks.gpu.library || return
  local before file
  before=$(mktemp)
  while read -r file limit; do
    tests "benchmark ${file##*bench_}" "$limit" "benchmarks/$file.py" </dev/null
    [ "$mode" = --plan ] ||
      find benchmarks/results -name '*.cuda.json' -newer "$before" -exec cp {} "$OUT" \;
  done <<'END'
operators/bench_rls_update_cuda 45
steps/bench_optimizer_step_cuda 50
steps/bench_training_step_cuda 55
operators/bench_patch_cuda 35
END
  rm "$before"
  step report 10 "$python" -m benchmarks.gpu.report "$OUT/check.jsonl"
}

sanitizer=$(command -v compute-sanitizer || ls "$(dirname "$(readlink -f "$(command -v nvcc)")")"/compute-sanitizer \
  /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
sanitizer=${sanitizer:-compute-sanitizer}
OUT=${OUT:-gpu_check}
if [ "$mode" = --plan ]; then
  arch=9.0a log=/dev/null
  step device 25 "$python" -m benchmarks.gpu.probe
  "$stage"
  exit
fi

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export OUT CHECK_JOURNAL=$OUT/check.jsonl
log=$OUT/check.log facts='"device": null'
first=$(wc -l 2>/dev/null <"$CHECK_JOURNAL" || echo 0) # another stage may have written before
{ timeout 5 nvidia-smi && nvcc --version && ls -l "$sanitizer"; } >>"$log" 2>&1
if probed=$(timeout 20 "$python" -m benchmarks.gpu.probe 2>>"$log"); then
  { read -r arch && read -r facts; } <<<"$probed"
  record device ok 0 "$SECONDS"
  "$stage"
else
  record device failed 1 "$SECONDS"
  echo "no CUDA device, or no CUDA build of torch"
fi
tail -n 60 "$log"
tail -n "+$((first + 1))" "$CHECK_JOURNAL" | grep '"step"' | grep -v '"started"' | cut -c1-200
exit "$(tail -n "+$((first + 1))" "$CHECK_JOURNAL" | grep -cE '"status": "(failed|cut short|no time)"')"
