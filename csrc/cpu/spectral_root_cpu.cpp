// foreach_spectral_root_ on the CPU: a matrix from beginning to end in a few squares of memory that
// stay in the caches, matrices shared among the threads by what they cost.
//
// A square has a whole number of tiles a side, kTile rows by a vector of columns, with zeros beyond
// the matrix. A tile of a product A B is a sum of outer products of two rows, one of A^T read as
// scalars and one of B as a vector, of 64 bytes where registers have them: the compiler would make
// two of 32 of it elsewhere, and too many sums for their registers. A symmetric A is its own
// transpose.
#include <algorithm>
#include <cmath>
#include <memory>

#include "scratch.h"
#include "simd.h"
#include "spectral_root.h"

namespace rlscuda {
namespace {

constexpr int64_t kTile = 8;
constexpr int64_t kSquares = 5;
constexpr int64_t kGrain = 1 << 17;  // multiply-adds of a product of those that a thread takes

// The side of the squares of m rows, for columns by vectors of so many bytes.
template <class T, int BYTES>
constexpr int64_t side_of(int64_t m) {
  constexpr int64_t unit = std::max(kTile, BYTES / int64_t(sizeof(T)));
  return (m + unit - 1) / unit * unit;
}

// A square in memory: X[i] is row i.
template <class T>
struct Square {
  T* data;
  int64_t side;
  ALWAYS_INLINE T* operator[](int64_t i) const { return data + i * side; }
};

// The square of vectors of X at (i, j), transposed, goes to (j, i) of Y.
template <class T>
ALWAYS_INLINE void flip(Square<T> Y, Square<T> X, int64_t i, int64_t j) {
  constexpr int W = kLanes<T>;
  Vec<T> v[W];
  for (int r = 0; r < W; ++r) v[r] = load(X[i + r] + j);
  transpose(v);
  for (int r = 0; r < W; ++r) store(Y[j + r] + i, v[r]);
}

// Makes the upper triangle the mirror image of the lower one.
template <class T>
ALWAYS_INLINE void mirror(Square<T> X) {
  for (int64_t i = 0; i < X.side; i += kLanes<T>) {
    for (int64_t j = 0; j < i; j += kLanes<T>) flip(X, X, i, j);
    for (int64_t r = i; r < i + kLanes<T>; ++r)
      for (int64_t q = i; q < r; ++q) X[q][r] = X[r][q];
  }
}

// The squares of one matrix, and the products of its polynomials by vectors of so many bytes.
template <class T, int BYTES>
struct Squares {
  using Row = typename VecOf<T, BYTES>::type;
  static constexpr int64_t kColumns = BYTES / sizeof(T);

  Square<T> X, factor, root, other, spare;
  int64_t m;
  bool symmetric;

  ALWAYS_INLINE Squares(T* memory, int64_t m, bool symmetric) : m(m), symmetric(symmetric) {
    for (Square<T>* square : {&X, &factor, &root, &other, &spare}) {
      *square = {memory, side_of<T, BYTES>(m)};
      memory = (*square)[square->side];
    }
  }

  ALWAYS_INLINE Square<T> transposed(Square<T> A) const {
    if (symmetric) return A;
    for (int64_t i = 0; i < A.side; i += kLanes<T>)
      for (int64_t j = 0; j < A.side; j += kLanes<T>) flip(spare, A, i, j);
    return spare;
  }

  // C = a I + b A + c A B
  ALWAYS_INLINE void combine(Square<T> C, T a, T b, T c, Square<T> A, Square<T> B) const {
    const Square<T> columns = transposed(A);
    for (int64_t i = 0; i < m; i += kTile)
      for (int64_t j = 0; j < (symmetric ? i + kTile : C.side); j += kColumns) {
        Row sums[kTile] = {};
        for (int64_t k = 0; k < m; ++k) {
          const Row row = load_as<Row>(B[k] + j);
          for (int64_t r = 0; r < kTile; ++r) sums[r] += columns[k][i + r] * row;
        }
        for (int64_t r = 0; r < kTile; ++r)
          store(C[i + r] + j, b * load_as<Row>(A[i + r] + j) + c * sums[r]);
      }
    for (int64_t i = 0; i < m; ++i) C[i][i] += a;
    if (symmetric) mirror(C);
  }

  // X = gram / |gram|; returns 1 / sqrt(|gram|).
  ALWAYS_INLINE T normalise(const T* gram) const {
    std::fill(X.data, X[X.side], T(0));
    for (int64_t i = 0; i < m; ++i) std::copy_n(gram + i * m, symmetric ? i + 1 : m, X[i]);
    if (symmetric) mirror(X);
    Vec<T> most = {};
    for (const T* x = X.data; x < X[m]; x += kLanes<T>) {
      const Vec<T> v = load(x), size = v < 0 ? -v : v;
      most = size > most ? size : most;
    }
    T largest = 0;
    for (int64_t i = 0; i < kLanes<T>; ++i) largest = std::max(largest, most[i]);
    const int exponent = GramSize<T>::exponent_of(largest);
    const T unit = GramSize<T>::unit(exponent);
    const Square<T> mirrored = transposed(X);
    Vec<T> squares = {};
    const int64_t elements = X.side * X.side;
    for (int64_t i = 0; i < elements; i += kLanes<T>)
      squares += (unit * load(X.data + i)) * (unit * load(mirrored.data + i));
    const GramSize<T> size(exponent, sum(squares));
    const T share = 1 / size.norm;
    for (int64_t i = 0; i < elements; i += kLanes<T>)
      store(X.data + i, share * (unit * load(X.data + i)));
    return size.inverse_root();
  }

  ALWAYS_INLINE void take_root(const SpectralRoot<T>& args) {
    for (int64_t i = 0; i < args.polynomials; ++i) {
      const T* p = args.coefficients + 3 * i;
      Square<T>& now = i == 0 ? root : factor;
      combine(now, p[0], p[1], p[2], X, X);
      if (i + 1 < args.polynomials) {
        combine(other, 0, 0, 1, now, X);
        combine(X, 0, 0, 1, now, other);
      }
      if (i > 0) {
        combine(other, 0, 0, 1, now, root);
        std::swap(root, other);
      }
    }
  }
};

}  // namespace

#define SPECTRAL_ROOT(T, BYTES, TARGET)                                                \
  TARGET void spectral_root(Width<BYTES>, T* gram, int64_t m, bool symmetric, T scale, \
                            const SpectralRoot<T>& args, T* memory) {                  \
    Squares<T, BYTES> squares(memory, m, symmetric);                                   \
    scale *= squares.normalise(gram);                                                  \
    squares.take_root(args);                                                           \
    for (int64_t i = 0; i < m; ++i)                                                    \
      for (int64_t j = 0; j < m; ++j) gram[i * m + j] = scale * squares.root[i][j];    \
  }
AT_EACH_WIDTH(SPECTRAL_ROOT, float)
AT_EACH_WIDTH(SPECTRAL_ROOT, double)
#undef SPECTRAL_ROOT

template <class T>
void spectral_root_cpu(const SpectralRoot<T>& args) {
  const auto cost = [](const RootLayer<T>& layer) { return layer.m * layer.m * layer.m; };
  int64_t total = 0, side = 0;
  for (int64_t l = 0; l < args.count; ++l) {
    const RootLayer<T>& layer = args.layers[l];
    total += layer.groups * layer.parts * cost(layer);
    side = std::max(side, side_of<T, kWidest>(layer.m));
  }
  // a thread takes the matrices that begin in its part of the cost
  parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t bytes = kSquares * side * side * sizeof(T) + kWidest;
    Scratch<char> memory(bytes);
    void* aligned = memory.data();  // so that no vector lies in two lines of the cache
    std::align(kWidest, bytes - kWidest, aligned, bytes);
    int64_t start = 0;
    for (int64_t l = 0; l < args.count && start < end; ++l) {
      const RootLayer<T>& layer = args.layers[l];
      const int64_t each = cost(layer), blocks = layer.groups * layer.parts;
      const int64_t first = std::max<int64_t>(0, (begin - start + each - 1) / each);
      const int64_t last = std::min(blocks, (end - start + each - 1) / each);
      for (int64_t b = first; b < last; ++b) {
        const int64_t g = b / layer.parts;
        const T scale = direction_scale(layer.length[g], layer.peak[g], layer.power[g],
                                        layer.elements, layer.tallness, args.eps);
        at_width(layer.m > kTile, [&](auto width) {
          spectral_root(width, layer.gram + b * layer.m * layer.m, layer.m, layer.symmetric, scale,
                        args, static_cast<T*>(aligned));
        });
      }
      start += blocks * each;
    }
  });
}

template void spectral_root_cpu(const SpectralRoot<float>&);
template void spectral_root_cpu(const SpectralRoot<double>&);

}  // namespace rlscuda
