// foreach_nesterov_ on the CPU: a pass over the gradients and the averages, and one over the
// result, rows shared among the threads. Sums of a row have the order of its vectors, those of a
// matrix that of its rows.
#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "half.h"
#include "nesterov.h"
#include "parallel.h"
#include "simd.h"

namespace rlscuda {
namespace {

constexpr int64_t kGrain = 16384;  // elements that a thread takes at least

template <class T, class W>
ALWAYS_INLINE void rows_ahead(const Nesterov<T>& a, const NesterovLayer<T>& layer, int64_t q0,
                              int64_t q1) {
  const T momentum = T(a.momentum), share = T(1 - a.momentum);
  for (int64_t q = q0; q < q1; ++q) {
    const int64_t group = q / layer.padded, i = q % layer.padded;
    T* __restrict out = layer.out + q * layer.n;
    T& row_peak = a.row_peak[layer.first_row + q];
    if (i >= layer.rows) {
      std::fill(out, out + layer.n, T(0));
      row_peak = 0;
      continue;
    }
    const int64_t row = group * layer.rows + i;
    const T* __restrict grad = layer.grad + row * layer.columns;
    T* __restrict average = layer.average + row * layer.n;
    MagnitudeBits<T> peak = 0;
    if (std::isfinite(layer.h[group])) {
      const auto take = [&](int64_t j, T g) {
        average[j] = lerp(average[j], g, share);
        out[j] = lerp(g, average[j], momentum);
        peak = std::max(peak, magnitude_bits(out[j]));
      };
      for (int64_t j = 0; j < layer.columns; ++j) take(j, grad[j]);
      if (layer.columns < layer.n)
        take(layer.columns, to_compute<T>(static_cast<const W*>(layer.grad_bias)[row]));
    } else {
      for (int64_t j = 0; j < layer.n; ++j) {
        out[j] = lerp(T(0), average[j], momentum);
        peak = std::max(peak, magnitude_bits(out[j]));
      }
    }
    row_peak = std::bit_cast<T>(peak);
  }
}

template <class T>
ALWAYS_INLINE void divide_rows(const Nesterov<T>& a, const NesterovLayer<T>& layer, int64_t q0,
                               int64_t q1) {
  for (int64_t q = q0; q < q1; ++q) {
    const T divisor = divisor_of(a.peak[layer.first_matrix + q / layer.padded]);
    T* out = layer.out + q * layer.n;
    Vec<T> squares = {};
    int64_t j = 0;
    for (; j + kLanes<T> <= layer.n; j += kLanes<T>) {
      const Vec<T> x = load(out + j) / divisor;
      store(out + j, x);
      squares += x * x;
    }
    T rest = 0;
    for (; j < layer.n; ++j) {
      out[j] /= divisor;
      rest += out[j] * out[j];
    }
    a.row_squares[layer.first_row + q] = sum(squares) + rest;
  }
}

// Calls f(layer, q0, q1) for the rows of all layers, shared among the threads by their elements: a
// thread takes the rows that begin in its part.
template <class T, class F>
void for_rows(const Nesterov<T>& args, const F& f) {
  int64_t total = 0;
  const auto elements = [](const NesterovLayer<T>& a) { return a.groups * a.padded * a.n; };
  for (int64_t l = 0; l < args.count; ++l) total += elements(args.layers[l]);
  parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (int64_t l = 0; l < args.count && start < end; ++l) {
      const NesterovLayer<T>& layer = args.layers[l];
      const int64_t n = layer.n, rows = layer.groups * layer.padded;
      const int64_t first = std::max<int64_t>(0, (begin - start + n - 1) / n);
      const int64_t last = std::min(rows, (end - start + n - 1) / n);
      if (first < last) f(layer, first, last);
      start += elements(layer);
    }
  });
}

}  // namespace

#define NESTEROV_DIVIDE(T)                                                                      \
  SIMD_CLONES void nesterov_divide(const Nesterov<T>& a, const NesterovLayer<T>& l, int64_t q0, \
                                   int64_t q1) {                                                \
    divide_rows(a, l, q0, q1);                                                                  \
  }
NESTEROV_DIVIDE(float)
NESTEROV_DIVIDE(double)
#undef NESTEROV_DIVIDE

#define NESTEROV_ROWS(T, W)                                                                   \
  SIMD_CLONES void nesterov_rows(const Nesterov<T>& a, const NesterovLayer<T>& l, int64_t q0, \
                                 int64_t q1, const W*) {                                      \
    rows_ahead<T, W>(a, l, q0, q1);                                                           \
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
  for_rows(args, [&](const NesterovLayer<T>& layer, int64_t q0, int64_t q1) {
    nesterov_rows(args, layer, q0, q1, static_cast<const W*>(nullptr));
  });
  const auto for_matrices = [&](const auto& f) {
    for (int64_t l = 0; l < args.count; ++l) {
      const NesterovLayer<T>& layer = args.layers[l];
      for (int64_t g = 0; g < layer.groups; ++g)
        f(layer.first_matrix + g, layer.first_row + g * layer.padded, layer.padded);
    }
  };
  for_matrices([&](int64_t matrix, int64_t first, int64_t rows) {
    MagnitudeBits<T> peak = 0;
    for (int64_t q = first; q < first + rows; ++q)
      peak = std::max(peak, magnitude_bits(args.row_peak[q]));
    args.peak[matrix] = std::bit_cast<T>(peak);
  });
  for_rows(args, [&](const NesterovLayer<T>& layer, int64_t q0, int64_t q1) {
    nesterov_divide(args, layer, q0, q1);
  });
  for_matrices([&](int64_t matrix, int64_t first, int64_t rows) {
    const T* squares = args.row_squares + first;
    args.length[matrix] = std::sqrt(std::accumulate(squares, squares + rows, T(0)));
  });
}

template void nesterov_cpu<float, float>(const Nesterov<float>&);
template void nesterov_cpu<float, BFloat16>(const Nesterov<float>&);
template void nesterov_cpu<float, Half>(const Nesterov<float>&);
template void nesterov_cpu<double, double>(const Nesterov<double>&);
template void nesterov_cpu<double, float>(const Nesterov<double>&);
template void nesterov_cpu<double, BFloat16>(const Nesterov<double>&);
template void nesterov_cpu<double, Half>(const Nesterov<double>&);

}  // namespace rlscuda
