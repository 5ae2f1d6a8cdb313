// The momentum of the gradients of many layers, looked ahead as Nesterov does: what it will be if
// the next gradient is the same.
//
//   average <- average + (1 - momentum) (G - average),   out = G + momentum (average - G)
//
// A matrix whose h is not finite takes no gradient in, and looks ahead as if it were zero. At last
// each matrix is divided by its largest |element|, so that no square of what is left, and of its
// products, leaves the range of T; a matrix of zeros stays what it is.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "rls_math.h"

struct CUstream_st;

namespace rlscuda {

// One layer: its weight's gradient, that of a bias in its last column, and their average.
template <class T>
struct NesterovLayer {
  const T* grad;                             // [groups * rows, columns]
  const void* grad_bias;                     // [groups * rows] of the parameter's dtype, or null
  T* average;                                // [groups * rows, n], updated in place
  const T* h;                                // [groups]
  T* out;                                    // [groups, padded, n]: rows beyond `rows` are zeros
  int64_t groups, rows, padded, columns, n;  // n = columns, + 1 with a bias
  int64_t first_row, first_matrix;           // those of `out` of all layers before it
};

template <class T>
struct Nesterov {
  const NesterovLayer<T>* layers;
  int64_t count;
  T* peak;         // [matrices]: what each was divided by
  T* length;       // [matrices]: Euclidean norm of `out`
  T* row_peak;     // [rows of all `out`]: workspace
  T* row_squares;  // likewise
  double momentum;
};
// W is the dtype of the parameters, the same in all layers.
template <class T, class W>
void nesterov_cpu(const Nesterov<T>& args);
template <class T, class W>
void nesterov_cuda(const Nesterov<T>& args, CUstream_st* stream);

// start + weight (end - start), from the nearer end, which it then reaches exactly.
template <class T>
RLS_HOST_DEVICE ALWAYS_INLINE T lerp(T start, T end, T weight) {
  const T way = end - start;
  return weight < T(0.5) ? start + weight * way : end - way * (1 - weight);
}

// |x| as an integer of the same order, in which NaN is the largest.
template <class T>
using MagnitudeBits = std::conditional_t<sizeof(T) == 4, unsigned, unsigned long long>;
template <class T>
RLS_HOST_DEVICE ALWAYS_INLINE MagnitudeBits<T> magnitude_bits(T x) {
  return std::bit_cast<MagnitudeBits<T>>(x) & (~MagnitudeBits<T>(0) >> 1);
}

// What a matrix is divided by, of its peak.
template <class T>
RLS_HOST_DEVICE ALWAYS_INLINE T divisor_of(T peak) {
  return at_least(std::numeric_limits<T>::min(), peak);
}

}  // namespace rlscuda
