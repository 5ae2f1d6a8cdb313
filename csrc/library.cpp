// Every schema and registration, and the Python module; nothing else.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "kernels.h"
#include "ops.h"
#include "parallel.h"
#include "rls_filter.h"

namespace rlscuda {
namespace {

// The SIMD level that the dispatch of SIMD_CLONES picks on this machine.
const char* simd_level() {
#if HAS_SIMD_CLONES
  if (__builtin_cpu_supports("avx512f")) return "avx512f";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
#endif
  return "default";
}

}  // namespace
}  // namespace rlscuda

STABLE_TORCH_LIBRARY(rlscuda, m) {
  m.def(
      "rls_update_(Tensor(a!) P, Tensor s, float forgetting, float gain, float decay, "
      "float diffusion, float initial_scale, Tensor(b!)? power, Tensor(c!)? health, "
      "Tensor? found_inf) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(rlscuda, CPU, m) {
  m.impl("rls_update_", TORCH_BOX(&rlscuda::rls_update_));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of rlscuda: loading it registers torch.ops.rlscuda.*";
  rlscuda::bind_rls_filter(m);
  m.attr("source_hash") = RLSCUDA_SOURCE_HASH;
  m.attr("simd") = rlscuda::simd_level();
#ifdef RLSCUDA_WITH_CUDA
  m.attr("cuda_runtime") = rlscuda::cuda_runtime_version();
#else
  m.attr("cuda_runtime") = pybind11::none();
#endif
}
