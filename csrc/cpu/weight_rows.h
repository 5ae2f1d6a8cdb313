// Rows of a parameter and of the product that moves it.
#pragma once

#include "half.h"
#include "kernels.h"
#include "parallel.h"

namespace rlscuda {

// The parameter row as it lies in memory: dense, or [channels, kh, kw] with strides.
template <class W, class F>
ALWAYS_INLINE void for_each_weight(const RowLayout& layout, W* weight, int64_t i, int64_t n,
                                   const F& f) {
  W* row = weight + i * layout.row_stride;
  if (layout.dense) {
    for (int64_t j = 0; j < n; ++j) f(row[j], j);
    return;
  }
  int64_t j = 0;
  for (int64_t c = 0; c < layout.size[0]; ++c)
    for (int64_t y = 0; y < layout.size[1]; ++y)
      for (int64_t x = 0; x < layout.size[2]; ++x)
        f(row[c * layout.stride[0] + y * layout.stride[1] + x * layout.stride[2]], j++);
}

// D[i, :] += g_b[i] P[n, :], where the bias was left out of the product.
template <class T, class W>
ALWAYS_INLINE void complete_row(const WeightStep<T>& a, int64_t i, T* row, int64_t columns) {
  if (!a.bias_row) return;
  const T g = to_compute<T>(static_cast<const W*>(a.grad_bias)[i]);
  const T* p = a.bias_row + (i / a.rows_per_group) * a.bias_row_stride;
  for (int64_t j = 0; j < columns; ++j) row[j] += g * p[j];
}

}  // namespace rlscuda
