// Vector loads of the storage types in the type in which they are summed.
#pragma once

#include "half.h"
#include "simd.h"

namespace rlscuda {

ALWAYS_INLINE Vec<float> load_compute(const float* from) { return load(from); }
ALWAYS_INLINE Vec<double> load_compute(const double* from) { return load(from); }

typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));

ALWAYS_INLINE Vec<float> load_compute(const BFloat16* from) {
  Bits16 bits;
  std::memcpy(&bits, from, sizeof bits);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Bits32) << 16);
}

// Exponent and mantissa move to their places in float32; the exponent is rebased by an integer
// addition, for subnormal numbers by a subtraction of floats that is exact.
ALWAYS_INLINE Vec<float> load_compute(const Half* from) {
  Bits16 bits;
  std::memcpy(&bits, from, sizeof bits);
  const Bits32 wide = __builtin_convertvector(bits, Bits32);
  const Bits32 magnitude = (wide & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
  const Bits32 rebased = magnitude + 0x38000000u;
  const Vec<float> smallest = reinterpret_cast<Vec<float>>(Bits32{} + 0x38800000u);  // 2^-14
  const Vec<float> subnormal = reinterpret_cast<Vec<float>>(magnitude + 0x38800000u) - smallest;
  const Bits32 is_subnormal = reinterpret_cast<Bits32>(exponent == 0u);
  const Bits32 is_special = reinterpret_cast<Bits32>(exponent == 0x0f800000u);
  const Bits32 normal = rebased + (is_special & 0x38000000u);
  const Bits32 value =
      (reinterpret_cast<Bits32>(subnormal) & is_subnormal) | (normal & ~is_subnormal);
  return reinterpret_cast<Vec<float>>(value | (wide & 0x8000u) << 16);
}

}  // namespace rlscuda
