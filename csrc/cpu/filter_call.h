// One call of a streaming filter of any form: its buffers, its blocks, and what waits for them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "filter_block.h"
#include "scratch.h"
#include "triangle.h"

namespace rlscuda {

// W <- W - E^T V of the rows [first, rows) of V, or its product with X; by rows of W.
template <class T>
struct WeightPass {
  Rows<T> W;
  int64_t n, rank;
  Rows<const T> E, V;
  Rows<const T> X;
  Rows<T> products;
  int64_t count;
};
void filter_weights(const WeightPass<float>& p, int64_t i0, int64_t i1);
void filter_weights(const WeightPass<double>& p, int64_t i0, int64_t i1);

template <class T>
class FilterCall {
 public:
  FilterCall(const RlsFilter<T>& f, int64_t most)
      : f_(f), most_(std::clamp<int64_t>(most, 1, kMostSamples)) {
    const int64_t wide = padded(f.n);
    memory_.resize(2 * most_ * wide + most_ * padded(f.n_out) + f.n * padded(most_) + 2 * kLine +
                   kFilterRows);
    T* next = memory_.data();
    next += (-reinterpret_cast<uintptr_t>(next) % 64) / sizeof(T);
    const auto take = [&](int64_t rows, int64_t cols) {
      T* at = next;
      next += rows * cols;
      return Rows<T>{at, cols};
    };
    block_.X = take(most_, wide);
    block_.U = take(most_, wide);
    block_.E = take(most_, padded(f.n_out));
    block_.minus = take(f.n, padded(most_));
    block_.weights = next;
    check_taken(memory_, next + kFilterRows);
  }
  virtual ~FilterCall() = default;

  // Learns the series; returns how many samples of it.
  int64_t learn() {
    FilterState& state = *f_.state;
    for (int64_t first = 0; first < f_.samples;) {
      const bool full = is_full();
      const int64_t room = samples_per_pass() - (full ? 0 : int64_t(state.rows));
      const int64_t count = f_.history ? 1 : std::min(room, f_.samples - first);
      take(first, count);
      pass(full, count);
      weights(0, 0, count);
      const int64_t before = int64_t(state.rows);
      const BlockEnd end = steps();
      if (const int64_t added = int64_t(state.rows) - before) {
        complete(before);
        weights(before, added, 0);
      }
      if (f_.history && end.taken)
        std::copy_n(f_.W, f_.n_out * f_.n, f_.history + first * f_.n_out * f_.n);
      first += end.taken;
      if (end.why == Steps::kFailed) return first;
      if (end.why == Steps::kRaise) raise_next(end.due, forgetting_of(f_, first - 1));
    }
    return f_.samples;
  }

  // out [samples]: x P x of each row of X.
  void variance(double* out) {
    for (int64_t first = 0; first < f_.samples; first += kMostSamples) {
      const int64_t count = std::min(kMostSamples, f_.samples - first);
      take(first, count);
      pass(false, count);
      for (int64_t t = 0; t < count; ++t) out[first + t] = variance_of(t);
    }
  }

  // Applies what waits where `apply`, and projects the block.
  virtual void pass(bool apply, int64_t count) = 0;

 protected:
  virtual BlockEnd steps() = 0;
  // The rows of V from `first` on, where steps and raises have left something else.
  virtual void complete(int64_t /*first*/) {}
  // The row of a raise of coordinate j.
  virtual void raise(int64_t j, double ridge) = 0;
  virtual double variance_of(int64_t t) = 0;

  // -X^T of the block.
  Rows<const T> minus(int64_t count) {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t j = 0; j < f_.n; ++j) block_.minus[j][t] = -block_.X[t][j];
    return {block_.minus.data, block_.minus.stride};
  }

  void nothing_waits() {
    f_.state->rows = 0;
    f_.state->scale = 1;
  }

  const RlsFilter<T>& f_;
  FilterBlock<T> block_{};

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  // An odd number of cache lines keeps the rows of a column apart in the cache.
  static int64_t padded(int64_t cols) { return ((cols + kLine - 1) / kLine | 1) * kLine; }

  // K: enough to be worth a pass, few enough that the thin corrections stay thin.
  int64_t samples_per_pass() const { return std::clamp<int64_t>(f_.n / 4, 4, kMostSamples); }

  // Whether what waits must be applied before another sample comes.
  bool is_full() const {
    const FilterState& state = *f_.state;
    return int64_t(state.rows) >= samples_per_pass() || scale_is_far(state);
  }

  // The samples [first, first + count) into the block.
  void take(int64_t first, int64_t count) {
    block_.first = first;
    block_.count = count;
    for (int64_t t = 0; t < count; ++t) {
      const T* x = f_.X + (first + t) * f_.x_stride[0];
      if (f_.x_stride[1] == 1)
        std::copy_n(x, f_.n, block_.X[t]);
      else
        for (int64_t j = 0; j < f_.n; ++j) block_.X[t][j] = x[j * f_.x_stride[1]];
    }
  }

  // W X^T of the block, or the update of W by the rows of V from `first` on.
  void weights(int64_t first, int64_t rows, int64_t count) {
    WeightPass<T> p{{f_.W, f_.n}, f_.n, rows, {block_.E.data, block_.E.stride}};
    p.V = {f_.V + first * f_.v_stride, f_.v_stride};
    p.X = {block_.X.data, block_.X.stride};
    p.products = {f_.predictions + block_.first * f_.n_out, f_.n_out};
    p.count = count;
    const int64_t strips = (f_.n_out + kStripRows - 1) / kStripRows;
    const int64_t grain = (1 << 19) / (kStripRows * f_.n * (rows + count) + 1) + 1;
    parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
      filter_weights(p, begin * kStripRows, std::min(end * kStripRows, f_.n_out));
    });
  }

  // Raises `due` coordinates, beginning with the one whose turn it is.
  void raise_next(int64_t due, double forgetting) {
    int64_t first = int64_t(f_.state->rows);
    take_turns(f_, due, forgetting, [&](int64_t j, double weight) {
      if (int64_t(f_.state->rows) == kFilterRows) {
        complete(first);
        pass(true, 0);
        first = 0;
      }
      raise(j, weight);
    });
    complete(first);
  }

  int64_t most_;
  Scratch<T> memory_;
};

}  // namespace rlscuda
