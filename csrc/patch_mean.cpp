// patch_mean: checks, dtype dispatch, launch.
#include "cuda_call.h"
#include "kernels.h"
#include "ops.h"
#include "patch_checks.h"

namespace rlscuda {

Tensor patch_mean(const Tensor& x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                  int64_t padding_mode, bool ones) {
  check_patch_input(x);
  const Tensor input = walkable(x);
  const PatchGeometry g =
      patch_geometry(input, kernel_size, stride, padding, dilation, groups, padding_mode, ones);
  check_products(x, double(g.channels) * double(g.taps()) * double(g.height));
  Tensor mean = new_tensor(x, {g.groups, g.row_size()}, summary_dtype(x));
  dispatch_element(input, [&]<class T>(const T* data) {
    auto* out = static_cast<Accumulate<T>*>(mean.mutable_data_ptr());
    run_on(
        x, [&] { patch_mean_cpu(data, g, out); },
        [&](auto stream) {
          Tensor workspace = new_tensor(x, {patch_mean_workspace(data, g)}, summary_dtype(x));
          patch_mean_cuda(data, g, static_cast<Accumulate<T>*>(workspace.mutable_data_ptr()), out,
                          stream);
        });
  });
  return mean;
}

}  // namespace rlscuda
