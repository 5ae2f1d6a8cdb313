// nonfinite: checks, dtype dispatch, launch.
#include <algorithm>
#include <utility>

#include "arguments.h"
#include "cuda_call.h"
#include "kernels.h"
#include "ops.h"

namespace rlscuda {
namespace {

// Elements in memory of t, of which an expanded one repeats some; -1 where they have gaps.
int64_t dense_elements(const Tensor& t) {
  if (t.is_contiguous()) return t.numel();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1 && t.stride(d) != 0) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return -1;
    expected *= size;
  }
  return expected;
}

NonfiniteTensor described(const Tensor& t, const void* data, int64_t count) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return {data, count, 0x7f800000u, 4};
    case ScalarType::Double:
      return {data, count, 0x7ff0000000000000u, 8};
    case ScalarType::BFloat16:
      return {data, count, 0x7f80u, 2};
    default:
      RLS_CHECK(t.scalar_type() == ScalarType::Half, "nonfinite expects floating-point tensors, ",
                "got ", dtype_of(t));
      return {data, count, 0x7c00u, 2};
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
  Arguments arguments("the first tensor", tensors[0]);
  std::vector<NonfiniteTensor> list;
  for (const Tensor& t : tensors) {
    const int64_t count = dense_elements(t);
    const void* data = count < 0 ? arguments.read<void>("every tensor", t)
                                 : arguments.read_strided("every tensor", t);
    list.push_back(described(t, data, count < 0 ? t.numel() : count));
  }
  Tensor result = new_tensor(tensors[0], {}, ScalarType::Bool);
  bool* found = static_cast<bool*>(result.mutable_data_ptr());
  run_on(
      result, [&] { *found = std::any_of(list.begin(), list.end(), any_nonfinite_element); },
      [&](auto stream) { nonfinite_cuda(list.data(), int64_t(list.size()), found, stream); });
  return result;
}

}  // namespace rlscuda
