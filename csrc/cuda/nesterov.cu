// foreach_nesterov_ on the GPU: all rows of all layers of one shape in one launch.
//
// A warp takes a row of up to kNarrow columns, a block a longer one; consecutive threads take
// consecutive columns. Traffic of float32, in bytes an element: the gradient and the average read,
// the average and the result written, 16.
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
  T* peak;
  T momentum, share;
  uint32_t total, groups, rows, padded, columns, n, rows_per_block;
  NesterovLayer<T> layer[LAYERS];
};
constexpr int kFewLayers = 120, kManyLayers = 1020;
static_assert(sizeof(Call<double, kFewLayers>) <= 4096);
static_assert(sizeof(Call<double, kManyLayers>) <= 32764);

// The largest of the threads that share a row, in the first of them.
template <int ROW_THREADS, class Bits>
__device__ Bits row_max(Bits x, Bits* largest) {
  for (int d = 16; d > 0; d /= 2) x = max(x, __shfl_xor_sync(~0u, x, d));
  if (ROW_THREADS == 32) return x;
  __syncthreads();
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) x = max(x, largest[w]);
  return x;
}

template <int ROW_THREADS, class T, class W, int LAYERS>
__device__ void take_row(const Call<T, LAYERS>& call, uint32_t q, MagnitudeBits<T>* largest) {
  const uint32_t first = threadIdx.x % ROW_THREADS;
  const uint32_t matrix = q / call.padded, i = q % call.padded;
  T* out = call.out + int64_t(q) * call.n;
  if (i >= call.rows) {
    for (uint32_t j = first; j < call.n; j += ROW_THREADS) out[j] = 0;
    if (first == 0) call.peak[q] = 0;
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
  if (first == 0) call.peak[q] = std::bit_cast<T>(peak);
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

template <class T, class W, int LAYERS>
void launch_layers(const Nesterov<T>& a, int64_t begin, int64_t count, cudaStream_t stream) {
  Call<T, LAYERS> call;
  const int64_t before = begin * a.groups * a.padded, total = count * a.groups * a.padded;
  if (total > INT32_MAX || a.n > INT32_MAX) throw std::runtime_error("average is too large");
  call.out = a.out + before * a.n;
  call.peak = a.peak + before;
  call.momentum = T(a.momentum);
  call.share = T(1 - a.momentum);
  call.total = uint32_t(total);
  call.groups = uint32_t(a.groups);
  call.rows = uint32_t(a.rows);
  call.padded = uint32_t(a.padded);
  call.columns = uint32_t(a.columns);
  call.n = uint32_t(a.n);
  const int64_t least = a.n <= kNarrow ? kWarps : 1;
  const int64_t share = std::max(kLeastWork, total * a.n / kTargetBlocks);
  call.rows_per_block = uint32_t(std::max(least, share / std::max<int64_t>(1, a.n)));
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
}

template void nesterov_cuda<float, float>(const Nesterov<float>&, cudaStream_t);
template void nesterov_cuda<float, BFloat16>(const Nesterov<float>&, cudaStream_t);
template void nesterov_cuda<float, Half>(const Nesterov<float>&, cudaStream_t);
template void nesterov_cuda<double, double>(const Nesterov<double>&, cudaStream_t);
template void nesterov_cuda<double, float>(const Nesterov<double>&, cudaStream_t);
template void nesterov_cuda<double, BFloat16>(const Nesterov<double>&, cudaStream_t);
template void nesterov_cuda<double, Half>(const Nesterov<double>&, cudaStream_t);

}  // namespace rlscuda
