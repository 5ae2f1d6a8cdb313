// A 32-byte vector of T, unaligned loads and stores; every SIMD level lowers it as it can.
#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace rlscuda {

constexpr int kVectorBytes = 32;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
ALWAYS_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
ALWAYS_INLINE void store(T* to, const Vec<T>& v) {
  std::memcpy(to, &v, sizeof v);
}

// The sum of the lanes, by halves.
template <class V>
ALWAYS_INLINE auto sum(const V& v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  auto total = v[0] * 0;
  for (int i = 0; i < lanes / 2; ++i) total += v[i] + v[i + lanes / 2];
  return total;
}

}  // namespace rlscuda
