// patch_sketch: checks, dtype dispatch, launch.
#include "cuda_call.h"
#include "kernels.h"
#include "ops.h"
#include "patch_checks.h"

namespace rlscuda {

Tensor patch_sketch(const Tensor& x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                    int64_t padding_mode, bool ones, int64_t rank, int64_t seed, int64_t offset) {
  check_patch_input(x);
  const Tensor input = walkable(x);
  const PatchGeometry g =
      patch_geometry(input, kernel_size, stride, padding, dilation, groups, padding_mode, ones);
  const PatchDraw draw = patch_draw(x, g, rank, seed, offset);
  check_products(x, double(g.images) * double(g.positions()) * double(rank) * double(g.channels) *
                        double(g.taps()));
  Tensor rows = new_tensor(x, {g.groups, rank, g.row_size()}, summary_dtype(x));
  dispatch_element(input, [&]<class T>(const T* data) {
    auto* out = static_cast<Accumulate<T>*>(rows.mutable_data_ptr());
    run_on(
        x, [&] { patch_sketch_cpu(data, g, draw, out); },
        [&](auto stream) {
          Tensor workspace =
              new_tensor(x, {patch_sketch_workspace(data, g, draw)}, summary_dtype(x));
          patch_sketch_cuda(data, g, draw,
                            static_cast<Accumulate<T>*>(workspace.mutable_data_ptr()), out, stream);
        });
  });
  return rows;
}

}  // namespace rlscuda
