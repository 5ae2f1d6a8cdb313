// The directions of the spectral form on the CPU, from momenta to the end in one call.
#pragma once

#include "spectral_root.h"

namespace rlscuda {

// The blocks of the matrices of one layer, [groups * parts, block, n].
template <class T>
struct DirectionLayer {
  T* blocks;   // of the momentum N in, of the direction out
  T* product;  // N P, or room for it
  const T* P;  // [groups, n, n], or null where `product` is made already
  int64_t block, n;
};

// Entry i of `layers` is of args.layers[i], whose gram is room for those of the blocks.
template <class T>
void spectral_direction_cpu(const DirectionLayer<T>* layers, const SpectralRoot<T>& args);

}  // namespace rlscuda
