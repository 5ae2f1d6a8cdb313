// The inverse roots of many small Gram matrices, by polynomials, scaled to the direction's length.
//
//   x = gram / |gram|,   root = p1(x),   x <- p1(x)^2 x,   root <- p2(x) root,  and so on,
//   gram <- scale / sqrt(|gram|) root
//
// with |gram|^2 = tr gram^2, the sum of the squares of the eigenvalues, and p(x) = a I + b x + c
// x^2. A gram N P N^T is symmetric, and so are all of these, which commute: the lower triangle of
// each product is computed, the upper one is its mirror image. Where a block has more rows than
// columns, its gram is the smaller N^T N P, which is not symmetric: the other one is singular, and
// its rounding errors would go 44-fold into the root. A gram of zeros has the root of the smallest
// normal number; one that is not finite has NaN.
#pragma once

#include <cstdint>
#include <limits>

#include "rls_math.h"

struct CUstream_st;

namespace rlscuda {

constexpr int64_t kMostRootRows = 64;
constexpr int64_t kMostPolynomials = 8;

// The blocks of the matrices of one layer.
template <class T>
struct RootLayer {
  T* gram;          // [groups * parts, m, m]: grams in, of symmetric ones the lower triangle; roots
  const T* peak;    // [groups]: what the momentum was divided by
  const T* length;  // [groups]: Euclidean norm of what that left
  const T* power;   // [groups]: running mean of the squared input
  int64_t groups, parts, m;
  T elements;  // root of the number of elements of a matrix of the momentum
  T tallness;  // root of the rows of a block over m
  bool symmetric;

  // Of matrices [rows, columns] in blocks of so many rows.
  void set_shape(int64_t block, int64_t rows, int64_t columns) {
    m = block < columns ? block : columns;
    elements = T(std::sqrt(double(rows) * double(columns)));
    tallness = T(std::sqrt(double(block) / double(m)));
    symmetric = block <= columns;
  }
};

template <class T>
struct SpectralRoot {
  const RootLayer<T>* layers;
  int64_t count, polynomials;
  T coefficients[3 * kMostPolynomials];  // a, b, c of each
  T eps;
};

template <class T>
void spectral_root_cpu(const SpectralRoot<T>& args);
template <class T>
void spectral_root_cuda(const SpectralRoot<T>& args, CUstream_st* stream);

// The length of a direction, by how far the momentum's elements are above what counts as nothing.
template <class T>
RLS_HOST_DEVICE ALWAYS_INLINE T direction_scale(T length, T peak, T power, T elements, T tallness,
                                                T eps) {
  const T size = length * (peak / elements);
  const T floor = at_least(std::numeric_limits<T>::min(), eps * std::sqrt(power));
  return tallness * size / (size + floor);
}

// |gram|, as 2^exponent * norm: elements over 2^exponent are below 2, so that their squares stay in
// the range of T.
template <class T>
struct GramSize {
  int exponent;
  T norm;

  RLS_HOST_DEVICE ALWAYS_INLINE static int exponent_of(T largest) {
    return std::ilogb(at_least(std::numeric_limits<T>::min(), largest));
  }
  RLS_HOST_DEVICE ALWAYS_INLINE static T unit(int exponent) { return std::ldexp(T(1), -exponent); }
  // squares: the sum over i, j of elements (i, j) and (j, i) multiplied, of gram over 2^exponent.
  RLS_HOST_DEVICE ALWAYS_INLINE GramSize(int exponent, T squares) : exponent(exponent) {
    const T tiny = std::numeric_limits<T>::min();
    const T least = at_least(tiny, std::ldexp(tiny, -exponent));  // |gram| is no less than tiny
    norm = at_least(least, std::sqrt(at_least(T(0), squares)));
  }
  RLS_HOST_DEVICE ALWAYS_INLINE T inverse_root() const {
    return 1 / (std::sqrt(norm) * std::sqrt(std::ldexp(T(1), exponent)));
  }
};

}  // namespace rlscuda
