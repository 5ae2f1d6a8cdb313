// The two register-blocked kernels of recursive least squares on the CPU, on any row-major block:
//   project   U[k, i] = sum_j M[i, j] S[k, j]
//   update    M[i, j] = scale (M[i, j] - sum_k L[k, i] R[k, j])
// With M = P and L = R = V they are the two halves of rls_update_; with M = W, the weights of the
// streaming filter. The projection keeps ROWS x RANKS accumulators over a stream of columns; the
// update keeps a ROWS x 2-vector tile of M and subtracts the rank-r product from it. With L = R an
// element and its mirror image go through the same operations, so P stays symmetric to the bit.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace rlscuda {

// A row-major block: `stride` elements from one row to the next.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  ALWAYS_INLINE T* operator[](int64_t i) const { return data + i * stride; }
};

// ROWS rows of M from i on, RANKS rows of S from k on; adds to U where `accumulate`.
template <class T, int ROWS, int RANKS>
ALWAYS_INLINE void project_tile(Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t cols,
                                bool accumulate, int64_t i, int64_t k) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[ROWS][RANKS];
  T tail[ROWS][RANKS];
  for (int a = 0; a < ROWS; ++a)
    for (int b = 0; b < RANKS; ++b) {
      acc[a][b] = Vec<T>{};
      tail[a][b] = 0;
    }
  int64_t j = 0;
  for (; j + W <= cols; j += W) {
    Vec<T> s[RANKS];
    for (int b = 0; b < RANKS; ++b) s[b] = load(S[k + b] + j);
    for (int a = 0; a < ROWS; ++a) {
      const Vec<T> m = load(M[i + a] + j);
      for (int b = 0; b < RANKS; ++b) acc[a][b] += m * s[b];
    }
  }
  for (; j < cols; ++j)
    for (int a = 0; a < ROWS; ++a)
      for (int b = 0; b < RANKS; ++b) tail[a][b] += M[i + a][j] * S[k + b][j];
  for (int a = 0; a < ROWS; ++a)
    for (int b = 0; b < RANKS; ++b) {
      const T dot = tail[a][b] + sum(acc[a][b]);
      T& u = U[k + b][i + a];
      u = accumulate ? u + dot : dot;
    }
}

template <class T, int RANKS>
ALWAYS_INLINE void project_ranks(Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t cols,
                                 bool accumulate, int64_t i0, int64_t i1, int64_t k) {
  constexpr int ROWS = RANKS == 1 ? 8 : 3;
  int64_t i = i0;
  for (; i + ROWS <= i1; i += ROWS) project_tile<T, ROWS, RANKS>(M, S, U, cols, accumulate, i, k);
  for (; i < i1; ++i) project_tile<T, 1, RANKS>(M, S, U, cols, accumulate, i, k);
}

// Rows [i0, i1) of M, all r rows of S.
template <class T>
ALWAYS_INLINE void project(Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t cols, int64_t r,
                           int64_t i0, int64_t i1, bool accumulate = false) {
  constexpr int64_t kBand = 24;  // rows of M that stay in the cache while all ranks pass
  for (int64_t i = i0; i < i1; i += kBand) {
    const int64_t end = std::min(i + kBand, i1);
    int64_t k = 0;
    for (; k + 4 <= r; k += 4) project_ranks<T, 4>(M, S, U, cols, accumulate, i, end, k);
    for (; k < r; ++k) project_ranks<T, 1>(M, S, U, cols, accumulate, i, end, k);
  }
}

// ROWS rows of M from i on, VECS vectors of columns from j on.
template <class T, int ROWS, int VECS>
ALWAYS_INLINE void update_tile(Rows<T> M, Rows<const T> L, Rows<const T> R, int64_t r, T scale,
                               int64_t i, int64_t j) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[ROWS][VECS];
  for (int a = 0; a < ROWS; ++a)
    for (int b = 0; b < VECS; ++b) acc[a][b] = load(M[i + a] + j + b * W);
  for (int64_t k = 0; k < r; ++k)
    for (int a = 0; a < ROWS; ++a)
      for (int b = 0; b < VECS; ++b) acc[a][b] -= L[k][i + a] * load(R[k] + j + b * W);
  for (int a = 0; a < ROWS; ++a)
    for (int b = 0; b < VECS; ++b) store(M[i + a] + j + b * W, scale * acc[a][b]);
}

template <class T, int ROWS>
ALWAYS_INLINE void update_band(Rows<T> M, Rows<const T> L, Rows<const T> R, int64_t r, T scale,
                               int64_t i, int64_t j0, int64_t j1) {
  constexpr int W = kLanes<T>;
  constexpr int VECS = ROWS == 1 ? 4 : 2;  // sums that do not wait for one another
  int64_t j = j0;
  for (; j + VECS * W <= j1; j += VECS * W) update_tile<T, ROWS, VECS>(M, L, R, r, scale, i, j);
  for (; j + W <= j1; j += W) update_tile<T, ROWS, 1>(M, L, R, r, scale, i, j);
  for (; j < j1; ++j)
    for (int a = 0; a < ROWS; ++a) {
      T acc = M[i + a][j];
      for (int64_t k = 0; k < r; ++k) acc -= L[k][i + a] * R[k][j];
      M[i + a][j] = scale * acc;
    }
}

// Rows [i0, i1), columns [j0, j1) of M.
template <class T>
ALWAYS_INLINE void update(Rows<T> M, Rows<const T> L, Rows<const T> R, int64_t r, T scale,
                          int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  int64_t i = i0;
  for (; i + 4 <= i1; i += 4) update_band<T, 4>(M, L, R, r, scale, i, j0, j1);
  for (; i < i1; ++i) update_band<T, 1>(M, L, R, r, scale, i, j0, j1);
}

}  // namespace rlscuda
