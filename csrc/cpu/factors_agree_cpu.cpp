// factors_agree on the CPU: whether G z = delta^T (X z) up to rounding, for one vector z.
//
// Three matrix-vector products; G is read once, by rows shared among the threads. The probe z is
// fixed: fractions of multiples of an irrational number, centred at 0. A comparison with NaN fails,
// so that agreement also says that G is finite.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rls_kernels.h"

namespace rlscuda {
namespace {

// e[i] = sum_m delta[m, i] y[m].
template <class T>
ALWAYS_INLINE void combine(const T* delta, const T* y, T* e, int64_t rows, int64_t outputs) {
  std::fill_n(e, outputs, T(0));
  for (int64_t m = 0; m < rows; ++m) {
    const T* d = delta + m * outputs;
    for (int64_t i = 0; i < outputs; ++i) e[i] += d[i] * y[m];
  }
}

}  // namespace

#define FACTORS_CLONES(T)                                                                          \
  SIMD_CLONES void probe_rows(const T* M, const T* z, T* out, int64_t n, int64_t i0, int64_t i1) { \
    project<T>(Rows<const T>{M, n}, Rows<const T>{z, n}, Rows<T>{out, 0}, n, 1, i0, i1);           \
  }                                                                                                \
  SIMD_CLONES void combine_rows(const T* delta, const T* y, T* e, int64_t rows, int64_t c) {       \
    combine(delta, y, e, rows, c);                                                                 \
  }
FACTORS_CLONES(float)
FACTORS_CLONES(double)
#undef FACTORS_CLONES

template <class T>
bool factors_agree_cpu(const T* grad, const T* x, const T* delta, int64_t rows, int64_t outputs,
                       int64_t n) {
  std::vector<T> z(n), y(rows), expected(outputs), actual(outputs);
  double fraction = 0;
  for (T& value : z) {
    fraction += 0.7548776662466927;
    fraction -= std::floor(fraction);
    value = T(fraction - 0.5);
  }
  const int64_t grain = 65536 / n + 8;
  parallel_for(0, rows, grain,
               [&](int64_t i0, int64_t i1) { probe_rows(x, z.data(), y.data(), n, i0, i1); });
  combine_rows(delta, y.data(), expected.data(), rows, outputs);
  parallel_for(0, outputs, grain, [&](int64_t i0, int64_t i1) {
    probe_rows(grad, z.data(), actual.data(), n, i0, i1);
  });
  double largest = 0;
  for (int64_t i = 0; i < outputs; ++i) largest = std::max(largest, std::abs(double(expected[i])));
  const double tolerance = 16 * std::sqrt(double(n)) * std::numeric_limits<T>::epsilon() * largest;
  for (int64_t i = 0; i < outputs; ++i)
    if (!(std::abs(double(actual[i]) - double(expected[i])) <= tolerance)) return false;
  return true;
}

template bool factors_agree_cpu(const float*, const float*, const float*, int64_t, int64_t,
                                int64_t);
template bool factors_agree_cpu(const double*, const double*, const double*, int64_t, int64_t,
                                int64_t);

}  // namespace rlscuda
