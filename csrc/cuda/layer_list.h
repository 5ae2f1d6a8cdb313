// Which layer of a launch a block works for.
#pragma once

#include <cstdint>

namespace rlscuda {

// The first of `count` layers whose end(layer), the number of the first block that is not for it,
// is beyond `block`.
template <class Layer, class End>
__device__ __forceinline__ int layer_of_block(const Layer* layers, int64_t count, uint32_t block,
                                              const End& end) {
  int low = 0, high = int(count) - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (end(layers[middle]) > block) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace rlscuda
