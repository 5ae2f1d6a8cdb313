// weight_step_ and adaptive_weight_step_ on the CPU: everything of a weight update that is not the
// matrix product, in one pass over the product, the moments and the parameter.
//
// One output row at a time, rows shared among the threads. A row of the product D is completed by
// the bias' part g_b P[n, :], since the vendor GEMM saw only the weight's columns. The adaptive
// form reads a row twice: the row's second moment needs its sum before the weight can move.
#include <algorithm>
#include <cmath>

#include "half.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "weight_rows.h"

namespace rlscuda {
namespace {

template <class T, class W>
ALWAYS_INLINE void move_row(const WeightStep<T>& a, const StepConstants& c, int64_t i,
                            const T* direction, T rate) {
  const T keep = T(1 - c.lr * a.weight_decay);
  for_each_weight(a.layout, static_cast<W*>(a.weight), i, a.n, [&](W& w, int64_t j) {
    w = to_storage<W>(keep * to_compute<T>(w) - rate * direction[j]);
  });
  if (a.bias) {
    W& w = static_cast<W*>(a.bias)[i * a.bias_stride];
    w = to_storage<W>(keep * to_compute<T>(w) - rate * direction[a.n]);
  }
}

template <class T, class W>
ALWAYS_INLINE void linear_rows(const WeightStep<T>& a, const StepConstants& c, int64_t i0,
                               int64_t i1) {
  const int64_t columns = a.n + (a.bias != nullptr);
  const T limit = T(c.lr / a.trust);
  for (int64_t i = i0; i < i1; ++i) {
    const int64_t group = i / a.rows_per_group;
    const T divisor = divisor_of(a.h ? a.h[group] : T(1), a.divide_by_h,
                                 a.norms ? a.norms + group : nullptr, a.matrices, limit);
    if (!std::isfinite(divisor)) continue;
    const T scale = T(1) / divisor;
    T* __restrict row = a.product + i * columns;
    complete_row<T, W>(a, i, row, columns);
    if (a.first_moment) {
      T* __restrict moment = a.first_moment + i * columns;
      const T alpha = T(a.momentum);
      for (int64_t j = 0; j < columns; ++j) moment[j] = alpha * moment[j] + scale * row[j];
      move_row<T, W>(a, c, i, moment, T(c.lr));
    } else {
      move_row<T, W>(a, c, i, row, T(c.lr) * scale);
    }
  }
}

template <class T, class W>
ALWAYS_INLINE void adaptive_rows(const WeightStep<T>& a, const StepConstants& c, int64_t i0,
                                 int64_t i1) {
  constexpr int L = kLanes<T>;
  const int64_t columns = a.n + (a.bias != nullptr);
  for (int64_t i = i0; i < i1; ++i) {
    if (a.h && !std::isfinite(a.h[i / a.rows_per_group])) continue;
    T* __restrict row = a.product + i * columns;
    complete_row<T, W>(a, i, row, columns);

    const T* g = a.grad + i * a.n;
    Vec<T> acc = {};
    int64_t j = 0;
    for (; j + L <= a.n; j += L) acc += load(row + j) * load(g + j);
    T norm = sum(acc);
    for (; j < a.n; ++j) norm += row[j] * g[j];
    if (a.bias) norm += row[a.n] * to_compute<T>(static_cast<const W*>(a.grad_bias)[i]);

    T& second = a.second_moment[i];
    second = T(a.beta2) * second + T(1 - a.beta2) * norm;
    const T root = std::sqrt(std::max(second, T(0)) / T(c.correction2)) + T(a.eps);

    T* __restrict moment = a.first_moment + i * columns;
    const T beta1 = T(a.momentum), rest = T(1 - a.momentum);
    for (j = 0; j < columns; ++j) moment[j] = beta1 * moment[j] + rest * row[j];
    move_row<T, W>(a, c, i, moment, T(c.lr / c.correction1) / root);
  }
}

}  // namespace

#define WEIGHT_STEP_ROWS(T, W)                                                                    \
  SIMD_CLONES void linear_step_rows(const WeightStep<T>& a, const StepConstants& c, int64_t i0,   \
                                    int64_t i1, const W*) {                                       \
    linear_rows<T, W>(a, c, i0, i1);                                                              \
  }                                                                                               \
  SIMD_CLONES void adaptive_step_rows(const WeightStep<T>& a, const StepConstants& c, int64_t i0, \
                                      int64_t i1, const W*) {                                     \
    adaptive_rows<T, W>(a, c, i0, i1);                                                            \
  }
WEIGHT_STEP_ROWS(float, float)
WEIGHT_STEP_ROWS(float, BFloat16)
WEIGHT_STEP_ROWS(float, Half)
WEIGHT_STEP_ROWS(double, double)
WEIGHT_STEP_ROWS(double, float)
WEIGHT_STEP_ROWS(double, BFloat16)
WEIGHT_STEP_ROWS(double, Half)
#undef WEIGHT_STEP_ROWS

template <class T, class W>
void weight_step_cpu(const WeightStep<T>* layers, int64_t count) {
  for (int64_t l = 0; l < count; ++l) {
    const WeightStep<T>& a = layers[l];
    const StepConstants c = step_constants(a);
    const int64_t grain = std::max<int64_t>(1, 16384 / (a.n + 1));
    parallel_for(0, a.rows, grain, [&](int64_t i0, int64_t i1) {
      if (a.second_moment) {
        adaptive_step_rows(a, c, i0, i1, static_cast<const W*>(nullptr));
      } else {
        linear_step_rows(a, c, i0, i1, static_cast<const W*>(nullptr));
      }
    });
  }
}

template void weight_step_cpu<float, float>(const WeightStep<float>*, int64_t);
template void weight_step_cpu<float, BFloat16>(const WeightStep<float>*, int64_t);
template void weight_step_cpu<float, Half>(const WeightStep<float>*, int64_t);
template void weight_step_cpu<double, double>(const WeightStep<double>*, int64_t);
template void weight_step_cpu<double, float>(const WeightStep<double>*, int64_t);
template void weight_step_cpu<double, BFloat16>(const WeightStep<double>*, int64_t);
template void weight_step_cpu<double, Half>(const WeightStep<double>*, int64_t);

}  // namespace rlscuda
