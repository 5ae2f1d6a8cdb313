// foreach_spectral_direction_: checks, dtype dispatch, launch.
#include "spectral_direction.h"

#include "arguments.h"
#include "ops.h"
#include "polynomials.h"
#include "scratch.h"

namespace rlscuda {
namespace {

// The layers of a call: entry i of each list is of layer i, whose blocks lie one after another in
// the momentum and in the product, and its matrices in peak and length.
struct Given {
  const Tensor &momentum, &product, &peak, &length;
  const std::vector<Tensor>&P, &power;
  const std::vector<int64_t>&blocks, &block, &rows, &columns;
};

template <class T>
class Directions {
 public:
  Directions(const Given& given, Arguments& arguments) : given_(given), arguments_(arguments) {
    for (size_t i = 0; i < given.P.size(); ++i) add(i);
    for (const Tensor* t : {&given.momentum, &given.product})
      check_shape("momentum and product", *t, {elements_});
    for (const Tensor* t : {&given.peak, &given.length})
      check_shape("peak and length", *t, {matrices_});
    grams_.resize(gram_elements_);
    place();
  }
  void run(SpectralRoot<T> args) const {
    args.layers = roots_.data(), args.count = int64_t(roots_.size());
    spectral_direction_cpu(layers_.data(), args);
  }

 private:
  void add(size_t i) {
    const Tensor &P = given_.P[i], &power = given_.power[i];
    const int64_t blocks = given_.blocks[i], block = given_.block[i], n = given_.columns[i];
    const int64_t rows = given_.rows[i], groups = power.numel();
    constexpr int64_t kMost = int64_t(1) << 31;  // so that their products are numbers
    RLS_CHECK(block > 0 && block <= kMost && rows > 0 && rows <= kMost && n > 0 && n <= kMost,
              "block, rows and columns must be positive, and no more than 2^31, got ", block, ", ",
              rows, " and ", n);
    RootLayer<T> root{};
    root.set_shape(block, rows, n);
    RLS_CHECK(root.m <= kMostRootRows, "block or columns must be at most ", kMostRootRows, ", got ",
              block, " and ", n);
    for (const Tensor* t : {&P, &power})
      check_same_dtype("every P and power", *t, "momentum", given_.momentum);
    check_shape("every power", power, {groups});
    const int64_t size = block * n;
    RLS_CHECK(groups > 0 && blocks > 0 && blocks % groups == 0 &&
                  blocks <= given_.momentum.numel() / size,
              "every layer must have blocks in the momentum of its power's ", groups,
              " matrices, got ", blocks, " of ", size, " elements");
    if (P.numel() > 0 && !(groups == 1 && P.dim() == 2)) check_shape("every P", P, {groups, n, n});
    if (P.numel() > 0 && P.dim() == 2) check_shape("every P", P, {n, n});
    root.power = arguments_.read<T>("power", power);
    root.groups = groups, root.parts = blocks / groups;
    DirectionLayer<T> layer{};
    layer.P = P.numel() > 0 ? arguments_.read<T>("P", P) : nullptr;
    layer.block = block, layer.n = n;
    roots_.push_back(root);
    layers_.push_back(layer);
    elements_ += blocks * size, matrices_ += groups;
    gram_elements_ += blocks * root.m * root.m;
  }

  // Gives every layer its part of what lies in one.
  void place() {
    T* momentum = arguments_.write<T>("momentum", given_.momentum);
    T* product = arguments_.write<T>("product", given_.product);
    const T* peak = arguments_.read<T>("peak", given_.peak);
    const T* length = arguments_.read<T>("length", given_.length);
    T* gram = grams_.data();
    for (size_t i = 0; i < roots_.size(); ++i) {
      RootLayer<T>& root = roots_[i];
      const int64_t blocks = root.groups * root.parts, size = layers_[i].block * layers_[i].n;
      layers_[i].blocks = momentum, layers_[i].product = product;
      root.peak = peak, root.length = length, root.gram = gram;
      momentum += blocks * size, product += blocks * size;
      peak += root.groups, length += root.groups;
      gram += blocks * root.m * root.m;
    }
  }

  const Given& given_;
  Arguments& arguments_;
  std::vector<RootLayer<T>> roots_;
  std::vector<DirectionLayer<T>> layers_;
  Scratch<T> grams_;
  int64_t elements_ = 0, matrices_ = 0, gram_elements_ = 0;
};

template <class T>
void run(const Given& given, const std::vector<double>& coefficients, double eps) {
  const SpectralRoot<T> args = polynomials_of<T>(coefficients, eps);
  Arguments arguments("momentum", given.momentum);
  const Directions<T> directions(given, arguments);
  arguments.check_apart();
  directions.run(args);
}

}  // namespace

void foreach_spectral_direction_(Tensor momentum, Tensor product, std::vector<Tensor> P,
                                 const Tensor& peak, const Tensor& length,
                                 std::vector<Tensor> power, std::vector<int64_t> blocks,
                                 std::vector<int64_t> block, std::vector<int64_t> rows,
                                 std::vector<int64_t> columns, std::vector<double> coefficients,
                                 double eps) {
  const size_t count = P.size();
  RLS_CHECK(count > 0, "P must hold at least one layer");
  check_list_size("power", power, count);
  for (auto* list : {&blocks, &block, &rows, &columns})
    RLS_CHECK(list->size() == count, "blocks, block, rows and columns must have ", count,
              " entries, got ", list->size());
  for (const Tensor* t : std::initializer_list<const Tensor*>{&product, &peak, &length})
    check_same_dtype("product, peak and length", *t, "momentum", momentum);
  const Given given{momentum, product, peak, length, P, power, blocks, block, rows, columns};
  if (momentum.scalar_type() == ScalarType::Float) return run<float>(given, coefficients, eps);
  check_dtype("momentum", momentum, ScalarType::Double, "float32 or float64");
  run<double>(given, coefficients, eps);
}

}  // namespace rlscuda
