// Vectors of T, unaligned loads and stores. Those of 32 bytes are for every SIMD level, which
// lowers them as it can; those of 64 for kernels whose sums are shaped for the registers of
// x86-64-v4: of 64 bytes other levels make two of 32, and too many sums for their registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace rlscuda {

constexpr int kVectorBytes = 32;
constexpr int kWidest = 64;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T, int BYTES>
struct VecOf {
  typedef T type __attribute__((vector_size(BYTES)));
};
template <class T>
using Vec = typename VecOf<T, kVectorBytes>::type;

template <class V, class T>
ALWAYS_INLINE V load_as(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
ALWAYS_INLINE Vec<T> load(const T* from) {
  return load_as<Vec<T>>(from);
}

template <class T, class V>
ALWAYS_INLINE void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof v);
}

// The width of the vectors of a kernel, by which its overloads differ.
template <int BYTES>
struct Width {};

// Defines KERNEL(T, BYTES, TARGET), functions of a Width<BYTES>, at each width.
#if HAS_SIMD_CLONES
#define AT_EACH_WIDTH(KERNEL, T)       \
  KERNEL(T, kVectorBytes, SIMD_CLONES) \
  KERNEL(T, kWidest, __attribute__((target("arch=x86-64-v4"))))
#else
#define AT_EACH_WIDTH(KERNEL, T) KERNEL(T, kVectorBytes, SIMD_CLONES)
#endif

// Calls kernel(width) with the widest vectors of this machine, of those of 64 bytes where `wide`.
template <class F>
void at_width(bool wide, const F& kernel) {
#if HAS_SIMD_CLONES
  if (wide && __builtin_cpu_supports("x86-64-v4")) return kernel(Width<kWidest>());
#endif
  kernel(Width<kVectorBytes>());
}

// The sum of the lanes, by halves. (Where the compiler has no shuffle, the lanes go by memory.)
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif
#ifdef HAS_SHUFFLE
// The lower half of a vector plus the upper one.
ALWAYS_INLINE auto half(const Vec<float>& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
ALWAYS_INLINE auto half(const VecOf<float, kWidest>::type& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
ALWAYS_INLINE auto half(const VecOf<double, kWidest>::type& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#endif
ALWAYS_INLINE float sum(const Vec<float>& v) {
#ifdef HAS_SHUFFLE
  const auto four = half(v);
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
#ifdef HAS_SHUFFLE
ALWAYS_INLINE float sum(const VecOf<float, kWidest>::type& v) { return sum(half(v)); }
ALWAYS_INLINE double sum(const VecOf<double, kWidest>::type& v) { return sum(half(v)); }

// The sums of four vectors as a vector, the same as each alone has.
template <class V>
ALWAYS_INLINE auto sums(const V& a, const V& b, const V& c, const V& d) {
  if constexpr (sizeof(V) > 4 * sizeof(a[0])) {
    return sums(half(a), half(b), half(c), half(d));
  } else {
    const V x =
        __builtin_shufflevector(a, c, 0, 1, 4, 5) + __builtin_shufflevector(a, c, 2, 3, 6, 7);
    const V y =
        __builtin_shufflevector(b, d, 0, 1, 4, 5) + __builtin_shufflevector(b, d, 2, 3, 6, 7);
    return __builtin_shufflevector(x, y, 0, 4, 2, 6) + __builtin_shufflevector(x, y, 1, 5, 3, 7);
  }
}
#endif

// Makes the columns of a square of vectors its rows: swaps its halves, theirs, and so on.
ALWAYS_INLINE void transpose(Vec<float> (&v)[kLanes<float>]) {
#ifdef HAS_SHUFFLE
  for (int i = 0; i < 4; ++i) {
    const auto x = v[i], y = v[i + 4];
    v[i] = __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int i = 0; i < 6; i += i % 4 == 0 ? 1 : 3) {
    const auto x = v[i], y = v[i + 2];
    v[i] = __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13);
    v[i + 2] = __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 8; i += 2) {
    const auto x = v[i], y = v[i + 1];
    v[i] = __builtin_shufflevector(x, y, 0, 8, 2, 10, 4, 12, 6, 14);
    v[i + 1] = __builtin_shufflevector(x, y, 1, 9, 3, 11, 5, 13, 7, 15);
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = v[i][j];
      v[i][j] = v[j][i], v[j][i] = x;
    }
#endif
}
ALWAYS_INLINE void transpose(Vec<double> (&v)[kLanes<double>]) {
#ifdef HAS_SHUFFLE
  for (int i = 0; i < 2; ++i) {
    const auto x = v[i], y = v[i + 2];
    v[i] = __builtin_shufflevector(x, y, 0, 1, 4, 5);
    v[i + 2] = __builtin_shufflevector(x, y, 2, 3, 6, 7);
  }
  for (int i = 0; i < 4; i += 2) {
    const auto x = v[i], y = v[i + 1];
    v[i] = __builtin_shufflevector(x, y, 0, 4, 2, 6);
    v[i + 1] = __builtin_shufflevector(x, y, 1, 5, 3, 7);
  }
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < i; ++j) {
      const double x = v[i][j];
      v[i][j] = v[j][i], v[j][i] = x;
    }
#endif
}

}  // namespace rlscuda
