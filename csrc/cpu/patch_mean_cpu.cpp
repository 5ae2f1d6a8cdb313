// patch_mean on the CPU, with x read once and no im2col:
//
//   mean[c, i, j] = 1/R sum_h A[i, h] sum_w B[j, w] sum_b x[b, c, h, w]
//
// A[i, h] counts the output rows that see row h of x through tap row i, B likewise for columns:
// stride, dilation and every padding mode are in these two small tables. A task sums one piece of
// the plane (dense rows for NCHW, dense pixels for NHWC) over one chunk of the images, at the rate
// of memory, contracts it with B and leaves t[chunk, h, j, c]; a second, small pass contracts t
// with A. Pieces and chunks depend on the shape alone, so the result does not depend on the number
// of threads; partial sums of kBlock images keep float32 accurate over long batches.
#include <algorithm>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd_convert.h"

namespace rlscuda {
namespace {

constexpr int64_t kPiece = 2048;   // elements of a piece: its sums stay in the L1 cache
constexpr int64_t kBlock = 64;     // images of one partial sum
constexpr int64_t kTasks = 16;     // wanted; a plane of fewer pieces is split over the images
constexpr int64_t kGrain = 32768;  // elements below which a thread is not worth waking

template <class V, class T>
ALWAYS_INLINE V fetch(const T* x) {
  if constexpr (std::is_arithmetic_v<V>) {
    return to_compute<V>(*x);
  } else {
    return load_compute(x);
  }
}

// The sum of one element (or vector) over IMAGES images, as a tree.
template <int IMAGES, class V, class T>
ALWAYS_INLINE V tree(const T* x, int64_t stride) {
  if constexpr (IMAGES == 1) {
    return fetch<V>(x);
  } else {
    return tree<IMAGES / 2, V>(x, stride) + tree<IMAGES / 2, V>(x + IMAGES / 2 * stride, stride);
  }
}

template <int IMAGES, class T, class A>
ALWAYS_INLINE void add_images(const T* x, int64_t stride, int64_t length, bool first, A* to) {
  int64_t e = 0;
  for (; e + kLanes<A> <= length; e += kLanes<A>) {
    const Vec<A> v = tree<IMAGES, Vec<A>>(x + e, stride);
    store(to + e, first ? v : load(to + e) + v);
  }
  for (; e < length; ++e) {
    const A v = tree<IMAGES, A>(x + e, stride);
    to[e] = first ? v : to[e] + v;
  }
}

// to[e] = sum over `images` of x[b * stride + e].
template <class T, class A>
ALWAYS_INLINE void sum_images(const T* x, int64_t stride, int64_t images, int64_t length, A* to) {
  A partial[kPiece];
  for (int64_t b0 = 0; b0 < images; b0 += kBlock) {
    const int64_t count = std::min(kBlock, images - b0);
    const T* from = x + b0 * stride;
    A* sums = b0 ? partial : to;
    int64_t b = 0;
    for (; b + 8 <= count; b += 8) add_images<8>(from + b * stride, stride, length, b == 0, sums);
    for (; b < count; ++b) add_images<1>(from + b * stride, stride, length, b == 0, sums);
    if (b0) add_images<1>(partial, 0, length, false, to);
  }
}

template <class A>
ALWAYS_INLINE A dot(const A* a, const A* b, int64_t length) {
  Vec<A> lanes{};
  int64_t e = 0;
  for (; e + kLanes<A> <= length; e += kLanes<A>) lanes += load(a + e) * load(b + e);
  A tail = 0;
  for (; e < length; ++e) tail += a[e] * b[e];
  return tail + sum(lanes);
}

}  // namespace

// One chunk of the images of one piece of the plane; t is that of the chunk.
template <class T, class A>
struct MeanTask {
  const T* x;
  const PatchGeometry& g;
  const A* columns;  // B [kernel_w, width]
  A* t;              // [height, kernel_w, channels]
  int64_t images, begin, end;

  ALWAYS_INLINE A* slot(int64_t h, int64_t j, int64_t c) const {
    return t + (h * g.kernel_w + j) * g.channels + c;
  }

  // Rows [begin, end) of the channels * height rows of w.
  ALWAYS_INLINE void run_nchw() const {
    A sums[kPiece];
    const bool fused = g.stride_h == g.width && g.stride_c == g.height * g.width;
    const int64_t step = std::min(g.width, kPiece);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t c = row / g.height, h = row - c * g.height;
      const T* from = x + c * g.stride_c + h * g.stride_h;
      for (int64_t j = 0; j < g.kernel_w; ++j) *slot(h, j, c) = 0;
      for (int64_t w = 0; w < g.width; w += step) {
        const int64_t length = std::min(step, g.width - w);
        const A* here = sums;
        if (!fused || step < g.width) {
          sum_images(from + w, g.stride_n, images, length, sums);
        } else if (row == begin) {
          sum_images(from, g.stride_n, images, (end - begin) * g.width, sums);
        } else {
          here = sums + (row - begin) * g.width;
        }
        for (int64_t j = 0; j < g.kernel_w; ++j)
          *slot(h, j, c) += dot(here, columns + j * g.width + w, length);
      }
    }
  }

  // Channels [begin, end) of the pixels of row h.
  ALWAYS_INLINE void run_nhwc(int64_t h) const {
    A sums[kPiece];
    const int64_t count = end - begin, step = std::max<int64_t>(1, kPiece / count);
    const bool fused = g.stride_w == count;
    for (int64_t j = 0; j < g.kernel_w; ++j) std::fill_n(slot(h, j, begin), count, A(0));
    for (int64_t w = 0; w < g.width; w += step) {
      const int64_t pixels = std::min(step, g.width - w);
      const T* from = x + h * g.stride_h + w * g.stride_w + begin;
      if (fused) {
        sum_images(from, g.stride_n, images, pixels * count, sums);
      } else {
        for (int64_t p = 0; p < pixels; ++p)
          sum_images(from + p * g.stride_w, g.stride_n, images, count, sums + p * count);
      }
      if (count < kLanes<A>) {
        A line[kPiece];
        for (int64_t c = 0; c < count; ++c) {
          for (int64_t p = 0; p < pixels; ++p) line[p] = sums[p * count + c];
          for (int64_t j = 0; j < g.kernel_w; ++j)
            *slot(h, j, begin + c) += dot(line, columns + j * g.width + w, pixels);
        }
        continue;
      }
      for (int64_t j = 0; j < g.kernel_w; ++j) {
        A* to = slot(h, j, begin);
        for (int64_t p = 0; p < pixels; ++p) {
          const A weight = columns[j * g.width + w + p];
          for (int64_t c = 0; c < count; ++c) to[c] += weight * sums[p * count + c];
        }
      }
    }
  }
};

namespace {

// mean[c, i, j] for channels [c0, c1) from the chunks of t.
template <class A>
ALWAYS_INLINE void contract_rows(const A* t, const PatchGeometry& g, const A* rows, int64_t chunks,
                                 A scale, int64_t c0, int64_t c1, A* out) {
  constexpr int64_t kChannels = 64;
  const int64_t per_group = g.channels / g.groups;
  A total[kChannels];
  for (int64_t c = c0; c < c1; c += kChannels) {
    const int64_t count = std::min(kChannels, c1 - c);
    for (int64_t i = 0; i < g.kernel_h; ++i) {
      for (int64_t j = 0; j < g.kernel_w; ++j) {
        std::fill_n(total, count, A(0));
        for (int64_t q = 0; q < chunks; ++q) {
          for (int64_t h = 0; h < g.height; ++h) {
            const A weight = rows[i * g.height + h];
            if (weight == 0) continue;
            const A* from = t + ((q * g.height + h) * g.kernel_w + j) * g.channels + c;
            for (int64_t k = 0; k < count; ++k) total[k] += weight * from[k];
          }
        }
        const int64_t group = c / per_group, place = c - group * per_group;
        A* to = out + group * g.row_size() + place * g.taps() + i * g.kernel_w + j;
        int64_t rest = per_group - place;  // channels of the group from here on
        for (int64_t k = 0; k < count; ++k, to += g.taps()) {
          if (rest-- == 0) to += g.ones, rest = per_group - 1;
          *to = scale * total[k];
        }
      }
    }
  }
}

}  // namespace

#define MEAN_TASK(T, A)                                                       \
  SIMD_CLONES void mean_rows(const MeanTask<T, A>& task) { task.run_nchw(); } \
  SIMD_CLONES void mean_pixels(const MeanTask<T, A>& task, int64_t h) { task.run_nhwc(h); }
MEAN_TASK(float, float)
MEAN_TASK(double, double)
MEAN_TASK(BFloat16, float)
MEAN_TASK(Half, float)
#undef MEAN_TASK

#define MEAN_CONTRACT(A)                                                                    \
  SIMD_CLONES void mean_contract(const A* t, const PatchGeometry& g, const A* rows,         \
                                 int64_t chunks, A scale, int64_t c0, int64_t c1, A* out) { \
    contract_rows(t, g, rows, chunks, scale, c0, c1, out);                                  \
  }
MEAN_CONTRACT(float)
MEAN_CONTRACT(double)
#undef MEAN_CONTRACT

template <class T>
void patch_mean_cpu(const T* x, const PatchGeometry& g, Accumulate<T>* out) {
  using A = Accumulate<T>;
  thread_local Scratch<A> scratch;
  const bool nhwc = g.channels > 1 && g.stride_c == 1 && (g.stride_w != 1 || g.width == 1);
  const int64_t plane = g.channels * g.height * g.width;
  const int64_t rows = g.channels * g.height;
  const int64_t group = nhwc ? std::min(g.channels, kPiece)             // channels, or
                             : std::max<int64_t>(1, kPiece / g.width);  // rows, of a piece
  const int64_t blocks = nhwc ? (g.channels + group - 1) / group : 1;
  const int64_t pieces = nhwc ? g.height * blocks : (rows + group - 1) / group;
  const int64_t chunks = std::clamp<int64_t>(g.images / kBlock, 1, (kTasks - 1) / pieces + 1);
  const int64_t per_chunk = (g.images + chunks - 1) / chunks;
  const int64_t t_size = rows * g.kernel_w;

  scratch.assign(g.kernel_h * g.height + g.kernel_w * g.width, A(0));
  A* count_h = scratch.data();
  A* count_w = count_h + g.kernel_h * g.height;
  for (int64_t i = 0; i < g.kernel_h; ++i)
    for (int64_t o = 0; o < g.out_h; ++o)
      if (const int64_t h = g.source_h(o, i); h >= 0) count_h[i * g.height + h] += 1;
  for (int64_t j = 0; j < g.kernel_w; ++j)
    for (int64_t o = 0; o < g.out_w; ++o)
      if (const int64_t w = g.source_w(o, j); w >= 0) count_w[j * g.width + w] += 1;
  thread_local Scratch<A> sums;
  sums.resize(chunks * t_size);
  A* t = sums.data();

  const int64_t work = (plane / pieces + 1) * per_chunk;
  parallel_for(0, pieces * chunks, kGrain / work + 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t q = task / pieces, piece = task % pieces, b = q * per_chunk;
      const int64_t images = std::min(per_chunk, g.images - b);
      const T* from = x + b * g.stride_n;
      if (nhwc) {
        const int64_t h = piece / blocks, c = piece % blocks * group;
        mean_pixels({from, g, count_w, t + q * t_size, images, c, std::min(c + group, g.channels)},
                    h);
      } else {
        const int64_t row = piece * group;
        mean_rows({from, g, count_w, t + q * t_size, images, row, std::min(row + group, rows)});
      }
    }
  });

  const A scale = A(1.0 / (double(g.images) * double(g.positions())));
  const int64_t per_channel = chunks * g.height * g.taps();
  parallel_for(0, g.channels, kGrain / per_channel + 1, [&](int64_t c0, int64_t c1) {
    mean_contract(t, g, count_h, chunks, scale, c0, c1, out);
  });
  if (g.ones)
    for (int64_t k = 1; k <= g.groups; ++k) out[k * g.row_size() - 1] = 1;
}

template void patch_mean_cpu(const float*, const PatchGeometry&, float*);
template void patch_mean_cpu(const double*, const PatchGeometry&, double*);
template void patch_mean_cpu(const BFloat16*, const PatchGeometry&, float*);
template void patch_mean_cpu(const Half*, const PatchGeometry&, float*);

}  // namespace rlscuda
