// Phase 1 of rls_update_: U[k, i] = sum_j P[j, i] S[k, j] on a strip of columns i and a split of
// rows j, then the strip's part of S U^T and of sum S^2.
//
// P is symmetric, so a column of U takes a column of P, and a warp reads a row of the strip: its
// lanes own kColumns columns each and the warp's accumulators, kColumns x RANKS a lane, never leave
// the registers. The rows of a slice are shared among the warps, whose sums meet in shared memory
// at the end. S comes through shared memory, [row, rank], which a warp reads as broadcast vectors.
// Up to kRanks ranks take one pass over P; more take the next from the L2 cache. Precision: sums in
// T; S U^T in T over kChunk columns, float64 beyond.
#pragma once

#include "rls_layers.h"
#include "vector.h"

namespace rlscuda {
namespace rls {

constexpr int kColumns = kStrip / 32;  // a lane's
constexpr int kChunk = 32;             // columns of S and U in shared memory
template <class T>
constexpr int kRanks = 64 / int(sizeof(T));
template <class T>
constexpr int kLanes = 16 / int(sizeof(T));
constexpr int kPairs = 5;  // entries of S U^T that a thread sums at once: ranks up to 34

template <class T>
union alignas(16) ProjectScratch {
  T S[kSlice][kRanks<T> + kLanes<T>];  // padded: rows stay aligned, their banks differ
  T sums[kWarps / 2][kRanks<T>][kStrip];
  struct {
    T S[kMaxRank][kChunk + 1], U[kMaxRank][kChunk + 1];
  } gram;
  double squares[kWarps];
};

// The column, counted from the strip's first, of element q of a lane that loads VEC at once.
template <int VEC>
__device__ __forceinline__ int column_of(int lane, int q) {
  return q / VEC * 32 * VEC + lane * VEC + q % VEC;
}

// A lane's elements of a row of which `left` are left; 0 beyond them.
template <int VEC, class T>
__device__ __forceinline__ void load_columns(const T* row, int lane, int left, T (&p)[kColumns]) {
#pragma unroll
  for (int q = 0; q < kColumns; q += VEC) {
    const int c = column_of<VEC>(lane, q);
    Packed<T, VEC> v{};
    if (c < left) v = *reinterpret_cast<const Packed<T, VEC>*>(row + c);
#pragma unroll
    for (int e = 0; e < VEC; ++e) p[q + e] = v[e];
  }
}

// U of ranks [k0, k0 + RANKS) into out [rank, n].
template <int RANKS, int VEC, class T>
__device__ void project_ranks(const T* P, const T* S, T* out, int64_t n, int rank, int k0,
                              int64_t c0, int64_t j0, int64_t j1, ProjectScratch<T>& shared) {
  constexpr int kUnroll = RANKS == 1 ? 16 : RANKS <= 4 ? 8 : 4;
  constexpr int kRows = kSlice / kWarps;  // of a warp in a slice
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int left = int(min(n - c0, int64_t(kStrip)));
  T acc[RANKS][kColumns] = {};
  for (int64_t js = j0; js < j1; js += kSlice) {
    __syncthreads();
    for (int e = threadIdx.x; e < RANKS * kSlice; e += kThreads) {
      const int k = e / kSlice, j = e % kSlice;
      shared.S[j][k] = k0 + k < rank && js + j < j1 ? S[(k0 + k) * n + js + j] : T(0);
    }
    __syncthreads();
#pragma unroll 1
    for (int g = 0; g < kRows; g += kUnroll) {
      const int first = warp * kRows + g;
      T p[kUnroll][kColumns];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t j = js + first + u;
        load_columns<VEC>(P + j * n + c0, lane, j < j1 ? left : 0, p[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        constexpr int kWide = RANKS < kLanes<T> ? 1 : kLanes<T>;
#pragma unroll
        for (int k = 0; k < RANKS; k += kWide) {
          const auto s = *reinterpret_cast<const Packed<T, kWide>*>(&shared.S[first + u][k]);
#pragma unroll
          for (int e = 0; e < kWide; ++e)
#pragma unroll
            for (int q = 0; q < kColumns; ++q) acc[k + e][q] += s[e] * p[u][q];
        }
      }
    }
  }
  // warps 2 and 3 to warps 0 and 1, then warp 1 to warp 0
#pragma unroll
  for (int half = kWarps / 2; half > 0; half /= 2) {
    __syncthreads();
    if (warp >= half && warp < 2 * half)
#pragma unroll
      for (int k = 0; k < RANKS; ++k)
#pragma unroll
        for (int q = 0; q < kColumns; ++q) shared.sums[warp - half][k][q * 32 + lane] = acc[k][q];
    __syncthreads();
    if (warp < half)
#pragma unroll
      for (int k = 0; k < RANKS; ++k)
#pragma unroll
        for (int q = 0; q < kColumns; ++q) acc[k][q] += shared.sums[warp][k][q * 32 + lane];
  }
  if (warp > 0) return;
#pragma unroll
  for (int k = 0; k < RANKS; ++k)
#pragma unroll
    for (int q = 0; q < kColumns; ++q) {
      const int c = column_of<VEC>(lane, q);
      if (k0 + k < rank && c < left) out[(k0 + k) * n + c0 + c] = acc[k][q];
    }
}

template <int VEC, class T>
__device__ void project_all_ranks(const T* P, const T* S, T* out, int64_t n, int rank, int64_t c0,
                                  int64_t j0, int64_t j1, ProjectScratch<T>& shared) {
  if (rank == 1) {
    project_ranks<1, VEC>(P, S, out, n, rank, 0, c0, j0, j1, shared);
  } else if (rank <= 4) {
    project_ranks<4, VEC>(P, S, out, n, rank, 0, c0, j0, j1, shared);
  } else {
    for (int k0 = 0; k0 < rank; k0 += kRanks<T>)
      project_ranks<kRanks<T>, VEC>(P, S, out, n, rank, k0, c0, j0, j1, shared);
  }
}

// Entries [first, first + kPairs kThreads / lanes) of the lower triangle of S U^T on one strip, a
// pair (k, l) of ranks each; `lanes` threads share one where there are few. Also adds up S^2.
template <class T>
__device__ double gram_pairs(const T* S, const T* U, int64_t n, int rank, int64_t c0, int first,
                             int lanes, T* out, ProjectScratch<T>& shared) {
  const int pairs = rank * (rank + 1) / 2;
  const int at_once = kThreads / lanes, place = threadIdx.x / lanes, lane = threadIdx.x % lanes;
  double sum[kPairs] = {}, square = 0;
  for (int chunk = 0; chunk < kStrip && c0 + chunk < n; chunk += kChunk) {
    __syncthreads();
    for (int e = threadIdx.x; e < rank * kChunk; e += kThreads) {
      const int k = e / kChunk, c = e % kChunk;
      const int64_t column = c0 + chunk + c;
      const T s = column < n ? S[k * n + column] : T(0);
      shared.gram.S[k][c] = s;
      shared.gram.U[k][c] = column < n ? U[k * n + column] : T(0);
      square += double(s) * double(s);
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kPairs; ++q) {
      const int pair = first + q * at_once + place;
      if (pair >= pairs) continue;
      const Place at = triangle(pair);
      T part = 0;
#pragma unroll 8
      for (int c = lane; c < kChunk; c += lanes)
        part += shared.gram.S[at.row][c] * shared.gram.U[at.column][c];
      sum[q] += double(part);
    }
  }
#pragma unroll
  for (int q = 0; q < kPairs; ++q) {
    for (int d = lanes / 2; d > 0; d /= 2) sum[q] += __shfl_xor_sync(~0u, sum[q], d);
    const int pair = first + q * at_once + place;
    if (lane == 0 && pair < pairs) out[pair] = T(sum[q]);
  }
  return square;
}

// The strip's part of the lower triangle of S U^T into out [pairs], and of sum S^2 into `squares`.
template <class T>
__device__ void gram_of_strip(const T* S, const T* U, int64_t n, int rank, int64_t c0, T* out,
                              double* squares, ProjectScratch<T>& shared) {
  const int pairs = rank * (rank + 1) / 2;
  int lanes = 1;
  while (lanes < 32 && 2 * lanes * pairs <= kThreads) lanes *= 2;
  double square = 0;
  for (int first = 0; first < pairs; first += kPairs * kThreads / lanes)
    square = gram_pairs(S, U, n, rank, c0, first, lanes, out, shared);
  if (!squares) return;
  for (int d = 16; d > 0; d /= 2) square += __shfl_xor_sync(~0u, square, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.squares[threadIdx.x / 32] = square;
  __syncthreads();
  if (threadIdx.x > 0) return;
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared.squares[w];
  *squares = total;
}

// Matrix b of the layer: strip and split `part`, of [splits, strips].
template <class T>
__device__ void project(const Layer<T>& a, uint32_t b, uint32_t part, ProjectScratch<T>& shared) {
  const int64_t n = a.n;
  const uint32_t split = part / a.strips();
  const int64_t c0 = int64_t(part % a.strips()) * kStrip;
  const int64_t j0 = int64_t(split) * a.split_rows, j1 = min(n, j0 + int64_t(a.split_rows));
  const T* P = a.P + b * n * n;
  const T* S = a.S + b * n * a.rank;
  T* out = a.partial(b) + split * n * a.rank;
  if (n % kLanes<T> == 0 && reinterpret_cast<uintptr_t>(P) % 16 == 0) {
    project_all_ranks<kLanes<T>>(P, S, out, n, int(a.rank), c0, j0, j1, shared);
  } else {
    project_all_ranks<1>(P, S, out, n, int(a.rank), c0, j0, j1, shared);
  }
  gram_of_strip(S, out, n, int(a.rank), c0, a.grams(b) + int64_t(part) * a.pairs(),
                split == 0 ? a.squares(b) + part : nullptr, shared);
}

}  // namespace rls
}  // namespace rlscuda
