// rls_update_ on the GPU: U = S P, the factor of H, then P <- scale (P - V^T V) + b I, the layers
// of a call together in each of three launches (rls_layers.h); one or two where every matrix is
// small.
//
// Traffic of float32, in bytes: 4 n^2 for U, 2 n^2 + 4 n^2 for the update. `update` takes the tiles
// in the reverse of the order in which `project` read P, so that what was read last is still in
// the L2 cache. No atomics: the same call gives the same bits.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "launch.h"
#include "rls_layers.h"
#include "rls_project.h"
#include "rls_solve.h"
#include "rls_tiles.h"

namespace rlscuda {
namespace rls {
namespace {

template <class T>
union alignas(16) Scratch {
  ProjectScratch<T> project;
  SolveScratch<T, kThreads, kWholeRank> solve;
  TileScratch<T> tile;
};

template <class T>
using SolveStreamed = SolveScratch<T, kSolveThreads, kMaxRank>;

// What follows on `project` where a block has the whole matrix.
template <class T>
__device__ void finish_whole(const UpdateRule& rule, bool void_step, const Layer<T>& layer,
                             uint32_t b, Scratch<T>& shared) {
  __syncthreads();
  solve(rule, void_step, layer, b, 0, shared.solve);
  __syncthreads();
  for (uint32_t tile = 0; tile < layer.tiles(); ++tile)
    update(layer, b, tile, rule.initial_scale, shared.tile);
  if (!layer.tallied_later()) tally(layer, rule.forgetting, void_step, shared.tile);
}

template <class T, int LAYERS>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2)
    rls_project_kernel(const __grid_constant__ Call<T, LAYERS> call) {
  __shared__ Scratch<T> shared;
  const Part<T> part = part_of(call, kProject, blockIdx.x);
  const uint32_t parts = part.layer.strips() * part.layer.splits(), b = part.item / parts;
  const bool void_step = step_is_void(call.found_inf);
  if (!void_step) project(part.layer, b, part.item % parts, shared.project);
  if (part.layer.whole()) finish_whole(call.rule, void_step, part.layer, b, shared);
}

template <class T, int LAYERS>
__global__ void __launch_bounds__(kSolveThreads)
    rls_solve_kernel(const __grid_constant__ Call<T, LAYERS> call) {
  __shared__ SolveStreamed<T> shared;
  const Part<T> part = part_of(call, kSolve, blockIdx.x);
  const uint32_t strips = part.layer.strips();
  solve(call.rule, step_is_void(call.found_inf), part.layer, part.item / strips, part.item % strips,
        shared);
}

template <class T, int LAYERS>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 4 : 2)
    rls_update_kernel(const __grid_constant__ Call<T, LAYERS> call) {
  __shared__ TileScratch<T> shared;
  const Part<T> part = part_of(call, kUpdate, gridDim.x - 1 - blockIdx.x);
  const uint32_t tallies = part.layer.tallied_later();
  if (part.item < tallies) {
    tally(part.layer, call.rule.forgetting, step_is_void(call.found_inf), shared);
  } else {
    const uint32_t tile = part.item - tallies, tiles = part.layer.tiles();
    update(part.layer, tile / tiles, tile % tiles, call.rule.initial_scale, shared);
  }
}

bool same_rule(const UpdateRule& a, const UpdateRule& b) {
  return a.forgetting == b.forgetting && a.gain == b.gain && a.decay == b.decay &&
         a.diffusion == b.diffusion && a.drift == b.drift && a.initial_scale == b.initial_scale &&
         a.averaging == b.averaging;
}

// The layers of one launch, but for their workspace.
template <class T>
std::vector<Layer<T>> planned(const RlsUpdate<T>* layers, int64_t count) {
  std::vector<Layer<T>> plan;
  int64_t area = 0, end[kPhases] = {};
  for (int64_t i = 0; i < count; ++i) {
    const RlsUpdate<T>& a = layers[i];
    if (a.rank > kMaxRank)
      throw std::runtime_error("s must have at most 64 rows on a CUDA device, got " +
                               std::to_string(a.rank));
    Layer<T> layer = layer_of(a);
    if (layer.rank > 0 && !layer.whole()) area += a.batch * layer.strips() * a.n;
    plan.push_back(layer);
  }
  for (auto& layer : plan) {
    layer.split_rows = layer.whole() ? kWholeColumns : split_rows(area);
    for (Phase phase : {kProject, kSolve, kUpdate}) {
      end[phase] += layer.blocks(phase);
      if (end[phase] > INT32_MAX) throw std::runtime_error("P is too large for one launch");
      layer.end[phase] = uint32_t(end[phase]);
    }
  }
  return plan;
}

// Calls f(layers, count) on runs of layers that one launch can take.
template <class T, class F>
void for_each_launch(const RlsUpdate<T>* layers, int64_t count, const F& f) {
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && end - begin < kManyLayers; ++end)
      if (!same_rule(layers[begin].rule, layers[end].rule) ||
          layers[begin].found_inf != layers[end].found_inf)
        break;
    f(layers + begin, end - begin);
  }
}

template <class T, int LAYERS>
void launch_phases(const UpdateRule& rule, const bool* found_inf, const std::vector<Layer<T>>& plan,
                   CudaStream stream) {
  Call<T, LAYERS> call;
  call.rule = rule;
  call.found_inf = found_inf;
  call.count = int64_t(plan.size());
  std::copy(plan.begin(), plan.end(), call.layer);
  const Layer<T>& last = plan.back();
  if (last.end[kProject] > 0)
    launch(rls_project_kernel<T, LAYERS>, dim3(last.end[kProject]), dim3(kThreads), 0, stream,
           call);
  if (last.end[kSolve] > 0)
    launch(rls_solve_kernel<T, LAYERS>, dim3(last.end[kSolve]), dim3(kSolveThreads), 0, stream,
           call);
  if (last.end[kUpdate] > 0)
    launch(rls_update_kernel<T, LAYERS>, dim3(last.end[kUpdate]), dim3(kThreads), 0, stream, call);
}

}  // namespace
}  // namespace rls

template <class T>
int64_t rls_update_workspace_cuda(const RlsUpdate<T>* layers, int64_t count) {
  int64_t bytes = 0;
  rls::for_each_launch(layers, count, [&](const RlsUpdate<T>* some, int64_t here) {
    for (const auto& layer : rls::planned(some, here)) bytes += layer.workspace_bytes();
  });
  return bytes;
}

template <class T>
void rls_update_cuda(const RlsUpdate<T>* layers, int64_t count, void* workspace,
                     CudaStream stream) {
  auto* free_bytes = static_cast<unsigned char*>(workspace);
  rls::for_each_launch(layers, count, [&](const RlsUpdate<T>* some, int64_t here) {
    auto plan = rls::planned(some, here);
    for (auto& layer : plan) {
      layer.workspace = free_bytes;
      free_bytes += layer.workspace_bytes();
    }
    if (here <= rls::kFewLayers) {
      rls::launch_phases<T, rls::kFewLayers>(some->rule, some->found_inf, plan, stream);
    } else {
      rls::launch_phases<T, rls::kManyLayers>(some->rule, some->found_inf, plan, stream);
    }
  });
}

template int64_t rls_update_workspace_cuda<float>(const RlsUpdate<float>*, int64_t);
template int64_t rls_update_workspace_cuda<double>(const RlsUpdate<double>*, int64_t);
template void rls_update_cuda<float>(const RlsUpdate<float>*, int64_t, void*, CudaStream);
template void rls_update_cuda<double>(const RlsUpdate<double>*, int64_t, void*, CudaStream);

}  // namespace rlscuda
