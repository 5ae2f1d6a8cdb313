// u = P s for a symmetric P that does not fit the near caches: only its lower triangle is read.
//
// An element P[i, j], j < i, serves u[i] and u[j]. Rows are cut into kChunks chunks of about equal
// area, whatever the number of threads, each with a private u, added up in order: the result does
// not depend on the threads.
#pragma once

#include <algorithm>
#include <cmath>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

namespace rlscuda {

// Bytes of a P that two cores keep in their L2 caches from one pass to the next, where both passes
// give each core the same rows, as this one does not. Of two whatever the number of threads, which
// results do not depend on.
inline int64_t near_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (cache > 0) return 2 * cache;
#endif
  return 1 << 20;
}

// Adds to u the part of P s that the rows [i, i + ROWS) of the lower triangle make.
template <int BYTES, int ROWS, class T>
ALWAYS_INLINE void symmetric_band(const T* P, const T* s, T* u, int64_t n, int64_t i) {
  using V = typename VecOf<T, BYTES>::type;
  constexpr int W = BYTES / int(sizeof(T));
  const T* rows = P + i * n;
  V acc[ROWS] = {};
  T tail[ROWS] = {};
  int64_t j = 0;
  for (; j + W <= i; j += W) {
    const V sj = load_as<V>(s + j);
    V uj = load_as<V>(u + j);
    for (int a = 0; a < ROWS; ++a) {
      const V p = load_as<V>(rows + a * n + j);
      acc[a] += p * sj;
      uj += p * s[i + a];
    }
    store(u + j, uj);
  }
  for (int a = 0; a < ROWS; ++a) {
    for (int64_t k = j; k < i + a; ++k) {
      tail[a] += rows[a * n + k] * s[k];
      u[k] += rows[a * n + k] * s[i + a];
    }
    u[i + a] += rows[a * n + i + a] * s[i + a];
  }
  for (int a = 0; a < ROWS; ++a) u[i + a] += tail[a] + sum(acc[a]);
}

template <int BYTES = kVectorBytes, class T>
ALWAYS_INLINE void symmetric_bands(const T* P, const T* s, T* u, int64_t n, int64_t i0,
                                   int64_t i1) {
  int64_t i = i0;
  for (; i + 4 <= i1; i += 4) symmetric_band<BYTES, 4>(P, s, u, n, i);
  for (; i < i1; ++i) symmetric_band<BYTES, 1>(P, s, u, n, i);
}

// Calls rows(P, s, u, n, i0, i1), a SIMD clone of symmetric_bands, over all chunks.
template <class T, class Rows>
void symmetric_project(const T* P, const T* s, T* u, int64_t n, const Rows& rows) {
  constexpr int64_t kChunks = 16;
  thread_local Scratch<T> scratch;
  scratch.assign(kChunks * n, T(0));
  T* partial = scratch.data();
  const auto edge = [n](int64_t c) { return int64_t(double(n) * std::sqrt(double(c) / kChunks)); };
  parallel_for(0, kChunks, 1, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) rows(P, s, partial + c * n, n, edge(c), edge(c + 1));
  });
  std::fill_n(u, n, T(0));
  for (int64_t c = 0; c < kChunks; ++c) {
    const T* part = partial + c * n;
    for (int64_t j = 0; j < edge(c + 1); ++j) u[j] += part[j];
  }
}

}  // namespace rlscuda
