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

ALWAYS_INLINE Vec<float> load_compute(const Half* from) {
  Bits16 bits;
  std::memcpy(&bits, from, sizeof bits);
  return widen_half<Vec<float>>(__builtin_convertvector(bits, Bits32));
}

}  // namespace rlscuda
