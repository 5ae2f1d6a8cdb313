// The thin half of an update on the CPU: H from the rows S and U, and V = root L^-1 U.
#pragma once

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

// H = forgetting I + gain S U^T, its lower triangle.
template <class T>
ALWAYS_INLINE void gram(const T* S, const T* U, double* H, int64_t n, int64_t r, double gain,
                        double forgetting) {
  for (int64_t k = 0; k < r; ++k)
    for (int64_t l = 0; l <= k; ++l)
      H[k * r + l] = gain * dot(S + k * n, U + l * n, n) + (k == l ? forgetting : 0);
}

// V = root L^-1 U by forward substitution over the rows; V may be U.
template <class T>
ALWAYS_INLINE void substitute(const double* L, const T* U, T* V, int64_t n, int64_t r,
                              double root) {
  for (int64_t k = 0; k < r; ++k) {
    T* v = V + k * n;
    const T front = T(root / L[k * r + k]);
    for (int64_t j = 0; j < n; ++j) v[j] = front * U[k * n + j];
    for (int64_t l = 0; l < k; ++l) {
      const T factor = T(L[k * r + l] / L[k * r + k]);
      const T* before = V + l * n;
      for (int64_t j = 0; j < n; ++j) v[j] -= factor * before[j];
    }
  }
}

}  // namespace rlscuda
