// The samples of a block, one after the other: what the forms of the streaming filter share.
//
// A sample leaves a row in memory by which P and W can be brought up to date later. A form says
// what the row is:
//   correct(f, block, rows, x, u)  u, the product of x with the matrix in memory, becomes that with
//                                  all rows that wait; leaves v_j x of each in block.weights
//   energy(f, x, u)                x P x
//   factors(f, gain, forgetting, h)  of u for the row, and of the error for W <- W - E^T V
//   row(f, j)                      where row j goes
#pragma once

#include <cmath>
#include <cstdint>

#include "filter_turns.h"
#include "kernels.h"
#include "parallel.h"
#include "rls_kernels.h"

namespace rlscuda {

constexpr int64_t kMostSamples = 16;  // K at most; V then still has room for raises

// Buffers of a call, each row on cache lines of its own.
template <class T>
struct FilterBlock {
  Rows<T> X;      // [K, n]: the samples
  Rows<T> U;      // [K, n]: their products with the matrix in memory
  Rows<T> minus;  // [n, K]: -X^T
  Rows<T> E;      // [K, n_out]: E of the rows of V that this block has added
  T* weights;     // [kFilterRows]
  int64_t first, count;
};

enum class Steps { kAll, kFailed, kRaise, kApply };

// What a block has done: the samples taken, and why it ended.
struct BlockEnd {
  int64_t taken, due;
  Steps why;
};

struct RowFactors {
  double row, error;
};

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

// The samples of a block until a raise is due, what waits must be applied, or one cannot be taken.
template <class Form, class T>
ALWAYS_INLINE BlockEnd block_steps(const RlsFilter<T>& f, const FilterBlock<T>& block) {
  FilterState& state = *f.state;
  const int64_t before = int64_t(state.rows);
  for (int64_t t = 0; t < block.count; ++t) {
    const int64_t sample = block.first + t, rows = int64_t(state.rows);
    const double gain = gain_of(f, sample), forgetting = forgetting_of(f, sample);
    if (scale_is_far(state)) return {t, 0, Steps::kApply};
    const T* x = block.X[t];
    T* u = block.U[t];
    T* prediction = f.predictions + sample * f.n_out;
    if (rows) Form::correct(f, block, rows, x, u);
    if (rows > before)  // what this block has taken from W x
      update_band<T, 1>({prediction, 0}, {block.weights + before, 1},
                        {block.E.data, block.E.stride}, rows - before, T(1), 0, 0, f.n_out);
    const double h = forgetting + gain * Form::energy(f, x, u);
    const RowFactors factors = Form::factors(f, gain, forgetting, h);
    const T factor = T(factors.error);
    const T* y = f.Y + sample * f.y_stride[0];
    T* error = block.E[rows - before];
    T zero = 0;  // becomes nan where an error is not finite
    for (int64_t k = 0; k < f.n_out; ++k) {
      error[k] = factor * (y[k * f.y_stride[1]] - prediction[k]);
      zero += error[k] * T(0);
    }
    if (!(h > 0) || !std::isfinite(h) || zero != 0) return {t, 0, Steps::kFailed};
    if (!counts(f, gain, x)) continue;
    const T unit = T(factors.row);
    T* v = Form::row(f, rows);
    for (int64_t j = 0; j < f.n; ++j) v[j] = unit * u[j];
    if (const int64_t due = row_waits(f, gain, forgetting, h)) return {t + 1, due, Steps::kRaise};
  }
  return {block.count, 0, Steps::kAll};
}

}  // namespace rlscuda
