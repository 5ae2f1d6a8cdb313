// The polynomials of a call of the spectral operators.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "spectral_root.h"

namespace rlscuda {

// `eps` is what counts as no gradient.
template <class T>
SpectralRoot<T> polynomials_of(const std::vector<double>& coefficients, double eps) {
  const size_t numbers = coefficients.size();
  RLS_CHECK(numbers > 0 && numbers % 3 == 0 && numbers <= 3 * kMostPolynomials,
            "coefficients must be three each of 1 to ", kMostPolynomials, " polynomials, got ",
            numbers);
  RLS_CHECK(eps >= 0 && std::isfinite(eps), "eps must be finite and not negative, got ", eps);
  SpectralRoot<T> args{};
  for (const double x : coefficients) check_number<T>("every coefficient", x);
  std::copy(coefficients.begin(), coefficients.end(), args.coefficients);
  args.polynomials = int64_t(numbers / 3);
  args.eps = T(eps);
  return args;
}

}  // namespace rlscuda
