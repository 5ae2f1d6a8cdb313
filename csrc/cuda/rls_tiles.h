// Phase 3 of rls_update_: P <- scale (P - V^T V) + diffusion I over the tiles of the upper
// triangle, and the counters of a layer.
//
// A tile is read once, computed once and stored twice, the second time transposed through shared
// memory: half of P is read, all is written, and P is symmetric to the bit. In a tile on the
// diagonal (i, j) and (j, i) go through the same operations: the products V_i V_j in order of rank.
// A thread owns kRows x kColumns of a tile; V passes through shared memory kDepth ranks at a time.
#pragma once

#include "rls_layers.h"
#include "vector.h"

namespace rlscuda {
namespace rls {

constexpr int kTileRows = 8, kTileColumns = 4;  // of a thread
template <class T>
constexpr int kDepth = 64 / int(sizeof(T));

template <class T>
union alignas(16) TileScratch {
  T V[2][kDepth<T>][kTile];  // of the tile's rows, of its columns
  T mirror[kTile][kTile + 1];
  double counts[kWarps][4];
};

// Column, in the tile, of element q of the thread in column x of threads.
template <int VEC>
__device__ __forceinline__ int tile_column(int x, int q) {
  return q / VEC * (kTile / kTileColumns) * VEC + x * VEC + q % VEC;
}

template <int VEC, class T>
__device__ void update_tile(T* P, const T* V, int64_t n, int rank, int64_t i0, int64_t j0, T scale,
                            T diffusion, TileScratch<T>& shared) {
  constexpr int kLane = 16 / int(sizeof(T));
  const int x = threadIdx.x % (kTile / kTileColumns);
  const int y = threadIdx.x / (kTile / kTileColumns) * kTileRows;
  T acc[kTileRows][kTileColumns];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r)
#pragma unroll
    for (int q = 0; q < kTileColumns; q += VEC) {
      const int64_t i = i0 + y + r, j = j0 + tile_column<VEC>(x, q);
      Packed<T, VEC> v{};
      if (i < n && j < n) v = *reinterpret_cast<const Packed<T, VEC>*>(P + i * n + j);
#pragma unroll
      for (int e = 0; e < VEC; ++e) acc[r][q + e] = v[e];
    }
  for (int k0 = 0; k0 < rank; k0 += kDepth<T>) {
    const int depth = min(kDepth<T>, rank - k0);
    __syncthreads();
    for (int e = threadIdx.x; e < 2 * depth * kTile; e += kThreads) {
      const int c = e % kTile, k = e / kTile % depth, side = e / kTile / depth;
      const int64_t column = (side ? j0 : i0) + c;
      shared.V[side][k][c] = column < n ? V[(k0 + k) * n + column] : T(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < depth; ++k) {
      T rows[kTileRows], columns[kTileColumns];
#pragma unroll
      for (int r = 0; r < kTileRows; r += kLane) {
        const auto v = *reinterpret_cast<const Packed<T, kLane>*>(&shared.V[0][k][y + r]);
#pragma unroll
        for (int e = 0; e < kLane; ++e) rows[r + e] = v[e];
      }
#pragma unroll
      for (int q = 0; q < kTileColumns; q += VEC) {
        const auto v =
            *reinterpret_cast<const Packed<T, VEC>*>(&shared.V[1][k][tile_column<VEC>(x, q)]);
#pragma unroll
        for (int e = 0; e < VEC; ++e) columns[q + e] = v[e];
      }
#pragma unroll
      for (int r = 0; r < kTileRows; ++r)
#pragma unroll
        for (int q = 0; q < kTileColumns; ++q) acc[r][q] -= rows[r] * columns[q];
    }
  }
#pragma unroll
  for (int r = 0; r < kTileRows; ++r)
#pragma unroll
    for (int q = 0; q < kTileColumns; q += VEC) {
      const int64_t i = i0 + y + r, j = j0 + tile_column<VEC>(x, q);
      Packed<T, VEC> v;
#pragma unroll
      for (int e = 0; e < VEC; ++e) {
        v[e] = acc[r][q + e] * scale;
        if (i == j + e) v[e] += diffusion;
        acc[r][q + e] = v[e];
      }
      if (i < n && j < n) *reinterpret_cast<Packed<T, VEC>*>(P + i * n + j) = v;
    }
  if (i0 == j0) return;

  __syncthreads();
#pragma unroll
  for (int r = 0; r < kTileRows; ++r)
#pragma unroll
    for (int q = 0; q < kTileColumns; ++q) shared.mirror[y + r][tile_column<VEC>(x, q)] = acc[r][q];
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 4
  for (int r = warp; r < kTile; r += kWarps)
#pragma unroll
    for (int c = lane; c < kTile; c += 32)
      if (j0 + r < n && i0 + c < n) P[(j0 + r) * n + i0 + c] = shared.mirror[c][r];
}

// P <- initial_scale I on a tile and its mirror image.
template <class T>
__device__ void reset_tile(T* P, int64_t n, int64_t i0, int64_t j0, T initial_scale) {
  for (int e = threadIdx.x; e < kTile * kTile; e += kThreads) {
    const int r = e / kTile, c = e % kTile;
    if (i0 + r < n && j0 + c < n)
      P[(i0 + r) * n + j0 + c] = i0 + r == j0 + c ? initial_scale : T(0);
    if (j0 + r < n && i0 + c < n)
      P[(j0 + r) * n + i0 + c] = i0 + c == j0 + r ? initial_scale : T(0);
  }
}

// The tiles are counted along the columns of the upper triangle.
template <class T>
__device__ void update_tile(T* P, const T* V, int64_t n, int rank, uint32_t index, T scale,
                            T diffusion, TileScratch<T>& shared) {
  constexpr int kLane = 16 / int(sizeof(T));
  const Place at = triangle(index);
  const int64_t i0 = int64_t(at.column) * kTile, j0 = int64_t(at.row) * kTile;
  if (n % kLane == 0 && reinterpret_cast<uintptr_t>(P) % 16 == 0) {
    update_tile<kLane>(P, V, n, rank, i0, j0, scale, diffusion, shared);
  } else {
    update_tile<1>(P, V, n, rank, i0, j0, scale, diffusion, shared);
  }
}
template <class T>
__device__ void reset_tile(T* P, int64_t n, uint32_t index, T initial_scale) {
  const Place at = triangle(index);
  reset_tile(P, n, int64_t(at.column) * kTile, int64_t(at.row) * kTile, initial_scale);
}

// Tile `index` of matrix b.
template <class T>
__device__ void update(const Layer<T>& a, uint32_t b, uint32_t index, double initial_scale,
                       TileScratch<T>& shared) {
  const Outcome outcome = a.outcome()[b];
  if (outcome.status == kRefuse) return;
  const int64_t n = a.n;
  T* P = a.P + b * n * n;
  if (outcome.status == kReset) return reset_tile(P, n, index, T(initial_scale));
  update_tile(P, a.V(b), n, int(a.rank), index, T(outcome.scale), T(outcome.diffusion), shared);
}

// Counts what became of the layer's matrices, and keeps their power.
template <class T>
__device__ void tally(const Layer<T>& a, double forgetting, bool void_step,
                      TileScratch<T>& shared) {
  constexpr int kCounts = 4;
  double counts[kCounts] = {};  // applied, refused, reset; the largest gain
  for (uint32_t b = threadIdx.x; b < a.batch; b += kThreads) {
    if (a.rank == 0) {
      a.h[b] = void_step ? T(NAN) : T(forgetting);
      counts[kRefused] += void_step;
      continue;
    }
    const Outcome outcome = a.outcome()[b];
    counts[kUpdates] += outcome.status == kApply;
    counts[kRefused] += outcome.status == kRefuse;
    counts[kResets] += outcome.status == kReset;
    if (outcome.status == kApply) counts[kLargestGain] = max(counts[kLargestGain], outcome.excess);
    if (outcome.status != kRefuse && a.power) a.power[b] = T(outcome.power);
  }
  if (!a.health) return;
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kCounts; ++c) {
    for (int d = 16; d > 0; d /= 2) {
      const double other = __shfl_xor_sync(~0u, counts[c], d);
      counts[c] = c == kLargestGain ? max(counts[c], other) : counts[c] + other;
    }
    if (threadIdx.x % 32 == 0) shared.counts[threadIdx.x / 32][c] = counts[c];
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 0; w < kWarps; ++w) {
    for (int slot : {kUpdates, kRefused, kResets}) a.health[slot] += shared.counts[w][slot];
    a.health[kLargestGain] = max(a.health[kLargestGain], shared.counts[w][kLargestGain]);
  }
  if (void_step) return;
  a.health[kSteps] += 1;
  if (a.rank == 0) a.health[kMissing] += 1;
}

}  // namespace rls
}  // namespace rlscuda
