// The storage types of activations and parameters, and their conversion to the compute type.
#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace rlscuda {

struct BFloat16 {
  uint16_t bits;
};
using Half = _Float16;

template <class T, class S>
ALWAYS_INLINE T to_compute(S x) {
  if constexpr (__is_same(S, BFloat16)) {
    const uint32_t wide = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return T(value);
  } else {
    return T(x);
  }
}

// Rounds to nearest even, as torch does; NaN stays NaN.
template <class S, class T>
ALWAYS_INLINE S to_storage(T x) {
  if constexpr (__is_same(S, BFloat16)) {
    const float value = float(x);
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    return BFloat16{uint16_t(value != value ? 0x7fc0u : rounded)};
  } else {
    return S(x);
  }
}

}  // namespace rlscuda
