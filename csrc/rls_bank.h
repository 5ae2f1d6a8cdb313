// One filter of a bank: its constants, its counters, and what the two make of a sample; for host
// and device. A sample x, y of weight w does to its filter, with kappa = w gain,
//   u = P x,   h = lambda + kappa x u,   e = y - W x,   v = sqrt(kappa / h) u:
//   W <- W + (kappa / h) e u^T,   P <- (P - v v^T) / lambda,   then the raises of rls_ridge.h.
#pragma once

#include "rls_ridge.h"

namespace rlscuda {

// A ridge >= 0 is one for every coordinate, 0 is none, and what is below follows the input.
struct BankRule {
  double forgetting, gain, ridge, initial_scale;
};
constexpr int64_t kBankRuleSlots = 4;

struct BankState {
  RidgeTurn turn;
  double updates, resets, refused;  // samples that entered, that would have broken P, not finite
};
constexpr int64_t kBankStateSlots = sizeof(BankState) / sizeof(double);
static_assert(sizeof(BankRule) == kBankRuleSlots * sizeof(double));

// What a bank refuses of a row, the first that holds.
enum BankFault { kNoFault, kBadRule, kBadWeight, kBadX, kBadY };

template <class T>
RLS_HOST_DEVICE inline bool is_rule(const BankRule& rule) {
  constexpr double kMost = sizeof(T) == 4 ? FLT_MAX : DBL_MAX;
  return rule.forgetting > 0 && rule.forgetting <= 1 && 1 / rule.forgetting <= kMost &&
         rule.gain > 0 && rule.gain <= kMost && rule.ridge <= kMost &&
         T(rule.initial_scale) > T(0) && rule.initial_scale <= kMost;
}

// A turn that is within its bounds, whatever came: nothing is read or written beyond P.
RLS_HOST_DEVICE inline RidgeTurn sound_turn(RidgeTurn turn, int64_t n) {
  const double all = double(n);
  if (!(turn.debt >= 0 && turn.debt <= all)) turn.debt = 0;
  if (!(turn.next >= 0 && turn.next < all)) turn.next = 0;
  if (!(std::fabs(turn.leverage) <= DBL_MAX)) turn.leverage = 0;
  return turn;
}

// What R_jj gains by a raise, where `square` is the sum of kappa x_j^2 over the samples that
// entered, and `all` the same over all coordinates.
RLS_HOST_DEVICE inline double bank_raise(const BankRule& rule, const BankState& state,
                                         double square, double all, int64_t n, double epsilon) {
  const double mean = all / (state.updates * double(n));
  const double ridge = rule.ridge >= 0
                           ? rule.ridge
                           : relative_ridge(square / state.updates, mean, rule.forgetting,
                                            state.turn.leverage, n, epsilon);
  return ridge_weight(ridge, rule.forgetting);
}

// Whether a divisor keeps P what it is: h, and 1 + rho P_jj.
RLS_HOST_DEVICE inline bool divides(double h) { return h > 0 && h <= DBL_MAX; }

}  // namespace rlscuda
