// The streaming filter on the CPU: K samples by one pass over P and W.
//
// One sample x, y does, with u = P x, h = lambda + kappa x u, e = y - W x, v = sqrt(kappa / h) u:
//   W <- W + (kappa / h) e u^T,   P <- (P - v v^T) / lambda.
// Written out, t samples after a matrix P_0 that is still the one in memory, with s_t = lambda^-t,
//   P_t = s_t (P_0 - sum_j w_j w_j^T),   w_j = v_j / sqrt(s_j),
//   W_t = W_0 - sum_j E_j w_j^T,         E_j = -sqrt(s_j kappa / h_j) e_j,
// so a block of K samples needs the products P_0 X^T and W_0 X^T, which are known before it starts,
// thin corrections, and one rank-K update. That update and the products of the next block share a
// pass over the lower triangle in tiles that stay in the cache: 4 n^2 / K bytes are read and
// written a sample in float32, where the formula as it stands moves 12 n^2. The rows w_j may wait
// in V from one call to the next, so that single samples share a pass too; W is always up to date.
//
// A raise of the ridge of coordinate j is a row of V as well, of the sample sqrt(rho) e_j, whose u
// is a column of P; a sample that leaves a window is one of negative kappa, whose row is added.
//
// Arithmetic is in T, the scalars h, s_t in float64. Work is shared by strips of rows, whose
// results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "filter_block.h"
#include "filter_call.h"
#include "kernels.h"
#include "parallel.h"
#include "rls_kernels.h"
#include "scratch.h"
#include "symmetric_project.h"
#include "triangle.h"

namespace rlscuda {
namespace {

struct Covariance {
  // u <- u - sum_j sign_j w_j (w_j x) over the rows that wait; leaves w_j x in the weights.
  template <class T>
  static ALWAYS_INLINE void correct(const RlsFilter<T>& f, const FilterBlock<T>& block,
                                    int64_t rows, const T* x, T* u) {
    const Rows<const T> V{f.V, f.v_stride}, L{block.weights, 1};
    project<T>(V, {x, 0}, {block.weights, 0}, f.n, 1, 0, rows);
    for (int64_t j = 0; j < rows; ++j) block.weights[j] *= T(f.state->sign[j]);
    update_band<T, 1>({u, 0}, L, V, rows, T(1), 0, 0, f.n);
    for (int64_t j = 0; j < rows; ++j) block.weights[j] *= T(f.state->sign[j]);
  }

  template <class T>
  static ALWAYS_INLINE double energy(const RlsFilter<T>& f, const T* x, T* u) {
    return scale_and_dot(u, x, T(f.state->scale), f.n);
  }

  template <class T>
  static ALWAYS_INLINE RowFactors factors(const RlsFilter<T>& f, double gain, double, double h) {
    const double root = std::sqrt(std::fabs(gain) / h), back = std::sqrt(f.state->scale);
    return {root / back, (gain < 0 ? root : -root) * back};
  }

  template <class T>
  static ALWAYS_INLINE T* row(const RlsFilter<T>& f, int64_t j) {
    return f.V + j * f.v_stride;
  }
};

// Row j of V from the column of P that is to be raised by `ridge`; false where it has overflowed.
template <class T>
ALWAYS_INLINE bool raise(const RlsFilter<T>& f, const FilterBlock<T>& block, int64_t j,
                         double ridge) {
  FilterState& state = *f.state;
  const int64_t rows = int64_t(state.rows);
  const Rows<const T> V{f.V, f.v_stride}, L{block.weights, 1};
  T* u = f.V + rows * f.v_stride;
  for (int64_t i = 0; i < j; ++i) u[i] = f.P[j * f.n + i];
  for (int64_t i = j; i < f.n; ++i) u[i] = f.P[i * f.n + j];
  for (int64_t k = 0; k < rows; ++k) block.weights[k] = T(state.sign[k]) * V[k][j];
  update_band<T, 1>({u, 0}, L, V, rows, T(1), 0, 0, f.n);
  const double h = 1 + ridge * state.scale * double(u[j]);
  if (!(h > 0) || !std::isfinite(h)) return false;
  const T unit = T(std::sqrt(ridge / h * state.scale));  // sqrt(ridge / h) scale u / sqrt(scale)
  for (int64_t i = 0; i < f.n; ++i) u[i] *= unit;
  state.sign[rows] = 1;
  state.rows += 1;
  return true;
}

}  // namespace

#define FILTER_CLONES(T)                                                                         \
  SIMD_CLONES void filter_rows(const TrianglePass<T>& p, Rows<T> U, int64_t i0, int64_t i1) {    \
    triangle_rows(p, U, i0, i1);                                                                 \
  }                                                                                              \
  SIMD_CLONES void filter_one(const T* P, const T* s, T* u, int64_t n, int64_t i0, int64_t i1) { \
    symmetric_bands(P, s, u, n, i0, i1);                                                         \
  }                                                                                              \
  SIMD_CLONES BlockEnd filter_steps(const RlsFilter<T>& f, const FilterBlock<T>& block) {        \
    return block_steps<Covariance>(f, block);                                                    \
  }                                                                                              \
  SIMD_CLONES bool filter_raise(const RlsFilter<T>& f, const FilterBlock<T>& block, int64_t j,   \
                                double ridge) {                                                  \
    return raise(f, block, j, ridge);                                                            \
  }                                                                                              \
  SIMD_CLONES void filter_weights(const WeightPass<T>& p, int64_t i0, int64_t i1) {              \
    if (p.rank) update<T>(p.W, p.E, p.V, p.rank, T(1), i0, i1, 0, p.n);                          \
    const Rows<const T> W{p.W.data, p.W.stride};                                                 \
    if (p.count) project<T>(W, p.X, p.products, p.n, p.count, i0, i1);                           \
  }                                                                                              \
  SIMD_CLONES double filter_variance(const RlsFilter<T>& f, const FilterBlock<T>& block,         \
                                     int64_t t) {                                                \
    Covariance::correct(f, block, int64_t(f.state->rows), block.X[t], block.U[t]);               \
    return scale_and_dot(block.U[t], block.X[t], T(f.state->scale), f.n);                        \
  }
FILTER_CLONES(float)
FILTER_CLONES(double)

namespace {

template <class T>
class CovarianceCall final : public FilterCall<T> {
 public:
  using FilterCall<T>::FilterCall;

  void pass(bool apply, int64_t count) override {
    FilterState& state = *f_.state;
    const int64_t rows = apply ? int64_t(state.rows) : 0;
    if (!rows && count == 1 && !apply) return project_one();
    TrianglePass<T> p{{f_.P, f_.n}, f_.n};
    p.R = {f_.V, f_.v_stride};
    p.L = rows ? signed_rows(rows) : p.R;
    p.rank = rows;
    p.scale = T(apply ? state.scale : 1);
    p.S = {block_.X.data, block_.X.stride};
    p.minus = this->minus(count);
    p.next = count;
    if (rows || count)
      triangle_pass(p, block_.U, [](const auto& q, Rows<T> U, int64_t i0, int64_t i1) {
        filter_rows(q, U, i0, i1);
      });
    if (apply) this->nothing_waits();
  }

 protected:
  BlockEnd steps() override { return filter_steps(f_, block_); }
  void raise(int64_t j, double ridge) override { filter_raise(f_, block_, j, ridge); }
  double variance_of(int64_t t) override { return filter_variance(f_, block_, t); }

 private:
  using FilterCall<T>::f_;
  using FilterCall<T>::block_;

  void project_one() {
    const auto rows = [](auto... args) { filter_one(args...); };
    if (f_.n * f_.n * int64_t(sizeof(T)) < kLeastShared) {
      std::fill_n(block_.U.data, f_.n, T(0));
      return rows(f_.P, block_.X.data, block_.U.data, f_.n, 0, f_.n);
    }
    symmetric_project(f_.P, block_.X.data, block_.U.data, f_.n, rows);
  }

  // V by its signs.
  Rows<const T> signed_rows(int64_t rows) {
    const double* sign = f_.state->sign;
    if (std::all_of(sign, sign + rows, [](double s) { return s > 0; })) return {f_.V, f_.v_stride};
    signed_.resize(rows * f_.n);
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t j = 0; j < f_.n; ++j)
        signed_[k * f_.n + j] = T(sign[k]) * f_.V[k * f_.v_stride + j];
    return {signed_.data(), f_.n};
  }

  Scratch<T> signed_;
};

}  // namespace

template <class T>
int64_t rls_filter_cpu(const RlsFilter<T>& f) {
  return CovarianceCall<T>(f, f.history ? 1 : f.samples).learn();
}

template <class T>
void rls_filter_flush_cpu(const RlsFilter<T>& f) {
  CovarianceCall<T>(f, 1).pass(true, 0);
  for (int64_t i = 0; i < f.n; ++i)
    for (int64_t j = 0; j < i; ++j) f.P[j * f.n + i] = f.P[i * f.n + j];
}

template <class T>
void rls_filter_variance_cpu(const RlsFilter<T>& f, double* out) {
  CovarianceCall<T>(f, f.samples).variance(out);
}

template <class T>
int64_t nonfinite_row_cpu(const T* x, int64_t rows, int64_t cols, const int64_t stride[2]) {
  for (int64_t i = 0; i < rows; ++i) {
    int bad = 0;
    for (int64_t j = 0; j < cols; ++j) bad |= !std::isfinite(x[i * stride[0] + j * stride[1]]);
    if (bad) return i;
  }
  return -1;
}

#define FILTER_OF(T)                                                      \
  template int64_t rls_filter_cpu<T>(const RlsFilter<T>&);                \
  template void rls_filter_flush_cpu<T>(const RlsFilter<T>&);             \
  template void rls_filter_variance_cpu<T>(const RlsFilter<T>&, double*); \
  template int64_t nonfinite_row_cpu<T>(const T*, int64_t, int64_t, const int64_t[2]);
FILTER_OF(float)
FILTER_OF(double)

}  // namespace rlscuda
