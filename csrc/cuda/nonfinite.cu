// nonfinite on the GPU: whether any element of many tensors has all exponent bits set (infinity or
// NaN). All tensors go by value in the arguments of one launch (of kTensors each where they are
// more); a block reads one span of one tensor, 16 bytes a load, and only writes if it found one.
#include <algorithm>

#include "kernels.h"
#include "launch.h"
#include "vector.h"

namespace rlscuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTensors = 100;            // the arguments of a launch hold 4 KiB
constexpr int64_t kSpan = 4 * kThreads;  // vectors of 16 bytes that a block reads
constexpr int kVector = 16;              // bytes

struct TensorList {
  NonfiniteTensor tensor[kTensors];
  int64_t first_block[kTensors + 1];
};

// Elements [0, count) at data, of which this is span `span`.
template <class Bits>
__device__ bool scan(const void* data, int64_t count, Bits mask, int64_t span) {
  const Bits* x = static_cast<const Bits*>(data);
  constexpr int kLanes = kVector / int(sizeof(Bits));
  // elements before the first whole vector; a tensor shorter than that has no vector
  const int64_t head =
      min(count, int64_t(-reinterpret_cast<uintptr_t>(x) % kVector / sizeof(Bits)));
  const int64_t vectors = (count - head) / kLanes;
  bool found = false;
  for (int64_t v = span * kSpan + threadIdx.x; v < min((span + 1) * kSpan, vectors);
       v += kThreads) {
    const auto bits = load_lanes<kLanes>(x + head + v * kLanes);
#pragma unroll
    for (int e = 0; e < kLanes; ++e) found |= (bits[e] & mask) == mask;
  }
  if (span == 0) {
    const int64_t tail = head + vectors * kLanes;
    if (threadIdx.x < head) found |= (x[threadIdx.x] & mask) == mask;
    if (tail + threadIdx.x < count) found |= (x[tail + threadIdx.x] & mask) == mask;
  }
  return found;
}

__global__ void nonfinite_kernel(TensorList list, int tensors, bool* found) {
  int i = 0;
  while (i + 1 < tensors && list.first_block[i + 1] <= blockIdx.x) ++i;
  const NonfiniteTensor& t = list.tensor[i];
  const int64_t span = blockIdx.x - list.first_block[i];
  const bool bad = t.width == 2   ? scan(t.data, t.count, uint16_t(t.exponent_mask), span)
                   : t.width == 4 ? scan(t.data, t.count, uint32_t(t.exponent_mask), span)
                                  : scan(t.data, t.count, t.exponent_mask, span);
  if (bad) *found = true;  // whoever writes, writes the same
}

}  // namespace

void nonfinite_cuda(const NonfiniteTensor* tensors, int64_t count, bool* found, CudaStream stream) {
  check_cuda(cudaMemsetAsync(found, 0, sizeof(bool), stream), "clearing the result of nonfinite");
  for (int64_t begin = 0; begin < count; begin += kTensors) {
    const int here = int(std::min<int64_t>(kTensors, count - begin));
    TensorList list{};
    int64_t blocks = 0;
    for (int i = 0; i < here; ++i) {
      list.tensor[i] = tensors[begin + i];
      list.first_block[i] = blocks;
      const int64_t bytes = list.tensor[i].count * list.tensor[i].width;
      blocks += (bytes + kSpan * kVector - 1) / (kSpan * kVector);
    }
    list.first_block[here] = blocks;
    if (blocks > 0)
      launch(nonfinite_kernel, grid_of(blocks), dim3(kThreads), 0, stream, list, here, found);
  }
}

}  // namespace rlscuda
