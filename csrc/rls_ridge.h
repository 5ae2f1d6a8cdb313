// Stabilised forgetting, the rule of every filter.
//
// Forgetting alone, R <- lambda R + kappa x x^T for R = P^-1, loses what is known of directions
// that the input no longer excites, as lambda^t, until P overflows. So the coordinates are given a
// ridge in turn: each time that forgetting has halved what was known, R_jj has once been raised by
// rho_j. Then R is nowhere below diag(rho), and as a raise is a row sqrt(rho_j) e_j, for which P s
// is a column of P, it costs no product. W is left alone, so that the ridge does not pull it to 0.
//
// rho_j is kRidge of the running power of coordinate j, the mean of kappa x_j^2 over all samples:
// as if each coordinate had been seen once more, at a hundredth of its power. So the filter does
// not depend on the units of its inputs. No coordinate counts for less than root epsilon of the
// mean power, which bounds one that never fires, and no ridge is so small that the condition of R,
// about n / (1 - lambda) over the ridge, is beyond the dtype. Where the memory, 1 / (1 - lambda)
// samples, is too short to determine the weights, each sample is met all but exactly, and its noise
// with it: the mean leverage 1 - lambda / h shows it, and beyond a half the ridge rises towards the
// power of a memory of samples.
#pragma once

#include <algorithm>
#include <cmath>

#include "rls_math.h"

namespace rlscuda {

constexpr double kRidge = 1e-2;        // of a coordinate's running power
constexpr double kRidgeRounding = 16;  // epsilon n / (1 - lambda) times this is the least of it
constexpr double kRidgeWait = 16;      // samples between two raises, that they share a pass over P

// Whose turn it is. A turn that is kept from one sample to the next makes the rule indifferent to
// how a series is cut into calls, and to a lambda that changes.
struct RidgeTurn {
  double debt, waited, next;  // coordinates due, samples since the last raise, the next coordinate
  double leverage;            // running mean of 1 - lambda / h
};

// Counts one sample; returns how many coordinates are to be raised after it, beginning with `next`.
RLS_HOST_DEVICE inline int64_t ridge_due(RidgeTurn& turn, double forgetting, double h, int64_t n) {
  const double all = double(n);
  turn.leverage += (1 - forgetting) * (1 - forgetting / h - turn.leverage);
  turn.debt += -all * std::log2(forgetting);
  turn.waited += 1;
  if (turn.debt >= all) {
    turn.debt = turn.waited = 0;
    return n;
  }
  if (turn.waited < kRidgeWait || turn.debt < 1) return 0;
  const double due = std::floor(turn.debt);
  turn.debt -= due;
  turn.waited = 0;
  return int64_t(due);
}

// The ridge of a coordinate of this mean square, where `mean` is that of all of them.
RLS_HOST_DEVICE inline double relative_ridge(double power, double mean, double forgetting,
                                             double leverage, int64_t n, double epsilon) {
  const double memory = 1 / (1 - forgetting);
  const double rounding = kRidgeRounding * epsilon * double(n) * memory;
  const double undetermined = (2 * leverage - 1) * memory;
  const double least = std::sqrt(epsilon) * mean;
  return std::fmax(kRidge, std::fmax(rounding, undetermined)) * std::fmax(power, least);
}

// What a raise by the ridge rho adds: more than rho where a sample forgets more than half.
RLS_HOST_DEVICE inline double ridge_weight(double ridge, double forgetting) {
  const double lost = 1 / forgetting - 1;
  return lost > 1 ? lost * ridge : ridge;
}

}  // namespace rlscuda
