// The two register-blocked kernels of recursive least squares on the CPU, on any row-major block:
//   project   U[k, i] = sum_j M[i, j] S[k, j]
//   update    M[i, j] = scale (M[i, j] - sum_k L[k, i] R[k, j])
// With M = P and L = R = V they are the two halves of rls_update_; with M = W, the weights of the
// streaming filter. The projection keeps ROWS x RANKS accumulators over a stream of columns; the
// update keeps a ROWS x 2-vector tile of M and subtracts the rank-r product from it. With L = R an
// element and its mirror image go through the same operations, so P stays symmetric to the bit.
//
// Vectors of 64 bytes have the 32 registers of x86-64-v4 and so larger tiles. Columns that are left
// over, which one by one would cost up to 15 times a vector, then go in the last vector of the row:
// the projection takes the lanes that it has seen for zeros, the update comes twice to the same.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace rlscuda {

// A row-major block: `stride` elements from one row to the next.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  ALWAYS_INLINE T* operator[](int64_t i) const { return data + i * stride; }
  ALWAYS_INLINE Rows from(int64_t i) const { return {data + i * stride, stride}; }
  ALWAYS_INLINE operator Rows<const T>() const
    requires(!std::is_const_v<T>)
  {
    return {data, stride};
  }
};

template <int BYTES>
constexpr bool kWide = BYTES > kVectorBytes;

// Calls kernel(width) with the width of vectors that suits rows of n elements.
template <class T, class F>
void at_width_of_rows(int64_t n, const F& kernel) {
  at_width(n * int64_t(sizeof(T)) >= 2 * kWidest, kernel);
}

// The lanes of x from `first` on, and those of y before it.
template <class V>
ALWAYS_INLINE V from_lane(int64_t first, const V& x, const V& y) {
  V lane;
  for (int l = 0; l < int(sizeof(V) / sizeof(x[0])); ++l) lane[l] = l;
  return lane >= decltype(+x[0])(first) ? x : y;
}

// ROWS rows of M from i on, RANKS rows of S from k on; adds to U where `accumulate`.
template <class T, int ROWS, int RANKS, int BYTES = kVectorBytes>
ALWAYS_INLINE void project_tile(Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t cols,
                                bool accumulate, int64_t i, int64_t k) {
  using V = typename VecOf<T, BYTES>::type;
  constexpr int W = BYTES / int(sizeof(T));
  V acc[ROWS][RANKS];
  T tail[ROWS][RANKS];
  for (int a = 0; a < ROWS; ++a)
    for (int b = 0; b < RANKS; ++b) {
      acc[a][b] = V{};
      tail[a][b] = 0;
    }
  int64_t j = 0;
  for (; j + W <= cols; j += W) {
    V s[RANKS];
    for (int b = 0; b < RANKS; ++b) s[b] = load_as<V>(S[k + b] + j);
    for (int a = 0; a < ROWS; ++a) {
      const V m = load_as<V>(M[i + a] + j);
      for (int b = 0; b < RANKS; ++b) acc[a][b] += m * s[b];
    }
  }
  if (kWide<BYTES> && j < cols) {
    const int64_t last = cols - W;
    V s[RANKS];
    for (int b = 0; b < RANKS; ++b) s[b] = from_lane(j - last, load_as<V>(S[k + b] + last), V{});
    for (int a = 0; a < ROWS; ++a) {
      const V m = from_lane(j - last, load_as<V>(M[i + a] + last), V{});
      for (int b = 0; b < RANKS; ++b) acc[a][b] += m * s[b];
    }
    j = cols;
  }
  for (; j < cols; ++j)
    for (int a = 0; a < ROWS; ++a)
      for (int b = 0; b < RANKS; ++b) tail[a][b] += M[i + a][j] * S[k + b][j];
  if constexpr (kWide<BYTES> && ROWS % 4 == 0) {
    for (int b = 0; b < RANKS; ++b)
      for (int a = 0; a < ROWS; a += 4) {
        const auto dots = sums(acc[a][b], acc[a + 1][b], acc[a + 2][b], acc[a + 3][b]);
        T* u = U[k + b] + i + a;
        store(u, accumulate ? load_as<decltype(dots + dots)>(u) + dots : dots);
      }
    return;
  }
  for (int a = 0; a < ROWS; ++a)
    for (int b = 0; b < RANKS; ++b) {
      const T dot = tail[a][b] + sum(acc[a][b]);
      T& u = U[k + b][i + a];
      u = accumulate ? u + dot : dot;
    }
}

template <class T, int RANKS, int BYTES>
ALWAYS_INLINE void project_ranks(Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t cols,
                                 bool accumulate, int64_t i0, int64_t i1, int64_t k) {
  constexpr int ROWS = RANKS == 1 ? 8 : kWide<BYTES> ? 4 : 3;
  int64_t i = i0;
  for (; i + ROWS <= i1; i += ROWS)
    project_tile<T, ROWS, RANKS, BYTES>(M, S, U, cols, accumulate, i, k);
  for (; i < i1; ++i) project_tile<T, 1, RANKS, BYTES>(M, S, U, cols, accumulate, i, k);
}

// Rows [i0, i1) of M, all r rows of S; `cols` is a vector or more where vectors are of 64 bytes.
template <class T, int BYTES = kVectorBytes>
ALWAYS_INLINE void project(Rows<const T> M, Rows<const T> S, Rows<T> U, int64_t cols, int64_t r,
                           int64_t i0, int64_t i1, bool accumulate = false) {
  constexpr int64_t kBand = 24;  // rows of M that stay in the cache while all ranks pass
  for (int64_t i = i0; i < i1; i += kBand) {
    const int64_t end = std::min(i + kBand, i1);
    int64_t k = 0;
    for (; k + 4 <= r; k += 4) project_ranks<T, 4, BYTES>(M, S, U, cols, accumulate, i, end, k);
    for (; k < r; ++k) project_ranks<T, 1, BYTES>(M, S, U, cols, accumulate, i, end, k);
  }
}

// ROWS rows of M from i on, VECS vectors of columns from j on.
template <class T, int ROWS, int VECS, int BYTES>
struct UpdateTile {
  using V = typename VecOf<T, BYTES>::type;
  static constexpr int W = BYTES / int(sizeof(T));
  V acc[ROWS][VECS];

  ALWAYS_INLINE void read(Rows<T> M, int64_t i, int64_t j) {
    for (int a = 0; a < ROWS; ++a)
      for (int b = 0; b < VECS; ++b) acc[a][b] = load_as<V>(M[i + a] + j + b * W);
  }
  ALWAYS_INLINE void write(Rows<T> M, Rows<const T> L, Rows<const T> R, int64_t r, T scale,
                           int64_t i, int64_t j) {
    for (int64_t k = 0; k < r; ++k)
      for (int a = 0; a < ROWS; ++a)
        for (int b = 0; b < VECS; ++b) acc[a][b] -= L[k][i + a] * load_as<V>(R[k] + j + b * W);
    for (int a = 0; a < ROWS; ++a)
      for (int b = 0; b < VECS; ++b) store(M[i + a] + j + b * W, scale * acc[a][b]);
  }
};

template <class T, int ROWS, int VECS, int BYTES>
ALWAYS_INLINE void update_tile(Rows<T> M, Rows<const T> L, Rows<const T> R, int64_t r, T scale,
                               int64_t i, int64_t j) {
  UpdateTile<T, ROWS, VECS, BYTES> tile;
  tile.read(M, i, j);
  tile.write(M, L, R, r, scale, i, j);
}

template <class T, int ROWS, int BYTES = kVectorBytes>
ALWAYS_INLINE void update_band(Rows<T> M, Rows<const T> L, Rows<const T> R, int64_t r, T scale,
                               int64_t i, int64_t j0, int64_t j1) {
  constexpr int W = BYTES / int(sizeof(T));
  constexpr int VECS = ROWS == 1 ? 4 : 2;  // sums that do not wait for one another
  const bool rest = kWide<BYTES> && j1 - j0 >= W && (j1 - j0) % W != 0;
  UpdateTile<T, ROWS, 1, BYTES> last;  // read before others write what they share with it
  if (rest) last.read(M, i, j1 - W);
  int64_t j = j0;
  for (; j + VECS * W <= j1; j += VECS * W)
    update_tile<T, ROWS, VECS, BYTES>(M, L, R, r, scale, i, j);
  for (; j + W <= j1; j += W) update_tile<T, ROWS, 1, BYTES>(M, L, R, r, scale, i, j);
  if (rest) return last.write(M, L, R, r, scale, i, j1 - W);
  for (; j < j1; ++j)
    for (int a = 0; a < ROWS; ++a) {
      T acc = M[i + a][j];
      for (int64_t k = 0; k < r; ++k) acc -= L[k][i + a] * R[k][j];
      M[i + a][j] = scale * acc;
    }
}

// Rows [i0, i1), columns [j0, j1) of M.
template <class T, int BYTES = kVectorBytes>
ALWAYS_INLINE void update(Rows<T> M, Rows<const T> L, Rows<const T> R, int64_t r, T scale,
                          int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  int64_t i = i0;
  if (kWide<BYTES>)
    for (; i + 8 <= i1; i += 8) update_band<T, 8, BYTES>(M, L, R, r, scale, i, j0, j1);
  for (; i + 4 <= i1; i += 4) update_band<T, 4, BYTES>(M, L, R, r, scale, i, j0, j1);
  for (; i < i1; ++i) update_band<T, 1, BYTES>(M, L, R, r, scale, i, j0, j1);
}

}  // namespace rlscuda
