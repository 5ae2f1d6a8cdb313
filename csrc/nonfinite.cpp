// nonfinite: checks, dtype dispatch, launch.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "checks.h"
#include "cuda_call.h"
#include "kernels.h"
#include "ops.h"

namespace rlscuda {
namespace {

// Whether the elements of t fill one stretch of memory, in whatever order.
bool fills_memory(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

NonfiniteTensor described(const Tensor& t) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return {data, t.numel(), 0x7f800000u, 4};
    case ScalarType::Double:
      return {data, t.numel(), 0x7ff0000000000000u, 8};
    case ScalarType::BFloat16:
      return {data, t.numel(), 0x7f80u, 2};
    default:
      RLS_CHECK(t.scalar_type() == ScalarType::Half, "nonfinite expects floating-point tensors");
      return {data, t.numel(), 0x7c00u, 2};
  }
}

bool any_nonfinite_element(const NonfiniteTensor& t) {
  if (t.width == 2) return nonfinite_cpu<uint16_t>(t.data, uint16_t(t.exponent_mask), t.count);
  if (t.width == 4) return nonfinite_cpu<uint32_t>(t.data, uint32_t(t.exponent_mask), t.count);
  return nonfinite_cpu<uint64_t>(t.data, t.exponent_mask, t.count);
}

}  // namespace

Tensor nonfinite(std::vector<Tensor> tensors) {
  RLS_CHECK(!tensors.empty(), "nonfinite expects at least one tensor");
  std::vector<NonfiniteTensor> list;
  for (Tensor& t : tensors) {
    check_same_device("every tensor", t, "the first", tensors[0]);
    if (!t.is_contiguous() && !fills_memory(t)) t = torch::stable::contiguous(t);
    list.push_back(described(t));
  }
  Tensor result = new_tensor(tensors[0], {}, ScalarType::Bool);
  bool* found = static_cast<bool*>(result.mutable_data_ptr());
  run_on(
      result, [&] { *found = std::any_of(list.begin(), list.end(), any_nonfinite_element); },
      [&](auto stream) { nonfinite_cuda(list.data(), int64_t(list.size()), found, stream); });
  return result;
}

}  // namespace rlscuda
