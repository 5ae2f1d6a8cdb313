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

// The sum of the lanes, by halves. (Where the compiler has no shuffle, the lanes go by memory.)
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif
ALWAYS_INLINE float sum(const Vec<float>& v) {
#ifdef HAS_SHUFFLE
  const auto four =
      __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  const auto two = four + __builtin_shufflevector(four, four, 2, 3, 2, 3);
  return two[0] + two[1];
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}
ALWAYS_INLINE double sum(const Vec<double>& v) {
#ifdef HAS_SHUFFLE
  const auto two = __builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3);
  return two[0] + two[1];
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

}  // namespace rlscuda
