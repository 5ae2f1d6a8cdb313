// foreach_complete_products_ on the CPU: one pass over the products and the parameters, rows shared
// among the threads. Each row has sums of its own, added up in order: the result does not depend on
// the threads.
#include <algorithm>
#include <cmath>

#include "half.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"
#include "weight_rows.h"

namespace rlscuda {
namespace {

// Sum of the squares of read(j), j < n, in as many parts as a vector has lanes.
template <class T, class F>
ALWAYS_INLINE T sum_of_squares(int64_t n, const F& read) {
  constexpr int L = kLanes<T>;
  Vec<T> parts = {};
  int64_t j = 0;
  for (; j + L <= n; j += L) {
    T x[L];
    for (int l = 0; l < L; ++l) x[l] = read(j + l);
    const Vec<T> v = load(x);
    parts += v * v;
  }
  T total = sum(parts);
  for (; j < n; ++j) total += read(j) * read(j);
  return total;
}

template <class T, class W>
ALWAYS_INLINE void complete_rows_of(const WeightStep<T>& a, T* product_squares, T* weight_squares,
                                    int64_t i0, int64_t i1) {
  const int64_t columns = a.n + (a.bias != nullptr);
  for (int64_t i = i0; i < i1; ++i) {
    T* __restrict row = a.product + i * columns;
    complete_row<T, W>(a, i, row, columns);
    product_squares[i] = sum_of_squares<T>(columns, [&](int64_t j) { return row[j]; });
    T size = 0;
    if (a.layout.dense) {
      const W* w = static_cast<const W*>(a.weight) + i * a.layout.row_stride;
      size = sum_of_squares<T>(a.n, [&](int64_t j) { return to_compute<T>(w[j]); });
    } else {
      for_each_weight(a.layout, static_cast<const W*>(a.weight), i, a.n, [&](const W& w, int64_t) {
        const T x = to_compute<T>(w);
        size += x * x;
      });
    }
    if (a.bias) {
      const T x = to_compute<T>(static_cast<const W*>(a.bias)[i * a.bias_stride]);
      size += x * x;
    }
    weight_squares[i] = size;
  }
}

template <class T>
T norm_of(const T* squares, int64_t rows) {
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) total += double(squares[i]);
  return T(std::sqrt(total));
}

}  // namespace

#define COMPLETE_ROWS(T, W)                                                                     \
  SIMD_CLONES void complete_product_rows(const WeightStep<T>& a, T* product_squares,            \
                                         T* weight_squares, int64_t i0, int64_t i1, const W*) { \
    complete_rows_of<T, W>(a, product_squares, weight_squares, i0, i1);                         \
  }
COMPLETE_ROWS(float, float)
COMPLETE_ROWS(float, BFloat16)
COMPLETE_ROWS(float, Half)
COMPLETE_ROWS(double, double)
COMPLETE_ROWS(double, float)
COMPLETE_ROWS(double, BFloat16)
COMPLETE_ROWS(double, Half)
#undef COMPLETE_ROWS

template <class T, class W>
void complete_products_cpu(const WeightStep<T>* layers, int64_t count, T* norms, T* squares) {
  int64_t all = 0, matrices = 0;
  for (int64_t l = 0; l < count; ++l) all += layers[l].rows, matrices += layers[l].groups;
  for (int64_t l = 0; l < count; ++l) {
    const WeightStep<T>& a = layers[l];
    const int64_t grain = std::max<int64_t>(1, 16384 / (a.n + 1));
    parallel_for(0, a.rows, grain, [&](int64_t i0, int64_t i1) {
      complete_product_rows(a, squares, squares + all, i0, i1, static_cast<const W*>(nullptr));
    });
    for (int64_t g = 0; g < a.groups; ++g, ++norms) {
      const T* own = squares + g * a.rows_per_group;
      norms[0] = norm_of(own, a.rows_per_group);
      norms[matrices] = norm_of(own + all, a.rows_per_group);
    }
    squares += a.rows;
  }
}

template void complete_products_cpu<float, float>(const WeightStep<float>*, int64_t, float*,
                                                  float*);
template void complete_products_cpu<float, BFloat16>(const WeightStep<float>*, int64_t, float*,
                                                     float*);
template void complete_products_cpu<float, Half>(const WeightStep<float>*, int64_t, float*, float*);
template void complete_products_cpu<double, double>(const WeightStep<double>*, int64_t, double*,
                                                    double*);
template void complete_products_cpu<double, float>(const WeightStep<double>*, int64_t, double*,
                                                   double*);
template void complete_products_cpu<double, BFloat16>(const WeightStep<double>*, int64_t, double*,
                                                      double*);
template void complete_products_cpu<double, Half>(const WeightStep<double>*, int64_t, double*,
                                                  double*);

}  // namespace rlscuda
