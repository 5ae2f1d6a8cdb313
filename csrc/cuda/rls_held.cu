// rls_update_held_ and rls_flush_ on the GPU: P_true = scale (P - V^T V) + shift I, of which an
// update reads P and V and appends to V (rls_math.h).
//
//   project   strips x splits of P, as in rls_update_: parts of S P and S P S^T; beside them, a
//             warp for each row of V, parts of C = S [V^T | S^T]
//   solve     strips: U = scale (S P - C V) + shift S; H from S P_true S^T, which is
//             scale (S P S^T - C C^T) + shift S S^T, so that no block waits for the U of another;
//             its factor; the new rows
//   apply     the counters and the new state; where what is held fills its room, P <- P_true over
//             the tiles of the upper triangle, each stored twice
//
// Whether P is written is decided by `solve` from the state in device memory: the blocks of
// `apply`, few enough to be on the device at once, find out and return. So a call is always the
// same three launches, and a captured one goes on counting. Traffic of float32, in bytes: 4 n^2 an
// update and 6 n^2 in each K. Sums are in T, those over strips and the products of C in float64.
#include <algorithm>

#include "launch.h"
#include "rls_layers.h"
#include "rls_project.h"
#include "rls_solve.h"
#include "rls_tiles.h"

namespace rlscuda {
namespace rls {
namespace {

constexpr int kHeldRank = kHeldRows / 2;
constexpr int64_t kApplyBlocks = 396;  // at most: three on each of 132 SMs

enum Action : int64_t { kKeep, kApplyHeld, kStartAnew };

// What `apply` does to a matrix: where it keeps P, the state becomes this one.
struct Turn {
  HeldState state;
  int64_t action;
};

template <class T>
struct HeldCall {
  UpdateRule rule;
  const bool* found_inf;
  Layer<T> layer;
  T* held;
  HeldState* state;
  int64_t hold;
  uint32_t apply_blocks;  // for each matrix
  bool counts;            // an update counts, a flush does not

  RLS_HOST_DEVICE int64_t
  products_at(uint32_t b) const {  // parts of C, [strips, rank, rows + rank]
    const int64_t width = (hold + 1) * layer.rank;
    return layer.workspace_bytes() + int64_t(b) * layer.strips() * layer.rank * width * sizeof(T);
  }
  RLS_HOST_DEVICE int64_t turns_at() const { return (products_at(layer.batch) + 15) / 16 * 16; }
  RLS_HOST_DEVICE int64_t workspace_bytes() const {
    return turns_at() + int64_t(layer.batch) * sizeof(Turn);
  }
  RLS_HOST_DEVICE T* products(uint32_t b) const {
    return reinterpret_cast<T*>(layer.workspace + products_at(b));
  }
  RLS_HOST_DEVICE Turn* turn() const {
    return reinterpret_cast<Turn*>(layer.workspace + turns_at());
  }
  RLS_HOST_DEVICE T* V(uint32_t b) const { return held + b * hold * layer.rank * layer.n; }
  RLS_HOST_DEVICE int rows(uint32_t b) const {
    return int(held_count(state[b], hold)) * int(layer.rank);
  }
};

// The strip's part of C: S times the held rows, then times S itself, shared among its splits.
template <class T>
__device__ void project_held(const HeldCall<T>& call, uint32_t b, uint32_t part) {
  const Layer<T>& a = call.layer;
  const int64_t n = a.n;
  const uint32_t strip = part % a.strips(), split = part / a.strips();
  const int64_t c0 = int64_t(strip) * kStrip;
  const int left = int(min(n - c0, int64_t(kStrip))), lane = threadIdx.x % 32;
  const int rank = int(a.rank), held = call.rows(b), width = held + rank;
  const T* S = a.S + b * n * rank + c0;
  const T* V = call.V(b) + c0;
  T* out = call.products(b) + int64_t(strip) * rank * width;
  for (int t = int(split) * kWarps + threadIdx.x / 32; t < width; t += int(a.splits()) * kWarps) {
    const T* row = t < held ? V + t * n : S + (t - held) * n;
    T v[kColumns];
    load_columns<1>(row, lane, left, v);
    for (int k = 0; k < rank; ++k) {
      T s[kColumns], sum = 0;
      load_columns<1>(S + k * n, lane, left, s);
#pragma unroll
      for (int q = 0; q < kColumns; ++q) sum += v[q] * s[q];
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
      if (lane == 0) out[k * width + t] = sum;
    }
  }
}

// A column of U = scale (S P - C V) + shift S: the splits of S P added up, what is held taken off.
template <class T>
__device__ void correct_column(const HeldCall<T>& call, uint32_t b, int64_t column, int group,
                               int held, const HeldState& state, const double* C) {
  const Layer<T>& a = call.layer;
  if (column >= a.n) return;
  const int64_t n = a.n, split = n * a.rank, splits = a.splits();
  const int rank = int(a.rank), width = held + rank;
  const T scale = T(state.scale), shift = T(state.shift);
  const T* V = call.V(b) + column;
  T* U = a.partial(b) + column;
  for (int64_t k = group; k < rank; k += kSolveThreads / kStrip) {
    T sum = 0, taken = 0;
#pragma unroll 8
    for (int64_t s = 0; s < splits; ++s) sum += U[s * split + k * n];
#pragma unroll 16
    for (int t = 0; t < held; ++t) taken += T(C[k * width + t]) * V[t * n];
    const T u = scale * (sum - taken) + shift * a.S[(b * rank + k) * n + column];
    U[k * n] = u;
    if (a.U) a.U[(b * rank + k) * n + column] = u;
  }
}

template <class T>
using SolveHeld = SolveScratch<T, kSolveThreads, kHeldRank>;
constexpr int kProducts = kHeldRank * (kHeldRows + kHeldRank);

template <class T>
__device__ void solve_held(const HeldCall<T>& call, uint32_t b, uint32_t strip, double* C,
                           SolveHeld<T>& shared) {
  const Layer<T>& a = call.layer;
  const int64_t column = int64_t(strip) * kStrip + threadIdx.x % kStrip;
  const int group = threadIdx.x / kStrip, strips = int(a.strips());
  const bool reports = strip == 0 && threadIdx.x == 0;
  const HeldState state = call.state[b];
  const double square = step_is_void(call.found_inf) ? NAN : add_squares(a.squares(b), strips);
  if (!rows_can_enter<T>(square, int64_t(a.rank) * a.n, a.power)) {
    if (reports) call.turn()[b] = {state, kKeep};
    return refuse<T, kSolveThreads>(a, b, column, group, reports);
  }
  const int rank = int(a.rank), held = call.rows(b), width = held + rank;
  add_parts<kSolveThreads>(call.products(b), strips, rank * width, shared.sums,
                           [&](int item, double sum) { C[item] = sum; });
  add_grams<kSolveThreads>(a.grams(b), int(a.splits()) * strips, int(a.pairs()), rank, shared.sums,
                           shared.H);
  correct_column(call, b, column, group, held, state, C);
  const Terms terms = terms_of(call.rule, a, b, square);
  for (int e = threadIdx.x; e < rank * rank; e += kSolveThreads) {
    const int k = e / rank, l = e % rank;
    double taken = 0;
    for (int t = 0; t < held; ++t) taken += C[k * width + t] * C[l * width + t];
    shared.H[e] =
        terms.gain * (state.scale * (shared.H[e] - taken) + state.shift * C[k * width + held + l]) +
        (k == l ? terms.rule.forgetting : 0);
  }
  const bool definite = decide<kSolveThreads>(terms, a, b, reports, shared.H);
  if (reports) {
    const HeldState next = held_after(state, terms.rule, call.hold);
    const Action kept = must_apply(next, call.hold) ? kApplyHeld : kKeep;
    call.turn()[b] = {next, definite ? kept : kStartAnew};
  }
  if (definite)
    factor_column(terms.gain / state.scale, a, b, column, group, call.V(b) + int64_t(held) * a.n,
                  shared);
}

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    held_project_kernel(const __grid_constant__ HeldCall<T> call) {
  __shared__ ProjectScratch<T> shared;
  if (step_is_void(call.found_inf)) return;
  const uint32_t parts = call.layer.strips() * call.layer.splits(), b = blockIdx.x / parts;
  project_held(call, b, blockIdx.x % parts);
  project(call.layer, b, blockIdx.x % parts, shared);
}

template <class T>
__global__ void __launch_bounds__(kSolveThreads)
    held_solve_kernel(const __grid_constant__ HeldCall<T> call) {
  __shared__ SolveHeld<T> shared;
  __shared__ double products[kProducts];
  const uint32_t strips = call.layer.strips();
  solve_held(call, blockIdx.x / strips, blockIdx.x % strips, products, shared);
}

// The first block keeps the books, the others are apply_blocks for each matrix.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    held_apply_kernel(const __grid_constant__ HeldCall<T> call) {
  __shared__ TileScratch<T> shared;
  const Layer<T>& a = call.layer;
  if (blockIdx.x == 0) {
    if (call.counts) tally(a, call.rule.forgetting, step_is_void(call.found_inf), shared);
    for (uint32_t b = threadIdx.x; b < a.batch; b += kThreads) {
      const Turn turn = call.turn()[b];
      call.state[b] = turn.action == kKeep ? turn.state : kNothingHeld;
    }
    return;
  }
  const uint32_t b = (blockIdx.x - 1) / call.apply_blocks, tiles = a.tiles();
  const Turn turn = call.turn()[b];
  if (turn.action == kKeep) return;
  const int64_t n = a.n;
  T* P = a.P + b * n * n;
  for (uint32_t i = (blockIdx.x - 1) % call.apply_blocks; i < tiles; i += call.apply_blocks) {
    const uint32_t tile = tiles - 1 - i;  // what `project` read last may still be in the L2 cache
    if (turn.action == kStartAnew) {
      reset_tile(P, n, tile, T(call.rule.initial_scale));
    } else {
      update_tile(P, call.V(b), n, int(turn.state.count) * int(a.rank), tile, T(turn.state.scale),
                  T(turn.state.shift), shared);
    }
  }
}

template <class T>
__global__ void held_flush_kernel(const __grid_constant__ HeldCall<T> call) {
  for (uint32_t b = threadIdx.x; b < call.layer.batch; b += kThreads) {
    HeldState state = call.state[b];
    state.count = double(held_count(state, call.hold));
    call.turn()[b] = {state, state.count > 0 ? kApplyHeld : kKeep};
  }
}

template <class T>
HeldCall<T> planned(const RlsUpdate<T>& a, void* workspace = nullptr) {
  HeldCall<T> call{};
  call.rule = a.rule, call.found_inf = a.found_inf;
  call.held = a.held, call.state = a.held_state, call.hold = a.hold;
  Layer<T>& layer = call.layer = layer_of(a);
  layer.workspace = static_cast<unsigned char*>(workspace);
  layer.split_rows = split_rows(a.batch * layer.strips() * a.n);
  const int64_t share = kApplyBlocks / std::max<int64_t>(1, a.batch);
  call.apply_blocks = uint32_t(std::clamp<int64_t>(share, 1, std::max(1u, layer.tiles())));
  return call;
}

template <class T>
void launch_apply(const HeldCall<T>& call, CudaStream stream) {
  launch(held_apply_kernel<T>, grid_of(1 + int64_t(call.layer.batch) * call.apply_blocks),
         dim3(kThreads), 0, stream, call);
}

}  // namespace
}  // namespace rls

template <class T>
int64_t rls_held_workspace_cuda(const RlsUpdate<T>& layer) {
  return rls::planned(layer).workspace_bytes();
}

template <class T>
void rls_update_held_cuda(const RlsUpdate<T>& layer, void* workspace, CudaStream stream) {
  auto call = rls::planned(layer, workspace);
  call.counts = true;
  const int64_t strips = layer.batch * call.layer.strips();
  if (strips > 0) {
    launch(rls::held_project_kernel<T>, grid_of(strips * call.layer.splits()), dim3(rls::kThreads),
           0, stream, call);
    launch(rls::held_solve_kernel<T>, grid_of(strips), dim3(rls::kSolveThreads), 0, stream, call);
  }
  rls::launch_apply(call, stream);
}

template <class T>
void rls_flush_cuda(const RlsUpdate<T>& layer, void* workspace, CudaStream stream) {
  const auto call = rls::planned(layer, workspace);
  if (layer.batch == 0) return;
  launch(rls::held_flush_kernel<T>, dim3(1), dim3(rls::kThreads), 0, stream, call);
  rls::launch_apply(call, stream);
}

template int64_t rls_held_workspace_cuda<float>(const RlsUpdate<float>&);
template int64_t rls_held_workspace_cuda<double>(const RlsUpdate<double>&);
template void rls_update_held_cuda<float>(const RlsUpdate<float>&, void*, CudaStream);
template void rls_update_held_cuda<double>(const RlsUpdate<double>&, void*, CudaStream);
template void rls_flush_cuda<float>(const RlsUpdate<float>&, void*, CudaStream);
template void rls_flush_cuda<double>(const RlsUpdate<double>&, void*, CudaStream);

}  // namespace rlscuda
