// What the kernels of rls_update_ know of the layers of a call, and how the work is cut into
// blocks. The list goes by value in the arguments of each launch, so that nothing is copied to the
// device and a step can be captured in a CUDA graph.
//
//   project   U = S P and S U^T: strips of kStrip columns x splits of `split_rows` rows of P
//   solve     H, its factor, V = root L^-1 U: strips of kStrip columns
//   update    P <- scale (P - V^T V) + diffusion I: tiles of the upper triangle, and the counters
//
// A matrix of at most kWholeColumns columns goes through all three in one block of `project`.
// What one phase leaves for the next is in the workspace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "layer_list.h"

namespace rlscuda {
namespace rls {

constexpr int kThreads = 128, kWarps = kThreads / 32;  // of `project` and `update`
constexpr int kSolveThreads = 512;
constexpr int kStrip = 128;
constexpr int kTile = 64;
constexpr int kWholeColumns = 128, kWholeRank = 32;
constexpr int kMaxRank = 64;
constexpr int kSlice = 64;              // rows of S in shared memory
constexpr int64_t kTargetBlocks = 396;  // of `project`: three on each of 132 SMs

enum Phase { kProject, kSolve, kUpdate, kPhases };
enum Status : int64_t { kApply, kReset, kRefuse };

// What `solve` decides on one matrix.
struct Outcome {
  int64_t status;
  double excess;  // h - forgetting
  double power;   // the new running mean of the squared input
  double scale, diffusion;
};

RLS_HOST_DEVICE constexpr uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

template <class T>
struct Layer {
  T* P;
  const T* S;
  T* U;
  T* h;
  T* power;
  double* health;
  unsigned char* workspace;
  uint32_t n, batch, rank, split_rows;
  uint32_t end[kPhases];  // the first block of each launch that is not for this layer

  RLS_HOST_DEVICE bool whole() const { return n <= kWholeColumns && rank <= kWholeRank; }
  RLS_HOST_DEVICE uint32_t strips() const { return n ? ceil_div(n, kStrip) : 1; }
  RLS_HOST_DEVICE uint32_t splits() const { return n ? ceil_div(n, split_rows) : 1; }
  RLS_HOST_DEVICE uint32_t tiles() const {
    const uint32_t side = ceil_div(n, kTile);
    return side * (side + 1) / 2;
  }
  // Elements of the lower triangle of S U^T.
  RLS_HOST_DEVICE uint32_t pairs() const { return rank * (rank + 1) / 2; }
  RLS_HOST_DEVICE int64_t blocks(Phase phase) const {
    const bool streamed = rank > 0 && !whole();
    if (phase == kProject)
      return streamed ? int64_t(batch) * strips() * splits() : rank > 0 ? batch : 0;
    if (phase == kSolve) return streamed ? int64_t(batch) * strips() : 0;
    return int64_t(tallied_later()) + (streamed ? int64_t(batch) * tiles() : 0);
  }
  // Whether the counters wait for the other matrices of the layer.
  RLS_HOST_DEVICE bool tallied_later() const { return !(whole() && rank > 0 && batch == 1); }

  // The workspace: outcomes [batch], then for matrix b, in bytes from the start,
  RLS_HOST_DEVICE int64_t squares_at(uint32_t b) const {  // sums of squares of S, float64 [strips]
    return int64_t(batch) * sizeof(Outcome) + int64_t(b) * strips() * 8;
  }
  RLS_HOST_DEVICE int64_t grams_at(uint32_t b) const {  // parts of S U^T, [splits, strips, pairs]
    return squares_at(batch) + int64_t(b) * strips() * splits() * pairs() * sizeof(T);
  }
  RLS_HOST_DEVICE int64_t partial_at(uint32_t b) const {  // parts of U, [splits, rank, n]
    return grams_at(batch) + int64_t(b) * splits() * rank * n * sizeof(T);
  }
  RLS_HOST_DEVICE int64_t V_at(uint32_t b) const {  // [rank, n]
    return partial_at(batch) + int64_t(b) * rank * n * sizeof(T);
  }
  RLS_HOST_DEVICE int64_t workspace_bytes() const { return (V_at(batch) + 15) / 16 * 16; }
  RLS_HOST_DEVICE Outcome* outcome() const { return reinterpret_cast<Outcome*>(workspace); }
  RLS_HOST_DEVICE double* squares(uint32_t b) const {
    return reinterpret_cast<double*>(workspace + squares_at(b));
  }
  RLS_HOST_DEVICE T* grams(uint32_t b) const {
    return reinterpret_cast<T*>(workspace + grams_at(b));
  }
  RLS_HOST_DEVICE T* partial(uint32_t b) const {
    return reinterpret_cast<T*>(workspace + partial_at(b));
  }
  RLS_HOST_DEVICE T* V(uint32_t b) const { return reinterpret_cast<T*>(workspace + V_at(b)); }
};

// A layer as its caller describes it; its splits, blocks and workspace are not planned yet.
template <class T>
Layer<T> layer_of(const RlsUpdate<T>& a) {
  Layer<T> layer{};
  layer.P = a.P, layer.S = a.S, layer.U = a.U, layer.h = a.h;
  layer.power = a.power, layer.health = a.health;
  layer.n = uint32_t(a.n), layer.batch = uint32_t(a.batch), layer.rank = uint32_t(a.rank);
  return layer;
}

// Rows of a split, such that streamed layers of `area` rows in all strips make about kTargetBlocks
// blocks of equal area; of one of few rows, each pass over it waits more than it reads or writes.
inline uint32_t split_rows(int64_t area) {
  const int64_t rows = std::max<int64_t>(1, (area + kTargetBlocks - 1) / kTargetBlocks);
  return uint32_t((rows + kSlice - 1) / kSlice * kSlice);
}

// The arguments of a launch.
template <class T, int LAYERS>
struct Call {
  UpdateRule rule;
  const bool* found_inf;
  int64_t count;
  Layer<T> layer[LAYERS];
};
constexpr int kFewLayers = 44, kManyLayers = 368;
static_assert(sizeof(Call<float, kFewLayers>) <= 4096);
static_assert(sizeof(Call<float, kManyLayers>) <= 32764);

// A block's part of a launch.
template <class T>
struct Part {
  const Layer<T>& layer;  // in the arguments, whence its fields cost no registers
  uint32_t item;          // number of the block among those of the layer
};

template <class T, int LAYERS>
__device__ Part<T> part_of(const Call<T, LAYERS>& call, Phase phase, uint32_t block) {
  const int l = layer_of_block(call.layer, call.count, block,
                               [phase](const Layer<T>& layer) { return layer.end[phase]; });
  return {call.layer[l], block - (l ? call.layer[l - 1].end[phase] : 0)};
}

// Row and column of element `index` of a lower triangle stored by rows.
struct Place {
  uint32_t row, column;
};
__device__ inline Place triangle(uint32_t index) {
  uint32_t row = uint32_t((sqrtf(8.f * float(index) + 1) - 1) / 2);
  while (row * (row + 1) / 2 > index) --row;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return {row, index - row * (row + 1) / 2};
}

__device__ inline bool step_is_void(const bool* found_inf) { return found_inf && *found_inf; }

}  // namespace rls
}  // namespace rlscuda
