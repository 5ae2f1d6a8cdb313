// The streaming filter by a root of P on the CPU: P = L L^T with L [n, n] in memory, Potter's form.
//
// One sample x, with f = L^T x, h = lambda + kappa f f and a = kappa / (h + sqrt(lambda h)), does
//   L <- L (I - a f f^T) / sqrt(lambda),
// the square of which is the sample's step of P, and u = P x = L f. P cannot become indefinite, and
// the condition of L is the root of that of P. Written out, t samples after the L_0 in memory, with
// s_t = lambda^-t and P_t = s_t L_t L_t^T,
//   L_t = L_0 - sum_j v_j f_j^T,  f_j = sqrt(|a_j| s_j) L_j^T x_j,  v_j = sign_j L_j f_j.
// The f of a sample comes from L_0^T x by f <- f - sign_j f_j (f_j f) over the rows that wait, and
// sign_j f_j f is v_j x: so a block of K samples needs the product L_0^T X^T before it, L_0 F^T for
// its rows v after it, and one rank-K update, which shares a pass over L with the products of the
// next block. The rows v_j and f_j may wait in the two halves of V from one call to the next.
//
// A raise of the ridge of coordinate j is the sample sqrt(rho) e_j at lambda = 1, a sample that
// leaves a window one of negative kappa. Work is shared by columns or rows of L, whose results do
// not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "filter_block.h"
#include "filter_call.h"
#include "kernels.h"
#include "parallel.h"
#include "rls_kernels.h"
#include "rls_rows.h"
#include "triangle.h"

namespace rlscuda {

// L <- scale (L - V^T F) where rank > 0, then U = X L where next > 0; by columns of L.
template <class T>
struct RootPass {
  Rows<T> L;
  int64_t n;
  Rows<const T> V, F;
  int64_t rank;
  T scale;
  Rows<const T> minus;  // [n, next]: -X^T
  int64_t next;
  Rows<T> U;
};

namespace {

template <class T>
Rows<T> root_rows(const RlsFilter<T>& f) {
  return {f.V + kFilterRows * f.v_stride, f.v_stride};
}

// f <- f - sign row (row f) for `rows` rows; leaves sign (row f) of each in the weights.
template <class T>
ALWAYS_INLINE void reflect(const Rows<T>& F, const double* sign, int64_t rows, int64_t n, T* f,
                           T* weights) {
  constexpr int W = kLanes<T>;
  if (!rows) return;
  T weight = 0;
  for (int64_t k = 0; k <= rows; ++k) {  // takes row k - 1 off f, and multiplies it with row k
    const T* last = F[k > 0 ? k - 1 : 0];
    const T* row = F[k < rows ? k : 0];
    Vec<T> acc[2] = {};
    T tail = 0;
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W)
      for (int b = 0; b < 2; ++b) {
        const Vec<T> rest = load(f + j + b * W) - weight * load(last + j + b * W);
        store(f + j + b * W, rest);
        acc[b] += rest * load(row + j + b * W);
      }
    for (; j < n; ++j) {
      f[j] -= weight * last[j];
      tail += f[j] * row[j];
    }
    if (k < rows) weights[k] = weight = T(sign[k]) * (tail + sum(acc[0] + acc[1]));
  }
}

struct SquareRoot {
  template <class T>
  static ALWAYS_INLINE void correct(const RlsFilter<T>& f, const FilterBlock<T>& block,
                                    int64_t rows, const T*, T* u) {
    reflect(root_rows(f), f.state->sign, rows, f.n, u, block.weights);
  }

  template <class T>
  static ALWAYS_INLINE double energy(const RlsFilter<T>& f, const T*, T* u) {
    return f.state->scale * dot(u, u, f.n);
  }

  template <class T>
  static ALWAYS_INLINE RowFactors factors(const RlsFilter<T>& f, double gain, double forgetting,
                                          double h) {
    const double root = std::sqrt((h + std::sqrt(forgetting * h)) * std::fabs(gain));
    const double back = std::sqrt(f.state->scale);
    return {std::fabs(gain) / root * back, -root / h * back};
  }

  template <class T>
  static ALWAYS_INLINE T* row(const RlsFilter<T>& f, int64_t j) {
    return root_rows(f)[j];
  }
};

template <class T>
ALWAYS_INLINE void root_pass(const RootPass<T>& p, int64_t begin, int64_t end) {
  constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));
  for (int64_t j0 = begin; j0 < end; j0 += kTile) {
    const int64_t j1 = std::min(j0 + kTile, end);
    for (int64_t k = 0; k < p.next; ++k) std::fill(p.U[k] + j0, p.U[k] + j1, T(0));
    for (int64_t i0 = 0; i0 < p.n; i0 += kStripRows) {
      const int64_t i1 = std::min(i0 + kStripRows, p.n);
      if (p.rank) update<T>(p.L, p.V, p.F, p.rank, p.scale, i0, i1, j0, j1);
      if (p.next)
        update<T>(p.U, {p.minus[i0], p.minus.stride}, {p.L[i0], p.L.stride}, i1 - i0, T(1), 0,
                  p.next, j0, j1);
    }
  }
}

// The rows v from `first` on: their products with L_0 become those with the L of their step.
template <class T>
ALWAYS_INLINE void root_complete(const RlsFilter<T>& f, const FilterBlock<T>& block,
                                 int64_t first) {
  const Rows<T> V{f.V, f.v_stride}, F = root_rows(f);
  for (int64_t k = first; k < int64_t(f.state->rows); ++k) {
    project<T>({F.data, F.stride}, {F[k], 0}, {block.weights, 0}, f.n, 1, 0, k);
    update_band<T, 1>({V[k], 0}, {block.weights, 1}, {V.data, V.stride}, k, T(f.state->sign[k]), 0,
                      0, f.n);
  }
}

// The row f of the sample sqrt(ridge) e_j; without one where it has overflowed.
template <class T>
ALWAYS_INLINE void root_raise(const RlsFilter<T>& f, const FilterBlock<T>& block, int64_t j,
                              double ridge) {
  FilterState& state = *f.state;
  const int64_t rows = int64_t(state.rows);
  T* u = SquareRoot::row(f, rows);
  std::copy_n(f.P + j * f.n, f.n, u);
  SquareRoot::correct(f, block, rows, u, u);
  const double h = 1 + ridge * SquareRoot::energy(f, u, u);
  if (!std::isfinite(h)) return;
  const T unit = T(SquareRoot::factors(f, ridge, 1, h).row);
  for (int64_t i = 0; i < f.n; ++i) u[i] *= unit;
  state.sign[rows] = 1;
  state.rows += 1;
}

}  // namespace

#define ROOT_CLONES(T)                                                                           \
  SIMD_CLONES void root_columns(const RootPass<T>& p, int64_t j0, int64_t j1) {                  \
    root_pass(p, j0, j1);                                                                        \
  }                                                                                              \
  SIMD_CLONES void root_product(Rows<const T> L, Rows<const T> F, Rows<T> V, int64_t n,          \
                                int64_t count, int64_t i0, int64_t i1) {                         \
    project<T>(L, F, V, n, count, i0, i1);                                                       \
  }                                                                                              \
  SIMD_CLONES BlockEnd root_steps(const RlsFilter<T>& f, const FilterBlock<T>& block) {          \
    return block_steps<SquareRoot>(f, block);                                                    \
  }                                                                                              \
  SIMD_CLONES void root_rows_complete(const RlsFilter<T>& f, const FilterBlock<T>& block,        \
                                      int64_t first) {                                           \
    root_complete(f, block, first);                                                              \
  }                                                                                              \
  SIMD_CLONES void root_row_raise(const RlsFilter<T>& f, const FilterBlock<T>& block, int64_t j, \
                                  double ridge) {                                                \
    root_raise(f, block, j, ridge);                                                              \
  }                                                                                              \
  SIMD_CLONES double root_variance(const RlsFilter<T>& f, const FilterBlock<T>& block,           \
                                   int64_t t) {                                                  \
    T* u = block.U[t];                                                                           \
    SquareRoot::correct(f, block, int64_t(f.state->rows), u, u);                                 \
    return SquareRoot::energy(f, u, u);                                                          \
  }
ROOT_CLONES(float)
ROOT_CLONES(double)

namespace {

template <class T>
class RootCall final : public FilterCall<T> {
 public:
  using FilterCall<T>::FilterCall;

  void pass(bool apply, int64_t count) override {
    const FilterState& state = *f_.state;
    const int64_t rows = apply ? int64_t(state.rows) : 0;
    const Rows<T> F = root_rows(f_);
    RootPass<T> p{{f_.P, f_.n}, f_.n, {f_.V, f_.v_stride}, {F.data, F.stride}, rows};
    p.scale = T(std::sqrt(state.scale));
    p.minus = this->minus(count);
    p.next = count;
    p.U = block_.U;
    constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));
    share(kTile, rows + count, [&](int64_t j0, int64_t j1) { root_columns(p, j0, j1); });
    if (apply) this->nothing_waits();
  }

 protected:
  BlockEnd steps() override { return root_steps(f_, block_); }
  void raise(int64_t j, double ridge) override { root_row_raise(f_, block_, j, ridge); }
  double variance_of(int64_t t) override { return root_variance(f_, block_, t); }

  void complete(int64_t first) override {
    const int64_t count = int64_t(f_.state->rows) - first;
    const Rows<T> V{f_.V + first * f_.v_stride, f_.v_stride};
    const Rows<const T> F{root_rows(f_)[first], f_.v_stride};
    share(kStripRows, count,
          [&](int64_t i0, int64_t i1) { root_product({f_.P, f_.n}, F, V, f_.n, count, i0, i1); });
    root_rows_complete(f_, block_, first);
  }

 private:
  using FilterCall<T>::f_;
  using FilterCall<T>::block_;

  // Calls part(begin, end) on ranges of the n rows or columns of L, in whole tiles, for a pass with
  // `rank` rows.
  template <class Part>
  void share(int64_t tile, int64_t rank, const Part& part) {
    if (!rank) return;
    const int64_t grain = (1 << 19) / (tile * f_.n * rank) + 1;
    parallel_for(0, (f_.n + tile - 1) / tile, grain, [&](int64_t begin, int64_t end) {
      part(begin * tile, std::min(end * tile, f_.n));
    });
  }
};

}  // namespace

template <class T>
int64_t rls_root_filter_cpu(const RlsFilter<T>& f) {
  return RootCall<T>(f, f.history ? 1 : f.samples).learn();
}

template <class T>
void rls_root_filter_flush_cpu(const RlsFilter<T>& f) {
  RootCall<T>(f, 1).pass(true, 0);
}

template <class T>
void rls_root_filter_variance_cpu(const RlsFilter<T>& f, double* out) {
  RootCall<T>(f, f.samples).variance(out);
}

#define ROOT_FILTER_OF(T)                                          \
  template int64_t rls_root_filter_cpu<T>(const RlsFilter<T>&);    \
  template void rls_root_filter_flush_cpu<T>(const RlsFilter<T>&); \
  template void rls_root_filter_variance_cpu<T>(const RlsFilter<T>&, double*);
ROOT_FILTER_OF(float)
ROOT_FILTER_OF(double)

}  // namespace rlscuda
