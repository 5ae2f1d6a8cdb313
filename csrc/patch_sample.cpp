// patch_sample: checks, dtype dispatch, launch.
#include "cuda_call.h"
#include "kernels.h"
#include "ops.h"
#include "patch_checks.h"

namespace rlscuda {

std::tuple<Tensor, Tensor> patch_sample(const Tensor& x, std::vector<int64_t> kernel_size,
                                        std::vector<int64_t> stride, std::vector<int64_t> padding,
                                        std::vector<int64_t> dilation, int64_t groups,
                                        int64_t padding_mode, bool ones, int64_t rank, int64_t seed,
                                        int64_t offset) {
  check_patch_input(x);
  const PatchGeometry g =
      patch_geometry(x, kernel_size, stride, padding, dilation, groups, padding_mode, ones);
  const PatchDraw draw = patch_draw(x, g, rank, seed, offset);
  Tensor rows = new_tensor(x, {g.groups, rank, g.row_size()}, summary_dtype(x));
  Tensor keys = new_tensor(x, {rank}, ScalarType::Long);
  dispatch_element(x, [&]<class T>(const T* data) {
    auto* out = static_cast<Accumulate<T>*>(rows.mutable_data_ptr());
    auto* hashes = static_cast<int64_t*>(keys.mutable_data_ptr());
    run_on(
        x, [&] { patch_sample_cpu(data, g, draw, out, hashes); },
        [&](auto stream) { patch_sample_cuda(data, g, draw, out, hashes, stream); });
  });
  return {rows, keys};
}

}  // namespace rlscuda
