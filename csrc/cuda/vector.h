// Loads of 16 bytes at once.
#pragma once

#include "half.h"

namespace rlscuda {

template <class T, int N>
struct alignas(N * sizeof(T)) Packed {
  T lane[N];
  RLS_HOST_DEVICE T& operator[](int i) { return lane[i]; }
  RLS_HOST_DEVICE const T& operator[](int i) const { return lane[i]; }
};

// Elements of T in a vector of 16 bytes.
template <class T>
constexpr int kVectorLanes = 16 / int(sizeof(T));

// N elements, one or a whole vector, from a pointer that is aligned to all of them and to memory
// that no one writes meanwhile.
template <int N, class T>
__device__ __forceinline__ Packed<T, N> load_lanes(const T* from) {
  if constexpr (N == 1) {
    return {{*from}};
  } else {
    static_assert(N == kVectorLanes<T>);
    return std::bit_cast<Packed<T, N>>(__ldg(reinterpret_cast<const uint4*>(from)));
  }
}

}  // namespace rlscuda
