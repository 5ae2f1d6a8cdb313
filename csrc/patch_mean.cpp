// patch_mean: checks, dtype dispatch, launch.
#include "kernels.h"
#include "ops.h"
#include "patch_checks.h"

namespace rlscuda {

Tensor patch_mean(const Tensor& x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                  std::string padding_mode, bool ones) {
  check_patch_input(x);
  const Tensor input = walkable(x);
  const PatchGeometry g =
      patch_geometry(input, kernel_size, stride, padding, dilation, groups, padding_mode, ones);
  Tensor mean = new_tensor(x, {g.groups, g.row_size()}, summary_dtype(x));
  dispatch_element(input, [&]<class T>(const T* data) {
    patch_mean_cpu(data, g, static_cast<Accumulate<T>*>(mean.mutable_data_ptr()));
  });
  return mean;
}

}  // namespace rlscuda
