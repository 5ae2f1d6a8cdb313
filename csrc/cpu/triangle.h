// One pass over the lower triangle of a symmetric matrix: a rank-r update, and the products of what
// comes next, in tiles that stay in the cache.
//
// Rows go in strips of kStripRows. What counts of P is what lies left of the end of a strip's
// diagonal block; the rest is never read or written. Right of the triangle its mirror image serves:
// an element P[i, j] goes into U[:, i] by S[:, j], and into U[:, j] by S[:, i].
#pragma once

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "rls_kernels.h"
#include "scratch.h"

namespace rlscuda {

constexpr int64_t kStripRows = 24;    // whole tiles of both kernels: 4 rows and 3 rows
constexpr int64_t kTileBytes = 1024;  // of a row: 24 rows stay in the L1 cache between the kernels
constexpr int64_t kLeastShared = 1 << 20;  // bytes of P from which threads share a pass

// P <- scale (P - L^T R) where rank > 0, then U = S P where next > 0.
template <class T>
struct TrianglePass {
  Rows<T> P;
  int64_t n;
  Rows<const T> L, R;
  int64_t rank;
  T scale;
  Rows<const T> S;      // [next, n]
  Rows<const T> minus;  // [n, next]: -S^T
  int64_t next;
};

template <class T>
ALWAYS_INLINE void triangle_strip(const TrianglePass<T>& p, Rows<T> U, int64_t i0, int64_t i1) {
  constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));
  const Rows<const T> P{p.P.data, p.P.stride};
  for (int64_t j0 = 0; j0 < i1; j0 += kTile) {
    const int64_t j1 = std::min(j0 + kTile, i1);
    if (p.rank) update<T>(p.P, p.L, p.R, p.rank, p.scale, i0, i1, j0, j1);
    if (!p.next) continue;
    project<T>({P[0] + j0, P.stride}, {p.S[0] + j0, p.S.stride}, U, j1 - j0, p.next, i0, i1,
               j0 > 0);
    const int64_t left = std::min(j1, i0);
    if (j0 < left)
      update<T>(U, {p.minus[i0], p.minus.stride}, {P[i0], P.stride}, i1 - i0, T(1), 0, p.next, j0,
                left);
  }
}

// Rows [i0, i1), which begin with a strip; U [next, n] is their part of the products.
template <class T>
ALWAYS_INLINE void triangle_rows(const TrianglePass<T>& p, Rows<T> U, int64_t i0, int64_t i1) {
  for (int64_t k = 0; k < p.next; ++k) std::fill_n(U[k], i0, T(0));
  for (int64_t i = i0; i < i1; i += kStripRows)
    triangle_strip(p, U, i, std::min(i + kStripRows, i1));
}

// Calls rows(p, U, i0, i1), a SIMD clone of triangle_rows, over all of P. Chunks of about equal
// area, whatever the number of threads, have a U each, which are added up in order: the result does
// not depend on the threads.
template <class T, class RowsOf>
void triangle_pass(const TrianglePass<T>& p, Rows<T> U, const RowsOf& rows) {
  if (p.n * p.n * int64_t(sizeof(T)) < kLeastShared) return rows(p, U, 0, p.n);
  constexpr int64_t kChunks = 16;
  const int64_t strips = (p.n + kStripRows - 1) / kStripRows;
  const auto edge = [&](int64_t c) {
    return std::min(int64_t(double(strips) * std::sqrt(double(c) / kChunks)) * kStripRows, p.n);
  };
  thread_local Scratch<T> scratch;
  scratch.resize(kChunks * p.next * p.n);
  T* partial = scratch.data();
  parallel_for(0, kChunks, 1, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) {
      const Rows<T> part{partial + c * p.next * p.n, p.n};
      rows(p, part, edge(c), c + 1 == kChunks ? p.n : edge(c + 1));
    }
  });
  for (int64_t k = 0; k < p.next; ++k) {
    std::fill_n(U[k], p.n, T(0));
    for (int64_t c = 0; c < kChunks; ++c) {
      const T* part = partial + (c * p.next + k) * p.n;
      const int64_t end = c + 1 == kChunks ? p.n : edge(c + 1);
      for (int64_t j = 0; j < end; ++j) U[k][j] += part[j];
    }
  }
}

}  // namespace rlscuda
