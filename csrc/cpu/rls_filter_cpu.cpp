// The streaming filter on the CPU: K samples by one pass over P and W.
//
// One sample x, y does, with u = P x, h = lambda + kappa x u, e = y - W x, v = sqrt(kappa / h) u:
//   W <- W + (kappa / h) e u^T,   P <- (P - v v^T) / lambda.
// Written out, t samples after a matrix P_0 that is still the one in memory, with s_t = lambda^-t,
//   P_t = s_t (P_0 - sum_j w_j w_j^T),   w_j = v_j / sqrt(s_j),
//   W_t = W_0 - sum_j E_j w_j^T,         E_j = -sqrt(s_j kappa / h_j) e_j,
// so a block of K samples needs the products P_0 X^T and W_0 X^T, which are known before it starts,
// thin corrections, and one rank-K update. That update and the products of the next block share a
// pass over the lower triangle in tiles that stay in the cache: 4 n^2 / K bytes are read and written
// a sample in float32, where the formula as it stands moves 12 n^2. The rows w_j may wait in V from
// one call to the next, so that single samples share a pass too; W is always up to date.
//
// A raise of the ridge of coordinate j is a row of V as well, of the sample sqrt(rho) e_j, whose u is
// a column of P; a sample that leaves a window is one of negative kappa, whose row is added.
//
// Arithmetic is in T, the scalars h, s_t in float64. Work is shared by strips of rows, whose results
// do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "filter_turns.h"
#include "kernels.h"
#include "parallel.h"
#include "rls_kernels.h"
#include "scratch.h"
#include "symmetric_project.h"
#include "triangle.h"

namespace rlscuda {

constexpr int64_t kMostSamples = 16;  // K at most; V then still has room for raises

// Buffers of a call, each row on cache lines of its own.
template <class T>
struct FilterBlock {
  Rows<T> X;      // [K, n]: the samples
  Rows<T> U;      // [K, n]: P_0 x
  Rows<T> minus;  // [n, K]: -X^T
  Rows<T> E;      // [K, n_out]: E of the rows of V that this block has added
  Rows<T> L;      // [kFilterRows, n]: V by its signs, where there are negative ones
  T* weights;     // [kFilterRows]
  int64_t first, count;
};

enum class Steps { kAll, kFailed, kRaise, kApply };

// What a block has done: the samples taken, and why it ended.
struct BlockEnd {
  int64_t taken, due;
  Steps why;
};

// W <- W - E^T V of the rows [first, rows) of V, or its product with X; by rows of W.
template <class T>
struct WeightPass {
  Rows<T> W;
  int64_t n, rank;
  Rows<const T> E, V;
  Rows<const T> X;
  Rows<T> products;
  int64_t count;
};

namespace {

// u <- scale u; returns x u.
template <class T>
ALWAYS_INLINE double scale_and_dot(T* u, const T* x, T scale, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[2] = {};
  T tail = 0;
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W)
    for (int b = 0; b < 2; ++b) {
      const Vec<T> product = scale * load(u + j + b * W);
      store(u + j + b * W, product);
      acc[b] += product * load(x + j + b * W);
    }
  for (; j < n; ++j) {
    u[j] *= scale;
    tail += u[j] * x[j];
  }
  return double(tail + sum(acc[0] + acc[1]));
}

// u <- u - sum_j sign_j w_j (w_j x) over the rows that wait; leaves w_j x in the weights.
template <class T>
ALWAYS_INLINE void correct(const RlsFilter<T>& f, const FilterBlock<T>& block, int64_t rows,
                           const T* x, T* u) {
  const Rows<const T> V{f.V, f.v_stride}, L{block.weights, 1};
  project<T>(V, {x, 0}, {block.weights, 0}, f.n, 1, 0, rows);
  for (int64_t j = 0; j < rows; ++j) block.weights[j] *= T(f.state->sign[j]);
  update_band<T, 1>({u, 0}, L, V, rows, T(1), 0, 0, f.n);
  for (int64_t j = 0; j < rows; ++j) block.weights[j] *= T(f.state->sign[j]);
}

// The samples of a block one after the other, until a raise is due, what waits must be applied, or
// one cannot be taken.
template <class T>
ALWAYS_INLINE BlockEnd steps(const RlsFilter<T>& f, const FilterBlock<T>& block) {
  FilterState& state = *f.state;
  const int64_t before = int64_t(state.rows);
  for (int64_t t = 0; t < block.count; ++t) {
    const int64_t sample = block.first + t, rows = int64_t(state.rows);
    const double gain = gain_of(f, sample), forgetting = forgetting_of(f, sample);
    if (scale_is_far(state)) return {t, 0, Steps::kApply};
    const T* x = block.X[t];
    T* u = block.U[t];
    T* prediction = f.predictions + sample * f.n_out;
    if (rows) correct(f, block, rows, x, u);
    if (rows > before)  // what this block has taken from W x
      update_band<T, 1>({prediction, 0}, {block.weights + before, 1},
                        {block.E.data, block.E.stride}, rows - before, T(1), 0, 0, f.n_out);
    const double h = forgetting + gain * scale_and_dot(u, x, T(state.scale), f.n);
    const double size = std::fabs(gain), root = std::sqrt(size / h), back = std::sqrt(state.scale);
    const T factor = T((gain < 0 ? root : -root) * back);
    const T* y = f.Y + sample * f.y_stride[0];
    T* error = block.E[rows - before];
    T zero = 0;  // becomes nan where an error is not finite
    for (int64_t k = 0; k < f.n_out; ++k) {
      error[k] = factor * (y[k * f.y_stride[1]] - prediction[k]);
      zero += error[k] * T(0);
    }
    if (!(h > 0) || !std::isfinite(h) || zero != 0) return {t, 0, Steps::kFailed};
    if (!counts(f, gain, x)) continue;
    const T unit = T(root / back);
    T* v = f.V + rows * f.v_stride;
    for (int64_t j = 0; j < f.n; ++j) v[j] = unit * u[j];
    if (const int64_t due = row_waits(f, gain, forgetting, h)) return {t + 1, due, Steps::kRaise};
  }
  return {block.count, 0, Steps::kAll};
}

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

#define FILTER_CLONES(T)                                                                          \
  SIMD_CLONES void filter_rows(const TrianglePass<T>& p, Rows<T> U, int64_t i0, int64_t i1) {     \
    triangle_rows(p, U, i0, i1);                                                                  \
  }                                                                                               \
  SIMD_CLONES void filter_one(const T* P, const T* s, T* u, int64_t n, int64_t i0, int64_t i1) {  \
    symmetric_bands(P, s, u, n, i0, i1);                                                          \
  }                                                                                               \
  SIMD_CLONES BlockEnd filter_steps(const RlsFilter<T>& f, const FilterBlock<T>& block) {         \
    return steps(f, block);                                                                       \
  }                                                                                               \
  SIMD_CLONES bool filter_raise(const RlsFilter<T>& f, const FilterBlock<T>& block, int64_t j,    \
                                double ridge) {                                                   \
    return raise(f, block, j, ridge);                                                             \
  }                                                                                               \
  SIMD_CLONES void filter_weights(const WeightPass<T>& p, int64_t i0, int64_t i1) {               \
    if (p.rank) update<T>(p.W, p.E, p.V, p.rank, T(1), i0, i1, 0, p.n);                           \
    const Rows<const T> W{p.W.data, p.W.stride};                                                  \
    if (p.count) project<T>(W, p.X, p.products, p.n, p.count, i0, i1);                            \
  }                                                                                               \
  SIMD_CLONES double filter_variance(const RlsFilter<T>& f, const FilterBlock<T>& block,          \
                                     int64_t t) {                                                 \
    correct(f, block, int64_t(f.state->rows), block.X[t], block.U[t]);                            \
    return scale_and_dot(block.U[t], block.X[t], T(f.state->scale), f.n);                         \
  }
FILTER_CLONES(float)
FILTER_CLONES(double)

namespace {

// One call: the buffers of it, and the passes.
template <class T>
class FilterCall {
 public:
  FilterCall(const RlsFilter<T>& f, int64_t most)
      : f_(f), most_(std::clamp<int64_t>(most, 1, kMostSamples)) {
    const int64_t wide = padded(f.n);
    memory_.resize(2 * most_ * wide + most_ * padded(f.n_out) + f.n * padded(most_) +
                   kFilterRows * wide + 2 * kLine + kFilterRows);
    T* next = memory_.data();
    next += (-reinterpret_cast<uintptr_t>(next) % 64) / sizeof(T);
    const auto take = [&](int64_t rows, int64_t cols) {
      T* at = next;
      next += rows * cols;
      return Rows<T>{at, cols};
    };
    block_.X = take(most_, wide);
    block_.U = take(most_, wide);
    block_.E = take(most_, padded(f.n_out));
    block_.minus = take(f.n, padded(most_));
    block_.L = take(kFilterRows, wide);
    block_.weights = next;
  }

  FilterBlock<T>& block() { return block_; }

  // K: enough to be worth a pass, few enough that the thin corrections stay thin.
  int64_t samples_per_pass() const { return std::clamp<int64_t>(f_.n / 4, 4, kMostSamples); }

  // Whether what waits must be applied before another sample comes.
  bool is_full() const {
    const FilterState& state = *f_.state;
    return int64_t(state.rows) >= samples_per_pass() || scale_is_far(state);
  }

  // The samples [first, first + count) into the block.
  void take(int64_t first, int64_t count) {
    block_.first = first;
    block_.count = count;
    for (int64_t t = 0; t < count; ++t) {
      const T* x = f_.X + (first + t) * f_.x_stride[0];
      if (f_.x_stride[1] == 1)
        std::copy_n(x, f_.n, block_.X[t]);
      else
        for (int64_t j = 0; j < f_.n; ++j) block_.X[t][j] = x[j * f_.x_stride[1]];
    }
  }

  // Applies what waits where `apply`, and projects the block.
  void pass(bool apply, int64_t count) {
    FilterState& state = *f_.state;
    const int64_t rows = apply ? int64_t(state.rows) : 0;
    if (!rows && count == 1 && !apply) return project_one();
    TrianglePass<T> p{{f_.P, f_.n}, f_.n};
    p.R = {f_.V, f_.v_stride};
    p.L = rows ? signed_rows(rows) : p.R;
    p.rank = rows;
    p.scale = T(apply ? state.scale : 1);
    p.S = {block_.X.data, block_.X.stride};
    p.minus = {block_.minus.data, block_.minus.stride};
    p.next = count;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = 0; j < f_.n; ++j) block_.minus[j][t] = -block_.X[t][j];
    if (rows || count)
      triangle_pass(p, block_.U, [](const auto& q, Rows<T> U, int64_t i0, int64_t i1) {
        filter_rows(q, U, i0, i1);
      });
    if (apply) {
      state.rows = 0;
      state.scale = 1;
    }
  }

  // W X^T of the block, or the update of W by the rows of V from `first` on.
  void weights(int64_t first, int64_t rows, int64_t count) {
    WeightPass<T> p{{f_.W, f_.n}, f_.n, rows, {block_.E.data, block_.E.stride}};
    p.V = {f_.V + first * f_.v_stride, f_.v_stride};
    p.X = {block_.X.data, block_.X.stride};
    p.products = {f_.predictions + block_.first * f_.n_out, f_.n_out};
    p.count = count;
    const int64_t strips = (f_.n_out + kStripRows - 1) / kStripRows;
    const int64_t grain = (1 << 19) / (kStripRows * f_.n * (rows + count) + 1) + 1;
    parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
      filter_weights(p, begin * kStripRows, std::min(end * kStripRows, f_.n_out));
    });
  }

  // Raises `due` coordinates, beginning with the one whose turn it is.
  void raise(int64_t due, double forgetting) {
    take_turns(f_, due, forgetting, [&](int64_t j, double weight) {
      if (int64_t(f_.state->rows) == kFilterRows) pass(true, 0);
      filter_raise(f_, block_, j, weight);
    });
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  // An odd number of cache lines keeps the rows of a column apart in the cache.
  static int64_t padded(int64_t cols) { return ((cols + kLine - 1) / kLine | 1) * kLine; }

  void project_one() {
    const auto rows = [](auto... args) { filter_one(args...); };
    if (f_.n * f_.n * int64_t(sizeof(T)) < kLeastShared) {
      std::fill_n(block_.U.data, f_.n, T(0));
      return rows(f_.P, block_.X.data, block_.U.data, f_.n, 0, f_.n);
    }
    symmetric_project(f_.P, block_.X.data, block_.U.data, f_.n, rows);
  }

  Rows<const T> signed_rows(int64_t rows) {
    const double* sign = f_.state->sign;
    if (std::all_of(sign, sign + rows, [](double s) { return s > 0; })) return {f_.V, f_.v_stride};
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t j = 0; j < f_.n; ++j) block_.L[k][j] = T(sign[k]) * f_.V[k * f_.v_stride + j];
    return {block_.L.data, block_.L.stride};
  }

  const RlsFilter<T>& f_;
  int64_t most_;
  FilterBlock<T> block_{};
  Scratch<T> memory_;
};

}  // namespace

template <class T>
int64_t rls_filter_cpu(const RlsFilter<T>& f) {
  FilterCall<T> call(f, f.history ? 1 : f.samples);
  FilterState& state = *f.state;
  for (int64_t first = 0; first < f.samples;) {
    const bool full = call.is_full();
    const int64_t room = call.samples_per_pass() - (full ? 0 : int64_t(state.rows));
    const int64_t count = f.history ? 1 : std::min(room, f.samples - first);
    call.take(first, count);
    call.pass(full, count);
    call.weights(0, 0, count);
    const int64_t before = int64_t(state.rows);
    const BlockEnd end = filter_steps(f, call.block());
    if (const int64_t added = int64_t(state.rows) - before) call.weights(before, added, 0);
    if (f.history && end.taken)
      std::copy_n(f.W, f.n_out * f.n, f.history + first * f.n_out * f.n);
    first += end.taken;
    if (end.why == Steps::kFailed) return first;
    if (end.why == Steps::kRaise)
      call.raise(end.due, forgetting_of(f, first - 1));
  }
  return f.samples;
}

template <class T>
void rls_filter_flush_cpu(const RlsFilter<T>& f) {
  FilterCall<T>(f, 1).pass(true, 0);
  for (int64_t i = 0; i < f.n; ++i)
    for (int64_t j = 0; j < i; ++j) f.P[j * f.n + i] = f.P[i * f.n + j];
}

template <class T>
void rls_filter_variance_cpu(const RlsFilter<T>& f, double* out) {
  FilterCall<T> call(f, f.samples);
  for (int64_t first = 0; first < f.samples; first += kMostSamples) {
    const int64_t count = std::min(kMostSamples, f.samples - first);
    call.take(first, count);
    call.pass(false, count);
    for (int64_t t = 0; t < count; ++t) out[first + t] = filter_variance(f, call.block(), t);
  }
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

#define FILTER_OF(T)                                                       \
  template int64_t rls_filter_cpu<T>(const RlsFilter<T>&);                 \
  template void rls_filter_flush_cpu<T>(const RlsFilter<T>&);              \
  template void rls_filter_variance_cpu<T>(const RlsFilter<T>&, double*);  \
  template int64_t nonfinite_row_cpu<T>(const T*, int64_t, int64_t, const int64_t[2]);
FILTER_OF(float)
FILTER_OF(double)

}  // namespace rlscuda
