// The updates held back of one matrix on the CPU, P_true = scale (P - V^T V) + shift I
// (rls_math.h).
#pragma once

#include <cstdint>

#include "kernels.h"
#include "rls_math.h"

namespace rlscuda {

template <class T>
struct HeldRows {
  T* V;  // [hold, rank, n]
  HeldState* state;
  int64_t hold, rank, n;

  HeldRows(const RlsUpdate<T>& layer, int64_t b)
      : V(layer.held + b * layer.hold * layer.rank * layer.n),
        state(layer.held_state + b),
        hold(layer.hold),
        rank(layer.rank),
        n(layer.n) {}

  int64_t rows() const { return held_count(*state, hold) * rank; }
  // Where the rows of the next update go.
  T* next() const { return V + rows() * n; }
  // U = S P of the P in memory, [rank, n], becomes S P_true.
  void correct(const T* S, T* U) const;
  // P <- P_true with all of V that the state counts, after which nothing is held.
  void apply(T* P) const;
};

}  // namespace rlscuda
