// rls_update_ of Hermitian matrices on the CPU: U = S P, H = lambda I + (kappa / r) S U^H = L L^H,
// then P <- scale (P - V^H V) + b I with V = sqrt(kappa / r) L^-1 U.
//
// U_k = conj(P conj(s_k)) by dots with the rows of P; all in reals (hermitian.h), H in float64. The
// update goes over the lower triangle, which is then mirrored, so P is Hermitian to the bit.
#include "hermitian.h"
#include "kernels.h"
#include "parallel.h"
#include "rls_layer.h"
#include "rls_rows.h"

namespace rlscuda {
namespace {

using Complex = std::complex<double>;

// H = lambda I + gain S U^H, its lower triangle; of S and U the rows are complex numbers.
template <class R>
ALWAYS_INLINE void complex_gram(const R* S, const R* U, R* turned, Complex* H, int64_t n, int64_t r,
                                double gain, double forgetting) {
  for (int64_t l = 0; l < r; ++l) {
    times_i(turned, U + 2 * l * n, n);
    for (int64_t k = l; k < r; ++k) {
      const R* s = S + 2 * k * n;
      H[k * r + l] = {gain * dot(s, U + 2 * l * n, 2 * n) + (k == l ? forgetting : 0),
                      k == l ? 0 : gain * dot(s, turned, 2 * n)};
    }
  }
}

// H = L L^H in place, by its lower triangle; false where it is not positive definite or not finite.
bool complex_cholesky(Complex* H, int64_t r) {
  for (int64_t j = 0; j < r; ++j)
    for (int64_t i = j; i < r; ++i) {
      Complex sum = H[i * r + j];
      for (int64_t k = 0; k < j; ++k) sum -= H[i * r + k] * std::conj(H[j * r + k]);
      if (i == j && (!(sum.real() > 0) || !std::isfinite(sum.real()))) return false;
      H[i * r + j] = i == j ? std::sqrt(sum.real()) : sum / H[j * r + j].real();
    }
  return true;
}

// Row k of V = root L^-1 U, where those before it are known.
template <class R>
ALWAYS_INLINE void substitute_row(const Complex* L, const R* u, Rows<R> V, int64_t n, int64_t r,
                                  int64_t k, double root) {
  const double diagonal = L[k * r + k].real();
  R* v = V[2 * k];
  for (int64_t j = 0; j < 2 * n; ++j) v[j] = R(root / diagonal) * u[j];
  for (int64_t l = 0; l < k; ++l) {
    const R re = R(L[k * r + l].real() / diagonal), im = R(L[k * r + l].imag() / diagonal);
    const R *before = V[2 * l], *turned = V[2 * l + 1];
    for (int64_t j = 0; j < 2 * n; ++j) v[j] -= re * before[j] + im * turned[j];
  }
  times_i(V[2 * k + 1], v, n);
}

}  // namespace

#define COMPLEX_UPDATE_CLONES(R)                                                                  \
  SIMD_CLONES double complex_square(const R* S, int64_t count) { return dot(S, S, count); }       \
  SIMD_CLONES void complex_project(Rows<const R> P, Rows<const R> S, Rows<R> U, int64_t n,        \
                                   int64_t rows) {                                                \
    project<R>(P, S, U, 2 * n, rows, 0, n);                                                       \
  }                                                                                               \
  SIMD_CLONES void complex_h(const R* S, const R* U, R* turned, Complex* H, int64_t n, int64_t r, \
                             double gain, double forgetting) {                                    \
    complex_gram(S, U, turned, H, n, r, gain, forgetting);                                        \
  }                                                                                               \
  SIMD_CLONES void complex_substitute(const Complex* L, const R* U, Rows<R> V, int64_t n,         \
                                      int64_t r, double root) {                                   \
    for (int64_t k = 0; k < r; ++k) substitute_row(L, U + 2 * k * n, V, n, r, k, root);           \
  }                                                                                               \
  SIMD_CLONES void complex_apply(const HermitianPass<R>& p) { hermitian_pass(p); }
COMPLEX_UPDATE_CLONES(float)
COMPLEX_UPDATE_CLONES(double)
#undef COMPLEX_UPDATE_CLONES

namespace {

// The update of one matrix; b is its place in the batch.
template <class R>
void update_matrix(const RlsUpdate<std::complex<R>>& args, const UpdateRule& rule, int64_t b,
                   double* health) {
  const int64_t n = args.n, r = args.rank;
  const std::complex<R>* S = args.S + b * r * n;
  std::complex<R>*P = args.P + b * n * n, *U = args.U + b * r * n;
  const auto square = [&] { return complex_square(reals(S), 2 * r * n); };
  double gain = 0;
  if (!rows_enter(args, rule, b, U, health, square, gain)) return;

  thread_local Scratch<R> scratch;
  thread_local Scratch<Complex> H;
  scratch.resize(6 * r * n + 2 * n);
  H.resize(r * r);
  const Rows<R> V{scratch.data(), 2 * n}, half{V[2 * r], n};  // [2r, 2n], [2r, n]
  R* turned = half[2 * r];                                    // [2n]
  for (int64_t k = 0; k < r;
       ++k) {  // s_k and i s_k, whose dots with z are those parts of z conj(s_k)
    std::copy_n(reals(S + k * n), 2 * n, V[2 * k]);
    times_i(V[2 * k + 1], V[2 * k], n);
  }
  complex_project({reals(P), 2 * n}, {V.data, V.stride}, half, n, 2 * r);
  for (int64_t k = 0; k < r; ++k)
    for (int64_t j = 0; j < n; ++j) U[k * n + j] = {half[2 * k][j], -half[2 * k + 1][j]};

  complex_h(reals(S), reals(U), turned, H.data(), n, r, gain, rule.forgetting);
  double trace = 0;
  for (int64_t k = 0; k < r; ++k) trace += H[k * r + k].real();
  if (!complex_cholesky(H.data(), r)) return start_anew(P, n, rule, health);
  count_update(args, rule, b, trace, health);

  complex_substitute(H.data(), reals(U), V, n, r, std::sqrt(gain));
  for (int64_t k = 0; k < r; ++k)
    for (int64_t j = 0; j < n; ++j) {
      half[2 * k][j] = V[2 * k][2 * j];
      half[2 * k + 1][j] = -V[2 * k][2 * j + 1];
    }
  HermitianPass<R> pass{{reals(P), 2 * n}, n};
  pass.L = {half.data, half.stride};
  pass.V = {V.data, V.stride};
  pass.rank = 2 * r;
  pass.scale = R(rule.decay / rule.forgetting);
  complex_apply(pass);
  mirror_block(pass.P, 0, n, 0);
  for (int64_t i = 0; i < n; ++i) P[i * n + i] += R(rule.diffusion);
}

}  // namespace

template <class R>
void rls_update_cpu(const RlsUpdate<std::complex<R>>& layer) {
  update_layer(layer, [&](const auto&... matrix) { update_matrix(layer, matrix...); });
}

template void rls_update_cpu<float>(const RlsUpdate<std::complex<float>>&);
template void rls_update_cpu<double>(const RlsUpdate<std::complex<double>>&);

}  // namespace rlscuda
