// The bookkeeping of a filter's samples, the same for every kernel: what a sample weighs, whether
// it counts, the rows of V that wait, and whose turn of the ridge it is.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>

#include "kernels.h"

namespace rlscuda {

template <class T>
ALWAYS_INLINE double gain_of(const RlsFilter<T>& f, int64_t sample) {
  return f.gains ? f.gains[sample] : f.gain;
}

template <class T>
ALWAYS_INLINE double forgetting_of(const RlsFilter<T>& f, int64_t sample) {
  return f.forgettings ? f.forgettings[sample] : f.forgetting;
}

// Whether the scale of what waits would let rounding errors of P grow.
ALWAYS_INLINE bool scale_is_far(const FilterState& state) {
  return state.scale > kHeldGrowth || state.scale < 1 / kHeldGrowth;
}

// |x|^2.
ALWAYS_INLINE double squared(double x) { return x * x; }
template <class R>
ALWAYS_INLINE double squared(const std::complex<R>& x) {
  return squared(double(x.real())) + squared(double(x.imag()));
}

// Adds the weighted squares of a sample to the running power; returns whether there has been any
// energy.
template <class T>
ALWAYS_INLINE bool add_power(const RlsFilter<T>& f, double gain, const T* x) {
  double energy = 0;
  for (int64_t j = 0; j < f.n; ++j) {
    const double square = gain * squared(x[j]);
    f.squares[j] += square;
    energy += square;
  }
  f.state->samples += 1;
  f.state->energy += energy;
  return f.state->energy > 0;
}

// Whether a sample that can be learnt changes P and W: not at weight 0, and not as long as nothing
// has been seen that a relative ridge could be measured by, and that could be forgotten.
template <class T>
ALWAYS_INLINE bool counts(const RlsFilter<T>& f, double gain, const T* x) {
  return gain != 0 && !(gain > 0 && f.ridge < 0 && !add_power(f, gain, x));
}

// The sample's row of V is written and waits; returns how many coordinates are to be raised now.
template <class T>
ALWAYS_INLINE int64_t row_waits(const RlsFilter<T>& f, double gain, double forgetting, double h) {
  FilterState& state = *f.state;
  state.sign[int64_t(state.rows)] = gain < 0 ? -1 : 1;
  state.rows += 1;
  state.scale /= forgetting;
  return forgetting < 1 && f.ridge != 0 ? ridge_due(state.turn, forgetting, h, f.n) : 0;
}

// Calls raise(j, weight) for `due` coordinates, beginning with the one whose turn it is.
template <class T, class Raise>
void take_turns(const RlsFilter<T>& f, int64_t due, double forgetting, const Raise& raise) {
  FilterState& state = *f.state;
  const double samples = std::max(state.samples, 1.0);
  const double mean = state.energy / samples / double(f.n);
  for (; due > 0; --due) {
    const int64_t j = int64_t(state.turn.next);
    double ridge = f.ridge;
    if (ridge < 0)
      ridge = relative_ridge(f.squares[j] / samples, mean, forgetting, state.turn.leverage, f.n,
                             std::numeric_limits<Real<T>>::epsilon());
    raise(j, ridge_weight(ridge, forgetting));
    state.turn.next = double(j + 1 < f.n ? j + 1 : 0);
  }
}

}  // namespace rlscuda
