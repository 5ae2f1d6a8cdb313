// Updates held back on the CPU: the thin correction of U = S P, and the pass that applies what is
// held.
//
// The correction is two products with V, U <- scale (U - (S V^T) V) + shift S, beside one read of
// P. The pass goes by strips of rows and tiles of columns that keep a tile of V in the L1 cache, so
// that P is streamed once. Every element goes through the same operations as its mirror image, so P
// stays symmetric to the bit; no result depends on the number of threads.
#include <algorithm>

#include "held_rows.h"
#include "parallel.h"
#include "rls_kernels.h"

namespace rlscuda {

constexpr int64_t kApplyStrip = 48;    // rows
constexpr int64_t kApplyBytes = 1024;  // of a row: 16 rows of V take half of the L1 cache

namespace {

template <class T, int BYTES>
ALWAYS_INLINE void apply_strip(Rows<T> P, Rows<const T> V, int64_t n, int64_t rows, T scale,
                               T shift, int64_t i0, int64_t i1) {
  constexpr int64_t kTile = kApplyBytes / int64_t(sizeof(T)), kLeast = BYTES / int64_t(sizeof(T));
  for (int64_t j0 = 0, j1; j0 < n; j0 = j1) {
    j1 = n - j0 < kTile + kLeast ? n : j0 + kTile;  // no tile is narrower than a vector
    update<T, BYTES>(P, V, V, rows, scale, i0, i1, j0, j1);
  }
  for (int64_t i = i0; i < i1; ++i) P[i][i] += shift;
}

template <class T, int BYTES>
ALWAYS_INLINE void correct_columns(Rows<T> U, Rows<const T> S, Rows<const T> C, Rows<const T> V,
                                   int64_t rank, int64_t rows, T scale, T shift, int64_t j0,
                                   int64_t j1) {
  update<T, BYTES>(U, C, V, rows, scale, 0, rank, j0, j1);
  if (shift == T(0)) return;
  for (int64_t k = 0; k < rank; ++k)
    for (int64_t j = j0; j < j1; ++j) U[k][j] += shift * S[k][j];
}

}  // namespace

#define RLS_HELD_KERNELS(T, BYTES, TARGET)                                                        \
  TARGET void held_apply_strip(Width<BYTES>, Rows<T> P, Rows<const T> V, int64_t n, int64_t rows, \
                               T scale, T shift, int64_t i0, int64_t i1) {                        \
    apply_strip<T, BYTES>(P, V, n, rows, scale, shift, i0, i1);                                   \
  }                                                                                               \
  TARGET void held_correct_columns(Width<BYTES>, Rows<T> U, Rows<const T> S, Rows<const T> C,     \
                                   Rows<const T> V, int64_t rank, int64_t rows, T scale, T shift, \
                                   int64_t j0, int64_t j1) {                                      \
    correct_columns<T, BYTES>(U, S, C, V, rank, rows, scale, shift, j0, j1);                      \
  }                                                                                               \
  TARGET void held_products(Width<BYTES>, Rows<const T> S, Rows<const T> V, Rows<T> C, int64_t n, \
                            int64_t rank, int64_t rows) {                                         \
    project<T, BYTES>(S, V, C, n, rows, 0, rank);                                                 \
  }
AT_EACH_WIDTH(RLS_HELD_KERNELS, float)
AT_EACH_WIDTH(RLS_HELD_KERNELS, double)
#undef RLS_HELD_KERNELS

template <class T>
void HeldRows<T>::correct(const T* S, T* U) const {
  const int64_t held = rows();
  if (held == 0) return;
  T products[kHeldRows * kHeldRows];  // C = V S^T, [held, rank]
  at_width_of_rows<T>(n, [&](auto width) {
    held_products(width, {S, n}, {V, n}, {products, rank}, n, rank, held);
    parallel_for(0, n, (1 << 17) / (held * rank) + 1, [&](int64_t j0, int64_t j1) {
      held_correct_columns(width, {U, n}, {S, n}, {products, rank}, {V, n}, rank, held,
                           T(state->scale), T(state->shift), j0, j1);
    });
  });
}

template <class T>
void HeldRows<T>::apply(T* P) const {
  const int64_t held = int64_t(state->count) * rank;
  const int64_t strips = (n + kApplyStrip - 1) / kApplyStrip;
  const int64_t grain = (1 << 17) / (kApplyStrip * n * held + 1) + 1;
  at_width_of_rows<T>(n, [&](auto width) {
    parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip)
        held_apply_strip(width, {P, n}, {V, n}, n, held, T(state->scale), T(state->shift),
                         strip * kApplyStrip, std::min((strip + 1) * kApplyStrip, n));
    });
  });
  *state = kNothingHeld;
}

template <class T>
void rls_flush_cpu(const RlsUpdate<T>& layer) {
  for (int64_t b = 0; b < layer.batch; ++b) {
    const HeldRows<T> held(layer, b);
    if (held.rows() > 0) held.apply(layer.P + b * layer.n * layer.n);
  }
}

template struct HeldRows<float>;
template struct HeldRows<double>;
template void rls_flush_cpu<float>(const RlsUpdate<float>&);
template void rls_flush_cpu<double>(const RlsUpdate<double>&);

}  // namespace rlscuda
