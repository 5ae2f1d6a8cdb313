// patch_sample on the GPU, one launch: row k is the patch of the image whose hash is the least of
// stream k, at the position that a second hash names.
//
// Block (x, k) gathers columns x * kColumns and following of row k. It finds the image by itself: a
// hash is a dozen instructions, and a batch has few of them; nothing passes between blocks. Its
// threads then copy one element each, the columns of all groups counted through.
#include <climits>

#include "counter_rng.h"
#include "kernels.h"
#include "launch.h"
#include "patch_launch.h"

namespace rlscuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 4 * kThreads;  // of a block

struct Choice {
  int64_t hash, image;
};

// The lesser hash; of equal ones, the first image.
__device__ Choice lesser(const Choice& a, const Choice& b) {
  return a.hash < b.hash || (a.hash == b.hash && a.image < b.image) ? a : b;
}

// The image of the least hash, known to every thread of the block.
__device__ Choice choose_image(uint64_t key, const PatchDraw& draw, int64_t images) {
  __shared__ Choice of_warp[kWarps];
  Choice best{INT64_MAX, 0};
  for (int64_t b = threadIdx.x; b < images; b += kThreads)
    best = lesser(best, {random_int63(key, draw.offset + b), b});
  for (int distance = 16; distance > 0; distance >>= 1)
    best = lesser(best, {__shfl_xor_sync(~0u, best.hash, distance),
                         __shfl_xor_sync(~0u, best.image, distance)});
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) best = lesser(best, of_warp[w]);
  return best;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    patch_sample_kernel(const T* __restrict__ x, PatchGeometry g, PatchDraw draw,
                        Accumulate<T>* __restrict__ out, int64_t* __restrict__ keys) {
  using A = Accumulate<T>;
  const int64_t k = blockIdx.y;
  const Choice chosen = choose_image(stream_key(draw.seed, Purpose::kImage, k), draw, g.images);
  if (blockIdx.x == 0 && threadIdx.x == 0) keys[k] = chosen.hash;
  const uint64_t place = stream_key(draw.seed, Purpose::kPosition, k);
  const int64_t position = random_int63(place, draw.offset + chosen.image) % g.positions();
  const int oh = int(position / g.out_w), ow = int(position % g.out_w);
  x += chosen.image * g.stride_n;

  const int taps = int(g.taps()), per_group = int(g.channels / g.groups);
  const int row = int(g.row_size());
  const int64_t end = min(int64_t(blockIdx.x + 1) * kColumns, g.groups * g.row_size());
  for (int64_t e = int64_t(blockIdx.x) * kColumns + threadIdx.x; e < end; e += kThreads) {
    const int64_t group = e / row;
    const int column = int(e - group * row), c = column / taps, tap = column - c * taps;
    A value = 1;  // the column of ones
    if (c < per_group) {
      const int64_t h = g.source_h(oh, tap / int(g.kernel_w));
      const int64_t w = g.source_w(ow, tap % int(g.kernel_w));
      value = h < 0 || w < 0
                  ? A(0)
                  : to_compute<A>(
                        x[(group * per_group + c) * g.stride_c + h * g.stride_h + w * g.stride_w]);
    }
    out[(group * draw.rank + k) * row + column] = value;
  }
}

}  // namespace

template <class T>
void patch_sample_cuda(const T* x, const PatchGeometry& g, const PatchDraw& draw,
                       Accumulate<T>* out, int64_t* keys, CudaStream stream) {
  check_plane(g);
  const int64_t blocks = ceil_div(g.groups * g.row_size(), kColumns);
  // gridDim.y ends at 65535
  if (draw.rank > 65535) throw std::runtime_error("rank must be at most 65535 on CUDA");
  launch(patch_sample_kernel<T>, dim3(grid_of(blocks).x, unsigned(draw.rank)), dim3(kThreads), 0,
         stream, x, g, draw, out, keys);
}

#define INSTANTIATE(T)                                                              \
  template void patch_sample_cuda(const T*, const PatchGeometry&, const PatchDraw&, \
                                  Accumulate<T>*, int64_t*, CudaStream);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace rlscuda
