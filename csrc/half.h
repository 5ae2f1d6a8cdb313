// The storage types of activations and parameters, and their conversion to the compute type; both
// are 16 bits that g++ and nvcc understand alike.
#pragma once

#include <bit>
#include <cstdint>

#include "rls_math.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace rlscuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T, class S>
RLS_HOST_DEVICE ALWAYS_INLINE T to_compute(S x) {
  if constexpr (__is_same(S, BFloat16)) {
    return T(std::bit_cast<float>(uint32_t(x.bits) << 16));
  } else if constexpr (__is_same(S, Half)) {
#ifdef __CUDACC__
    return T(__half2float(__ushort_as_half(x.bits)));
#else
    return T(std::bit_cast<_Float16>(x.bits));
#endif
  } else {
    return T(x);
  }
}

// Rounds to nearest even, as torch does; NaN stays NaN.
template <class S, class T>
RLS_HOST_DEVICE ALWAYS_INLINE S to_storage(T x) {
  if constexpr (__is_same(S, BFloat16)) {
    const float value = float(x);
    const uint32_t wide = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    return BFloat16{uint16_t(value != value ? 0x7fc0u : rounded)};
  } else if constexpr (__is_same(S, Half)) {
#ifdef __CUDACC__
    return Half{__half_as_ushort(__float2half_rn(float(x)))};
#else
    return std::bit_cast<Half>(_Float16(x));
#endif
  } else {
    return S(x);
  }
}

}  // namespace rlscuda
