// The streaming filter of complex signals on the CPU, one sample after the other.
//
// One sample x, y does, with u = P x, h = lambda + kappa x^H u, e = y - W x:
//   W <- W + (kappa / h) e u^H,   P <- (P - (kappa / h) u u^H) / lambda,
// so P is the inverse of the forgetting sum of kappa x x^H, and W minimises that of |y - W x|^2.
// As in the real filter (rls_filter_cpu.cpp) what is taken from P waits in V: a row v stands for
// v^H v. Once they are enough, one pass over the lower triangle applies them and makes the next P
// x. Rows are taken as twice as many reals (hermitian.h). h is real: it is float64, as all scalars.
#include <algorithm>
#include <cmath>

#include "filter_turns.h"
#include "hermitian.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace rlscuda {

// A filter, seen as reals, and the buffers of a call.
template <class R>
struct ComplexFilter {
  const RlsFilter<std::complex<R>>& f;
  Rows<R> P, W, V;   // [n, 2n], [n_out, 2n], [kFilterRows, 2n]
  Rows<R> S;         // [2, 2n], see factors_of
  R* minus;          // [n, 2]
  Rows<R> direct;    // [2, n]
  Rows<R> mirrored;  // [2, 2n]
  R* x;              // [2n]
  R* u;              // [2n]: P x
  Rows<R> product;   // [2, n_out]: re and im of W x, then of the errors
  Rows<R> weights;   // [2, kFilterRows]: re and im of products with rows of V
  R* pairs;          // [kFilterRows, 2]: the same, by rows
  Rows<R> L, right;  // [2 kFilterRows, n], [2 kFilterRows, 2n], see HermitianPass
};

namespace {

template <class R>
ALWAYS_INLINE double real_dot(const R* a, const R* b, int64_t count) {
  R dot[1];
  project_tile<R, 1, 1>({a, 0}, {b, 0}, {dot, 0}, count, false, 0, 0);
  return double(dot[0]);
}

template <class R>
ALWAYS_INLINE void clear(Rows<R> mirrored, int64_t n) {
  for (int part : {0, 1}) std::fill_n(mirrored[part], 2 * n, R(0));
}

// Adds sum_k sign_k re(c_k) v_k and sum_k sign_k im(c_k) v_k over the rows that wait, with a minus.
template <class R>
ALWAYS_INLINE void subtract_rows(const ComplexFilter<R>& c, Rows<R> to) {
  const int64_t rows = int64_t(c.f.state->rows);
  for (int64_t k = 0; k < rows; ++k)
    for (int part : {0, 1}) c.pairs[2 * k + part] = R(c.f.state->sign[k]) * c.weights[part][k];
  update<R>(to, {c.pairs, 2}, {c.V.data, c.V.stride}, rows, R(1), 0, 2, 0, 2 * c.f.n);
}

// u = P x of a sample; what waits is applied before where `apply`.
template <class R>
ALWAYS_INLINE void product(const ComplexFilter<R>& c, const std::complex<R>* x, int64_t stride,
                           bool apply) {
  FilterState& state = *c.f.state;
  const int64_t n = c.f.n, rows = int64_t(state.rows);
  HermitianPass<R> p{c.P, n};
  if (apply) {
    for (int64_t k = 0; k < rows; ++k) {
      const R sign = R(state.sign[k]);
      std::copy_n(c.V[k], 2 * n, c.right[2 * k]);
      times_i(c.right[2 * k + 1], c.V[k], n);
      for (int64_t j = 0; j < n; ++j) {
        c.L[2 * k][j] = sign * c.V[k][2 * j];
        c.L[2 * k + 1][j] = -sign * c.V[k][2 * j + 1];
      }
    }
    p.L = {c.L.data, c.L.stride};
    p.V = {c.right.data, c.right.stride};
    p.rank = 2 * rows;
    p.scale = R(state.scale);
    state.rows = 0;
    state.scale = 1;
  }
  if (x) {
    factors_of(x, stride, n, c.S, c.minus);
    for (int64_t j = 0; j < 2 * n; ++j) c.x[j] = -c.minus[j];
    clear(c.mirrored, n);
    p.S = {c.S.data, c.S.stride};
    p.minus = c.minus;
    p.direct = c.direct;
    p.mirrored = c.mirrored;
  }
  hermitian_pass(p);
  if (!x) return;
  if (const int64_t waiting = int64_t(state.rows)) {
    project<R>({c.V.data, c.V.stride}, p.S, c.weights, 2 * n, 2, 0, waiting);
    subtract_rows(c, c.mirrored);
  }
  put_together(c.direct, c.mirrored, R(state.scale), c.u, n);
}

// Learns the sample whose u is known; false where it cannot be. `due`: coordinates to be raised.
template <class R>
ALWAYS_INLINE bool learn(const ComplexFilter<R>& c, int64_t sample, int64_t& due) {
  const auto& f = c.f;
  FilterState& state = *f.state;
  const double gain = gain_of(f, sample), forgetting = forgetting_of(f, sample);
  project<R>({c.W.data, c.W.stride}, {c.S.data, c.S.stride}, c.product, 2 * f.n, 2, 0, f.n_out);
  const double h = forgetting + gain * real_dot(c.x, c.u, 2 * f.n);
  const double root = std::sqrt(std::fabs(gain) / h), back = std::sqrt(state.scale);
  const R factor = R((gain < 0 ? root : -root) * back);
  const std::complex<R>* y = f.Y + sample * f.y_stride[0];
  R zero = 0;  // becomes nan where an error is not finite
  for (int64_t k = 0; k < f.n_out; ++k) {
    const R re = c.product[0][k], im = c.product[1][k];
    f.predictions[sample * f.n_out + k] = {re, im};
    c.product[0][k] = factor * (y[k * f.y_stride[1]].real() - re);
    c.product[1][k] = factor * (y[k * f.y_stride[1]].imag() - im);
    zero += c.product[0][k] * R(0) + c.product[1][k] * R(0);
  }
  if (!(h > 0) || !std::isfinite(h) || zero != 0) return false;
  if (!counts(f, gain, reinterpret_cast<const std::complex<R>*>(c.x))) return true;
  const R unit = R(root / back);
  R* v = c.V[int64_t(state.rows)];
  for (int64_t j = 0; j < f.n; ++j) {
    v[2 * j] = unit * c.u[2 * j];
    v[2 * j + 1] = -(unit * c.u[2 * j + 1]);
  }
  std::copy_n(v, 2 * f.n, c.right[0]);
  times_i(c.right[1], v, f.n);
  update<R>(c.W, {c.product.data, c.product.stride}, {c.right.data, c.right.stride}, 2, R(1), 0,
            f.n_out, 0, 2 * f.n);
  due = row_waits(f, gain, forgetting, h);
  return true;
}

// Row j of P, which is to be raised by `ridge`, as a row of V; none where it has overflowed.
template <class R>
ALWAYS_INLINE void raise(const ComplexFilter<R>& c, int64_t j, double ridge) {
  FilterState& state = *c.f.state;
  const int64_t n = c.f.n, rows = int64_t(state.rows);
  for (int64_t k = 0; k < rows; ++k) {  // conj(v_k[j])
    c.weights[0][k] = c.V[k][2 * j];
    c.weights[1][k] = -c.V[k][2 * j + 1];
  }
  clear(c.mirrored, n);
  subtract_rows(c, c.mirrored);
  R *v = c.V[rows], *a = c.mirrored[0], *b = c.mirrored[1];
  for (int64_t i = 0; i < n; ++i) {
    const R* p = i <= j ? c.P[j] + 2 * i : c.P[i] + 2 * j;
    v[2 * i] = p[0] + (a[2 * i] - b[2 * i + 1]);
    v[2 * i + 1] = (i < j ? p[1] : i > j ? -p[1] : R(0)) + (a[2 * i + 1] + b[2 * i]);
  }
  v[2 * j + 1] = 0;
  const double h = 1 + ridge * state.scale * double(v[2 * j]);
  if (!(h > 0) || !std::isfinite(h)) return;
  const R unit = R(std::sqrt(ridge / h * state.scale));
  for (int64_t i = 0; i < 2 * n; ++i) v[i] *= unit;
  state.sign[rows] = 1;
  state.rows += 1;
}

}  // namespace

#define COMPLEX_FILTER_CLONES(R)                                                            \
  SIMD_CLONES void complex_product(const ComplexFilter<R>& c, const std::complex<R>* x,     \
                                   int64_t stride, bool apply) {                            \
    product(c, x, stride, apply);                                                           \
  }                                                                                         \
  SIMD_CLONES bool complex_learn(const ComplexFilter<R>& c, int64_t sample, int64_t& due) { \
    return learn(c, sample, due);                                                           \
  }                                                                                         \
  SIMD_CLONES double complex_variance(const ComplexFilter<R>& c, const std::complex<R>* x,  \
                                      int64_t stride) {                                     \
    product(c, x, stride, false);                                                           \
    return real_dot(c.x, c.u, 2 * c.f.n);                                                   \
  }                                                                                         \
  SIMD_CLONES void complex_raise(const ComplexFilter<R>& c, int64_t j, double ridge) {      \
    raise(c, j, ridge);                                                                     \
  }
COMPLEX_FILTER_CLONES(float)
COMPLEX_FILTER_CLONES(double)
#undef COMPLEX_FILTER_CLONES

namespace {

// The filter with its buffers, which the thread keeps; each row is on cache lines of its own.
template <class R>
ComplexFilter<R> complex_filter(const RlsFilter<std::complex<R>>& f) {
  constexpr int64_t kLine = 64 / sizeof(R);
  // an odd number of them keeps the rows of a column apart in the cache
  const auto padded = [](int64_t cols) { return ((cols + kLine - 1) / kLine | 1) * kLine; };
  const int64_t n = padded(f.n), width = padded(2 * f.n), most = 2 * kFilterRows;
  thread_local Scratch<R> memory;
  memory.resize(kLine + (7 + most) * width + (2 + most) * n + 2 * padded(f.n_out) +
                2 * padded(kFilterRows) + padded(most));
  R* next = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) % 64) / sizeof(R);
  const auto take = [&](int64_t rows, int64_t cols) {
    const Rows<R> at{next, cols};
    next += rows * cols;
    return at;
  };
  ComplexFilter<R> c{f, {reals(f.P), 2 * f.n}, {reals(f.W), 2 * f.n}, {reals(f.V), 2 * f.v_stride}};
  c.S = take(2, width);
  c.minus = take(1, width).data;
  c.x = take(1, width).data;
  c.u = take(1, width).data;
  c.direct = take(2, n);
  c.mirrored = take(2, width);
  c.product = take(2, padded(f.n_out));
  c.weights = take(2, padded(kFilterRows));
  c.pairs = take(1, padded(most)).data;
  c.L = take(most, n);
  c.right = take(most, width);
  check_taken(memory, next);
  return c;
}

// Whether what waits must be applied before another sample comes.
bool is_full(const FilterState& state, int64_t n) {
  return state.rows >= double(std::clamp<int64_t>(n / 4, 4, 16)) || scale_is_far(state);
}

}  // namespace

template <class R>
int64_t rls_filter_cpu(const RlsFilter<std::complex<R>>& f) {
  const ComplexFilter<R> c = complex_filter(f);
  const int64_t outputs = f.n_out * f.n;
  for (int64_t t = 0; t < f.samples; ++t) {
    complex_product(c, f.X + t * f.x_stride[0], f.x_stride[1], is_full(*f.state, f.n));
    int64_t due = 0;
    if (!complex_learn(c, t, due)) return t;
    if (f.history) std::copy_n(f.W, outputs, f.history + t * outputs);
    if (!due) continue;
    take_turns(f, due, forgetting_of(f, t), [&](int64_t j, double weight) {
      if (int64_t(f.state->rows) == kFilterRows) complex_product(c, nullptr, 0, true);
      complex_raise(c, j, weight);
    });
  }
  return f.samples;
}

template <class R>
void rls_filter_flush_cpu(const RlsFilter<std::complex<R>>& f) {
  complex_product(complex_filter(f), nullptr, 0, true);
  for (int64_t i = 0; i < f.n; ++i) {
    for (int64_t j = 0; j < i; ++j) f.P[j * f.n + i] = std::conj(f.P[i * f.n + j]);
    f.P[i * f.n + i].imag(0);
  }
}

template <class R>
void rls_filter_variance_cpu(const RlsFilter<std::complex<R>>& f, double* out) {
  const ComplexFilter<R> c = complex_filter(f);
  for (int64_t t = 0; t < f.samples; ++t)
    out[t] = complex_variance(c, f.X + t * f.x_stride[0], f.x_stride[1]);
}

template <class R>
int64_t nonfinite_row_cpu(const std::complex<R>* x, int64_t rows, int64_t cols,
                          const int64_t stride[2]) {
  const int64_t twice[2] = {2 * stride[0], 2 * stride[1]};
  const int64_t re = nonfinite_row_cpu(reals(x), rows, cols, twice);
  const int64_t im = nonfinite_row_cpu(reals(x) + 1, re < 0 ? rows : re, cols, twice);
  return im < 0 ? re : im;
}

#define COMPLEX_FILTER_OF(R)                                                            \
  template int64_t rls_filter_cpu<R>(const RlsFilter<std::complex<R>>&);                \
  template void rls_filter_flush_cpu<R>(const RlsFilter<std::complex<R>>&);             \
  template void rls_filter_variance_cpu<R>(const RlsFilter<std::complex<R>>&, double*); \
  template int64_t nonfinite_row_cpu<R>(const std::complex<R>*, int64_t, int64_t, const int64_t[2]);
COMPLEX_FILTER_OF(float)
COMPLEX_FILTER_OF(double)

}  // namespace rlscuda
