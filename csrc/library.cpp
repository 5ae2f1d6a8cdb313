// Every schema and registration, and the Python module; nothing else.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "build_info.h"
#include "kernels.h"
#include "ops.h"
#include "parallel.h"
#include "rls_filter.h"
#include "rls_math.h"

namespace rlscuda {
namespace {

// The SIMD level that the dispatch of SIMD_CLONES picks on this machine.
const char* simd_level() {
#if HAS_SIMD_CLONES
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
#endif
  return "default";
}

// Whose processor this is, as far as a library's choice of kernels depends on it.
const char* cpu_vendor() {
#if HAS_SIMD_CLONES
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

}  // namespace
}  // namespace rlscuda

STABLE_TORCH_LIBRARY(rlscuda, m) {
  m.def(
      "rls_update_(Tensor(a!) P, Tensor s, float forgetting, float gain, float decay, "
      "float diffusion, float initial_scale, Tensor(b!)? power, Tensor(c!)? health, "
      "Tensor? found_inf) -> (Tensor, Tensor)");
  m.def(
      "foreach_rls_update_(Tensor(a!)[] P, Tensor[] s, Tensor(b!)[] power, Tensor(c!)[] health, "
      "Tensor? found_inf, Tensor[] projection, Tensor(d!)[] projected, Tensor[] projected_x, "
      "float forgetting, float gain, float decay, float diffusion, float drift, "
      "float initial_scale, bool averaging) -> Tensor");
  m.def(
      "rls_update_held_(Tensor(a!) P, Tensor(b!) held, Tensor(c!) state, Tensor s, "
      "float forgetting, float gain, float decay, float diffusion, float initial_scale, "
      "Tensor(d!)? power, Tensor(e!)? health, Tensor? found_inf) -> (Tensor, Tensor)");
  m.def("rls_flush_(Tensor(a!) P, Tensor held, Tensor(b!) state) -> ()");
  m.def(
      "rls_filter_bank_(Tensor(a!) P, Tensor(b!) W, Tensor(c!) state, Tensor(d!) squares, "
      "Tensor rule, Tensor x, Tensor y, Tensor? weights, Tensor? mask, Tensor? index) -> Tensor");
  m.def("factors_agree(Tensor grad, Tensor x, Tensor delta, Tensor? grad_bias) -> bool");
  m.def("nonfinite(Tensor[] tensors) -> Tensor");
  m.def(
      "weight_step_(Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!) product, Tensor? bias_row, "
      "Tensor? grad_bias, Tensor? h, Tensor(d!)? momentum_buffer, float lr, float momentum, "
      "float weight_decay, bool divide_by_h) -> ()");
  m.def(
      "adaptive_weight_step_(Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!) product, Tensor grad, "
      "Tensor? bias_row, Tensor? grad_bias, Tensor? h, Tensor(d!) first_moment, Tensor(e!) "
      "second_moment, "
      "float lr, float beta1, float beta2, float weight_decay, float eps, int step) -> ()");
  m.def(
      "foreach_weight_step_(Tensor(a!)[] weight, Tensor(b!)[] bias, Tensor(c!)[] product, "
      "Tensor[] grad, Tensor[] bias_row, Tensor[] grad_bias, Tensor h, int[] groups, "
      "Tensor(d!)[] first_moment, Tensor(e!)[] second_moment, Tensor[] health, Tensor? rate, "
      "Tensor? norms, float lr, float momentum, float beta2, float weight_decay, float eps, "
      "float gain, float trust, bool divide_by_h) -> ()");
  m.def(
      "foreach_complete_products_(Tensor(a!)[] product, Tensor[] weight, Tensor[] bias, "
      "Tensor[] bias_row, Tensor[] grad_bias, int[] groups) -> Tensor");
  m.def(
      "foreach_nesterov_(Tensor[] grad, Tensor[] grad_bias, Tensor(a!)[] average, Tensor h, "
      "int[] place, int[] groups, int[] rows, float momentum) -> (Tensor, Tensor, Tensor)");
  m.def(
      "foreach_spectral_direction_(Tensor(a!) momentum, Tensor(b!) product, Tensor[] P, "
      "Tensor peak, Tensor length, Tensor[] power, int[] blocks, int[] block, int[] rows, "
      "int[] columns, float[] coefficients, float eps) -> ()");
  m.def(
      "foreach_spectral_root_(Tensor(a!)[] gram, Tensor[] peak, Tensor[] length, Tensor[] power, "
      "int[] block, int[] rows, int[] columns, float[] coefficients, float eps) -> ()");
#define PATCH_ARGS                                                              \
  "(Tensor x, int[] kernel_size, int[] stride, int[] padding, int[] dilation, " \
  "int groups, int padding_mode, bool ones"
  m.def("patch_mean" PATCH_ARGS ") -> Tensor");
  m.def("patch_sketch" PATCH_ARGS ", int rank, SymInt seed, SymInt offset) -> Tensor");
  m.def("patch_sample" PATCH_ARGS ", int rank, SymInt seed, SymInt offset) -> (Tensor, Tensor)");
#undef PATCH_ARGS
}

STABLE_TORCH_LIBRARY_IMPL(rlscuda, CPU, m) {
  m.impl("rls_update_", TORCH_BOX(&rlscuda::rls_update_));
  m.impl("foreach_rls_update_", TORCH_BOX(&rlscuda::foreach_rls_update_));
  m.impl("rls_update_held_", TORCH_BOX(&rlscuda::rls_update_held_));
  m.impl("rls_flush_", TORCH_BOX(&rlscuda::rls_flush_));
  m.impl("rls_filter_bank_", TORCH_BOX(&rlscuda::rls_filter_bank_));
  m.impl("foreach_weight_step_", TORCH_BOX(&rlscuda::foreach_weight_step_));
  m.impl("foreach_complete_products_", TORCH_BOX(&rlscuda::foreach_complete_products_));
  m.impl("foreach_nesterov_", TORCH_BOX(&rlscuda::foreach_nesterov_));
  m.impl("foreach_spectral_direction_", TORCH_BOX(&rlscuda::foreach_spectral_direction_));
  m.impl("foreach_spectral_root_", TORCH_BOX(&rlscuda::foreach_spectral_root_));
  m.impl("factors_agree", TORCH_BOX(&rlscuda::factors_agree));
  m.impl("nonfinite", TORCH_BOX(&rlscuda::nonfinite));
  m.impl("weight_step_", TORCH_BOX(&rlscuda::weight_step_));
  m.impl("adaptive_weight_step_", TORCH_BOX(&rlscuda::adaptive_weight_step_));
  m.impl("patch_mean", TORCH_BOX(&rlscuda::patch_mean));
  m.impl("patch_sketch", TORCH_BOX(&rlscuda::patch_sketch));
  m.impl("patch_sample", TORCH_BOX(&rlscuda::patch_sample));
}

#ifdef RLSCUDA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rlscuda, CUDA, m) {
  m.impl("rls_update_", TORCH_BOX(&rlscuda::rls_update_));
  m.impl("foreach_rls_update_", TORCH_BOX(&rlscuda::foreach_rls_update_));
  m.impl("rls_update_held_", TORCH_BOX(&rlscuda::rls_update_held_));
  m.impl("rls_flush_", TORCH_BOX(&rlscuda::rls_flush_));
  m.impl("rls_filter_bank_", TORCH_BOX(&rlscuda::rls_filter_bank_));
  m.impl("weight_step_", TORCH_BOX(&rlscuda::weight_step_));
  m.impl("adaptive_weight_step_", TORCH_BOX(&rlscuda::adaptive_weight_step_));
  m.impl("foreach_weight_step_", TORCH_BOX(&rlscuda::foreach_weight_step_));
  m.impl("foreach_complete_products_", TORCH_BOX(&rlscuda::foreach_complete_products_));
  m.impl("foreach_nesterov_", TORCH_BOX(&rlscuda::foreach_nesterov_));
  m.impl("foreach_spectral_root_", TORCH_BOX(&rlscuda::foreach_spectral_root_));
  m.impl("nonfinite", TORCH_BOX(&rlscuda::nonfinite));
  m.impl("patch_mean", TORCH_BOX(&rlscuda::patch_mean));
  m.impl("patch_sketch", TORCH_BOX(&rlscuda::patch_sketch));
  m.impl("patch_sample", TORCH_BOX(&rlscuda::patch_sample));
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of rlscuda: loading it registers torch.ops.rlscuda.*";
  rlscuda::bind_rls_filter(m);
  m.attr("source_hash") = RLSCUDA_SOURCE_HASH;
  m.attr("cuda_archs") = RLSCUDA_CUDA_ARCHS;
  pybind11::tuple slots(int(rlscuda::kHealthSlots));
  for (int i = 0; i < rlscuda::kHealthSlots; ++i) slots[i] = rlscuda::kHealthNames[i];
  m.attr("health_slots") = slots;
  m.attr("simd") = rlscuda::simd_level();
  m.attr("cpu_vendor") = rlscuda::cpu_vendor();
#ifdef RLSCUDA_WITH_CUDA
  m.attr("cuda_runtime") = rlscuda::cuda_runtime_version();
#else
  m.attr("cuda_runtime") = pybind11::none();
#endif
}
