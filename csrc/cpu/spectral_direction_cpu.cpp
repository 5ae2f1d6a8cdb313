// foreach_spectral_direction_ on the CPU: N P, the gram of each block, its root, and the direction.
//
// Each is done for all blocks before the next is begun, in units that threads share by what they
// cost. All products are by the two kernels of rls_kernels.h: a product with a matrix whose rows
// are at hand projects on them; one with a transpose is a rank-r update of zeros.
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "rls_calls.h"
#include "scratch.h"
#include "spectral_direction.h"

namespace rlscuda {
namespace {

constexpr int64_t kGrain = 1 << 18;  // multiply-adds of the units that a thread takes
constexpr int64_t kBand = 16;        // rows of a unit

// Some rows [begin, end) of what one step makes of block b of a layer, or of its matrix b.
struct Unit {
  int64_t layer, b, begin, end, cost;
};

// The units of a step: cost(begin, end) of each band of `rows`, of all `count` of a layer.
class Units {
 public:
  template <class Cost>
  void add(int64_t layer, int64_t count, int64_t rows, int64_t band, const Cost& cost) {
    for (int64_t b = 0; b < count; ++b)
      for (int64_t i = 0; i < rows; i += band) {
        const int64_t end = std::min(i + band, rows);
        units_.push_back({layer, b, i, end, cost(i, end)});
        total_ += units_.back().cost;
      }
  }
  // Calls work(unit) for all; a thread takes those that begin in its part of the cost.
  template <class Work>
  void share(const Work& work) const {
    parallel_for(0, total_, kGrain, [&](int64_t begin, int64_t end) {
      int64_t start = 0;
      for (const Unit& unit : units_) {
        if (start >= begin && start < end) work(unit);
        start += unit.cost;
      }
    });
  }

 private:
  std::vector<Unit> units_;
  int64_t total_ = 0;
};

// M = A^T B for rows [i0, i1) of M [.., n], of `rows` rows of A and B.
template <class T>
void multiply_transposed(Rows<T> M, Rows<const T> A, Rows<const T> B, int64_t n, int64_t rows,
                         int64_t i0, int64_t i1) {
  for (int64_t i = i0; i < i1; ++i) std::fill_n(M[i], n, T(0));
  update_rows<T>(M, A, B, n, rows, T(-1), i0, i1);
}

// The blocks of one layer.
template <class T>
struct Layer {
  const DirectionLayer<T>& own;
  const RootLayer<T>& root;
  int64_t size, m;  // elements of a block, rows of its gram

  Layer(const DirectionLayer<T>& own, const RootLayer<T>& root)
      : own(own), root(root), size(own.block * own.n), m(root.m) {}
  int64_t blocks() const { return root.groups * root.parts; }
  int64_t rows() const { return root.parts * own.block; }  // of a matrix
  Rows<T> N(int64_t b) const { return {own.blocks + b * size, own.n}; }
  Rows<T> D(int64_t b) const { return {own.product + b * size, own.n}; }
  Rows<T> gram(int64_t b) const { return {root.gram + b * m * m, m}; }

  // Some columns of N P of a matrix.
  void multiply(const Unit& u) const {
    const int64_t n = own.n, first = u.b * root.parts;
    project_rows<T>({own.P + u.b * n * n, n}, N(first), D(first), n, rows(), u.begin, u.end);
  }
  // Rows of N P N^T as far as its diagonal, or of N^T N P.
  void square(const Unit& u) const {
    if (root.symmetric) {
      const Rows<T> out = gram(u.b).from(u.begin);
      project_rows<T>(D(u.b), N(u.b).from(u.begin), out, own.n, u.end - u.begin, 0, u.end);
    } else {
      multiply_transposed<T>(gram(u.b), N(u.b), D(u.b), own.n, own.block, u.begin, u.end);
    }
  }
  // Rows of the root, which is symmetric, times N P, or of N P times the root.
  void direct(const Unit& u) const {
    if (root.symmetric) {
      multiply_transposed<T>(N(u.b), gram(u.b), D(u.b), own.n, m, u.begin, u.end);
      return;
    }
    Scratch<T> flipped(m * m);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < m; ++j) flipped[i * m + j] = gram(u.b)[j][i];
    project_rows<T>({flipped.data(), m}, D(u.b).from(u.begin), N(u.b).from(u.begin), m,
                    u.end - u.begin, 0, m);
  }
};

}  // namespace

template <class T>
void spectral_direction_cpu(const DirectionLayer<T>* layers, const SpectralRoot<T>& args) {
  std::vector<Layer<T>> all;
  Units products, squares, directions;
  for (int64_t l = 0; l < args.count; ++l) {
    const Layer<T>& layer = all.emplace_back(layers[l], args.layers[l]);
    const int64_t n = layer.own.n, rows = layer.rows(), m = layer.m, block = layer.own.block;
    const bool symmetric = layer.root.symmetric;
    if (layer.own.P)
      products.add(l, layer.root.groups, n, 3 * kBand,
                   [&](int64_t i, int64_t end) { return (end - i) * n * rows; });
    squares.add(l, layer.blocks(), m, kBand,
                [&](int64_t i, int64_t end) { return (end - i) * n * (symmetric ? end : block); });
    directions.add(l, layer.blocks(), block, symmetric ? kBand : block,
                   [&](int64_t i, int64_t end) { return (end - i) * n * m; });
  }
  products.share([&](const Unit& u) { all[u.layer].multiply(u); });
  squares.share([&](const Unit& u) { all[u.layer].square(u); });
  spectral_root_cpu(args);
  directions.share([&](const Unit& u) { all[u.layer].direct(u); });
}

template void spectral_direction_cpu(const DirectionLayer<float>*, const SpectralRoot<float>&);
template void spectral_direction_cpu(const DirectionLayer<double>*, const SpectralRoot<double>&);

}  // namespace rlscuda
