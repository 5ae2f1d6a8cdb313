// rls_update_ on the CPU: U = S P, the Cholesky factor of H, then P <- scale (P - V^T V) + b I.
//
// Two passes over P, each multithreaded by rows and register-blocked (rls_kernels.h), so that P is
// read twice and written once whatever the rank; the first pass falls away where the caller knows
// S P. H [r, r] is formed and factored in float64. Rows that the caller has projected on the old P
// are turned into those of the new one by the same two kernels: with A = sqrt(kappa / r) L^-1 (S P
// X^T), X P_new = scale (X P - A^T V) + diffusion X. Where updates are held back, U is corrected by
// those, V joins them, and the second pass waits until they are enough (held_rows.h).
#include <algorithm>

#include "held_rows.h"
#include "kernels.h"
#include "parallel.h"
#include "rls_calls.h"
#include "rls_layer.h"
#include "rls_math.h"
#include "rls_rows.h"
#include "scratch.h"
#include "simd.h"
#include "symmetric_project.h"

namespace rlscuda {
namespace {

// y += factor x.
template <class T>
ALWAYS_INLINE void axpy(T* __restrict y, const T* __restrict x, T factor, int64_t n) {
  for (int64_t j = 0; j < n; ++j) y[j] += factor * x[j];
}

}  // namespace

#define RLS_UPDATE_CLONES(T)                                                                    \
  SIMD_CLONES double dot_rows(const T* a, const T* b, int64_t n) { return dot(a, b, n); }       \
  SIMD_CLONES void gram_row(const T* S, const T* U, double* H, int64_t n, int64_t r, int64_t k, \
                            double gain, double forgetting) {                                   \
    gram(S, U, H, n, r, k, gain, forgetting);                                                   \
  }                                                                                             \
  SIMD_CLONES void substitute_columns(const T* F, const T* U, T* V, int64_t n, int64_t r,       \
                                      int64_t begin, int64_t end) {                             \
    substitute(F, U, V, n, r, begin, end);                                                      \
  }                                                                                             \
  SIMD_CLONES void add_scaled(T* y, const T* x, T factor, int64_t n) { axpy(y, x, factor, n); }
RLS_UPDATE_CLONES(float)
RLS_UPDATE_CLONES(double)
#undef RLS_UPDATE_CLONES

SIMD_CLONES bool factor_rows(double* H, double* column, int64_t r) {
  return factor_columns(H, column, r);
}

#define SYMMETRIC_ROWS(T, BYTES, TARGET)                                                        \
  TARGET void symmetric_rows(Width<BYTES>, const T* P, const T* s, T* u, int64_t n, int64_t i0, \
                             int64_t i1) {                                                      \
    symmetric_bands<BYTES>(P, s, u, n, i0, i1);                                                 \
  }
AT_EACH_WIDTH(SYMMETRIC_ROWS, float)
AT_EACH_WIDTH(SYMMETRIC_ROWS, double)
#undef SYMMETRIC_ROWS

namespace {

constexpr int64_t kGrain = 65536;  // multiply-adds below which a thread is not worth waking

// H = forgetting I + gain S U^T, its lower triangle: the threads take rows of it in pairs, of which
// all are together equally long.
template <class T>
void gram_rows(const T* S, const T* U, double* H, int64_t n, int64_t r, double gain,
               double forgetting) {
  parallel_for(0, (r + 1) / 2, kGrain / ((r + 1) * n + 1) + 1, [&](int64_t k0, int64_t k1) {
    for (int64_t k = k0; k < k1; ++k) {
      gram_row(S, U, H, n, r, k, gain, forgetting);
      if (r - 1 - k > k) gram_row(S, U, H, n, r, r - 1 - k, gain, forgetting);
    }
  });
}

// V = root L^-1 U by forward substitution, columns shared among the threads; V may be U.
template <class T>
void substitute_rows(const double* L, const T* U, T* V, int64_t n, int64_t r, double root) {
  thread_local Scratch<T> factors;
  factors.resize(r * r);
  substitution_factors(L, factors.data(), r, root);
  const T* F = factors.data();  // of this thread, as the name of it would not be in another
  parallel_for(0, n, kGrain / (r * r) + 64,
               [&](int64_t begin, int64_t end) { substitute_columns(F, U, V, n, r, begin, end); });
}

// Rows X P of the old P, [rows, n], become those of the new one.
template <class T>
void turn_projected(const RlsUpdate<T>& args, const UpdateRule& rule, const double* L, const T* V,
                    double root) {
  const int64_t n = args.n, r = args.rank, rows = args.projected_rows;
  const int64_t columns = args.projected_columns;
  thread_local Scratch<T> A;
  A.resize(r * rows);
  const Rows<T> projected{args.projected, n}, factor{A.data(), rows};
  const int64_t grain = kGrain / std::max<int64_t>(1, n * r) + 4;
  const T diffusion = T(rule.diffusion);
  parallel_for(0, rows, grain, [&](int64_t i0, int64_t i1) {
    project_rows<T>({args.projected, n}, {args.S, n}, factor, n, r, i0, i1);
  });
  substitute_rows(L, factor.data, factor.data, rows, r, root);
  parallel_for(0, rows, grain, [&](int64_t i0, int64_t i1) {
    update_rows<T>(projected, {factor.data, rows}, {V, n}, n, r, T(rule.decay / rule.forgetting),
                   i0, i1);
    for (int64_t i = i0; i < i1; ++i) {
      add_scaled(projected[i], args.projected_x + i * columns, diffusion, columns);
      for (int64_t j = columns; j < n; ++j) projected[i][j] += diffusion;
    }
  });
}

// The update of one matrix; b is its place in the batch.
template <class T>
void update_matrix(const RlsUpdate<T>& args, const UpdateRule& rule, int64_t b, double* health) {
  const int64_t n = args.n, r = args.rank;
  T* P = args.P + b * n * n;
  const T* S = args.S + b * r * n;
  thread_local Scratch<T> scratch;
  thread_local Scratch<double> H;
  scratch.resize(2 * r * n);
  H.resize((r + 1) * r);
  T* V = scratch.data();
  T* U = args.U ? args.U + b * r * n : V + r * n;
  double gain = 0;
  if (!rows_enter(args, rule, b, U, health, [&] { return dot_rows(S, S, r * n); }, gain)) return;

  const int64_t grain = std::max<int64_t>(8, kGrain / std::max<int64_t>(1, n * r) + 1);
  if (args.projection) {
    std::copy_n(args.projection, r * n, U);
  } else if (r == 1 && n * n * int64_t(sizeof(T)) > near_bytes()) {
    symmetric_project(P, S, U, n, [](auto... rows) {
      at_width(true, [&](auto width) { symmetric_rows(width, rows...); });
    });
  } else {
    parallel_for(0, n, grain, [&](int64_t i0, int64_t i1) {
      project_rows<T>({P, n}, {S, n}, {U, n}, n, r, i0, i1);
    });
  }

  const HeldRows<T> held(args, b);
  if (args.held) held.correct(S, U);

  gram_rows(S, U, H.data(), n, r, gain, rule.forgetting);
  double trace = 0;
  for (int64_t k = 0; k < r; ++k) trace += H[k * r + k];
  if (!factor_rows(H.data(), H.data() + r * r, r)) {
    start_anew(P, n, rule, health);
    if (args.held) *held.state = kNothingHeld;
    return;
  }
  count_update(args, rule, b, trace, health);

  const double root = std::sqrt(gain);
  if (args.held) {
    substitute_rows(H.data(), U, held.next(), n, r, root / std::sqrt(held.state->scale));
    *held.state = held_after(*held.state, rule, args.hold);
    if (must_apply(*held.state, args.hold)) held.apply(P);
    return;
  }
  substitute_rows(H.data(), U, V, n, r, root);
  const T scale = T(rule.decay / rule.forgetting), diffusion = T(rule.diffusion);
  const Rows<const T> factor{V, n};
  parallel_for(0, n, grain, [&](int64_t i0, int64_t i1) {
    update_rows<T>({P, n}, factor, factor, n, r, scale, i0, i1);
    for (int64_t i = i0; i < i1; ++i) P[i * n + i] += diffusion;
  });
  if (args.projected) turn_projected(args, rule, H.data(), V, root);
}

}  // namespace

template <class T>
void rls_update_cpu(const RlsUpdate<T>* layers, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    update_layer(layers[i], [&](const auto&... matrix) { update_matrix(layers[i], matrix...); });
}

template void rls_update_cpu<float>(const RlsUpdate<float>*, int64_t);
template void rls_update_cpu<double>(const RlsUpdate<double>*, int64_t);

}  // namespace rlscuda
