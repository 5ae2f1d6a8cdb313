// foreach_spectral_root_ on the GPU: a block a matrix, all shapes in one launch.
//
// Matrices lie in shared memory from beginning to end (of float64 the root lies in `gram`, in the
// L1 cache, since three matrices are more than some devices have). A thread takes a tile of 4 x 4
// elements of a product and keeps its sums in registers, so that a product may overwrite one of its
// factors; of a symmetric product only tiles of the lower triangle are computed, and each is stored
// twice. A row of a square is 16 groups of 4 elements, which are permuted by the row's tile: so
// tiles of one column that are stored at once lie in different banks. Sums have a fixed order.
#include <algorithm>
#include <stdexcept>

#include "launch.h"
#include "layer_list.h"
#include "spectral_root.h"

namespace rlscuda {
namespace {

constexpr int kTile = 4, kGroups = 16, kSide = kTile * kGroups;
constexpr int kThreads = kGroups * kGroups, kWarps = kThreads / 32;
static_assert(kSide == kMostRootRows);

template <class T>
struct Layer {
  RootLayer<T> root;
  uint32_t end;  // the first block that is not for this layer
};

template <class T, int LAYERS>
struct Call {
  int64_t count, polynomials;
  T coefficients[3 * kMostPolynomials];
  T eps;
  Layer<T> layer[LAYERS];
};
constexpr int kFewLayers = 44, kManyLayers = 369;
static_assert(sizeof(Call<double, kFewLayers>) <= 4096);
static_assert(sizeof(Call<double, kManyLayers>) <= 32764);

// Whether three squares are in shared memory, or two.
template <class T>
constexpr bool kRootIsShared = sizeof(T) == 4;

// A group of elements, loaded and stored in vectors of 16 bytes.
template <class T>
struct alignas(16) Group {
  T lane[kTile];
};

// A matrix in shared memory: at (i, q) is group q of row i.
template <class T>
struct Square {
  T* data;
  __device__ __forceinline__ Group<T>& at(int i, int q) const {
    return reinterpret_cast<Group<T>*>(data)[i * kGroups + (q ^ (i / kTile))];
  }
  __device__ __forceinline__ T& operator()(int i, int j) const {
    return at(i, j / kTile).lane[j % kTile];
  }
  __device__ __forceinline__ Group<T> load(int i, int q) const { return at(i, q); }
  __device__ __forceinline__ void store(int i, int q, const Group<T>& x) const { at(i, q) = x; }
};

// A matrix [m, m] in global memory, where a group may end beyond it.
template <class T>
struct Dense {
  T* data;
  int m;
  __device__ __forceinline__ T operator()(int i, int j) const {
    return i < m && j < m ? data[i * m + j] : T(0);
  }
  __device__ __forceinline__ Group<T> load(int i, int q) const {
    const int j = q * kTile;
    return {{(*this)(i, j), (*this)(i, j + 1), (*this)(i, j + 2), (*this)(i, j + 3)}};
  }
  __device__ __forceinline__ void store(int i, int q, const Group<T>& x) const {
    for (int l = 0; l < kTile; ++l)
      if (i < m && q * kTile + l < m) data[i * m + q * kTile + l] = x.lane[l];
  }
};

// The largest, or the sum, of the threads of a block, known to all of them.
template <class T, class F>
__device__ T over_block(T x, T* parts, const F& join) {
  for (int d = 16; d > 0; d /= 2) x = join(x, __shfl_xor_sync(~0u, x, d));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
  for (int w = 1; w < kWarps; ++w) x = join(x, parts[w]);
  __syncthreads();
  return x;
}

// The tile of a thread in the products of a matrix, where it has one.
struct Tile {
  int i, j;
  bool works;
  __device__ Tile(int m, bool symmetric) {
    const int tiles = (m + kTile - 1) / kTile, t = int(threadIdx.x);
    i = symmetric ? 0 : t / tiles;
    while (symmetric && (i + 1) * (i + 2) / 2 <= t) ++i;
    j = symmetric ? t - i * (i + 1) / 2 : t % tiles;
    works = i < tiles;
  }
};

template <class T>
__device__ __forceinline__ void add_outer(T (&sums)[kTile][kTile], const Group<T>& column,
                                          const Group<T>& row) {
#pragma unroll
  for (int r = 0; r < kTile; ++r)
#pragma unroll
    for (int q = 0; q < kTile; ++q) sums[r][q] += column.lane[r] * row.lane[q];
}

// out = a I + b A + c A B, where `out` may be A or B.
template <class T, class Out, class Left, class Right>
__device__ __forceinline__ void combine(const Out& out, T a, T b, T c, const Left& A,
                                        const Right& B, int m, bool symmetric, const Tile& tile) {
  T sums[kTile][kTile] = {};
  if (tile.works) {
    if (symmetric) {
#pragma unroll 4
      for (int k = 0; k < m; ++k) add_outer(sums, A.load(k, tile.i), B.load(k, tile.j));
    } else {
#pragma unroll 4
      for (int k = 0; k < m; ++k) {
        Group<T> column;
        for (int r = 0; r < kTile; ++r) column.lane[r] = A(tile.i * kTile + r, k);
        add_outer(sums, column, B.load(k, tile.j));
      }
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      const Group<T> old = A.load(tile.i * kTile + r, tile.j);
#pragma unroll
      for (int q = 0; q < kTile; ++q)
        sums[r][q] = b * old.lane[q] + c * sums[r][q] + (tile.i == tile.j && r == q ? a : T(0));
    }
    if (symmetric && tile.i == tile.j)
#pragma unroll
      for (int r = 0; r < kTile; ++r)
#pragma unroll
        for (int q = r + 1; q < kTile; ++q) sums[r][q] = sums[q][r];
  }
  __syncthreads();  // until all have read what this overwrites
  if (tile.works) {
#pragma unroll
    for (int r = 0; r < kTile; ++r)
      out.store(tile.i * kTile + r, tile.j, {{sums[r][0], sums[r][1], sums[r][2], sums[r][3]}});
    if (symmetric && tile.i != tile.j)
#pragma unroll
      for (int q = 0; q < kTile; ++q)
        out.store(tile.j * kTile + q, tile.i, {{sums[0][q], sums[1][q], sums[2][q], sums[3][q]}});
  }
  __syncthreads();
}

// X = gram / |gram|; returns 1 / sqrt(|gram|). parts: memory for an element a warp.
template <class T>
__device__ T normalise(const Square<T>& X, const T* gram, int m, bool symmetric, T* parts) {
  T largest = 0;
  for (int at = threadIdx.x; at < m * m; at += kThreads) {
    const int i = at / m, j = at % m;
    if (symmetric && j > i) continue;
    const T x = gram[at], size = x < 0 ? -x : x;
    X(i, j) = x;
    if (symmetric) X(j, i) = x;
    largest = size > largest ? size : largest;
  }
  largest = over_block(largest, parts, [](T x, T y) { return y > x ? y : x; });
  const int exponent = GramSize<T>::exponent_of(largest);
  const T unit = GramSize<T>::unit(exponent);
  T squares = 0;
  for (int at = threadIdx.x; at < m * m; at += kThreads) {
    const int i = at / m, j = at % m;
    squares += (unit * X(i, j)) * (unit * X(j, i));
  }
  squares = over_block(squares, parts, [](T x, T y) { return x + y; });
  const GramSize<T> size(exponent, squares);
  const T share = 1 / size.norm;
  for (int at = threadIdx.x; at < m * m; at += kThreads) {
    T& x = X(at / m, at % m);
    x = share * (unit * x);
  }
  __syncthreads();
  return size.inverse_root();
}

template <class T, int LAYERS>
__global__ void __launch_bounds__(kThreads, 2)
    spectral_root_kernel(const __grid_constant__ Call<T, LAYERS> call) {
  extern __shared__ float4 memory[];
  const int l = layer_of_block(call.layer, call.count, blockIdx.x,
                               [](const Layer<T>& layer) { return layer.end; });
  const RootLayer<T> a = call.layer[l].root;
  const int64_t block = blockIdx.x - (l ? call.layer[l - 1].end : 0), g = block / a.parts;
  const int m = int(a.m);
  T* const gram = a.gram + block * m * m;
  T* const shared = reinterpret_cast<T*>(memory);
  const Square<T> X{shared}, factor{shared + kSide * kSide};
  const auto root = [&] {
    if constexpr (kRootIsShared<T>) {
      return Square<T>{shared + 2 * kSide * kSide};
    } else {
      return Dense<T>{gram, m};
    }
  }();
  const Tile tile(m, a.symmetric);
  const T scale =
      direction_scale(a.length[g], a.peak[g], a.power[g], a.elements, a.tallness, call.eps) *
      normalise(X, gram, m, a.symmetric, factor.data);
  const auto product = [&](const auto& out, const auto& A, const auto& B) {
    combine(out, T(0), T(0), T(1), A, B, m, a.symmetric, tile);
  };
  for (int p = 0; p < call.polynomials; ++p) {
    const T* abc = call.coefficients + 3 * p;
    const bool last = p + 1 == call.polynomials;
    if (p == 0) {
      combine(root, abc[0], abc[1], abc[2], X, X, m, a.symmetric, tile);
      if (!last) product(X, root, X);
      if (!last) product(X, root, X);
    } else {
      combine(factor, abc[0], abc[1], abc[2], X, X, m, a.symmetric, tile);
      product(root, factor, root);
      if (!last) product(X, factor, X);
      if (!last) product(X, factor, X);
    }
  }
  for (int at = threadIdx.x; at < m * m; at += kThreads) gram[at] = scale * root(at / m, at % m);
}

template <class T, int LAYERS>
void launch_layers(const SpectralRoot<T>& a, int64_t begin, int64_t count, cudaStream_t stream) {
  Call<T, LAYERS> call;
  call.count = count;
  call.polynomials = a.polynomials;
  std::copy_n(a.coefficients, 3 * a.polynomials, call.coefficients);
  call.eps = a.eps;
  int64_t end = 0;
  for (int64_t l = 0; l < count; ++l) {
    call.layer[l].root = a.layers[begin + l];
    end += call.layer[l].root.groups * call.layer[l].root.parts;
    if (end > INT32_MAX) throw std::runtime_error("gram is too large for one launch");
    call.layer[l].end = uint32_t(end);
  }
  constexpr size_t bytes = (kRootIsShared<T> ? 3 : 2) * kSide * kSide * sizeof(T);
  if (end > 0)
    launch(spectral_root_kernel<T, LAYERS>, grid_of(end), dim3(kThreads), bytes, stream, call);
}

}  // namespace

template <class T>
void spectral_root_cuda(const SpectralRoot<T>& args, cudaStream_t stream) {
  for (int64_t begin = 0; begin < args.count; begin += kManyLayers) {
    const int64_t count = std::min<int64_t>(kManyLayers, args.count - begin);
    if (count <= kFewLayers) {
      launch_layers<T, kFewLayers>(args, begin, count, stream);
    } else {
      launch_layers<T, kManyLayers>(args, begin, count, stream);
    }
  }
}

template void spectral_root_cuda(const SpectralRoot<float>&, cudaStream_t);
template void spectral_root_cuda(const SpectralRoot<double>&, cudaStream_t);

}  // namespace rlscuda
