// The thin half of an update on the CPU: H from the rows S and U, and V = root L^-1 U.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace rlscuda {

// sum_j a[j] b[j] in float64.
template <class T>
ALWAYS_INLINE double dot(const T* a, const T* b, int64_t n) {
  typedef T Narrow __attribute__((vector_size(4 * sizeof(T))));
  Vec<double> acc[4] = {};
  int64_t j = 0;
  for (; j + 16 <= n; j += 16)
    for (int k = 0; k < 4; ++k) {
      Narrow x, y;
      std::memcpy(&x, a + j + 4 * k, sizeof x);
      std::memcpy(&y, b + j + 4 * k, sizeof y);
      acc[k] += __builtin_convertvector(x, Vec<double>) * __builtin_convertvector(y, Vec<double>);
    }
  double total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; j < n; ++j) total += double(a[j]) * double(b[j]);
  return total;
}

// The same of a and four rows of b, which are n apart.
template <class T>
ALWAYS_INLINE void dot_four(const T* a, const T* b, int64_t n, double* out) {
  typedef T Narrow __attribute__((vector_size(4 * sizeof(T))));
  Vec<double> acc[4][2] = {};
  int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    for (int half = 0; half < 2; ++half) {
      Narrow x, y;
      std::memcpy(&x, a + j + 4 * half, sizeof x);
      const Vec<double> wide = __builtin_convertvector(x, Vec<double>);
      for (int k = 0; k < 4; ++k) {
        std::memcpy(&y, b + k * n + j + 4 * half, sizeof y);
        acc[k][half] += wide * __builtin_convertvector(y, Vec<double>);
      }
    }
  for (int k = 0; k < 4; ++k) out[k] = sum(acc[k][0] + acc[k][1]);
  for (; j < n; ++j)
    for (int k = 0; k < 4; ++k) out[k] += double(a[j]) * double(b[k * n + j]);
}

// Row k of H = forgetting I + gain S U^T, its lower triangle.
template <class T>
ALWAYS_INLINE void gram(const T* S, const T* U, double* H, int64_t n, int64_t r, int64_t k,
                        double gain, double forgetting) {
  double* row = H + k * r;
  int64_t l = 0;
  for (; l + 4 <= k + 1; l += 4) dot_four(S + k * n, U + l * n, n, row + l);
  for (; l <= k; ++l) row[l] = dot(S + k * n, U + l * n, n);
  for (l = 0; l <= k; ++l) row[l] = gain * row[l] + (k == l ? forgetting : 0);
}

// The in-place Cholesky factor of H [r, r], to the bits of `cholesky`, but a column at a time, so
// that the elements of a row do not wait for each other. `column` has room for r numbers.
ALWAYS_INLINE bool factor_columns(double* H, double* column, int64_t r) {
  for (int64_t j = 0; j < r; ++j) {
    double& diagonal = H[j * r + j];
    if (!(diagonal > 0) || !(diagonal < INFINITY)) return false;
    diagonal = std::sqrt(diagonal);
    for (int64_t i = j + 1; i < r; ++i) column[i] = H[i * r + j] /= diagonal;
    for (int64_t i = j + 1; i < r; ++i) {
      double* __restrict row = H + i * r;
      const double factor = column[i];
      for (int64_t k = j + 1; k <= i; ++k) row[k] -= factor * column[k];
    }
  }
  return true;
}

// V = root L^-1 U by rows is V[k] = F[k, k] U[k] - sum of F[k, l] V[l] over l < k: these F [r, r].
template <class T>
ALWAYS_INLINE void substitution_factors(const double* L, T* F, int64_t r, double root) {
  for (int64_t k = 0; k < r; ++k) {
    const double diagonal = L[k * r + k];
    for (int64_t l = 0; l < k; ++l) F[k * r + l] = T(L[k * r + l] / diagonal);
    F[k * r + k] = T(root / diagonal);
  }
}

// Columns [begin, end) of V, which may be U: as many at a time as stay near.
template <class T>
ALWAYS_INLINE void substitute(const T* F, const T* U, T* V, int64_t n, int64_t r, int64_t begin,
                              int64_t end) {
  constexpr int64_t kColumns = 128;
  for (int64_t first = begin; first < end; first += kColumns) {
    const int64_t count = std::min(kColumns, end - first);
    for (int64_t k = 0; k < r; ++k) {
      const T* f = F + k * r;
      const T *u = U + k * n + first, *b = V + first;
      T* v = V + k * n + first;
#pragma GCC ivdep
      for (int64_t j = 0; j < count; ++j) v[j] = f[k] * u[j];
      int64_t l = 0;
      for (; l + 4 <= k; l += 4, b += 4 * n) {
        const T f0 = f[l], f1 = f[l + 1], f2 = f[l + 2], f3 = f[l + 3];
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j)
          v[j] = v[j] - f0 * b[j] - f1 * b[n + j] - f2 * b[2 * n + j] - f3 * b[3 * n + j];
      }
      for (; l < k; ++l, b += n) {
        const T f0 = f[l];
#pragma GCC ivdep
        for (int64_t j = 0; j < count; ++j) v[j] -= f0 * b[j];
      }
    }
  }
}

}  // namespace rlscuda
