// foreach_nesterov_ on the GPU: all rows of all layers in three launches. The first looks ahead,
// the second divides by the largest element, the third adds the rows' squares.
//
// Traffic of float32, in bytes an element: the gradient and the average read, the average and the
// result written, 16; the result read and written, 8, of a small one in the L2 cache. Sums have a
// fixed order.
#include <algorithm>
#include <bit>

#include "half.h"
#include "launch.h"
#include "layer_list.h"
#include "nesterov.h"
#include "rows.h"

namespace rlscuda {
namespace {

using namespace rows;

template <class T>
struct Layer {
  const T* grad;
  const void* grad_bias;
  T* average;
  const T* h;
  T* out;
  uint32_t groups, rows, padded, columns, n;
  uint32_t first_row, first_matrix;  // of the launch's
  uint32_t rows_per_block, end;      // the first block that is not for this layer
};

template <class T, int LAYERS>
struct Call {
  T* peak;
  T* length;
  T* row_peak;
  T* row_squares;
  T momentum, share;
  uint32_t count;
  Layer<T> layer[LAYERS];
};
constexpr int kFewLayers = 50, kManyLayers = 408;
static_assert(sizeof(Call<double, kFewLayers>) <= 4096);
static_assert(sizeof(Call<double, kManyLayers>) <= 32764);

// The layer of a block, and the rows of its `out` that the block takes.
template <class T>
struct Share {
  const Layer<T>& layer;
  uint32_t begin, end;
};
template <class T, int LAYERS>
__device__ __forceinline__ Share<T> share_of(const Call<T, LAYERS>& call) {
  const int l = layer_of_block(call.layer, call.count, blockIdx.x,
                               [](const Layer<T>& layer) { return layer.end; });
  const Layer<T>& layer = call.layer[l];
  const uint32_t block = blockIdx.x - (l ? call.layer[l - 1].end : 0);
  const uint32_t begin = block * layer.rows_per_block;
  return {layer, begin, min(layer.groups * layer.padded, begin + layer.rows_per_block)};
}

template <int ROW_THREADS, class T, class W, int LAYERS>
__device__ void take_row(const Call<T, LAYERS>& call, const Layer<T>& a, uint32_t q,
                         MagnitudeBits<T>* largest) {
  const uint32_t first = threadIdx.x % ROW_THREADS;
  const uint32_t group = q / a.padded, i = q % a.padded;
  T* out = a.out + int64_t(q) * a.n;
  T& row_peak = call.row_peak[a.first_row + q];
  if (i >= a.rows) {
    for (uint32_t j = first; j < a.n; j += ROW_THREADS) out[j] = 0;
    if (first == 0) row_peak = 0;
    return;
  }
  const int64_t row = int64_t(group) * a.rows + i;
  const bool enters = std::isfinite(a.h[group]);
  const T* grad = a.grad + row * a.columns;
  T* average = a.average + row * a.n;
  const T bias = a.columns < a.n ? to_compute<T>(static_cast<const W*>(a.grad_bias)[row]) : T(0);
  MagnitudeBits<T> peak = 0;
  for (uint32_t j0 = first; j0 < a.n; j0 += kUnroll<T> * ROW_THREADS) {
    // all loads before the first use, those beyond the row of its last column
    T seen[kUnroll<T>], before[kUnroll<T>];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll<T>; ++u) {
      const uint32_t j = min(j0 + u * ROW_THREADS, a.n - 1);
      seen[u] = j < a.columns ? grad[j] : bias;
      before[u] = average[j];
    }
#pragma unroll
    for (uint32_t u = 0; u < kUnroll<T>; ++u) {
      const uint32_t j = j0 + u * ROW_THREADS;
      if (j >= a.n) continue;
      const T g = enters ? seen[u] : T(0);
      const T after = enters ? lerp(before[u], g, call.share) : before[u];
      average[j] = after;
      out[j] = lerp(g, after, call.momentum);
      peak = max(peak, magnitude_bits(out[j]));
    }
  }
  peak = row_max<ROW_THREADS>(peak, largest);
  if (first == 0) row_peak = std::bit_cast<T>(peak);
}

template <class T, class W, int LAYERS>
__global__ void __launch_bounds__(kThreads)
    nesterov_kernel(const __grid_constant__ Call<T, LAYERS> call) {
  __shared__ MagnitudeBits<T> largest[kWarps];
  const Share<T> own = share_of(call);
  if (own.layer.n <= kNarrow) {
    for (uint32_t q = own.begin + threadIdx.x / 32; q < own.end; q += kWarps)
      take_row<32, T, W>(call, own.layer, q, largest);
  } else {
    for (uint32_t q = own.begin; q < own.end; ++q)
      take_row<kThreads, T, W>(call, own.layer, q, largest);
  }
}

// The rows that a warp or a block takes, to be divided.
template <int ROW_THREADS, class T, int LAYERS>
__device__ void divide_rows(const Call<T, LAYERS>& call, const Layer<T>& a, uint32_t q,
                            uint32_t end, uint32_t step, MagnitudeBits<T>* largest, T* sums) {
  const uint32_t first = threadIdx.x % ROW_THREADS;
  T divisor = 1;
  for (uint32_t group = UINT32_MAX; q < end; q += step) {
    if (q / a.padded != group) {
      group = q / a.padded;
      const T* peaks = call.row_peak + a.first_row + group * a.padded;
      MagnitudeBits<T> peak = 0;
      for (uint32_t i = first; i < a.padded; i += ROW_THREADS)
        peak = max(peak, magnitude_bits(peaks[i]));
      peak = row_max<ROW_THREADS>(peak, largest);
      divisor = divisor_of(std::bit_cast<T>(peak));
      if (q % a.padded == 0 && first == 0)
        call.peak[a.first_matrix + group] = std::bit_cast<T>(peak);
    }
    T* out = a.out + int64_t(q) * a.n;
    T squares = 0;
    for (uint32_t j0 = first; j0 < a.n; j0 += kUnroll<T> * ROW_THREADS) {
      T seen[kUnroll<T>];
#pragma unroll
      for (uint32_t u = 0; u < kUnroll<T>; ++u) seen[u] = out[min(j0 + u * ROW_THREADS, a.n - 1)];
#pragma unroll
      for (uint32_t u = 0; u < kUnroll<T>; ++u) {
        const uint32_t j = j0 + u * ROW_THREADS;
        if (j >= a.n) continue;
        const T x = seen[u] / divisor;
        out[j] = x;
        squares += x * x;
      }
    }
    squares = row_sum<ROW_THREADS>(squares, sums);
    if (first == 0) call.row_squares[a.first_row + q] = squares;
  }
}

template <class T, int LAYERS>
__global__ void __launch_bounds__(kThreads)
    nesterov_divide_kernel(const __grid_constant__ Call<T, LAYERS> call) {
  __shared__ MagnitudeBits<T> largest[kWarps];
  __shared__ T sums[kWarps];
  const Share<T> own = share_of(call);
  if (own.layer.n <= kNarrow) {
    divide_rows<32>(call, own.layer, own.begin + threadIdx.x / 32, own.end, kWarps, largest, sums);
  } else {
    divide_rows<kThreads>(call, own.layer, own.begin, own.end, 1, largest, sums);
  }
}

// A block a matrix.
template <class T, int LAYERS>
__global__ void __launch_bounds__(kThreads)
    nesterov_length_kernel(const __grid_constant__ Call<T, LAYERS> call) {
  __shared__ T sums[kWarps];
  const Layer<T>& a =
      call.layer[layer_of_block(call.layer, call.count, blockIdx.x, [](const Layer<T>& layer) {
        return layer.first_matrix + layer.groups;
      })];
  const T* squares = call.row_squares + a.first_row + (blockIdx.x - a.first_matrix) * a.padded;
  T sum = 0;
  for (uint32_t i = threadIdx.x; i < a.padded; i += kThreads) sum += squares[i];
  sum = row_sum<kThreads>(sum, sums);
  if (threadIdx.x == 0) call.length[blockIdx.x] = std::sqrt(sum);
}

template <class T, class W, int LAYERS>
void launch_layers(const Nesterov<T>& a, int64_t begin, int64_t count, cudaStream_t stream) {
  Call<T, LAYERS> call;
  const NesterovLayer<T>& first = a.layers[begin];
  call.peak = a.peak + first.first_matrix;
  call.length = a.length + first.first_matrix;
  call.row_peak = a.row_peak + first.first_row;
  call.row_squares = a.row_squares + first.first_row;
  call.momentum = T(a.momentum);
  call.share = T(1 - a.momentum);
  call.count = uint32_t(count);
  int64_t elements = 0, rows = 0, matrices = 0, blocks = 0;
  for (int64_t l = begin; l < begin + count; ++l)
    elements += a.layers[l].groups * a.layers[l].padded * a.layers[l].n;
  const int64_t share = std::max(kLeastWork, elements / kTargetBlocks);
  for (int64_t l = 0; l < count; ++l) {
    const NesterovLayer<T>& from = a.layers[begin + l];
    const int64_t least = from.n <= kNarrow ? kWarps : 1;
    const int64_t per_block = std::max(least, share / from.n);
    rows += from.groups * from.padded, matrices += from.groups;
    blocks += (from.groups * from.padded + per_block - 1) / per_block;
    if (std::max({rows, matrices, blocks, from.n, per_block}) > INT32_MAX)
      throw std::runtime_error("average is too large");
    call.layer[l] = {from.grad,
                     from.grad_bias,
                     from.average,
                     from.h,
                     from.out,
                     uint32_t(from.groups),
                     uint32_t(from.rows),
                     uint32_t(from.padded),
                     uint32_t(from.columns),
                     uint32_t(from.n),
                     uint32_t(from.first_row - first.first_row),
                     uint32_t(from.first_matrix - first.first_matrix),
                     uint32_t(per_block),
                     uint32_t(blocks)};
  }
  launch(nesterov_kernel<T, W, LAYERS>, grid_of(blocks), dim3(kThreads), 0, stream, call);
  launch(nesterov_divide_kernel<T, LAYERS>, grid_of(blocks), dim3(kThreads), 0, stream, call);
  launch(nesterov_length_kernel<T, LAYERS>, grid_of(matrices), dim3(kThreads), 0, stream, call);
}

}  // namespace

template <class T, class W>
void nesterov_cuda(const Nesterov<T>& args, cudaStream_t stream) {
  for (int64_t begin = 0; begin < args.count; begin += kManyLayers) {
    const int64_t count = std::min<int64_t>(kManyLayers, args.count - begin);
    if (count <= kFewLayers) {
      launch_layers<T, W, kFewLayers>(args, begin, count, stream);
    } else {
      launch_layers<T, W, kManyLayers>(args, begin, count, stream);
    }
  }
}

template void nesterov_cuda<float, float>(const Nesterov<float>&, cudaStream_t);
template void nesterov_cuda<float, BFloat16>(const Nesterov<float>&, cudaStream_t);
template void nesterov_cuda<float, Half>(const Nesterov<float>&, cudaStream_t);
template void nesterov_cuda<double, double>(const Nesterov<double>&, cudaStream_t);
template void nesterov_cuda<double, float>(const Nesterov<double>&, cudaStream_t);
template void nesterov_cuda<double, BFloat16>(const Nesterov<double>&, cudaStream_t);
template void nesterov_cuda<double, Half>(const Nesterov<double>&, cudaStream_t);

}  // namespace rlscuda
