// The scalar formulas of recursive least squares, shared by host and device, and the glossary.
//
//   n         fan-in: columns of the im2col matrix of a layer, + 1 for a bias
//   c         outputs of the layer
//   P         inverse autocorrelation matrix [n, n] of the layer's input, symmetric and positive
//             definite
//   S         input summary [r, n]: the r rows by which a minibatch enters P
//   U         P S^T, kept as rows [r, n]; for r = 1 the vector u of the papers
//   H         lambda I + (kappa / r) S U^T [r, r]; for r = 1 the scalar h of the papers
//   lambda    forgetting factor, (0, 1]
//   kappa     gain of a new observation, > 0
//   power     running mean of the squared input, by which a summary is normalised; see Power
//   decay, diffusion   P <- decay P + diffusion I after the update: shrinkage towards P_0
//   held      updates not yet applied to the P in memory, kept as thin factors; see HeldState
//   drift     delta of the random-walk drift of a Kalman filter: P <- (1 - kappa delta) P + kappa I
//
// One update (Sherman-Morrison-Woodbury of R <- lambda R + (kappa / r) S^T S, then decay and
// diffusion):
//   P <- (decay / lambda) (P - V^T V) + diffusion I,   V = sqrt(kappa / r) L^-1 U,   H = L L^T.
// V_i V_j is the same number for (i, j) and (j, i), so P stays symmetric to the bit.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define RLS_HOST_DEVICE __host__ __device__
#else
#define RLS_HOST_DEVICE
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace rlscuda {

// NaN where x is.
template <class T>
RLS_HOST_DEVICE ALWAYS_INLINE T at_least(T least, T x) {
  return x < least ? least : x;
}

// The slots of a layer's health counters (float64, so that they count exactly). Every group of a
// convolution counts its own updates, refusals and resets; a step of the layer counts once.
enum Health {
  kUpdates,      // updates applied to a matrix
  kRefused,      // updates refused for a non-finite or immense summary, or a non-finite gradient
  kResets,       // times that P was set back to its start
  kLargestGain,  // largest h - lambda
  kMissing,      // steps with a gradient but no summary
  kSteps,        // steps since a restart of the moments that a non-finite gradient did not void
  kEarlier,      // steps from before it that still count
  kHealthSlots
};
constexpr const char* kHealthNames[kHealthSlots] = {"updates", "refused", "resets", "largest_gain",
                                                    "missing", "steps",   "earlier"};

// The constants of the updates of a layer.
struct UpdateRule {
  double forgetting, gain, decay, diffusion, drift, initial_scale;
  bool averaging;  // the gain starts as that of a plain average, 1 / (t + 1), and ends at `gain`
};

// kappa_t after `updates` earlier ones.
RLS_HOST_DEVICE inline double gain_at(double gain, bool averaging, double updates) {
  const double average = 1 / (updates + 1);
  return averaging && average > gain ? average : gain;
}

// The rule of one update: the gain that its place in the series gives it, drift folded into decay
// and diffusion.
RLS_HOST_DEVICE inline UpdateRule rule_at(UpdateRule rule, double updates) {
  rule.gain = gain_at(rule.gain, rule.averaging, updates);
  if (rule.drift > 0) {
    const double keep = 1 - rule.gain * rule.drift;
    rule.decay *= keep;
    rule.diffusion = rule.diffusion * keep + rule.gain;
  }
  return rule;
}

// The running mean of the squared input, `power`, at one update by a summary of mean square `seen`:
// what normalises the summary, and what is kept. The latter takes no more than kPowerRise times
// itself for seen, so that one wild batch does not blind the layer for the next 1 / gain ones;
// inputs that do grow are followed by a factor 1 + gain (kPowerRise - 1) an update.
struct Power {
  double now, kept;
};
constexpr double kPowerRise = 100;
RLS_HOST_DEVICE inline Power power_after(double before, double seen, double gain) {
  if (!(before > 0 && before < INFINITY)) return {seen, seen};
  const double most = kPowerRise * before;
  return {(1 - gain) * before + gain * seen,
          (1 - gain) * before + gain * (seen < most ? seen : most)};
}

// Whether rows with this sum of squares can enter P: it is finite, and so is its mean as a number
// of type T, in which `power` is kept.
template <class T>
RLS_HOST_DEVICE inline bool rows_can_enter(double square, int64_t elements, bool normalised) {
  constexpr double kMost = sizeof(T) == 4 ? FLT_MAX : DBL_MAX;
  return square <= DBL_MAX && !(normalised && square > kMost * double(elements));
}

// Steps of a layer that count for its gain and its warm-up; those without a summary count, or a
// layer whose input is never seen would never be warm.
RLS_HOST_DEVICE inline double steps_counted(const double* health) {
  return health ? health[kEarlier] + health[kSteps] : 0;
}

// What is held back of a matrix: with V the rows of the `count` updates that its memory lacks,
//   P_true = scale (P - V^T V) + shift I.
// The next update, P_true <- a (P_true - v^T v) + b I with a = decay / lambda, appends the rows
// v / sqrt(scale) to V and moves the scalars; P is not touched. kHeldGrowth keeps the rounding
// errors of P from being scaled up, and sqrt(scale) away from 0.
struct HeldState {
  double scale, shift, count;
};
constexpr int64_t kHeldSlots = 3;  // float64 numbers of a HeldState
constexpr int64_t kHeldRows = 64;  // of V, at most: the thin correction stays thin
constexpr double kHeldGrowth = 4;  // scale stays within [1 / this, this]
constexpr HeldState kNothingHeld{1, 0, 0};

// Updates in V between two calls, fewer than `hold`; none where the state is not one, so that no
// one reads or writes beyond V.
RLS_HOST_DEVICE inline int64_t held_count(const HeldState& state, int64_t hold) {
  return state.count >= 0 && state.count < double(hold) ? int64_t(state.count) : 0;
}

// The state after one more update.
RLS_HOST_DEVICE inline HeldState held_after(const HeldState& state, const UpdateRule& rule,
                                            int64_t hold) {
  const double a = rule.decay / rule.forgetting;
  return {a * state.scale, a * state.shift + rule.diffusion, double(held_count(state, hold) + 1)};
}

// Whether what is held must be applied now.
RLS_HOST_DEVICE inline bool must_apply(const HeldState& state, int64_t hold) {
  return state.count >= double(hold) || !(state.scale <= kHeldGrowth) ||
         !(state.scale >= 1 / kHeldGrowth);
}

// The in-place Cholesky factor of the symmetric [r, r] matrix H (lower triangle, row-major).
// False where H is not positive definite or not finite.
template <class T>
RLS_HOST_DEVICE inline bool cholesky(T* H, int64_t r) {
  for (int64_t j = 0; j < r; ++j) {
    for (int64_t i = j; i < r; ++i) {
      T sum = H[i * r + j];
      for (int64_t k = 0; k < j; ++k) sum -= H[i * r + k] * H[j * r + k];
      if (i == j) {
        if (!(sum > T(0)) || !(sum < T(INFINITY))) return false;
        H[j * r + j] = std::sqrt(sum);
      } else {
        H[i * r + j] = sum / H[j * r + j];
      }
    }
  }
  return true;
}

}  // namespace rlscuda
