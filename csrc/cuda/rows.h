// How threads share the rows of a matrix: a warp takes a row of up to kNarrow columns, a block a
// longer one; consecutive threads take consecutive columns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rlscuda {
namespace rows {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr uint32_t kNarrow = 256;  // columns up to which a warp takes a row
template <class T>
constexpr uint32_t kUnroll = 16 / sizeof(T);  // elements of a row that a thread has in flight
constexpr int64_t kTargetBlocks = 2048;  // of a launch; a block has at least kLeastWork elements
constexpr int64_t kLeastWork = 1024;

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

}  // namespace rows
}  // namespace rlscuda
