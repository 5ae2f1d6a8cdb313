// A bank of filters on the CPU: one after the other, each from beginning to end while its matrix is
// in the nearest cache. Arithmetic is in T; h, the ridge and the sums of squares in float64.
// Filters are independent, so results do not depend on the number of threads.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "kernels.h"
#include "parallel.h"
#include "rls_kernels.h"
#include "scratch.h"

namespace rlscuda {
namespace {

constexpr int64_t kGrainWork = 1 << 15;  // multiply-adds that are worth a thread

template <class T>
ALWAYS_INLINE double weight_of(const RlsBank<T>& bank, int64_t row) {
  if (bank.mask && !bank.mask[row]) return 0;
  return bank.weights ? double(bank.weights[row]) : 1.0;
}

template <class T>
ALWAYS_INLINE bool all_finite(const T* x, int64_t count) {
  constexpr T kMost = std::numeric_limits<T>::max();
  int bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= !(std::fabs(x[i]) <= kMost);
  return !bad;
}

template <class T>
ALWAYS_INLINE BankFault fault_of(const RlsBank<T>& bank, int64_t row) {
  const double weight = weight_of(bank, row);
  if (weight == 0) return kNoFault;
  const BankRule& rule = bank.rule[bank.index ? bank.index[row] : row];
  if (!is_rule<T>(rule)) return kBadRule;
  if (!(weight > 0 && weight * rule.gain <= DBL_MAX)) return kBadWeight;
  if (!all_finite(bank.x + row * bank.x_stride, bank.n)) return kBadX;
  return all_finite(bank.y + row * bank.n_out, bank.n_out) ? kNoFault : kBadY;
}

template <class T>
ALWAYS_INLINE int64_t first_fault(const RlsBank<T>& bank, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    if (fault_of(bank, row) != kNoFault) return row;
  return end;
}

template <class T>
ALWAYS_INLINE void start_anew(T* P, double scale, int64_t n) {
  std::fill_n(P, n * n, T(0));
  for (int64_t i = 0; i < n; ++i) P[i * (n + 1)] = T(scale);
}

// P <- scale (P - v v^T): v_i v_j is v_j v_i, so P stays symmetric to the bit.
template <class T>
ALWAYS_INLINE void subtract(T* P, const T* v, T scale, int64_t n) {
  update<T>({P, n}, {v, 0}, {v, 0}, 1, scale, 0, n, 0, n);
}

// The raises that are due after a sample; false where one of them would break P.
template <class T>
ALWAYS_INLINE bool raise(const RlsBank<T>& bank, int64_t filter, double h, double all, T* P, T* v) {
  const int64_t n = bank.n;
  const BankRule& rule = bank.rule[filter];
  BankState& state = bank.state[filter];
  state.turn = sound_turn(state.turn, n);
  for (int64_t due = ridge_due(state.turn, rule.forgetting, h, n); due > 0; --due) {
    const int64_t j = int64_t(state.turn.next);
    const double raised = bank_raise(rule, state, bank.squares[filter * n + j], all, n,
                                     double(std::numeric_limits<T>::epsilon()));
    const double divisor = 1 + raised * double(P[j * (n + 1)]);
    if (!divides(divisor)) return false;
    const T root = T(std::sqrt(raised / divisor));
    for (int64_t i = 0; i < n; ++i) v[i] = root * P[j * n + i];
    subtract(P, v, T(1), n);
    state.turn.next = double(j + 1 < n ? j + 1 : 0);
  }
  return true;
}

// One sample; v [n] and error [n_out] are workspace.
template <class T>
ALWAYS_INLINE void learn(const RlsBank<T>& bank, int64_t row, T* v, T* error) {
  const int64_t n = bank.n;
  const int64_t filter = bank.index ? bank.index[row] : row;
  const BankRule& rule = bank.rule[filter];
  BankState& state = bank.state[filter];
  T* P = bank.P + filter * n * n;
  T* W = bank.W + filter * bank.n_out * n;
  const T* x = bank.x + row * bank.x_stride;
  const T* y = bank.y + row * bank.n_out;
  T* prediction = bank.predictions + row * bank.n_out;
  project<T>({W, n}, {x, 0}, {prediction, 0}, n, 1, 0, bank.n_out);
  const double gain = rule.gain * weight_of(bank, row);
  if (gain == 0) return;

  project<T>({P, n}, {x, 0}, {v, 0}, n, 1, 0, n);
  bool sound = true;
  for (int64_t k = 0; k < bank.n_out; ++k) {
    error[k] = y[k] - prediction[k];
    sound = sound && std::isfinite(error[k]);
  }
  double* squares = bank.squares + filter * n;
  double xu = 0, all = 0;
  for (int64_t i = 0; i < n; ++i) {
    xu += double(x[i]) * double(v[i]);
    all += squares[i] + gain * double(x[i]) * double(x[i]);
  }
  const double h = rule.forgetting + gain * xu;
  if (all == 0 && rule.ridge < 0) {  // nothing seen yet that could be forgotten
    ++state.updates;
    return;
  }
  if (!(sound && divides(h) && all <= DBL_MAX)) {
    start_anew(P, rule.initial_scale, n);
    ++state.resets;
    return;
  }
  ++state.updates;
  const T root = T(std::sqrt(gain / h));
  for (int64_t i = 0; i < n; ++i) {
    squares[i] += gain * double(x[i]) * double(x[i]);
    v[i] *= root;
  }
  for (int64_t k = 0; k < bank.n_out; ++k) error[k] = -root * error[k];
  update<T>({W, n}, {error, 0}, {v, 0}, 1, T(1), 0, bank.n_out, 0, n);
  subtract(P, v, T(1 / rule.forgetting), n);
  if (rule.forgetting < 1 && rule.ridge != 0 && !raise(bank, filter, h, all, P, v)) {
    start_anew(P, rule.initial_scale, n);
    ++state.resets;
  }
}

template <class T>
ALWAYS_INLINE void learn_all(const RlsBank<T>& bank, T* workspace, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) learn(bank, row, workspace, workspace + bank.n);
}

}  // namespace

SIMD_CLONES void bank_rows(const RlsBank<float>& bank, float* workspace, int64_t begin,
                           int64_t end) {
  learn_all(bank, workspace, begin, end);
}
SIMD_CLONES void bank_rows(const RlsBank<double>& bank, double* workspace, int64_t begin,
                           int64_t end) {
  learn_all(bank, workspace, begin, end);
}
SIMD_CLONES int64_t bank_fault(const RlsBank<float>& bank, int64_t begin, int64_t end) {
  return first_fault(bank, begin, end);
}
SIMD_CLONES int64_t bank_fault(const RlsBank<double>& bank, int64_t begin, int64_t end) {
  return first_fault(bank, begin, end);
}

template <class T>
std::pair<int64_t, BankFault> rls_bank_fault_cpu(const RlsBank<T>& bank) {
  std::atomic<int64_t> first{bank.rows};
  parallel_for(
      0, bank.rows, kGrainWork / (bank.n + bank.n_out) + 1, [&](int64_t begin, int64_t end) {
        const int64_t found = bank_fault(bank, begin, end);
        int64_t known = first;
        while (found < end && found < known && !first.compare_exchange_weak(known, found)) {
        }
      });
  if (first == bank.rows) return {-1, kNoFault};
  return {first, fault_of(bank, first)};
}

template <class T>
void rls_bank_cpu(const RlsBank<T>& bank) {
  const int64_t work = bank.n * (2 * bank.n + bank.n_out);
  parallel_for(0, bank.rows, kGrainWork / work + 1, [&](int64_t begin, int64_t end) {
    Scratch<T> workspace(bank.n_out + bank.n);
    bank_rows(bank, workspace.data(), begin, end);
  });
}

template std::pair<int64_t, BankFault> rls_bank_fault_cpu<float>(const RlsBank<float>&);
template std::pair<int64_t, BankFault> rls_bank_fault_cpu<double>(const RlsBank<double>&);
template void rls_bank_cpu<float>(const RlsBank<float>&);
template void rls_bank_cpu<double>(const RlsBank<double>&);

}  // namespace rlscuda
