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

// Calls store(item, sum) for each of `items` sums over `from` [parts, items]; sums: a number a
// thread. Ends with a barrier.
template <int THREADS, class T, class Store>
__device__ void add_parts(const T* from, int parts, int items, double* sums, const Store& store) {
  constexpr int kSlices = 16;  // at most: one thread adds up those of an item
  const int slices = min(kSlices, max(1, THREADS / items)), width = min(items, THREADS);
  const int slice = threadIdx.x / width, lane = threadIdx.x % width;
  for (int first = 0; first < items; first += width) {  // once, unless there are many
    const int item = first + lane;
    double sum = 0;
    if (slice < slices && item < items)
#pragma unroll 16
      for (int i = slice; i < parts; i += slices) sum += double(from[int64_t(i) * items + item]);
    __syncthreads();
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (int(threadIdx.x) >= width || item >= items) continue;
    double total = 0;
    for (int s = 0; s < slices; ++s) total += sums[s * width + lane];
    store(item, total);
  }
  __syncthreads();
}

// Sums over the parts of S U^T: its lower triangle, mirrored, into H [r, r].
template <int THREADS, class T>
__device__ void add_grams(const T* grams, int parts, int pairs, int rank, double* sums, double* H) {
  add_parts<THREADS>(grams, parts, pairs, sums, [&](int pair, double total) {
    const Place at = triangle(pair);
    H[at.row * rank + at.column] = H[at.column * rank + at.row] = total;
  });
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

// The constants of one update of a matrix; power: the new running mean of the squared input.
struct Terms {
  UpdateRule rule;
  double gain, power;
};

template <class T>
__device__ Terms terms_of(const UpdateRule& base, const Layer<T>& a, uint32_t b, double square) {
  Terms terms{rule_at(base, steps_counted(a.health)), 0, 0};
  terms.gain = terms.rule.gain / int(a.rank);
  if (a.power) {
    const double seen = square / (double(a.rank) * max(1u, a.n));
    const Power power = power_after(a.power[b], seen, terms.rule.gain);
    terms.power = power.kept;
    terms.gain = power.now > 0 ? terms.gain / power.now : 0;
  }
  return terms;
}

// Eliminates H; the thread that reports says what becomes of the matrix. False for a reset.
template <int THREADS, class T>
__device__ bool decide(const Terms& terms, const Layer<T>& a, uint32_t b, bool reports, double* H) {
  const int rank = int(a.rank);
  __syncthreads();
  double trace = 0;
  if (reports)
    for (int k = 0; k < rank; ++k) trace += H[k * rank + k];
  __syncthreads();
  const bool definite = eliminate<THREADS>(H, rank);
  if (reports) {
    const double h = trace / rank;
    a.h[b] = definite ? T(h) : T(NAN);
    a.outcome()[b] = {definite ? kApply : kReset, h - terms.rule.forgetting, terms.power,
                      terms.rule.decay / terms.rule.forgetting, terms.rule.diffusion};
  }
  return definite;
}

// A column of sqrt(gain) D^(-1/2) E U into V [rank, n], from H as `eliminate` has left it.
template <class T, int THREADS, int RANK>
__device__ void factor_column(double gain, const Layer<T>& a, uint32_t b, int64_t column, int group,
                              T* V, SolveScratch<T, THREADS, RANK>& shared) {
  const int rank = int(a.rank);
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
  V += column;
  for (int k = group; k < rank; k += THREADS / kStrip) {
    T sum = 0;
#pragma unroll 4
    for (int l = 0; l <= k; ++l) sum += shared.factor[k * rank + l] * U[int64_t(l) * a.n];
    V[int64_t(k) * a.n] = sum;
  }
}

// Nothing moves: no U, no h.
template <class T, int THREADS>
__device__ void refuse(const Layer<T>& a, uint32_t b, int64_t column, int group, bool reports) {
  fill_strip<T, THREADS>(a, b, column, group);
  if (!reports) return;
  a.h[b] = T(NAN);
  a.outcome()[b] = {kRefuse, 0, 0, 0, 0};
}

template <class T, int THREADS, int RANK>
__device__ void solve(const UpdateRule& base, bool void_step, const Layer<T>& a, uint32_t b,
                      uint32_t strip, SolveScratch<T, THREADS, RANK>& shared) {
  const int rank = int(a.rank);
  const int64_t column = int64_t(strip) * kStrip + threadIdx.x % kStrip;
  const int group = threadIdx.x / kStrip;
  const bool reports = strip == 0 && threadIdx.x == 0;
  const double square = void_step ? NAN : add_squares(a.squares(b), int(a.strips()));
  if (!rows_can_enter<T>(square, int64_t(a.rank) * a.n, a.power))
    return refuse<T, THREADS>(a, b, column, group, reports);
  add_splits<T, THREADS>(a, b, column, group);
  add_grams<THREADS>(a.grams(b), int(a.splits() * a.strips()), int(a.pairs()), rank, shared.sums,
                     shared.H);
  const Terms terms = terms_of(base, a, b, square);
  for (int e = threadIdx.x; e < rank * rank; e += THREADS)
    shared.H[e] = terms.gain * shared.H[e] + (e % rank == e / rank ? terms.rule.forgetting : 0);
  if (decide<THREADS>(terms, a, b, reports, shared.H))
    factor_column(terms.gain, a, b, column, group, a.V(b), shared);
}

}  // namespace rls
}  // namespace rlscuda
