// foreach_nesterov_ on the GPU: all rows of all layers of one shape in three launches. The first
// looks ahead, the second divides by the largest element, the third adds the rows' squares.
//
// A warp takes a row of up to kNarrow columns, a block a longer one; consecutive threads take
// consecutive columns. Traffic of float32, in bytes an element: the gradient and the average read,
// the average and the result written, 16; the result read and written, 8, of a small one in the L2
// cache. Sums have a fixed order.
#include <algorithm>
#include <bit>

#include "half.h"
#include "launch.h"
#include "nesterov.h"

namespace rlscuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr uint32_t kNarrow = 256;  // columns up to which a warp takes a row
template <class T>
constexpr uint32_t kUnroll = 16 / sizeof(T);  // elements of a row that a thread has in flight
constexpr int64_t kTargetBlocks = 2048;  // of a launch; a block has at least kLeastWork elements
constexpr int64_t kLeastWork = 1024;

template <class T, int LAYERS>
struct Call {
  T* out;
  T* row_peak;
  T momentum, share;
  uint32_t total, groups, rows, padded, columns, n, rows_per_block;
  NesterovLayer<T> layer[LAYERS];
};
constexpr int kFewLayers = 120, kManyLayers = 1020;
static_assert(sizeof(Call<double, kFewLayers>) <= 4096);
static_assert(sizeof(Call<double, kManyLayers>) <= 32764);

// What `join` makes of the values of all threads that share a row, known to each of them.
template <int ROW_THREADS, class X, class Join>
__device__ X over_row(X x, X* parts, const Join& join) {
  for (int d = 16; d > 0; d /= 2) x = join(x, __shfl_xor_sync(~0u, x, d));
  if (ROW_THREADS == 32) return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int w = 1; w < kWarps; ++w) x = join(x, parts[w]);
  return x;
}
template <int ROW_THREADS, class Bits>
__device__ Bits row_max(Bits x, Bits* parts) {
  return over_row<ROW_THREADS>(x, parts, [](Bits a, Bits b) { return max(a, b); });
}
template <int ROW_THREADS, class T>
__device__ T row_sum(T x, T* parts) {
  return over_row<ROW_THREADS>(x, parts, [](T a, T b) { return a + b; });
}

template <int ROW_THREADS, class T, class W, int LAYERS>
__device__ void take_row(const Call<T, LAYERS>& call, uint32_t q, MagnitudeBits<T>* largest) {
  const uint32_t first = threadIdx.x % ROW_THREADS;
  const uint32_t matrix = q / call.padded, i = q % call.padded;
  T* out = call.out + int64_t(q) * call.n;
  if (i >= call.rows) {
    for (uint32_t j = first; j < call.n; j += ROW_THREADS) out[j] = 0;
    if (first == 0) call.row_peak[q] = 0;
    return;
  }
  const NesterovLayer<T>& layer = call.layer[matrix / call.groups];
  const uint32_t group = matrix % call.groups;
  const int64_t row = int64_t(group) * call.rows + i;
  const bool enters = std::isfinite(layer.h[group]);
  const T* grad = layer.grad + row * call.columns;
  T* average = layer.average + row * call.n;
  const T bias =
      call.columns < call.n ? to_compute<T>(static_cast<const W*>(layer.grad_bias)[row]) : T(0);
  MagnitudeBits<T> peak = 0;
  for (uint32_t j0 = first; j0 < call.n; j0 += kUnroll<T> * ROW_THREADS) {
    // all loads before the first use, those beyond the row of its last column
    T seen[kUnroll<T>], before[kUnroll<T>];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll<T>; ++u) {
      const uint32_t j = min(j0 + u * ROW_THREADS, call.n - 1);
      seen[u] = j < call.columns ? grad[j] : bias;
      before[u] = average[j];
    }
#pragma unroll
    for (uint32_t u = 0; u < kUnroll<T>; ++u) {
      const uint32_t j = j0 + u * ROW_THREADS;
      if (j >= call.n) continue;
      const T g = enters ? seen[u] : T(0);
      const T after = enters ? lerp(before[u], g, call.share) : before[u];
      average[j] = after;
      out[j] = lerp(g, after, call.momentum);
      peak = max(peak, magnitude_bits(out[j]));
    }
  }
  peak = row_max<ROW_THREADS>(peak, largest);
  if (first == 0) call.row_peak[q] = std::bit_cast<T>(peak);
}

template <class T, class W, int LAYERS>
__global__ void __launch_bounds__(kThreads)
    nesterov_kernel(const __grid_constant__ Call<T, LAYERS> call) {
  __shared__ MagnitudeBits<T> largest[kWarps];
  const uint32_t begin = blockIdx.x * call.rows_per_block;
  const uint32_t end = min(call.total, begin + call.rows_per_block);
  if (call.n <= kNarrow) {
    for (uint32_t q = begin + threadIdx.x / 32; q < end; q += kWarps)
      take_row<32, T, W>(call, q, largest);
  } else {
    for (uint32_t q = begin; q < end; ++q) take_row<kThreads, T, W>(call, q, largest);
  }
}

// The rows that a warp or a block takes, from the first of the launch on, to be divided.
template <int ROW_THREADS, class T>
__device__ void divide_rows(const Nesterov<T>& a, uint32_t q, uint32_t end, uint32_t step,
                            MagnitudeBits<T>* largest, T* sums) {
  const uint32_t first = threadIdx.x % ROW_THREADS, padded = uint32_t(a.padded);
  T divisor = 1;
  for (uint32_t matrix = UINT32_MAX; q < end; q += step) {
    if (q / padded != matrix) {
      matrix = q / padded;
      MagnitudeBits<T> peak = 0;
      for (uint32_t i = first; i < padded; i += ROW_THREADS)
        peak = max(peak, magnitude_bits(a.row_peak[int64_t(matrix) * padded + i]));
      peak = row_max<ROW_THREADS>(peak, largest);
      divisor = divisor_of(std::bit_cast<T>(peak));
      if (q % padded == 0 && first == 0) a.peak[matrix] = std::bit_cast<T>(peak);
    }
    T* out = a.out + int64_t(q) * a.n;
    T squares = 0;
    for (uint32_t j0 = first; j0 < a.n; j0 += kUnroll<T> * ROW_THREADS) {
      T seen[kUnroll<T>];
#pragma unroll
      for (uint32_t u = 0; u < kUnroll<T>; ++u)
        seen[u] = out[min(j0 + u * ROW_THREADS, uint32_t(a.n) - 1)];
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
    if (first == 0) a.row_squares[q] = squares;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    nesterov_divide_kernel(const __grid_constant__ Nesterov<T> a, uint32_t total, uint32_t rows) {
  __shared__ MagnitudeBits<T> largest[kWarps];
  __shared__ T sums[kWarps];
  const uint32_t begin = blockIdx.x * rows, end = min(total, begin + rows);
  if (a.n <= kNarrow) {
    divide_rows<32>(a, begin + threadIdx.x / 32, end, kWarps, largest, sums);
  } else {
    divide_rows<kThreads>(a, begin, end, 1, largest, sums);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    nesterov_length_kernel(const __grid_constant__ Nesterov<T> a) {
  __shared__ T sums[kWarps];
  const T* squares = a.row_squares + blockIdx.x * a.padded;
  T sum = 0;
  for (int64_t i = threadIdx.x; i < a.padded; i += kThreads) sum += squares[i];
  sum = row_sum<kThreads>(sum, sums);
  if (threadIdx.x == 0) a.length[blockIdx.x] = std::sqrt(sum);
}

uint32_t rows_per_block(int64_t total, int64_t n) {
  const int64_t least = n <= kNarrow ? kWarps : 1;
  const int64_t share = std::max(kLeastWork, total * n / kTargetBlocks);
  return uint32_t(std::max(least, share / std::max<int64_t>(1, n)));
}

template <class T, class W, int LAYERS>
void launch_layers(const Nesterov<T>& a, int64_t begin, int64_t count, cudaStream_t stream) {
  Call<T, LAYERS> call;
  const int64_t before = begin * a.groups * a.padded, total = count * a.groups * a.padded;
  if (total > INT32_MAX || a.n > INT32_MAX) throw std::runtime_error("average is too large");
  call.out = a.out + before * a.n;
  call.row_peak = a.row_peak + before;
  call.momentum = T(a.momentum);
  call.share = T(1 - a.momentum);
  call.total = uint32_t(total);
  call.groups = uint32_t(a.groups);
  call.rows = uint32_t(a.rows);
  call.padded = uint32_t(a.padded);
  call.columns = uint32_t(a.columns);
  call.n = uint32_t(a.n);
  call.rows_per_block = rows_per_block(total, a.n);
  std::copy_n(a.layers + begin, count, call.layer);
  const int64_t blocks = (total + call.rows_per_block - 1) / call.rows_per_block;
  if (blocks > 0)
    launch(nesterov_kernel<T, W, LAYERS>, grid_of(blocks), dim3(kThreads), 0, stream, call);
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
  const int64_t matrices = args.count * args.groups, total = matrices * args.padded;
  if (total > INT32_MAX) throw std::runtime_error("average is too large");
  if (total == 0) return;
  const uint32_t rows = rows_per_block(total, args.n);
  launch(nesterov_divide_kernel<T>, grid_of((total + rows - 1) / rows), dim3(kThreads), 0, stream,
         args, uint32_t(total), rows);
  launch(nesterov_length_kernel<T>, grid_of(matrices), dim3(kThreads), 0, stream, args);
}

template void nesterov_cuda<float, float>(const Nesterov<float>&, cudaStream_t);
template void nesterov_cuda<float, BFloat16>(const Nesterov<float>&, cudaStream_t);
template void nesterov_cuda<float, Half>(const Nesterov<float>&, cudaStream_t);
template void nesterov_cuda<double, double>(const Nesterov<double>&, cudaStream_t);
template void nesterov_cuda<double, float>(const Nesterov<double>&, cudaStream_t);
template void nesterov_cuda<double, BFloat16>(const Nesterov<double>&, cudaStream_t);
template void nesterov_cuda<double, Half>(const Nesterov<double>&, cudaStream_t);

}  // namespace rlscuda
