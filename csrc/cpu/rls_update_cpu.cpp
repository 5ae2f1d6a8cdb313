// rls_update_ on the CPU: U = S P, the Cholesky factor of H, then P <- scale (P - V^T V) + b I.
//
// Two passes over P, each multithreaded by rows and register-blocked: the projection keeps
// ROWS x RANKS accumulators over a stream of columns, the update keeps a ROWS x 2-vector tile of P
// and subtracts the rank-r product from it, so that P is read twice and written once whatever the
// rank. H [r, r] is formed and factored in float64.
#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rls_math.h"
#include "simd.h"
#include "symmetric_project.h"

namespace rlscuda {
namespace {

// U[k, i] = sum_j P[i, j] S[k, j] for ROWS rows i and RANKS rows k.
template <class T, int ROWS, int RANKS>
ALWAYS_INLINE void project_tile(const T* P, const T* S, T* U, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[ROWS][RANKS] = {};
  T tail[ROWS][RANKS] = {};
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    Vec<T> s[RANKS];
    for (int k = 0; k < RANKS; ++k) s[k] = load(S + k * n + j);
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> p = load(P + i * n + j);
      for (int k = 0; k < RANKS; ++k) acc[i][k] += p * s[k];
    }
  }
  for (; j < n; ++j)
    for (int i = 0; i < ROWS; ++i)
      for (int k = 0; k < RANKS; ++k) tail[i][k] += P[i * n + j] * S[k * n + j];
  for (int i = 0; i < ROWS; ++i)
    for (int k = 0; k < RANKS; ++k) U[k * n + i] = tail[i][k] + sum(acc[i][k]);
}

template <class T, int RANKS>
ALWAYS_INLINE void project_ranks(const T* P, const T* S, T* U, int64_t n, int64_t i0, int64_t i1) {
  constexpr int ROWS = RANKS == 1 ? 8 : 3;
  int64_t i = i0;
  for (; i + ROWS <= i1; i += ROWS) project_tile<T, ROWS, RANKS>(P + i * n, S, U + i, n);
  for (; i < i1; ++i) project_tile<T, 1, RANKS>(P + i * n, S, U + i, n);
}

template <class T>
ALWAYS_INLINE void project(const T* P, const T* S, T* U, int64_t n, int64_t r, int64_t i0,
                           int64_t i1) {
  constexpr int64_t kBand = 24;  // rows of P that stay in the L1 cache while all ranks pass
  for (int64_t i = i0; i < i1; i += kBand) {
    const int64_t end = std::min(i + kBand, i1);
    int64_t k = 0;
    for (; k + 4 <= r; k += 4) project_ranks<T, 4>(P, S + k * n, U + k * n, n, i, end);
    for (; k < r; ++k) project_ranks<T, 1>(P, S + k * n, U + k * n, n, i, end);
  }
}

// A ROWS x (VECS lanes) tile of P at column j: scale * (P - V^T V).
template <class T, int ROWS, int VECS>
ALWAYS_INLINE void update_tile(T* P, const T* V, int64_t n, int64_t r, T scale, int64_t i,
                               int64_t j) {
  constexpr int W = kLanes<T>;
  Vec<T> acc[ROWS][VECS];
  for (int a = 0; a < ROWS; ++a)
    for (int b = 0; b < VECS; ++b) acc[a][b] = load(P + (i + a) * n + j + b * W);
  for (int64_t k = 0; k < r; ++k) {
    const T* v = V + k * n;
    for (int a = 0; a < ROWS; ++a)
      for (int b = 0; b < VECS; ++b) acc[a][b] -= v[i + a] * load(v + j + b * W);
  }
  for (int a = 0; a < ROWS; ++a)
    for (int b = 0; b < VECS; ++b) store(P + (i + a) * n + j + b * W, scale * acc[a][b]);
}

template <class T, int ROWS>
ALWAYS_INLINE void update_band(T* P, const T* V, int64_t n, int64_t r, T scale, int64_t i) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) update_tile<T, ROWS, 2>(P, V, n, r, scale, i, j);
  for (; j + W <= n; j += W) update_tile<T, ROWS, 1>(P, V, n, r, scale, i, j);
  for (; j < n; ++j)
    for (int a = 0; a < ROWS; ++a) {
      T acc = P[(i + a) * n + j];
      for (int64_t k = 0; k < r; ++k) acc -= V[k * n + i + a] * V[k * n + j];
      P[(i + a) * n + j] = scale * acc;
    }
}

template <class T>
ALWAYS_INLINE void update(T* P, const T* V, int64_t n, int64_t r, T scale, T diffusion, int64_t i0,
                          int64_t i1) {
  int64_t i = i0;
  for (; i + 4 <= i1; i += 4) update_band<T, 4>(P, V, n, r, scale, i);
  for (; i < i1; ++i) update_band<T, 1>(P, V, n, r, scale, i);
  for (i = i0; i < i1; ++i) P[i * n + i] += diffusion;
}

}  // namespace

SIMD_CLONES void project_rows(const float* P, const float* S, float* U, int64_t n, int64_t r,
                              int64_t i0, int64_t i1) {
  project(P, S, U, n, r, i0, i1);
}
SIMD_CLONES void project_rows(const double* P, const double* S, double* U, int64_t n, int64_t r,
                              int64_t i0, int64_t i1) {
  project(P, S, U, n, r, i0, i1);
}
SIMD_CLONES void symmetric_rows(const float* P, const float* s, float* u, int64_t n, int64_t i0,
                                int64_t i1) {
  symmetric_bands(P, s, u, n, i0, i1);
}
SIMD_CLONES void symmetric_rows(const double* P, const double* s, double* u, int64_t n, int64_t i0,
                                int64_t i1) {
  symmetric_bands(P, s, u, n, i0, i1);
}
SIMD_CLONES void update_rows(float* P, const float* V, int64_t n, int64_t r, float scale,
                             float diffusion, int64_t i0, int64_t i1) {
  update(P, V, n, r, scale, diffusion, i0, i1);
}
SIMD_CLONES void update_rows(double* P, const double* V, int64_t n, int64_t r, double scale,
                             double diffusion, int64_t i0, int64_t i1) {
  update(P, V, n, r, scale, diffusion, i0, i1);
}

namespace {

// The update of one matrix; b is its place in the batch.
template <class T>
void update_matrix(const RlsUpdate<T>& args, int64_t b, double* health) {
  const int64_t n = args.n, r = args.rank;
  T* P = args.P + b * n * n;
  const T* S = args.S + b * r * n;
  T* U = args.U + b * r * n;
  args.h[b] = std::numeric_limits<T>::quiet_NaN();

  double square = 0;
  for (int64_t i = 0; i < r * n; ++i) square += double(S[i]) * double(S[i]);
  if (args.refuse || !std::isfinite(square)) {
    std::fill_n(U, r * n, T(0));
    health[kRefused] += 1;
    return;
  }

  double gain = args.gain / double(r);
  if (args.power) {
    const double seen = square / double(r * n), before = args.power[b];
    const double power = before > 0 ? (1 - args.gain) * before + args.gain * seen : seen;
    args.power[b] = T(power);
    gain = power > 0 ? gain / power : 0;
  }

  const int64_t grain = std::max<int64_t>(8, 65536 / (n * r) + 1);
  parallel_for(0, n, grain, [&](int64_t i0, int64_t i1) { project_rows(P, S, U, n, r, i0, i1); });

  std::vector<double> H(r * r);
  double trace = 0;
  for (int64_t k = 0; k < r; ++k) {
    for (int64_t l = 0; l <= k; ++l) {
      double dot = 0;
      for (int64_t j = 0; j < n; ++j) dot += double(S[k * n + j]) * double(U[l * n + j]);
      H[k * r + l] = gain * dot + (k == l ? args.forgetting : 0);
    }
    trace += H[k * r + k];
  }
  if (!cholesky(H.data(), r)) {
    std::fill_n(P, n * n, T(0));
    for (int64_t i = 0; i < n; ++i) P[i * n + i] = T(args.initial_scale);
    health[kResets] += 1;
    return;
  }
  args.h[b] = T(trace / double(r));
  health[kUpdates] += 1;
  health[kLargestGain] = std::max(health[kLargestGain], trace / double(r) - args.forgetting);

  thread_local std::vector<T> V;
  V.resize(r * n);
  const double root = std::sqrt(gain);
  for (int64_t k = 0; k < r; ++k) {  // forward substitution V = sqrt(gain) L^-1 U
    T* v = V.data() + k * n;
    const T front = T(root / H[k * r + k]);
    for (int64_t j = 0; j < n; ++j) v[j] = front * U[k * n + j];
    for (int64_t l = 0; l < k; ++l) {
      const T factor = T(H[k * r + l] / H[k * r + k]);
      for (int64_t j = 0; j < n; ++j) v[j] -= factor * V[l * n + j];
    }
  }
  const T scale = T(args.decay / args.forgetting), diffusion = T(args.diffusion);
  const T* factor = V.data();
  parallel_for(0, n, grain, [&](int64_t i0, int64_t i1) {
    update_rows(P, factor, n, r, scale, diffusion, i0, i1);
  });
}

}  // namespace

template <class T>
void rls_update_cpu(const RlsUpdate<T>& args) {
  std::vector<double> health(args.batch * kHealthSlots, 0.0);
  const int64_t work = args.n * args.n * args.rank;
  parallel_for(0, args.batch, 65536 / (work + 1) + 1, [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) update_matrix(args, b, health.data() + b * kHealthSlots);
  });
  if (!args.health) return;
  for (int64_t b = 0; b < args.batch; ++b) {
    const double* one = health.data() + b * kHealthSlots;
    for (int slot : {kUpdates, kRefused, kResets}) args.health[slot] += one[slot];
    args.health[kLargestGain] = std::max(args.health[kLargestGain], one[kLargestGain]);
  }
}

template void rls_update_cpu<float>(const RlsUpdate<float>&);
template void rls_update_cpu<double>(const RlsUpdate<double>&);

}  // namespace rlscuda
