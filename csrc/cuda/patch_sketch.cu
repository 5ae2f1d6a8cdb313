// patch_sketch on the GPU, with x read once from memory, no im2col and no signs in memory:
//
//   sketch[k, c, i, j] = 1/sqrt(R) sum_b sum_(h, w) x[b, c, h, w] eps[k, b, oh, ow]
//
// where (oh, ow) is the one output position that sees the element through the tap (i, j), if any.
// Padding that is not zeros is walked as elements of its own, so that there is never more than one.
//
// A thread owns one pixel of the (padded) plane and kChannels channels. Which output position each
// tap leads to is the same in every image: it is worked out once and kept, kChannels sums a tap
// besides. For each image the thread then loads its channels, once, and adds them to the sums of
// the taps with their signs, which all channels share. Signs are 64 to a hash: the block keeps
// those of the next images as bits in shared memory. In the end the sums of a block's pixels meet
// through shuffles and shared memory, and a second kernel adds the blocks' results in order.
//
// Lanes run along the channels where those are dense (whole vectors), else along the pixels. Large
// kernels take several blocks of kTaps taps, and each rank row its own; neighbouring blocks share
// their x through the L2 cache.
#include <algorithm>

#include "counter_rng.h"
#include "kernels.h"
#include "launch.h"
#include "patch_launch.h"
#include "vector.h"

namespace rlscuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChannels = 8;  // of a thread; as many as warps
// Taps of a block of threads: as many sums as the registers hold.
template <class A>
constexpr int kTaps = sizeof(A) == 4 ? 9 : 3;

struct SketchPlan {
  int domain_h, domain_w;    // the plane that is walked: that of x, or of the padded x
  int origin_h, origin_w;    // its first element, in the padded x
  int slots;                 // groups of kChannels in a block, a power of two
  int pixels, side_by_side;  // pixels of a tile, and images that a block takes at a time
  int tiles, channel_tiles, tap_tiles, chunks;
  int64_t per_chunk;     // images
  int window_images;     // whose signs are made at a time
  int64_t window_words;  // of 64 signs, the most that these take
  bool vectors;          // the channels are dense and aligned

  int64_t parts() const { return int64_t(chunks) * tiles; }
  int64_t blocks(int64_t rank) const { return parts() * channel_tiles * tap_tiles * rank; }
};

template <class T>
SketchPlan make_plan(const T* x, const PatchGeometry& g, const PatchDraw& draw) {
  SketchPlan p{};
  const bool inside = g.padding == Padding::kZeros;
  p.origin_h = inside ? int(g.pad_h) : 0, p.origin_w = inside ? int(g.pad_w) : 0;
  p.domain_h =
      int(inside ? g.height : (g.out_h - 1) * g.step_h + (g.kernel_h - 1) * g.dilation_h + 1);
  p.domain_w =
      int(inside ? g.width : (g.out_w - 1) * g.step_w + (g.kernel_w - 1) * g.dilation_w + 1);
  const int64_t domain = int64_t(p.domain_h) * p.domain_w;
  const bool dense = g.stride_c == 1 && g.channels > 1;
  p.slots = 1;
  while (dense && p.slots < 32 && p.slots * kChannels < g.channels) p.slots *= 2;
  const int lanes = kThreads / p.slots;
  p.tiles = int(ceil_div(domain, lanes));
  p.pixels = int(ceil_div(domain, p.tiles));
  p.side_by_side = lanes / p.pixels;
  p.channel_tiles = int(ceil_div(g.channels, p.slots * kChannels));
  p.tap_tiles = g.taps() == 1 ? 1 : int(ceil_div(g.taps(), kTaps<Accumulate<T>>));
  p.per_chunk = images_per_chunk(g.images, p.side_by_side,
                                 int64_t(p.tiles) * p.channel_tiles * p.tap_tiles * draw.rank);
  p.chunks = int(ceil_div(g.images, p.per_chunk));
  const int64_t signs = int64_t(p.side_by_side) * g.positions();
  p.window_images = p.side_by_side * int(std::max<int64_t>(64 * kThreads / signs, 1));
  // the rows of the padded plane of a tile, and the output rows that see any of them
  const int64_t high = (p.pixels - 1) / p.domain_w + 2 + (g.kernel_h - 1) * g.dilation_h;
  const int64_t rows = std::min(g.out_h, high / g.step_h + 1);
  p.window_words = ((p.window_images - 1) * g.positions() + rows * g.out_w) / 64 + 2;
  const int64_t vector = kVectorLanes<T>;
  p.vectors = dense && reinterpret_cast<uintptr_t>(x) % 16 == 0 &&
              begins_vectors(g.images, g.stride_n, vector) &&
              begins_vectors(g.height, g.stride_h, vector) &&
              begins_vectors(g.width, g.stride_w, vector);
  return p;
}

// Where a block stands; blocks that read the same x follow each other.
struct SketchTile {
  int tap, k, channel, tile, chunk;
  __device__ SketchTile(const SketchPlan& p, int rank, int taps, int slot, unsigned block) {
    tap = int(block % p.tap_tiles) * taps, block /= p.tap_tiles;
    k = int(block % rank), block /= rank;
    channel = (int(block % p.channel_tiles) * p.slots + slot) * kChannels;
    block /= p.channel_tiles;
    tile = int(block % p.tiles), chunk = int(block / p.tiles);
  }
};

// The output position along one side that sees the padded element `at` through a tap, or -1.
__device__ int output_of(int at, int tap, int dilation, int step, int out) {
  const int from = at - tap * dilation, o = from / step;
  return from >= 0 && o * step == from && o < out ? o : -1;
}

template <class T>
struct Channels {
  const T* from;
  int64_t stride_n, stride_c;
  int count;
  bool vectors;

  // The channels of image b; the last one again for those beyond it, which no one asks for.
  template <class A>
  __device__ void load(int64_t b, A (&to)[kChannels]) const {
    const T* at = from + b * stride_n;
    if (vectors && count == kChannels) {
      constexpr int kLanes = kVectorLanes<T>;
#pragma unroll
      for (int c = 0; c < kChannels; c += kLanes) {
        const auto lanes = load_lanes<kLanes>(at + c);
#pragma unroll
        for (int v = 0; v < kLanes; ++v) to[c + v] = to_compute<A>(lanes[v]);
      }
    } else {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        to[c] = to_compute<A>(*at);
        if (c + 1 < count) at += stride_c;
      }
    }
  }
};

// -1 where bit 0 of `bits` is set, else 1.
template <class A>
__device__ __forceinline__ A sign_of(unsigned bits) {
  if constexpr (sizeof(A) == 4) return __uint_as_float(0x3f800000u | bits << 31);
  return bits & 1 ? A(-1) : A(1);
}

// The sum of the signs of rows [begin, end), by all threads of the block; valid in thread 0.
__device__ int64_t sum_of_signs(uint64_t key, int64_t begin, int64_t end) {
  __shared__ int64_t of_warp[kWarps];
  int64_t minus = 0;
  for (int64_t row = begin + 64 * int64_t(threadIdx.x); row < end; row += 64 * kThreads) {
    const int64_t count = min(end - row, int64_t(64));
    minus += __popcll(sign_bits(key, row) & ~uint64_t(0) >> (64 - count));
  }
  for (int distance = 16; distance > 0; distance >>= 1)
    minus += __shfl_xor_sync(~0u, minus, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = minus;
  __syncthreads();
  for (int w = 1; w < kWarps; ++w) minus += threadIdx.x == 0 ? of_warp[w] : 0;
  return end - begin - 2 * minus;
}

// partial [parts, rank, channels, taps]; ones [chunks, rank].
template <class T, int TAPS>
__global__ void __launch_bounds__(kThreads)
    patch_sketch_sums_kernel(const T* __restrict__ x, PatchGeometry g, PatchDraw draw,
                             SketchPlan plan, Accumulate<T>* __restrict__ partial,
                             Accumulate<T>* __restrict__ ones) {
  using A = Accumulate<T>;
  extern __shared__ uint32_t window[];
  __shared__ A meeting[kChannels][kThreads];
  const int slot = threadIdx.x % plan.slots, place = threadIdx.x / plan.slots;
  const int sub = place / plan.pixels;
  const SketchTile tile(plan, int(draw.rank), TAPS, slot, blockIdx.x);
  const uint64_t key = stream_key(draw.seed, Purpose::kSign, tile.k);
  const int out_h = int(g.out_h), out_w = int(g.out_w), taps = int(g.taps());
  const int64_t positions = g.positions();
  const int64_t b0 = tile.chunk * plan.per_chunk, b1 = min(b0 + plan.per_chunk, g.images);

  // The output position of each tap, and where the channels of the pixel are.
  const int domain = plan.domain_h * plan.domain_w, start = tile.tile * plan.pixels;
  const int pixel = start + place % plan.pixels;
  const int at_h = pixel / plan.domain_w + plan.origin_h;
  const int at_w = pixel % plan.domain_w + plan.origin_w;
  const int channels = min(kChannels, int(g.channels) - tile.channel);
  int position[TAPS];
  bool seen = false;
#pragma unroll
  for (int t = 0; t < TAPS; ++t) {
    const int tap = tile.tap + t, i = tap / int(g.kernel_w), j = tap % int(g.kernel_w);
    const int oh = output_of(at_h, i, int(g.dilation_h), int(g.step_h), out_h);
    const int ow = output_of(at_w, j, int(g.dilation_w), int(g.step_w), out_w);
    position[t] = tap < taps && oh >= 0 && ow >= 0 ? oh * out_w + ow : -1;
    seen = seen || position[t] >= 0;
  }
  const bool works = sub < plan.side_by_side && pixel < domain && channels > 0 && seen;
  Channels<T> source{x, g.stride_n, g.stride_c, channels, plan.vectors};
  if (works)
    source.from += g.source(at_h - int(g.pad_h), int(g.height)) * g.stride_h +
                   g.source(at_w - int(g.pad_w), int(g.width)) * g.stride_w +
                   tile.channel * g.stride_c;

  // The output rows that the tile can lead to bound the signs that an image needs.
  const int last_pixel = min(start + plan.pixels, domain) - 1;
  const int top = start / plan.domain_w + plan.origin_h - int((g.kernel_h - 1) * g.dilation_h);
  const int bottom = (last_pixel / plan.domain_w + plan.origin_h) / int(g.step_h);
  const int oh0 = min(top <= 0 ? 0 : top / int(g.step_h), out_h - 1);
  const int oh1 = max(min(bottom, out_h - 1), oh0);

  A sums[TAPS][kChannels] = {};
  for (int64_t b = b0; b < b1; b += plan.window_images) {
    const int images = int(min(int64_t(plan.window_images), b1 - b));
    const int64_t row = draw.offset + b * positions, word = (row + int64_t(oh0) * out_w) >> 6;
    const int64_t last = row + (images - 1) * positions + (oh1 + 1) * int64_t(out_w) - 1;
    const int words = int((last >> 6) - word) + 1;
    __syncthreads();
    for (int n = threadIdx.x; n < words; n += kThreads) {
      const uint64_t bits = random_bits(key, word + n);
      window[2 * n] = uint32_t(bits), window[2 * n + 1] = uint32_t(bits >> 32);
    }
    __syncthreads();
    if (!works) continue;
    for (int image = sub; image < images; image += plan.side_by_side) {
      A value[kChannels];
      source.load(b + image, value);
      // of the signs of the image in the window, which may begin inside the image
      const unsigned shift = unsigned(row - 64 * word) + unsigned(image) * unsigned(positions);
#pragma unroll
      for (int t = 0; t < TAPS; ++t) {
        const unsigned at = position[t] < 0 ? 0 : shift + unsigned(position[t]);
        const unsigned bits = window[at / 32] >> at % 32;
        const A sign = position[t] < 0 ? A(0) : sign_of<A>(bits);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sums[t][c] += sign * value[c];
      }
    }
  }

  // The threads with the same channels meet: warp w adds channel w of every group, lane by lane.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channel = tile.channel + warp;  // in the first lanes, which the results go to
  const int64_t part = int64_t(tile.chunk) * plan.tiles + tile.tile;
#pragma unroll
  for (int t = 0; t < TAPS; ++t) {
    if (tile.tap + t >= taps) break;  // for all of the block
#pragma unroll
    for (int c = 0; c < kChannels; ++c) meeting[c][threadIdx.x] = sums[t][c];
    __syncthreads();
    A sum = 0;
#pragma unroll
    for (int n = 0; n < kThreads; n += 32) sum += meeting[warp][n + lane];
    for (int distance = 16; distance >= plan.slots; distance >>= 1)
      sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane < plan.slots && channel < g.channels)
      partial[((part * draw.rank + tile.k) * g.channels + channel) * taps + tile.tap + t] = sum;
    __syncthreads();
  }
  if (ones && tile.tap == 0 && tile.tile == 0 && tile.channel == slot * kChannels) {
    const int64_t sum =
        sum_of_signs(key, draw.offset + b0 * positions, draw.offset + b1 * positions);
    if (threadIdx.x == 0) ones[tile.chunk * draw.rank + tile.k] = A(sum);
  }
}

// Adds the parts: 32 neighbouring elements to a block, lane y of its 32 rows takes every 32nd part.
template <class A>
__global__ void __launch_bounds__(1024)
    patch_sketch_rows_kernel(const A* __restrict__ partial, const A* __restrict__ ones,
                             PatchGeometry g, int rank, int parts, int chunks, A scale,
                             A* __restrict__ out) {
  __shared__ A sums[32][33];
  const int columns = int(g.channels * g.taps());
  const int64_t size = int64_t(rank) * columns, element = int64_t(blockIdx.x) * 32 + threadIdx.x;
  const bool is_one = element >= size;  // past the sketch: rank sums of signs
  const int64_t stride = is_one ? rank : size;
  const A* from = is_one ? ones + (element - size) : partial + element;
  const bool exists = element < size + (ones ? rank : 0);
  A sum = 0;
  const int end = exists ? (is_one ? chunks : parts) : 0;
#pragma unroll 8
  for (int p = threadIdx.y; p < end; p += 32) sum += from[p * stride];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || !exists) return;
  for (int y = 1; y < 32; ++y) sum += sums[y][threadIdx.x];
  const int64_t row = g.row_size();
  if (is_one) {
    for (int64_t group = 0; group < g.groups; ++group)
      out[(group * rank + element - size) * row + row - 1] = scale * sum;
    return;
  }
  const int64_t k = element / columns, column = element % columns, per_group = g.columns();
  out[(column / per_group * rank + k) * row + column % per_group] = scale * sum;
}

}  // namespace

template <class T>
int64_t patch_sketch_workspace(const T* x, const PatchGeometry& g, const PatchDraw& draw) {
  const SketchPlan plan = make_plan(x, g, draw);
  return (plan.parts() * g.channels * g.taps() + plan.chunks) * draw.rank;
}

template <class T>
void patch_sketch_cuda(const T* x, const PatchGeometry& g, const PatchDraw& draw,
                       Accumulate<T>* workspace, Accumulate<T>* out, CudaStream stream) {
  using A = Accumulate<T>;
  check_plane(g);
  const SketchPlan plan = make_plan(x, g, draw);
  const int64_t size = draw.rank * g.channels * g.taps();
  A* ones = g.ones ? workspace + plan.parts() * size : nullptr;
  const auto sums =
      g.taps() == 1 ? patch_sketch_sums_kernel<T, 1> : patch_sketch_sums_kernel<T, kTaps<A>>;
  launch(sums, grid_of(plan.blocks(draw.rank)), dim3(kThreads), size_t(plan.window_words) * 8,
         stream, x, g, draw, plan, workspace, ones);
  const A scale = A(1 / std::sqrt(double(g.images) * double(g.positions())));
  launch(patch_sketch_rows_kernel<A>, grid_of(ceil_div(size + (ones ? draw.rank : 0), 32)),
         dim3(32, 32), 0, stream, workspace, ones, g, int(draw.rank), int(plan.parts()),
         plan.chunks, scale, out);
}

#define INSTANTIATE(T)                                                                       \
  template int64_t patch_sketch_workspace(const T*, const PatchGeometry&, const PatchDraw&); \
  template void patch_sketch_cuda(const T*, const PatchGeometry&, const PatchDraw&,          \
                                  Accumulate<T>*, Accumulate<T>*, CudaStream);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace rlscuda
