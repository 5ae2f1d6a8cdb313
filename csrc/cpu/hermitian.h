// Hermitian matrices by the register-blocked kernels of real ones (rls_kernels.h).
//
// A complex row of n numbers is 2 n real ones, so that every inner loop runs over contiguous reals:
//   z x        two real dots of the row z, with [re x, -im x, ...] and with [im x, re x, ...]
//   c z        re c times the row z, plus im c times the row i z = [-im z, re z, ...]
//   conj(z) c  conj of both sums of re c z and im c z, put together at the end
// Of P the lower triangle counts. Rows go in strips, whose diagonal blocks are mirrored after an
// update: a product may then take them whole, and what differs by rounding cannot grow.
#pragma once

#include <algorithm>
#include <complex>
#include <cstdint>

#include "rls_kernels.h"

namespace rlscuda {

constexpr int64_t kHermitianStrip = 12;  // whole tiles of both kernels: 4 rows and 3 rows

// The real numbers of complex ones.
template <class R>
ALWAYS_INLINE R* reals(std::complex<R>* z) {
  return reinterpret_cast<R*>(z);
}
template <class R>
ALWAYS_INLINE const R* reals(const std::complex<R>* z) {
  return reinterpret_cast<const R*>(z);
}

// i z of a row z of n complex numbers.
template <class R>
ALWAYS_INLINE void times_i(R* to, const R* z, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    to[2 * j] = -z[2 * j + 1];
    to[2 * j + 1] = z[2 * j];
  }
}

// Rows by which x is multiplied: S [2, 2n] for dots with x, and minus [n, 2], the numbers -x.
template <class R>
ALWAYS_INLINE void factors_of(const std::complex<R>* x, int64_t stride, int64_t n, Rows<R> S,
                              R* minus) {
  for (int64_t j = 0; j < n; ++j) {
    const R re = x[j * stride].real(), im = x[j * stride].imag();
    S[0][2 * j] = re;
    S[0][2 * j + 1] = -im;
    S[1][2 * j] = im;
    S[1][2 * j + 1] = re;
    minus[2 * j] = -re;
    minus[2 * j + 1] = -im;
  }
}

// P <- scale (P - sum_k conj(v_k)^T v_k sign_k) where rank > 0, by rows v_k; then P x where S is.
template <class R>
struct HermitianPass {
  Rows<R> P;  // [n, 2n]
  int64_t n;
  Rows<const R> L;  // [rank, n]: for each v_k the rows sign_k re v_k and -sign_k im v_k
  Rows<const R> V;  // [rank, 2n]: v_k and i v_k
  int64_t rank;     // 2 for each row v_k
  R scale;
  Rows<const R> S;   // [2, 2n], or null
  const R* minus;    // [n, 2]
  Rows<R> direct;    // [2, n], out: re and im of what the rows of the triangle make of P x
  Rows<R> mirrored;  // [2, 2n], added to: what their mirror images make, before it is put together
};

// Right of the diagonal of a block, the mirror image.
template <class R>
ALWAYS_INLINE void mirror_block(Rows<R> P, int64_t i0, int64_t i1, int64_t j0) {
  for (int64_t i = i0; i < i1; ++i) {
    for (int64_t j = j0; j < i; ++j) {
      P[j][2 * i] = P[i][2 * j];
      P[j][2 * i + 1] = -P[i][2 * j + 1];
    }
    P[i][2 * i + 1] = 0;
  }
}

template <class R>
ALWAYS_INLINE void hermitian_tile(const HermitianPass<R>& p, int64_t i0, int64_t i1, int64_t j0,
                                  int64_t j1) {
  const Rows<const R> P{p.P.data, p.P.stride};
  const bool diagonal = j0 == 2 * i0;
  if (p.rank) update<R>(p.P, p.L, p.V, p.rank, p.scale, i0, i1, j0, j1);
  if (p.rank && diagonal) mirror_block(p.P, i0, i1, i0);
  if (!p.S.data) return;
  project<R>({P[0] + j0, P.stride}, {p.S[0] + j0, p.S.stride}, p.direct, j1 - j0, 2, i0, i1,
             j0 > 0);
  if (!diagonal)
    update<R>(p.mirrored, {p.minus + 2 * i0, 2}, {P[i0], P.stride}, i1 - i0, R(1), 0, 2, j0, j1);
}

template <class R>
ALWAYS_INLINE void hermitian_pass(const HermitianPass<R>& p) {
  constexpr int64_t kTile = 2048 / int64_t(sizeof(R));  // 12 rows of it stay in the L1 cache
  for (int64_t i0 = 0; i0 < p.n; i0 += kHermitianStrip) {
    const int64_t i1 = std::min(i0 + kHermitianStrip, p.n);
    for (int64_t j0 = 0; j0 < 2 * i0; j0 += kTile)
      hermitian_tile(p, i0, i1, j0, std::min(j0 + kTile, 2 * i0));
    hermitian_tile(p, i0, i1, 2 * i0, 2 * i1);
  }
}

// u [n] = scale P x from both parts of it.
template <class R>
ALWAYS_INLINE void put_together(Rows<R> direct, Rows<R> mirrored, R scale, R* u, int64_t n) {
  const R *a = mirrored[0], *b = mirrored[1];
  for (int64_t j = 0; j < n; ++j) {
    u[2 * j] = scale * (direct[0][j] + (a[2 * j] + b[2 * j + 1]));
    u[2 * j + 1] = scale * (direct[1][j] + (b[2 * j] - a[2 * j + 1]));
  }
}

}  // namespace rlscuda
