// The streaming filter on the CPU: K samples by one pass over P and W.
//
// One sample x, y does, with u = P x, h = lambda + kappa x u, e = y - W x, v = sqrt(kappa / h) u:
//   W <- W + (kappa / h) e u^T,   P <- a (P - v v^T) + b I,   a = decay / lambda, b = diffusion.
// Written out, t samples after a matrix P_0 that is still the one in memory,
//   P_t = a^t (P_0 - sum_j w_j w_j^T) + b_t I,   w_j = a^(-j/2) v_j,   b_t = b (1 + ... + a^(t-1)),
//   W_t = W_0 - sum_j E_j w_j^T,                 E_j = -a^(j/2) sqrt(kappa / h_j) e_j,
// so a block of K samples needs the products P_0 X^T and W_0 X^T, which are known before it starts,
// thin corrections, and one rank-K update. That update and the products of the next block share a
// pass in tiles that stay in the cache: P is read and written once in K samples, 8 n^2 / K bytes a
// sample in float32, where the formula as it stands moves 12 n^2.
//
// A series of few samples has no block to share a pass: where P is large, its updates are those of
// rls_update_, held back from one call to the next (rls_held_cpu.cpp).
//
// Arithmetic is in T, the scalars h, a^t, b_t in float64. Work is shared by strips of rows, whose
// results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "parallel.h"
#include "rls_kernels.h"
#include "scratch.h"

namespace rlscuda {

constexpr int64_t kStripRows = 12;    // whole tiles of both kernels: 4 rows and 3 rows
constexpr int64_t kTileBytes = 2048;  // of a row: 12 rows stay in the L1 cache between the kernels
constexpr int64_t kMostSamples = 16;  // K at most
constexpr int64_t kFewSamples = 4;    // a series of so few goes sample by sample, held back

// M <- scale (M - L^T R) + diffusion I where rank > 0, then U = S M^T where next > 0.
template <class T>
struct FilterPass {
  Rows<T> M;
  int64_t rows, cols;
  Rows<const T> L, R;
  int64_t rank;
  T scale, diffusion;
  Rows<const T> S;
  Rows<T> U;
  int64_t next;
};

// What a block needs between two passes: from the products to the factors of the next update.
template <class T>
struct FilterBlock {
  Rows<const T> X;  // [count, n]
  Rows<T> V;        // [count, n]: in P_0 x, out w
  Rows<T> E;        // [count, n_out]: in W_0 x, out E
  T* weights;       // [count]: workspace
  int64_t first, count;
};

namespace {

template <class T>
ALWAYS_INLINE void pass_strip(const FilterPass<T>& p, int64_t i0, int64_t i1) {
  constexpr int64_t kTile = kTileBytes / int64_t(sizeof(T));
  const Rows<const T> M{p.M.data, p.M.stride};
  for (int64_t j0 = 0; j0 < p.cols; j0 += kTile) {
    const int64_t j1 = std::min(j0 + kTile, p.cols);
    if (p.rank) {
      update<T>(p.M, p.L, p.R, p.rank, p.scale, i0, i1, j0, j1);
      if (p.diffusion != 0)
        for (int64_t i = std::max(i0, j0); i < std::min(i1, j1); ++i) p.M[i][i] += p.diffusion;
    }
    if (p.next)
      project<T>({M[0] + j0, M.stride}, {p.S[0] + j0, p.S.stride}, p.U, j1 - j0, p.next, i0, i1,
                 j0 > 0);
  }
}

template <class T>
ALWAYS_INLINE void pass(const FilterPass<T>& p, int64_t strip0, int64_t strip1) {
  for (int64_t strip = strip0; strip < strip1; ++strip)
    pass_strip(p, strip * kStripRows, std::min((strip + 1) * kStripRows, p.rows));
}

// u <- scale u + shift x; returns x u.
template <class T>
ALWAYS_INLINE double scale_and_dot(T* u, const T* x, T scale, T shift, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[2] = {};
  T tail = 0;
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W)
    for (int b = 0; b < 2; ++b) {
      const Vec<T> value = load(x + j + b * W);
      const Vec<T> product = scale * load(u + j + b * W) + shift * value;
      store(u + j + b * W, product);
      acc[b] += product * value;
    }
  for (; j < n; ++j) {
    u[j] = scale * u[j] + shift * x[j];
    tail += u[j] * x[j];
  }
  return double(tail + sum(acc[0] + acc[1]));
}

// The samples of a block one after the other; returns how many could be taken: fewer than `count`
// where the next one makes h or its error no finite, positive number.
template <class T>
ALWAYS_INLINE int64_t steps(const RlsFilter<T>& f, const FilterBlock<T>& block) {
  const double growth = f.decay / f.forgetting;
  double scale = 1, shift = 0;  // a^t, b_t
  const Rows<const T> V{block.V.data, block.V.stride}, E{block.E.data, block.E.stride};
  for (int64_t t = 0; t < block.count; ++t) {
    const T* x = block.X[t];
    T* u = block.V[t];
    T* error = block.E[t];
    if (t) {  // subtract what the samples before this one in the block have taken from P x and W x
      project<T>(V, {x, 0}, {block.weights, 0}, f.n, 1, 0, t);
      const Rows<const T> L{block.weights, 1};
      update_band<T, 1>({u, 0}, L, V, t, T(1), 0, 0, f.n);
      update_band<T, 1>({error, 0}, L, E, t, T(1), 0, 0, f.n_out);
    }
    const double h = f.forgetting + f.gain * scale_and_dot(u, x, T(scale), T(shift), f.n);
    const double root = std::sqrt(f.gain / h), back = std::sqrt(scale);
    const T factor = T(-root * back);
    const T* y = f.Y + (block.first + t) * f.y_stride[0];
    T* prediction = f.predictions + (block.first + t) * f.n_out;
    T zero = 0;  // becomes nan where an error is not finite
    for (int64_t k = 0; k < f.n_out; ++k) {
      prediction[k] = error[k];
      error[k] = factor * (y[k * f.y_stride[1]] - prediction[k]);
      zero += error[k] * T(0);
    }
    if (!(h > 0) || !std::isfinite(h) || zero != 0) return t;
    const T unit = T(root / back);
    for (int64_t j = 0; j < f.n; ++j) u[j] *= unit;
    scale *= growth;
    shift = growth * shift + f.diffusion;
  }
  return block.count;
}

}  // namespace

SIMD_CLONES void filter_pass(const FilterPass<float>& p, int64_t strip0, int64_t strip1) {
  pass(p, strip0, strip1);
}
SIMD_CLONES void filter_pass(const FilterPass<double>& p, int64_t strip0, int64_t strip1) {
  pass(p, strip0, strip1);
}
SIMD_CLONES int64_t filter_steps(const RlsFilter<float>& f, const FilterBlock<float>& block) {
  return steps(f, block);
}
SIMD_CLONES int64_t filter_steps(const RlsFilter<double>& f, const FilterBlock<double>& block) {
  return steps(f, block);
}

namespace {

template <class T>
void parallel_pass(const FilterPass<T>& p) {
  const int64_t strips = (p.rows + kStripRows - 1) / kStripRows;
  const int64_t work = kStripRows * p.cols * (p.rank + p.next);
  parallel_for(0, strips, (1 << 19) / (work + 1) + 1,
               [&](int64_t begin, int64_t end) { filter_pass(p, begin, end); });
}

// K: enough to be worth a pass, few enough that the thin corrections stay thin and a^K tame.
template <class T>
int64_t samples_per_pass(const RlsFilter<T>& f) {
  const double growth = std::fabs(std::log(f.decay / f.forgetting));
  const double most = growth > 0 ? std::log(kHeldGrowth) / growth : double(kMostSamples);
  const int64_t wanted = std::clamp<int64_t>(f.n / 4, 4, kMostSamples);
  return std::max<int64_t>(1, int64_t(std::min(most, double(wanted))));
}

// Rows of T, each on cache lines of its own; the odd number of lines keeps the rows of a column
// apart in the cache, which a power of two would not.
template <class T>
class Buffer {
 public:
  Buffer(int64_t rows, int64_t cols)
      : stride_(((cols + kLine - 1) / kLine | 1) * kLine), memory_(rows * stride_ + kLine) {}
  Rows<T> rows() {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return {memory_.data() + (-address % 64) / sizeof(T), stride_};
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  int64_t stride_;
  Scratch<T> memory_;
};

template <class T>
void copy_sample(const RlsFilter<T>& f, int64_t sample, T* to) {
  const T* x = f.X + sample * f.x_stride[0];
  if (f.x_stride[1] == 1)
    std::copy_n(x, f.n, to);
  else
    for (int64_t j = 0; j < f.n; ++j) to[j] = x[j * f.x_stride[1]];
}

template <class T>
void start_anew(const RlsFilter<T>& f) {
  std::fill_n(f.P, f.n * f.n, T(0));
  for (int64_t i = 0; i < f.n; ++i) f.P[i * f.n + i] = T(f.initial_scale);
  if (f.hold) *f.held_state = kNothingHeld;
}

// The matrix of the filter as one layer of rls_update_, with what is held of it.
template <class T>
RlsUpdate<T> matrix_of(const RlsFilter<T>& f) {
  RlsUpdate<T> layer{};
  layer.P = f.P;
  layer.batch = layer.rank = 1;
  layer.n = f.n;
  layer.rule = {f.forgetting, f.gain, f.decay, f.diffusion, 0, f.initial_scale, false};
  layer.held = f.held;
  layer.held_state = f.held_state;
  layer.hold = f.hold;
  return layer;
}

// Sample by sample, the updates of P held back. Returns the resets.
template <class T>
int64_t filter_held(const RlsFilter<T>& f) {
  Buffer<T> input(1, f.n), projected(1, f.n), errors(1, f.n_out);
  const Rows<T> x = input.rows(), u = projected.rows(), e = errors.rows();
  RlsUpdate<T> layer = matrix_of(f);
  T h;
  layer.S = x.data;
  layer.U = u.data;
  layer.h = &h;
  FilterPass<T> on_W{{f.W, f.n}, f.n_out, f.n};
  on_W.scale = T(1);
  on_W.L = {e.data, e.stride};
  on_W.R = {u.data, u.stride};
  on_W.S = {x.data, x.stride};
  on_W.U = e;
  int64_t resets = 0;
  for (int64_t t = 0; t < f.samples; ++t) {
    copy_sample(f, t, x.data);
    on_W.rank = 0, on_W.next = 1;
    parallel_pass(on_W);
    bool finite = true;
    for (int64_t k = 0; k < f.n_out; ++k) {
      T& error = e.data[k];
      f.predictions[t * f.n_out + k] = error;
      error = f.Y[t * f.y_stride[0] + k * f.y_stride[1]] - error;
      finite = finite && std::isfinite(error);
    }
    if (finite) rls_update_cpu(&layer, 1);
    if (!finite || std::isnan(h)) {
      start_anew(f);
      ++resets;
      continue;
    }
    const T factor = T(-f.gain / double(h));
    for (int64_t k = 0; k < f.n_out; ++k) e.data[k] *= factor;
    on_W.rank = 1, on_W.next = 0;
    parallel_pass(on_W);
  }
  return resets;
}

}  // namespace

template <class T>
int64_t rls_filter_cpu(const RlsFilter<T>& f) {
  if (f.hold && f.samples <= kFewSamples) return filter_held(f);
  if (f.hold) rls_flush_cpu(matrix_of(f));
  const int64_t most = std::min(samples_per_pass(f), f.samples);
  Buffer<T> factors[2] = {{most, f.n}, {most, f.n}};
  Buffer<T> errors[2] = {{most, f.n_out}, {most, f.n_out}};
  Buffer<T> inputs(most, f.n), weights(1, most);

  FilterPass<T> on_P{{f.P, f.n}, f.n, f.n}, on_W{{f.W, f.n}, f.n_out, f.n};
  on_W.scale = T(1);
  int64_t resets = 0;
  for (int64_t first = 0, turn = 0;; turn ^= 1) {
    const int64_t count = std::min(most, f.samples - first);
    const Rows<T> X = inputs.rows();
    for (int64_t t = 0; t < count; ++t) copy_sample(f, first + t, X[t]);
    const FilterBlock<T> block{{X.data, X.stride},
                               factors[turn].rows(),
                               errors[turn].rows(),
                               weights.rows().data,
                               first,
                               count};
    on_P.S = on_W.S = block.X;
    on_P.U = block.V;
    on_W.U = block.E;
    on_P.next = on_W.next = count;
    parallel_pass(on_P);
    parallel_pass(on_W);
    if (count == 0) return resets;

    const int64_t taken = filter_steps(f, block);
    on_P.L = on_P.R = on_W.R = {block.V.data, block.V.stride};
    on_W.L = {block.E.data, block.E.stride};
    on_P.rank = on_W.rank = taken;
    double scale = 1, shift = 0;
    for (int64_t t = 0; t < taken; ++t) {
      shift = f.decay / f.forgetting * shift + f.diffusion;
      scale *= f.decay / f.forgetting;
    }
    on_P.scale = T(scale);
    on_P.diffusion = T(shift);
    first += taken;
    if (taken < count) {  // the sample that could not be taken: it is skipped and P starts anew
      start_anew(f);
      on_P.rank = 0;
      ++first;
      ++resets;
    }
  }
}

template <class T>
int64_t nonfinite_row_cpu(const T* x, int64_t rows, int64_t cols, const int64_t stride[2]) {
  for (int64_t i = 0; i < rows; ++i) {
    int bad = 0;
    for (int64_t j = 0; j < cols; ++j) bad |= !std::isfinite(x[i * stride[0] + j * stride[1]]);
    if (bad) return i;
  }
  return -1;
}

template int64_t rls_filter_cpu<float>(const RlsFilter<float>&);
template int64_t rls_filter_cpu<double>(const RlsFilter<double>&);
template int64_t nonfinite_row_cpu<float>(const float*, int64_t, int64_t, const int64_t[2]);
template int64_t nonfinite_row_cpu<double>(const double*, int64_t, int64_t, const int64_t[2]);

}  // namespace rlscuda
