// foreach_nesterov_ on the CPU: a pass over the gradients and the averages, and one over the
// result, rows shared among the threads. Sums of a row have the order of its vectors, those of a
// matrix that of its rows.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "half.h"
#include "nesterov.h"
#include "simd.h"

namespace rlscuda {
namespace {

template <class T, class W>
ALWAYS_INLINE void rows_ahead(const Nesterov<T>& a, int64_t q0, int64_t q1) {
  const T momentum = T(a.momentum), share = T(1 - a.momentum);
  for (int64_t q = q0; q < q1; ++q) {
    const int64_t matrix = q / a.padded, i = q % a.padded;
    T* __restrict out = a.out + q * a.n;
    if (i >= a.rows) {
      std::fill(out, out + a.n, T(0));
      a.row_peak[q] = 0;
      continue;
    }
    const NesterovLayer<T>& layer = a.layers[matrix / a.groups];
    const int64_t group = matrix % a.groups, row = group * a.rows + i;
    const T* __restrict grad = layer.grad + row * a.columns;
    T* __restrict average = layer.average + row * a.n;
    MagnitudeBits<T> peak = 0;
    if (std::isfinite(layer.h[group])) {
      const auto take = [&](int64_t j, T g) {
        average[j] = lerp(average[j], g, share);
        out[j] = lerp(g, average[j], momentum);
        peak = std::max(peak, magnitude_bits(out[j]));
      };
      for (int64_t j = 0; j < a.columns; ++j) take(j, grad[j]);
      if (a.columns < a.n)
        take(a.columns, to_compute<T>(static_cast<const W*>(layer.grad_bias)[row]));
    } else {
      for (int64_t j = 0; j < a.n; ++j) {
        out[j] = lerp(T(0), average[j], momentum);
        peak = std::max(peak, magnitude_bits(out[j]));
      }
    }
    a.row_peak[q] = std::bit_cast<T>(peak);
  }
}

template <class T>
ALWAYS_INLINE void divide_rows(const Nesterov<T>& a, int64_t q0, int64_t q1) {
  for (int64_t q = q0; q < q1; ++q) {
    const T divisor = divisor_of(a.peak[q / a.padded]);
    T* out = a.out + q * a.n;
    Vec<T> squares = {};
    int64_t j = 0;
    for (; j + kLanes<T> <= a.n; j += kLanes<T>) {
      const Vec<T> x = load(out + j) / divisor;
      store(out + j, x);
      squares += x * x;
    }
    T rest = 0;
    for (; j < a.n; ++j) {
      out[j] /= divisor;
      rest += out[j] * out[j];
    }
    a.row_squares[q] = sum(squares) + rest;
  }
}

}  // namespace

SIMD_CLONES void nesterov_divide(const Nesterov<float>& a, int64_t q0, int64_t q1) {
  divide_rows(a, q0, q1);
}
SIMD_CLONES void nesterov_divide(const Nesterov<double>& a, int64_t q0, int64_t q1) {
  divide_rows(a, q0, q1);
}

#define NESTEROV_ROWS(T, W)                                                                \
  SIMD_CLONES void nesterov_rows(const Nesterov<T>& a, int64_t q0, int64_t q1, const W*) { \
    rows_ahead<T, W>(a, q0, q1);                                                           \
  }
NESTEROV_ROWS(float, float)
NESTEROV_ROWS(float, BFloat16)
NESTEROV_ROWS(float, Half)
NESTEROV_ROWS(double, double)
NESTEROV_ROWS(double, float)
NESTEROV_ROWS(double, BFloat16)
NESTEROV_ROWS(double, Half)
#undef NESTEROV_ROWS

template <class T, class W>
void nesterov_cpu(const Nesterov<T>& args) {
  const int64_t grain = std::max<int64_t>(1, 16384 / (args.n + 1));
  const int64_t matrices = args.count * args.groups, rows = matrices * args.padded;
  parallel_for(0, rows, grain, [&](int64_t q0, int64_t q1) {
    nesterov_rows(args, q0, q1, static_cast<const W*>(nullptr));
  });
  for (int64_t i = 0; i < matrices; ++i) {
    MagnitudeBits<T> peak = 0;
    for (int64_t q = i * args.padded; q < (i + 1) * args.padded; ++q)
      peak = std::max(peak, magnitude_bits(args.row_peak[q]));
    args.peak[i] = std::bit_cast<T>(peak);
  }
  parallel_for(0, rows, grain, [&](int64_t q0, int64_t q1) { nesterov_divide(args, q0, q1); });
  for (int64_t i = 0; i < matrices; ++i) {
    const T* squares = args.row_squares + i * args.padded;
    args.length[i] = std::sqrt(std::accumulate(squares, squares + args.padded, T(0)));
  }
}

template void nesterov_cpu<float, float>(const Nesterov<float>&);
template void nesterov_cpu<float, BFloat16>(const Nesterov<float>&);
template void nesterov_cpu<float, Half>(const Nesterov<float>&);
template void nesterov_cpu<double, double>(const Nesterov<double>&);
template void nesterov_cpu<double, float>(const Nesterov<double>&);
template void nesterov_cpu<double, BFloat16>(const Nesterov<double>&);
template void nesterov_cpu<double, Half>(const Nesterov<double>&);

}  // namespace rlscuda
