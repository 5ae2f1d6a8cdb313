// patch_mean on the GPU, with x read once and no im2col:
//
//   t[part, j, c, h] = sum_ow sum_b x[b, c, h, source_w(ow, j)]
//   mean[c, i, j] = 1/R sum_part sum_oh t[part, j, c, source_h(oh, i)]
//
// The first kernel streams x. A block owns a tile of the plane (rows of w where w is dense, pixels
// of one row where the channels are) and a chunk of the images, a thread 16 bytes of the tile:
// it adds them over the images, a coalesced load after the other, into registers. Tiles smaller
// than the block let several images be added side by side. What is left of the tile goes to shared
// memory and is summed for each column j of taps. The second kernel sums t, smaller than x by the
// images of a chunk and the width, one warp to an element of the result. Tiles and chunks depend on
// shapes alone and sums have a fixed order, so a result is the same to the bit in every run.
// float32 sums of float32 and half inputs: at most 128 images and a line of the tile one by one.
#include <algorithm>

#include "kernels.h"
#include "launch.h"
#include "patch_launch.h"
#include "vector.h"

namespace rlscuda {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // loads in flight in a thread: of images, of lines

// How x is cut. A line is what is summed along w: a row (c, h), or a channel of the pixels of row
// h.
struct MeanPlan {
  bool pixels;                           // the channels are dense
  bool valid;                            // vectors of `lanes` elements fit the layout
  int lanes;                             // elements that a thread adds at once
  int lines, width;                      // of a tile
  int slots;                             // threads that one image of a tile takes
  int side_by_side;                      // images that a block takes at a time
  int line_tiles, pieces, rows, chunks;  // tiles along lines and w, for each of rows
  int64_t per_chunk;                     // images

  int64_t tiles() const { return int64_t(rows) * line_tiles * pieces; }
  int64_t parts() const { return int64_t(chunks) * pieces; }
};

MeanPlan make_plan(const void* x, const PatchGeometry& g, int lanes, int64_t element_bytes) {
  MeanPlan p{};
  p.pixels = g.channels > 1 && g.stride_c == 1 && (g.stride_w != 1 || g.width == 1);
  p.lanes = lanes;
  const int64_t most = int64_t(kThreads) * lanes, width = g.width;
  const int64_t lines = p.pixels ? g.channels : g.channels * g.height;
  bool dense;  // elements of a tile that follow each other are neighbours in memory
  if (p.pixels) {
    const int64_t sector = 32 / element_bytes;  // channels below which a tile wastes memory traffic
    p.lines = int(std::min(lines, std::max(most / width / lanes * lanes, sector)));
    p.width = int(std::min(width, most / p.lines));
    p.width = int(ceil_div(width, ceil_div(width, p.width)));
    dense = p.lines == lines && g.stride_w == lines;
    if (dense && p.width < width) p.width = std::max(p.width / lanes * lanes, 1);
  } else {
    p.width = int(std::min(width, most));
    p.lines = int(std::min(lines, std::max<int64_t>(most / width, 1)));
    dense = p.width == width && g.stride_h == width && g.stride_c == g.height * width;
    if (dense && p.lines > lanes) p.lines = p.lines / lanes * lanes;
  }
  p.rows = p.pixels ? int(g.height) : 1;
  p.line_tiles = int(ceil_div(lines, p.lines));
  p.pieces = int(ceil_div(width, p.width));
  // a vector must not cross a gap, and every vector must begin at a multiple of its size
  const int64_t run = p.pixels ? p.lines : p.width, all = p.pixels ? lines : width;
  const bool rows = begins_vectors(g.height, g.stride_h, lanes);
  const bool whole = dense ? int64_t(p.lines) * p.width % lanes == 0 || p.tiles() == 1
                           : run % lanes == 0 && all % lanes == 0 && rows &&
                                 (p.pixels ? begins_vectors(g.width, g.stride_w, lanes)
                                           : begins_vectors(g.channels, g.stride_c, lanes));
  p.valid = lanes == 1 || (whole && reinterpret_cast<uintptr_t>(x) % 16 == 0 &&
                           begins_vectors(g.images, g.stride_n, lanes) && (!p.pixels || rows));
  p.slots = int(ceil_div(int64_t(p.lines) * p.width, lanes));
  p.side_by_side = kThreads / p.slots;
  p.per_chunk = images_per_chunk(g.images, p.side_by_side, p.tiles());
  p.chunks = int(ceil_div(g.images, p.per_chunk));
  return p;
}

template <class T>
MeanPlan plan_of(const T* x, const PatchGeometry& g) {
  const MeanPlan p = make_plan(x, g, kVectorLanes<T>, sizeof(T));
  return p.valid ? p : make_plan(x, g, 1, sizeof(T));
}

// One tile of one chunk of the images.
struct MeanTile {
  int c, h, w, chunk, piece;  // where it begins
  int lines, width;           // of it that x has

  __device__ MeanTile(const MeanPlan& p, const PatchGeometry& g, unsigned block) {
    const int line = int(block % p.line_tiles) * p.lines;
    block /= p.line_tiles;
    piece = int(block % p.pieces), block /= p.pieces;
    const int height = int(g.height), channels = int(g.channels);
    h = p.pixels ? int(block % p.rows) : line % height;
    c = p.pixels ? line : line / height;
    chunk = int(block / p.rows), w = piece * p.width;
    lines = min(p.lines, p.pixels ? channels - c : channels * height - line);
    width = min(p.width, int(g.width) - w);
  }

  // The channel and row of a line.
  __device__ int channel(const MeanPlan& p, const PatchGeometry& g, int line) const {
    return p.pixels ? c + line : c + (h + line) / int(g.height);
  }
  __device__ int row(const MeanPlan& p, const PatchGeometry& g, int line) const {
    return p.pixels ? h : (h + line) % int(g.height);
  }
};

template <class T, int LANES>
__global__ void __launch_bounds__(kThreads, 4)
    patch_mean_sums_kernel(const T* __restrict__ x, PatchGeometry g, MeanPlan plan,
                           Accumulate<T>* __restrict__ t) {
  using A = Accumulate<T>;
  __shared__ A sums[kThreads * LANES * 3 / 2];
  const MeanTile tile(plan, g, blockIdx.x);
  const int inner = plan.pixels ? tile.lines : tile.width, elements = tile.lines * tile.width;
  // rows of an odd length, so that threads on neighbouring rows use different banks
  const int pitch = plan.pixels ? inner : inner | 1, size = elements / inner * pitch;

  const int slot = threadIdx.x % plan.slots, sub = threadIdx.x / plan.slots;
  const int first = slot * LANES, count = min(LANES, elements - first);
  if (sub < plan.side_by_side && count > 0) {
    const auto offset = [&](int e) {  // in an image
      const int outer = e / inner, in = e - outer * inner, line = plan.pixels ? in : outer;
      return tile.channel(plan, g, line) * g.stride_c + tile.row(plan, g, line) * g.stride_h +
             (tile.w + (plan.pixels ? outer : in)) * g.stride_w;
    };
    const int64_t end = min((tile.chunk + 1) * plan.per_chunk, g.images);
    const int64_t step = plan.side_by_side;
    A total[LANES] = {};
    int64_t b = tile.chunk * plan.per_chunk + sub;
    if (count == LANES) {
      const T* from = x + offset(first);
      for (; b + (kUnroll - 1) * step < end; b += kUnroll * step) {
        Packed<T, LANES> image[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
          image[u] = load_lanes<LANES>(from + (b + u * step) * g.stride_n);
#pragma unroll
        for (int v = 0; v < LANES; ++v)
          total[v] += (to_compute<A>(image[0][v]) + to_compute<A>(image[1][v])) +
                      (to_compute<A>(image[2][v]) + to_compute<A>(image[3][v]));
      }
      for (; b < end; b += step) {
        const auto image = load_lanes<LANES>(from + b * g.stride_n);
#pragma unroll
        for (int v = 0; v < LANES; ++v) total[v] += to_compute<A>(image[v]);
      }
    } else {  // the last elements of a tile
#pragma unroll
      for (int v = 0; v < LANES; ++v)
        for (int64_t at = b; v < count && at < end; at += step)
          total[v] += to_compute<A>(x[offset(first + v) + at * g.stride_n]);
    }
#pragma unroll
    for (int v = 0; v < LANES; ++v) {
      const int outer = (first + v) / inner, in = first + v - outer * inner;
      if (v < count) sums[sub * size + outer * pitch + in] = total[v];
    }
  }
  __syncthreads();
  if (plan.side_by_side > 1) {
    for (int e = threadIdx.x; e < size; e += kThreads) {
      A total = sums[e];
      for (int s = 1; s < plan.side_by_side; ++s) total += sums[s * size + e];
      sums[e] = total;
    }
    __syncthreads();
  }

  // One line and tap column to `team` neighbouring threads; all threads of a warp take part.
  const int out_w = int(g.out_w), team = out_w >= 32 ? 8 : out_w >= 8 ? 4 : 1;
  const int items = tile.lines * int(g.kernel_w), member = threadIdx.x % team;
  const int64_t rows = g.channels * g.height, part = tile.chunk * plan.pieces + tile.piece;
  for (int begin = 0; begin < items; begin += kThreads / team) {
    const int item = begin + threadIdx.x / team, j = item / tile.lines, line = item % tile.lines;
    A total = 0;
    if (item < items) {
      const int start = j * int(g.dilation_w) - int(g.pad_w);
      for (int ow = member; ow < out_w; ow += team) {
        const int w = g.source(ow * int(g.step_w) + start, int(g.width)) - tile.w;
        if (w >= 0 && w < tile.width)
          total += plan.pixels ? sums[w * pitch + line] : sums[line * pitch + w];
      }
    }
    for (int distance = team / 2; distance > 0; distance >>= 1)
      total += __shfl_xor_sync(~0u, total, distance);
    if (item < items && member == 0) {
      const int64_t row = tile.channel(plan, g, line) * g.height + tile.row(plan, g, line);
      t[(part * g.kernel_w + j) * rows + row] = total;
    }
  }
}

// One warp to an element of the result.
template <class A>
__global__ void __launch_bounds__(kThreads)
    patch_mean_rows_kernel(const A* __restrict__ t, PatchGeometry g, int parts, A scale,
                           A* __restrict__ out) {
  const unsigned element = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (element >= g.groups * g.row_size()) return;
  const int group = int(element / unsigned(g.row_size())), lane = threadIdx.x % 32;
  const int column = int(element % unsigned(g.row_size()));
  if (column == g.columns()) {  // the column of ones
    if (lane == 0) out[element] = 1;
    return;
  }
  const int taps = int(g.taps()), tap = column % taps, kernel_w = int(g.kernel_w);
  const int i = tap / kernel_w, j = tap % kernel_w, out_h = int(g.out_h);
  const int64_t c = group * (g.channels / g.groups) + column / taps;
  const int64_t rows = g.channels * g.height;
  const unsigned lines = unsigned(parts) * unsigned(out_h);
  A total = 0;
  for (unsigned begin = lane; begin < lines; begin += 32 * kUnroll) {
    int64_t at[kUnroll];  // less than 0 for what is padding, or beyond the lines
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned m = min(begin + 32 * u, lines - 1);
      const int64_t part = m / unsigned(out_h);
      const int oh = int(m % unsigned(out_h));
      const int h =
          g.source(oh * int(g.step_h) - int(g.pad_h) + i * int(g.dilation_h), int(g.height));
      const bool seen = h >= 0 && begin + 32 * u < lines;
      at[u] = seen ? (part * kernel_w + j) * rows + c * g.height + h : -1;
    }
    A sum[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum[u] = t[max(at[u], int64_t(0))];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) total += at[u] < 0 ? A(0) : sum[u];
  }
  for (int distance = 16; distance > 0; distance >>= 1)
    total += __shfl_xor_sync(~0u, total, distance);
  if (lane == 0) out[element] = scale * total;
}

}  // namespace

template <class T>
int64_t patch_mean_workspace(const T* x, const PatchGeometry& g) {
  return plan_of(x, g).parts() * g.kernel_w * g.channels * g.height;
}

template <class T>
void patch_mean_cuda(const T* x, const PatchGeometry& g, Accumulate<T>* workspace,
                     Accumulate<T>* out, CudaStream stream) {
  using A = Accumulate<T>;
  check_plane(g);
  const MeanPlan plan = plan_of(x, g);
  const auto sums =
      plan.lanes == 1 ? patch_mean_sums_kernel<T, 1> : patch_mean_sums_kernel<T, kVectorLanes<T>>;
  launch(sums, grid_of(plan.tiles() * plan.chunks), dim3(kThreads), 0, stream, x, g, plan,
         workspace);
  const A scale = A(1.0 / (double(g.images) * double(g.positions())));
  launch(patch_mean_rows_kernel<A>, grid_of(ceil_div(g.groups * g.row_size(), kThreads / 32)),
         dim3(kThreads), 0, stream, workspace, g, int(plan.parts()), scale, out);
}

#define INSTANTIATE(T)                                                                          \
  template int64_t patch_mean_workspace(const T*, const PatchGeometry&);                        \
  template void patch_mean_cuda(const T*, const PatchGeometry&, Accumulate<T>*, Accumulate<T>*, \
                                CudaStream);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace rlscuda
