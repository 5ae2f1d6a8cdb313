// weight_step_ and adaptive_weight_step_ on the GPU: everything of a weight update that is not the
// matrix product, for all rows of all layers of a call in one launch.
//
// A warp takes a row of up to kNarrow columns, a block a longer one; consecutive threads take
// consecutive columns. The adaptive form reads a row twice, since the row's second moment needs the
// sum of D o G before the weight can move; the second time it comes from the cache. A block takes
// several rows of one layer, so that the constants of the step, powers in float64, are worked out
// once for all of them. The product is completed by the bias' part on the way and not written back.
// Traffic of float32, in bytes an element: D, G and M read, M written, W read and written, 24.
#include "weight_layers.h"

namespace rlscuda {
namespace {

using namespace weights;

// What a row needs of its layer and of the step.
template <class T>
struct Step {
  T rate, keep, momentum, rest, beta2, rest2, correction2, eps, limit;
};

template <int ROW_THREADS, class T, class W>
__device__ void move_row(const Layer<T>& a, const WeightStep<T>& common, const Step<T>& step,
                         uint32_t i, T* sums) {
  const uint32_t first = threadIdx.x % ROW_THREADS, columns = a.n + (a.bias != nullptr);
  const uint32_t group = i / a.rows_per_group;
  const T divisor = divisor_of(a.h ? a.h[group] : T(1), common.divide_by_h,
                               a.norms ? a.norms + group : nullptr, common.matrices, step.limit);
  if (!std::isfinite(divisor)) return;
  W* weight = static_cast<W*>(a.weight) + i * a.row_stride;
  const T* product = a.product + int64_t(i) * columns;
  const T* bias_row = a.bias_row ? a.bias_row + group * a.bias_row_stride : nullptr;
  const T grad_bias = a.grad_bias ? to_compute<T>(static_cast<const W*>(a.grad_bias)[i]) : T(0);
  T* moment = a.first_moment ? a.first_moment + int64_t(i) * columns : nullptr;

  T scale = 1 / divisor, rate = step.rate, momentum = step.momentum;
  if (a.second_moment) {
    const T* grad = a.grad + int64_t(i) * a.n;
    T part = 0;
    for (uint32_t j0 = first; j0 < columns; j0 += kUnroll<T> * ROW_THREADS) {
      T d[kUnroll<T>], g[kUnroll<T>];
#pragma unroll
      for (uint32_t u = 0; u < kUnroll<T>; ++u) {
        const uint32_t j = min(j0 + u * ROW_THREADS, columns - 1);
        d[u] = product[j];
        g[u] = j < a.n ? grad[j] : grad_bias;
      }
      complete<ROW_THREADS>(d, bias_row, grad_bias, j0, columns);
#pragma unroll
      for (uint32_t u = 0; u < kUnroll<T>; ++u)
        if (j0 + u * ROW_THREADS < columns) part += d[u] * g[u];
    }
    const T norm = row_sum<ROW_THREADS>(part, sums);
    const T second = step.beta2 * a.second_moment[i] + step.rest2 * norm;
    if (ROW_THREADS > 32) __syncthreads();  // all have read it
    __syncwarp();
    if (first == 0) a.second_moment[i] = second;
    rate /= std::sqrt(max(second, T(0)) / step.correction2) + step.eps;
    scale = step.rest;
  }
  for (uint32_t j0 = first; j0 < columns; j0 += kUnroll<T> * ROW_THREADS) {
    // all loads before the first use, those beyond the row of its last column
    T direction[kUnroll<T>], old[kUnroll<T>] = {};
    W before[kUnroll<T>];
    W* w[kUnroll<T>];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll<T>; ++u) {
      const uint32_t j = min(j0 + u * ROW_THREADS, columns - 1);
      direction[u] = product[j];
      if (moment) old[u] = moment[j];
      w[u] = j < a.n ? weight + offset(a, j) : static_cast<W*>(a.bias) + i * a.bias_stride;
      before[u] = *w[u];
    }
    complete<ROW_THREADS>(direction, bias_row, grad_bias, j0, columns);
#pragma unroll
    for (uint32_t u = 0; u < kUnroll<T>; ++u) {
      const uint32_t j = j0 + u * ROW_THREADS;
      if (j >= columns) continue;
      direction[u] = scale * direction[u];
      if (moment) moment[j] = direction[u] += momentum * old[u];
      *w[u] = to_storage<W>(step.keep * to_compute<T>(before[u]) - rate * direction[u]);
    }
  }
}

template <class T, class W, int LAYERS>
__global__ void __launch_bounds__(kThreads)
    weight_step_kernel(const __grid_constant__ Call<T, LAYERS> call) {
  __shared__ Step<T> step;
  __shared__ T sums[kWarps];
  const int l = layer_of_block(call.layer, call.count, blockIdx.x,
                               [](const Layer<T>& layer) { return layer.end; });
  const Layer<T> a = call.layer[l];
  const uint32_t block = blockIdx.x - (l ? call.layer[l - 1].end : 0);
  if (threadIdx.x == 0) {
    WeightStep<T> own = call.common;
    own.health = a.health;
    own.second_moment = a.second_moment;
    const StepConstants c = step_constants(own);
    step = {T(c.lr / c.correction1),
            T(1 - c.lr * own.weight_decay),
            T(own.momentum),
            T(1 - own.momentum),
            T(own.beta2),
            T(1 - own.beta2),
            T(c.correction2),
            T(own.eps),
            T(c.lr / own.trust)};
  }
  __syncthreads();
  const Step<T> here = step;
  const uint32_t begin = block * a.rows_per_block, end = min(a.rows, begin + a.rows_per_block);
  if (a.n <= kNarrow) {
    for (uint32_t i = begin + threadIdx.x / 32; i < end; i += kWarps)
      move_row<32, T, W>(a, call.common, here, i, sums);
  } else {
    for (uint32_t i = begin; i < end; ++i) move_row<kThreads, T, W>(a, call.common, here, i, sums);
  }
}

// Whether two layers differ in nothing but their tensors.
template <class T>
bool same_constants(const WeightStep<T>& a, const WeightStep<T>& b) {
  return a.rate == b.rate && a.lr == b.lr && a.momentum == b.momentum && a.beta2 == b.beta2 &&
         a.weight_decay == b.weight_decay && a.eps == b.eps && a.step == b.step &&
         a.gain == b.gain && a.trust == b.trust && a.divide_by_h == b.divide_by_h;
}

template <class T, class W, int LAYERS>
void launch_layers(const WeightStep<T>* layers, int64_t count, CudaStream stream) {
  Call<T, LAYERS> call;
  const int64_t blocks = share_rows(call, layers, count);
  if (blocks > 0)
    launch(weight_step_kernel<T, W, LAYERS>, grid_of(blocks), dim3(kThreads), 0, stream, call);
}

}  // namespace

template <class T, class W>
void weight_step_cuda(const WeightStep<T>* layers, int64_t count, CudaStream stream) {
  for (int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin + 1; end < count && end - begin < kManyLayers; ++end)
      if (!same_constants(layers[begin], layers[end])) break;
    if (end - begin <= kFewLayers) {
      launch_layers<T, W, kFewLayers>(layers + begin, end - begin, stream);
    } else {
      launch_layers<T, W, kManyLayers>(layers + begin, end - begin, stream);
    }
  }
}

template void weight_step_cuda<float, float>(const WeightStep<float>*, int64_t, CudaStream);
template void weight_step_cuda<float, BFloat16>(const WeightStep<float>*, int64_t, CudaStream);
template void weight_step_cuda<float, Half>(const WeightStep<float>*, int64_t, CudaStream);
template void weight_step_cuda<double, double>(const WeightStep<double>*, int64_t, CudaStream);
template void weight_step_cuda<double, float>(const WeightStep<double>*, int64_t, CudaStream);
template void weight_step_cuda<double, BFloat16>(const WeightStep<double>*, int64_t, CudaStream);
template void weight_step_cuda<double, Half>(const WeightStep<double>*, int64_t, CudaStream);

}  // namespace rlscuda
