// foreach_complete_products_ on the GPU: the rows of all layers in one launch, then a warp for the
// norms of each matrix, which adds up its rows' sums in order.
//
// Traffic of float32, in bytes an element: D read and written, W read, 12.
#include "weight_layers.h"

namespace rlscuda {
namespace {

using namespace weights;

constexpr uint32_t kNormWarps = 4;  // of a block, a matrix each

template <class T, int LAYERS>
struct Completion {
  Call<T, LAYERS> call;
  T* squares;  // [rows of all layers] of D; those of W lie all_rows behind
  T* norms;    // [matrices] likewise
  int64_t all_rows, all_matrices;
  int64_t first_row[LAYERS];  // of each layer
  uint32_t first_matrix[LAYERS + 1];
};
constexpr int kFew = 18, kMany = 160;
static_assert(sizeof(Completion<double, kFew>) <= 4096);
static_assert(sizeof(Completion<double, kMany>) <= 32764);

template <int ROW_THREADS, class T, class W>
__device__ void complete_row(const Layer<T>& a, uint32_t i, T* product_square, T* weight_square,
                             T* sums) {
  const uint32_t first = threadIdx.x % ROW_THREADS, columns = a.n + (a.bias != nullptr);
  const W* weight = static_cast<const W*>(a.weight) + i * a.row_stride;
  T* product = const_cast<T*>(a.product) + int64_t(i) * columns;
  const T* bias_row =
      a.bias_row ? a.bias_row + (i / a.rows_per_group) * a.bias_row_stride : nullptr;
  const T grad_bias = a.grad_bias ? to_compute<T>(static_cast<const W*>(a.grad_bias)[i]) : T(0);
  T length = 0, size = 0;
  for (uint32_t j0 = first; j0 < columns; j0 += kUnroll<T> * ROW_THREADS) {
    // all loads before the first use, those beyond the row of its last column
    T d[kUnroll<T>];
    W w[kUnroll<T>];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll<T>; ++u) {
      const uint32_t j = min(j0 + u * ROW_THREADS, columns - 1);
      d[u] = product[j];
      w[u] = j < a.n ? weight[offset(a, j)] : static_cast<const W*>(a.bias)[i * a.bias_stride];
    }
    complete<ROW_THREADS>(d, bias_row, grad_bias, j0, columns);
#pragma unroll
    for (uint32_t u = 0; u < kUnroll<T>; ++u) {
      const uint32_t j = j0 + u * ROW_THREADS;
      if (j >= columns) continue;
      if (bias_row) product[j] = d[u];
      length += d[u] * d[u];
      const T x = to_compute<T>(w[u]);
      size += x * x;
    }
  }
  length = row_sum<ROW_THREADS>(length, sums);
  size = row_sum<ROW_THREADS>(size, sums);
  if (first == 0) *product_square = length, *weight_square = size;
}

template <class T, class W, int LAYERS>
__global__ void __launch_bounds__(kThreads)
    complete_products_kernel(const __grid_constant__ Completion<T, LAYERS> c) {
  __shared__ T sums[kWarps];
  const int l = layer_of_block(c.call.layer, c.call.count, blockIdx.x,
                               [](const Layer<T>& layer) { return layer.end; });
  const Layer<T> a = c.call.layer[l];
  const uint32_t block = blockIdx.x - (l ? c.call.layer[l - 1].end : 0);
  const uint32_t begin = block * a.rows_per_block, end = min(a.rows, begin + a.rows_per_block);
  T* squares = c.squares + c.first_row[l];
  if (a.n <= kNarrow) {
    for (uint32_t i = begin + threadIdx.x / 32; i < end; i += kWarps)
      complete_row<32, T, W>(a, i, squares + i, squares + c.all_rows + i, sums);
  } else {
    for (uint32_t i = begin; i < end; ++i)
      complete_row<kThreads, T, W>(a, i, squares + i, squares + c.all_rows + i, sums);
  }
}

// Sum of the squares of a matrix' rows; the same for each thread of a warp.
template <class T>
__device__ double sum_of_rows(const T* squares, uint32_t rows) {
  double total = 0;
  for (uint32_t i = threadIdx.x % 32; i < rows; i += 32) total += double(squares[i]);
  for (int d = 16; d > 0; d /= 2) total += __shfl_xor_sync(~0u, total, d);
  return total;
}

template <class T, int LAYERS>
__global__ void __launch_bounds__(32 * kNormWarps)
    product_norms_kernel(const __grid_constant__ Completion<T, LAYERS> c) {
  const uint32_t matrix = blockIdx.x * kNormWarps + threadIdx.x / 32;
  const uint32_t matrices = c.first_matrix[c.call.count];
  if (matrix >= matrices) return;
  const int l = layer_of_block(c.first_matrix + 1, c.call.count, matrix,
                               [](uint32_t first_of_next) { return first_of_next; });
  const uint32_t rows = c.call.layer[l].rows_per_group;
  const T* squares = c.squares + c.first_row[l] + int64_t(matrix - c.first_matrix[l]) * rows;
  const double length = sum_of_rows(squares, rows), size = sum_of_rows(squares + c.all_rows, rows);
  if (threadIdx.x % 32 == 0) {
    c.norms[matrix] = T(sqrt(length));
    c.norms[c.all_matrices + matrix] = T(sqrt(size));
  }
}

// Where the sums and the norms of the layers of a launch go.
template <class T>
struct Place {
  T* norms;
  T* squares;
  int64_t matrices, rows;  // of all launches of the call
};

// Launches for some layers; their sums and norms begin at `place`, which it moves on.
template <class T, class W, int LAYERS>
void launch_layers(const WeightStep<T>* layers, int64_t count, Place<T>& place, CudaStream stream) {
  Completion<T, LAYERS> c;
  const int64_t blocks = share_rows(c.call, layers, count);
  c.squares = place.squares, c.norms = place.norms;
  c.all_rows = place.rows, c.all_matrices = place.matrices;
  int64_t row = 0, matrix = 0;
  for (int64_t l = 0; l < count; ++l) {
    c.first_row[l] = row, c.first_matrix[l] = uint32_t(matrix);
    row += layers[l].rows, matrix += layers[l].groups;
    if (matrix > INT32_MAX) throw std::runtime_error("groups are too many for one launch");
  }
  c.first_matrix[count] = uint32_t(matrix);
  if (blocks > 0)
    launch(complete_products_kernel<T, W, LAYERS>, grid_of(blocks), dim3(kThreads), 0, stream, c);
  if (matrix > 0)
    launch(product_norms_kernel<T, LAYERS>, grid_of((matrix + kNormWarps - 1) / kNormWarps),
           dim3(32 * kNormWarps), 0, stream, c);
  place.squares += row, place.norms += matrix;
}

}  // namespace

template <class T, class W>
void complete_products_cuda(const WeightStep<T>* layers, int64_t count, T* norms, T* squares,
                            CudaStream stream) {
  Place<T> place{norms, squares, 0, 0};
  for (int64_t l = 0; l < count; ++l)
    place.matrices += layers[l].groups, place.rows += layers[l].rows;
  for (int64_t begin = 0; begin < count; begin += kMany) {
    const int64_t some = std::min<int64_t>(kMany, count - begin);
    if (some <= kFew) {
      launch_layers<T, W, kFew>(layers + begin, some, place, stream);
    } else {
      launch_layers<T, W, kMany>(layers + begin, some, place, stream);
    }
  }
}

template void complete_products_cuda<float, float>(const WeightStep<float>*, int64_t, float*,
                                                   float*, CudaStream);
template void complete_products_cuda<float, BFloat16>(const WeightStep<float>*, int64_t, float*,
                                                      float*, CudaStream);
template void complete_products_cuda<float, Half>(const WeightStep<float>*, int64_t, float*, float*,
                                                  CudaStream);
template void complete_products_cuda<double, double>(const WeightStep<double>*, int64_t, double*,
                                                     double*, CudaStream);
template void complete_products_cuda<double, float>(const WeightStep<double>*, int64_t, double*,
                                                    double*, CudaStream);
template void complete_products_cuda<double, BFloat16>(const WeightStep<double>*, int64_t, double*,
                                                       double*, CudaStream);
template void complete_products_cuda<double, Half>(const WeightStep<double>*, int64_t, double*,
                                                   double*, CudaStream);

}  // namespace rlscuda
