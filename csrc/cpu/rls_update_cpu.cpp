// rls_update_ on the CPU: U = S P, the Cholesky factor of H, then P <- scale (P - V^T V) + b I.
//
// Two passes over P, each multithreaded by rows and register-blocked (rls_kernels.h), so that P is
// read twice and written once whatever the rank. H [r, r] is formed and factored in float64.
#include <algorithm>
#include <limits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rls_kernels.h"
#include "rls_math.h"
#include "simd.h"
#include "symmetric_project.h"

namespace rlscuda {

SIMD_CLONES void project_rows(const float* P, const float* S, float* U, int64_t n, int64_t r,
                              int64_t i0, int64_t i1) {
  project<float>({P, n}, {S, n}, {U, n}, n, r, i0, i1);
}
SIMD_CLONES void project_rows(const double* P, const double* S, double* U, int64_t n, int64_t r,
                              int64_t i0, int64_t i1) {
  project<double>({P, n}, {S, n}, {U, n}, n, r, i0, i1);
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
  update<float>({P, n}, {V, n}, {V, n}, r, scale, i0, i1, 0, n);
  for (int64_t i = i0; i < i1; ++i) P[i * n + i] += diffusion;
}
SIMD_CLONES void update_rows(double* P, const double* V, int64_t n, int64_t r, double scale,
                             double diffusion, int64_t i0, int64_t i1) {
  update<double>({P, n}, {V, n}, {V, n}, r, scale, i0, i1, 0, n);
  for (int64_t i = i0; i < i1; ++i) P[i * n + i] += diffusion;
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
