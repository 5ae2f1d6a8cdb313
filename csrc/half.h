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

#ifndef __CUDACC__
// The bits of float16, in the low half of each 32-bit lane, as float32: exact. Exponent and
// mantissa move to their places; the exponent is rebased by an integer addition, for subnormal
// numbers by a subtraction of floats. Bits is a vector or one number (and std::bit_cast may be a
// call, whose ABI for vectors differs between SIMD levels).
template <class Float, class Bits>
ALWAYS_INLINE Float widen_half(Bits wide) {
  const Bits magnitude = (wide & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const Float smallest = __builtin_bit_cast(Float, Bits{} + 0x38800000u);  // 2^-14
  const Float subnormal = __builtin_bit_cast(Float, magnitude + 0x38800000u) - smallest;
  const Bits special = magnitude + 0x70000000u, normal = magnitude + 0x38000000u;
  const Bits value = exponent == 0u            ? __builtin_bit_cast(Bits, subnormal)
                     : exponent == 0x0f800000u ? special
                                               : normal;
  return __builtin_bit_cast(Float, value | (wide & 0x8000u) << 16);
}

// float32 as the bits of float16, rounded to nearest even. Below 2^-14 the addition of 0.5, whose
// last place is the step of the subnormal numbers, rounds; above, the addition of just under half a
// step, or of half a step where the number's last bit is odd.
ALWAYS_INLINE uint16_t narrow_half(float x) {
  const uint32_t wide = std::bit_cast<uint32_t>(x), magnitude = wide & 0x7fffffffu;
  const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
  const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
  value = magnitude >= 0x47800000u ? 0x7c00u : value;  // 2^16 and beyond
  value = magnitude > 0x7f800000u ? 0x7e00u : value;   // NaN
  return uint16_t(value | ((wide >> 16) & 0x8000u));
}
#endif

template <class T, class S>
RLS_HOST_DEVICE ALWAYS_INLINE T to_compute(S x) {
  if constexpr (__is_same(S, BFloat16)) {
    return T(std::bit_cast<float>(uint32_t(x.bits) << 16));
  } else if constexpr (__is_same(S, Half)) {
#ifdef __CUDACC__
    return T(__half2float(__ushort_as_half(x.bits)));
#else
    return T(widen_half<float>(uint32_t(x.bits)));
#endif
  } else {
    return T(x);
  }
}

// Rounds to nearest even, float64 by way of float32, as torch does; NaN stays NaN.
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
    return Half{narrow_half(float(x))};
#endif
  } else {
    return S(x);
  }
}

}  // namespace rlscuda
