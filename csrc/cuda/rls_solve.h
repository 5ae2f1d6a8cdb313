// Phase 2 of rls_update_: what becomes of a matrix, and V = sqrt(kappa / r) L^-1 U for one strip.
//
// Every block of a matrix adds up the parts of S U^T and eliminates for itself, in the same order
// and so with the same result: that costs less than another launch. The elimination is
// H = E^-1 D E^-T in float64 with E kept in place, a warp a row, and V = sqrt(kappa / r)
// D^(-1/2) E U: one product with a triangular [r, r] matrix, without a substitution column by
// column. H is positive definite where every pivot in D is positive.
#pragma once

#include "rls_layers.h"

namespace rlscuda {
namespace rls {

template <class T, int THREADS, int RANK>
struct SolveScratch {
  double sums[THREADS];
  union {
    double H[RANK * RANK];
    T factor[RANK * RANK];
  };
};

// Sum S^2, the same in every thread.
__device__ inline double add_squares(const double* squares, int strips) {
  double sum = 0;
  for (int i = threadIdx.x % 32; i < strips; i += 32) sum += squares[i];
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  return sum;
}

// Sums over the parts of S U^T: its lower triangle, mirrored, into H [r, r].
template <int THREADS, class T>
__device__ void add_grams(const T* grams, int parts, int pairs, int rank, double* sums, double* H) {
  constexpr int kSlices = 16;  // at most: one thread adds up those of a pair
  const int slices = min(kSlices, max(1, THREADS / pairs)), width = min(pairs, THREADS);
  const int slice = threadIdx.x / width, lane = threadIdx.x % width;
  for (int first = 0; first < pairs; first += width) {  // once, unless there are many ranks
    const int pair = first + lane;
    double sum = 0;
    if (slice < slices && pair < pairs)
#pragma unroll 16
      for (int i = slice; i < parts; i += slices) sum += double(grams[int64_t(i) * pairs + pair]);
    __syncthreads();
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (int(threadIdx.x) >= width || pair >= pairs) continue;
    double total = 0;
    for (int s = 0; s < slices; ++s) total += sums[s * width + lane];
    const Place at = triangle(pair);
    H[at.row * rank + at.column] = H[at.column * rank + at.row] = total;
  }
  __syncthreads();
}

// D on the diagonal of H and E below it. False where a pivot is not positive and finite.
template <int THREADS>
__device__ bool eliminate(double* H, int rank) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int j = 0; j < rank; ++j) {
    const double pivot = H[j * rank + j];
    if (!(pivot > 0) || !(pivot < INFINITY)) return false;
    const double inverse = 1 / pivot;
    for (int i = j + 1 + warp; i < rank; i += THREADS / 32) {
      const double factor = H[i * rank + j] * inverse;
      __syncwarp();
      for (int c = lane; c < rank; c += 32) {
        double& x = H[i * rank + c];
        x = c == j ? -factor : x - factor * H[j * rank + c];
      }
    }
    __syncthreads();
  }
  return true;
}

// The strip's columns of U, added up over the splits; also where the caller wants them.
template <class T, int THREADS>
__device__ void add_splits(const Layer<T>& a, uint32_t b, int64_t column, int group) {
  if (column >= a.n) return;
  T* U = a.partial(b);
  const int64_t n = a.n, split = n * a.rank, splits = a.splits();
  for (int64_t k = group; k < a.rank; k += THREADS / kStrip) {
    T sum = 0;
#pragma unroll 8
    for (int64_t s = 0; s < splits; ++s) sum += U[s * split + k * n + column];
    U[k * n + column] = sum;
    if (a.U) a.U[(b * a.rank + k) * n + column] = sum;
  }
}

template <class T, int THREADS>
__device__ void fill_strip(const Layer<T>& a, uint32_t b, int64_t column, int group) {
  if (!a.U || column >= a.n) return;
  for (int64_t k = group; k < a.rank; k += THREADS / kStrip)
    a.U[(b * a.rank + k) * a.n + column] = T(0);
}

template <class T, int THREADS, int RANK>
__device__ void solve(const UpdateRule& base, bool void_step, const Layer<T>& a, uint32_t b,
                      uint32_t strip, SolveScratch<T, THREADS, RANK>& shared) {
  const int rank = int(a.rank);
  const int64_t column = int64_t(strip) * kStrip + threadIdx.x % kStrip;
  const int group = threadIdx.x / kStrip;
  const bool reports = strip == 0 && threadIdx.x == 0;
  const double square = void_step ? NAN : add_squares(a.squares(b), int(a.strips()));
  if (!std::isfinite(square)) {
    fill_strip<T, THREADS>(a, b, column, group);
    if (reports) {
      a.h[b] = T(NAN);
      a.outcome()[b] = {kRefuse, 0, 0, 0, 0};
    }
    return;
  }
  add_splits<T, THREADS>(a, b, column, group);
  add_grams<THREADS>(a.grams(b), int(a.splits() * a.strips()), int(a.pairs()), rank, shared.sums,
                     shared.H);

  const UpdateRule rule = rule_at(base, updates_seen(a.health));
  double gain = rule.gain / rank, power = 0;
  if (a.power) {
    const double seen = square / (double(rank) * a.n), before = a.power[b];
    power = before > 0 ? (1 - rule.gain) * before + rule.gain * seen : seen;
    gain = power > 0 ? gain / power : 0;
  }
  for (int e = threadIdx.x; e < rank * rank; e += THREADS)
    shared.H[e] = gain * shared.H[e] + (e % rank == e / rank ? rule.forgetting : 0);
  __syncthreads();
  double trace = 0;
  if (reports)
    for (int k = 0; k < rank; ++k) trace += shared.H[k * rank + k];
  __syncthreads();
  const bool definite = eliminate<THREADS>(shared.H, rank);
  if (reports) {
    const double h = trace / rank;
    a.h[b] = definite ? T(h) : T(NAN);
    a.outcome()[b] = {definite ? kApply : kReset, h - rule.forgetting, power,
                      rule.decay / rule.forgetting, rule.diffusion};
  }
  if (!definite) return;

  constexpr int kKept = (RANK * RANK + THREADS - 1) / THREADS;
  T kept[kKept];  // the factor takes the place of H
#pragma unroll
  for (int q = 0; q < kKept; ++q) {
    const int e = q * THREADS + threadIdx.x;
    if (e >= rank * rank) continue;
    const int k = e / rank;
    const double row = std::sqrt(gain / shared.H[k * rank + k]);
    kept[q] = T(k * rank + k == e ? row : row * shared.H[e]);
  }
  __syncthreads();
#pragma unroll
  for (int q = 0; q < kKept; ++q) {
    const int e = q * THREADS + threadIdx.x;
    if (e < rank * rank) shared.factor[e] = kept[q];
  }
  __syncthreads();
  if (column >= a.n) return;
  const T* U = a.partial(b) + column;
  T* V = a.V(b) + column;
  for (int k = group; k < rank; k += THREADS / kStrip) {
    T sum = 0;
#pragma unroll 4
    for (int l = 0; l <= k; ++l) sum += shared.factor[k * rank + l] * U[int64_t(l) * a.n];
    V[int64_t(k) * a.n] = sum;
  }
}

}  // namespace rls
}  // namespace rlscuda
