// factors_agree on the CPU: whether [G, g] z = delta^T ([X, 1] z) up to rounding, for one vector z.
//
// Three matrix-vector products; G is read once, by rows shared among the threads. The probe z is
// fixed: fractions of multiples of an irrational number, centred at 0. Each output is compared on
// the scale of its own summands, sum_m |delta_m| |x_m| |z|. A comparison with NaN or within
// an infinite scale fails, so that agreement also says that G, X and delta are finite.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "rls_kernels.h"
#include "scratch.h"

namespace rlscuda {
namespace {

// y[m] = x_m z and its bound scale[m] = |x_m|, for rows m of X.
template <class T>
ALWAYS_INLINE void along(const T* x, const T* z, T* y, T* scale, int64_t n, int64_t i0,
                         int64_t i1) {
  for (int64_t i = i0; i < i1; ++i) {
    const Rows<const T> row{x + i * n, n};
    project<T>(row, Rows<const T>{z, n}, Rows<T>{y + i, 1}, n, 1, 0, 1);
    project<T>(row, row, Rows<T>{scale + i, 1}, n, 1, 0, 1);
    scale[i] = std::sqrt(scale[i]);
  }
}

// expected[i] = sum_m delta[m, i] y[m], bound[i] = sum_m |delta[m, i]| scale[m].
template <class T>
ALWAYS_INLINE void combine(const T* delta, const T* y, const T* scale, T* expected, T* bound,
                           int64_t rows, int64_t outputs) {
  for (int64_t m = 0; m < rows; ++m) {
    const T* d = delta + m * outputs;
    for (int64_t i = 0; i < outputs; ++i) {
      expected[i] += d[i] * y[m];
      bound[i] += std::abs(d[i]) * scale[m];
    }
  }
}

}  // namespace

#define FACTORS_CLONES(T)                                                                          \
  SIMD_CLONES void along_rows(const T* x, const T* z, T* y, T* scale, int64_t n, int64_t i0,       \
                              int64_t i1) {                                                        \
    along(x, z, y, scale, n, i0, i1);                                                              \
  }                                                                                                \
  SIMD_CLONES void probe_rows(const T* M, const T* z, T* out, int64_t n, int64_t i0, int64_t i1) { \
    project<T>(Rows<const T>{M, n}, Rows<const T>{z, n}, Rows<T>{out, 0}, n, 1, i0, i1);           \
  }                                                                                                \
  SIMD_CLONES void combine_rows(const T* delta, const T* y, const T* scale, T* expected, T* bound, \
                                int64_t rows, int64_t outputs) {                                   \
    combine(delta, y, scale, expected, bound, rows, outputs);                                      \
  }
FACTORS_CLONES(float)
FACTORS_CLONES(double)
#undef FACTORS_CLONES

template <class T>
bool factors_agree_cpu(const T* grad, const T* x, const T* delta, const T* grad_bias, int64_t rows,
                       int64_t outputs, int64_t n) {
  constexpr T kBiasProbe = T(0.5);
  Scratch<T> z(n), y(rows), scale(rows), expected(outputs), bound(outputs), actual(outputs);
  double fraction = 0, square = 0;
  for (T& value : z) {
    fraction += 0.7548776662466927;
    fraction -= std::floor(fraction);
    value = T(fraction - 0.5);
    square += double(value) * double(value);
  }
  const int64_t grain = 65536 / (n + 1) + 8;
  parallel_for(0, rows, grain, [&](int64_t i0, int64_t i1) {
    along_rows(x, z.data(), y.data(), scale.data(), n, i0, i1);
  });
  for (int64_t m = 0; m < rows; ++m) {
    scale[m] = scale[m] * T(std::sqrt(square)) + (grad_bias ? kBiasProbe : T(0));
    y[m] += grad_bias ? kBiasProbe : T(0);
  }
  combine_rows(delta, y.data(), scale.data(), expected.data(), bound.data(), rows, outputs);
  parallel_for(0, outputs, grain, [&](int64_t i0, int64_t i1) {
    probe_rows(grad, z.data(), actual.data(), n, i0, i1);
  });
  const T unit = 4 * std::numeric_limits<T>::epsilon();
  for (int64_t i = 0; i < outputs; ++i) {
    const T seen = actual[i] + (grad_bias ? kBiasProbe * grad_bias[i] : T(0));
    const T allowed = unit * bound[i];
    if (!(std::abs(seen - expected[i]) <= allowed && std::isfinite(allowed))) return false;
  }
  return true;
}

template bool factors_agree_cpu(const float*, const float*, const float*, const float*, int64_t,
                                int64_t, int64_t);
template bool factors_agree_cpu(const double*, const double*, const double*, const double*, int64_t,
                                int64_t, int64_t);

}  // namespace rlscuda
