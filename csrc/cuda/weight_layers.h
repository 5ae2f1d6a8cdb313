// The rows of the weights of many layers and of the products that move them, in one launch. A block
// takes several rows of one layer.
#pragma once

#include <algorithm>
#include <stdexcept>

#include "half.h"
#include "kernels.h"
#include "launch.h"
#include "layer_list.h"
#include "rows.h"

namespace rlscuda {
namespace weights {

using namespace rows;

template <class T>
struct Layer {
  void* weight;
  void* bias;
  const T* product;
  const T* grad;
  const T* bias_row;
  const void* grad_bias;
  const T* h;
  const T* norms;
  T* first_moment;
  T* second_moment;
  const double* health;
  int64_t row_stride, stride[3], bias_row_stride, bias_stride;
  uint32_t height, width;  // of a convolution's kernel; 0 where a row is dense
  uint32_t rows, rows_per_group, n;
  uint32_t rows_per_block, end;  // the first block that is not for this layer
};

template <class T, int LAYERS>
struct Call {
  WeightStep<T> common;  // its constants; the pointers are those of the layers
  int64_t count;
  Layer<T> layer[LAYERS];
};
constexpr int kFewLayers = 21, kManyLayers = 184;
static_assert(sizeof(Call<float, kFewLayers>) <= 4096);
static_assert(sizeof(Call<float, kManyLayers>) <= 32764);

// Where column j of a row of the parameter lies.
template <class T>
__device__ __forceinline__ int64_t offset(const Layer<T>& a, uint32_t j) {
  if (a.width == 0) return j;
  const uint32_t y = j / a.width, x = j % a.width, c = y / a.height;
  return c * a.stride[0] + (y % a.height) * a.stride[1] + x * a.stride[2];
}

// Adds the bias' part to D[i, j] of a thread's columns j0, j0 + ROW_THREADS, ...
template <int ROW_THREADS, class T>
__device__ __forceinline__ void complete(T (&product)[kUnroll<T>], const T* bias_row, T grad_bias,
                                         uint32_t j0, uint32_t columns) {
  if (!bias_row) return;
#pragma unroll
  for (uint32_t u = 0; u < kUnroll<T>; ++u)
    product[u] += grad_bias * bias_row[min(j0 + u * ROW_THREADS, columns - 1)];
}

template <class T>
Layer<T> layer_of(const WeightStep<T>& a) {
  const RowLayout& layout = a.layout;
  Layer<T> layer{a.weight, a.bias,  a.product,      a.grad,          a.bias_row, a.grad_bias,
                 a.h,      a.norms, a.first_moment, a.second_moment, a.health};
  layer.row_stride = layout.row_stride;
  std::copy(layout.stride, layout.stride + 3, layer.stride);
  layer.bias_row_stride = a.bias_row_stride;
  layer.bias_stride = a.bias_stride;
  layer.height = layout.dense ? 0 : uint32_t(layout.size[1]);
  layer.width = layout.dense ? 0 : uint32_t(layout.size[2]);
  layer.rows = uint32_t(a.rows);
  layer.rows_per_group = uint32_t(a.rows_per_group);
  layer.n = uint32_t(a.n);
  return layer;
}

// Fills in the call of a launch that shares the rows of some layers among blocks; returns how many.
template <class T, int LAYERS>
int64_t share_rows(Call<T, LAYERS>& call, const WeightStep<T>* layers, int64_t count) {
  call.common = layers[0];
  call.count = count;
  int64_t work = 0, end = 0;
  for (int64_t l = 0; l < count; ++l) work += layers[l].rows * (layers[l].n + 1);
  const int64_t share = std::max(kLeastWork, work / kTargetBlocks);
  for (int64_t l = 0; l < count; ++l) {
    Layer<T>& layer = call.layer[l] = layer_of(layers[l]);
    const int64_t least = layer.n <= kNarrow ? kWarps : 1;
    const int64_t rows = std::max(least, share / (int64_t(layer.n) + 1));
    layer.rows_per_block = uint32_t(std::min<int64_t>(rows, UINT32_MAX / 2));
    end += (int64_t(layer.rows) + rows - 1) / rows;
    if (end > INT32_MAX) throw std::runtime_error("weight is too large for one launch");
    layer.end = uint32_t(end);
  }
  return end;
}

}  // namespace weights
}  // namespace rlscuda
