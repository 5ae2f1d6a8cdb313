// What an update of a layer does beside its arithmetic: refusals, the running power, a reset, and
// the counters.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace rlscuda {

// Whether the rows of matrix b enter it, and with what gain each. `square` makes the sum of their
// squares. Where they do not, U is 0 and h is NaN, or lambda for no rows at all.
template <class T, class Square>
bool rows_enter(const RlsUpdate<T>& args, const UpdateRule& rule, int64_t b, T* U, double* health,
                const Square& square, double& gain) {
  const int64_t numbers = args.rank * args.n;
  args.h[b] = std::numeric_limits<Real<T>>::quiet_NaN();
  const bool refuse = args.found_inf && *args.found_inf;
  const double sum = refuse ? 0 : square();
  if (refuse || !rows_can_enter<Real<T>>(sum, numbers, args.power)) {
    std::fill_n(U, numbers, T(0));
    health[kRefused] += 1;
    return false;
  }
  if (args.rank == 0) {
    args.h[b] = Real<T>(rule.forgetting);
    return false;
  }
  gain = rule.gain / double(args.rank);
  if (args.power) {
    const double seen = sum / double(std::max<int64_t>(1, numbers));
    const Power power = power_after(args.power[b], seen, rule.gain);
    args.power[b] = Real<T>(power.kept);
    gain = power.now > 0 ? gain / power.now : 0;
  }
  return true;
}

// P of which H was not positive definite.
template <class T>
void start_anew(T* P, int64_t n, const UpdateRule& rule, double* health) {
  std::fill_n(P, n * n, T(0));
  for (int64_t i = 0; i < n; ++i) P[i * n + i] = T(Real<T>(rule.initial_scale));
  health[kResets] += 1;
}

// One update more, of this trace of H.
template <class T>
void count_update(const RlsUpdate<T>& args, const UpdateRule& rule, int64_t b, double trace,
                  double* health) {
  const double h = trace / double(args.rank);
  args.h[b] = Real<T>(h);
  health[kUpdates] += 1;
  health[kLargestGain] = std::max(health[kLargestGain], h - rule.forgetting);
}

// Calls update(rule, b, counters) for the matrices of one layer, which threads share where each is
// small.
template <class T, class Update>
void update_layer(const RlsUpdate<T>& args, const Update& update) {
  const UpdateRule rule = rule_at(args.rule, steps_counted(args.health));
  if (args.batch == 1) {
    double unread[kHealthSlots] = {};
    update(rule, int64_t(0), args.health ? args.health : unread);
  } else {
    Scratch<double> counts(args.batch * kHealthSlots, 0.0);
    const int64_t work = args.n * args.n * args.rank;
    parallel_for(0, args.batch, 65536 / (work + 1) + 1, [&](int64_t b0, int64_t b1) {
      for (int64_t b = b0; b < b1; ++b) update(rule, b, counts.data() + b * kHealthSlots);
    });
    for (int64_t b = 0; args.health && b < args.batch; ++b) {
      const double* one = counts.data() + b * kHealthSlots;
      for (int slot : {kUpdates, kRefused, kResets}) args.health[slot] += one[slot];
      args.health[kLargestGain] = std::max(args.health[kLargestGain], one[kLargestGain]);
    }
  }
  if (!args.health || (args.found_inf && *args.found_inf)) return;
  args.health[kSteps] += 1;
  if (args.rank == 0) args.health[kMissing] += 1;
}

}  // namespace rlscuda
