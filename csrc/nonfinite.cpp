// nonfinite: checks, dtype dispatch, launch.
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "kernels.h"
#include "ops.h"

namespace rlscuda {
namespace {

bool any_nonfinite_element(const Tensor& tensor) {
  const Tensor t = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return nonfinite_cpu<uint32_t>(t.const_data_ptr(), 0x7f800000u, t.numel());
    case ScalarType::Double:
      return nonfinite_cpu<uint64_t>(t.const_data_ptr(), 0x7ff0000000000000u, t.numel());
    case ScalarType::BFloat16:
      return nonfinite_cpu<uint16_t>(t.const_data_ptr(), 0x7f80u, t.numel());
    case ScalarType::Half:
      return nonfinite_cpu<uint16_t>(t.const_data_ptr(), 0x7c00u, t.numel());
    default:
      RLS_CHECK(false, "nonfinite expects floating-point tensors");
  }
  return false;
}

}  // namespace

Tensor nonfinite(std::vector<Tensor> tensors) {
  RLS_CHECK(!tensors.empty(), "nonfinite expects at least one tensor");
  bool found = false;
  for (const Tensor& t : tensors) found = found || any_nonfinite_element(t);
  Tensor result = new_tensor(tensors[0], {}, ScalarType::Bool);
  *static_cast<bool*>(result.mutable_data_ptr()) = found;
  return result;
}

}  // namespace rlscuda
