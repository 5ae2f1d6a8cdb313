// foreach_spectral_direction_: checks, dtype dispatch, launch.
#include "spectral_direction.h"

#include "ops.h"
#include "spectral_layers.h"

namespace rlscuda {
namespace {

struct Blocks {
  const std::vector<Tensor>&momentum, &product, &P;
};

// What the directions of the layers that the shapes have are made of.
template <class T>
std::vector<DirectionLayer<T>> directions_of(const Blocks& blocks, const Shapes& shapes,
                                             const Layers<T>& layers, Arguments& arguments) {
  std::vector<DirectionLayer<T>> found;
  for (size_t i = 0; i < blocks.momentum.size(); ++i) {
    DirectionLayer<T> layer{};
    layer.blocks = arguments.write<T>("momentum", blocks.momentum[i]);
    layer.product = arguments.write<T>("product", blocks.product[i]);
    layer.block = shapes.block[i], layer.n = shapes.columns[i];
    for (int64_t matrices = shapes.peak[i].numel(); matrices > 0;) {
      const RootLayer<T>& root = layers.found[found.size()];
      const Tensor& P = blocks.P[found.size()];
      check_same_dtype("every P", P, "momentum[0]", blocks.momentum[0]);
      if (P.numel() > 0 && P.dim() == 2) check_shape("every P", P, {layer.n, layer.n});
      if (P.numel() > 0 && P.dim() != 2) check_shape("every P", P, {root.groups, layer.n, layer.n});
      layer.P = P.numel() > 0 ? arguments.read<T>("P", P) : nullptr;
      RLS_CHECK(P.numel() == 0 || P.numel() == root.groups * layer.n * layer.n, "P must be of ",
                root.groups, " matrices, got ", shape_of(P));
      found.push_back(layer);
      const int64_t elements = root.groups * root.parts * layer.block * layer.n;
      if (elements > 0) layer.blocks += elements, layer.product += elements;
      matrices -= root.groups;
    }
  }
  return found;
}

// Room for the gram of every block.
std::vector<Tensor> grams_of(const Blocks& blocks, const std::vector<int64_t>& block,
                             const std::vector<int64_t>& columns) {
  std::vector<Tensor> grams;
  for (size_t i = 0; i < blocks.momentum.size(); ++i) {
    const Tensor& momentum = blocks.momentum[i];
    RLS_CHECK(momentum.dim() == 3, "every momentum must be [b, rows, columns], got ",
              shape_of(momentum));
    check_shape("every momentum", momentum, {momentum.size(0), block[i], columns[i]});
    check_shape("every product", blocks.product[i], {momentum.size(0), block[i], columns[i]});
    for (const Tensor* t : {&momentum, &blocks.product[i]})
      check_same_dtype("every momentum and product", *t, "momentum[0]", blocks.momentum[0]);
    const int64_t m = std::min(block[i], columns[i]);
    RLS_CHECK(m > 0, "block and columns must be positive, got ", block[i], " and ", columns[i]);
    grams.push_back(new_tensor(momentum, {momentum.size(0), m, m}, momentum.scalar_type()));
  }
  return grams;
}

template <class T>
void run(const Blocks& blocks, const Shapes& shapes, const std::vector<double>& coefficients,
         double eps) {
  SpectralRoot<T> args = polynomials_of<T>(coefficients, eps);
  Arguments arguments("the first momentum", blocks.momentum[0]);
  const Layers<T> layers(shapes, arguments);
  RLS_CHECK(blocks.P.size() == layers.found.size(), "P must have ", layers.found.size(),
            " tensors, got ", blocks.P.size());
  const auto directions = directions_of<T>(blocks, shapes, layers, arguments);
  arguments.check_apart();
  args.layers = layers.found.data(), args.count = int64_t(layers.found.size());
  spectral_direction_cpu(directions.data(), args);
}

}  // namespace

void foreach_spectral_direction_(std::vector<Tensor> momentum, std::vector<Tensor> product,
                                 std::vector<Tensor> P, std::vector<Tensor> peak,
                                 std::vector<Tensor> length, std::vector<Tensor> power,
                                 std::vector<int64_t> block, std::vector<int64_t> rows,
                                 std::vector<int64_t> columns, std::vector<double> coefficients,
                                 double eps) {
  const size_t count = momentum.size();
  RLS_CHECK(count > 0, "momentum must hold at least one shape");
  check_list_size("product", product, count);
  check_lists(count, peak, length, block, rows, columns);
  const Blocks blocks{momentum, product, P};
  const auto grams = grams_of(blocks, block, columns);
  const Shapes shapes{grams, peak, length, power, block, rows, columns};
  if (momentum[0].scalar_type() == ScalarType::Float)
    return run<float>(blocks, shapes, coefficients, eps);
  check_dtype("momentum", momentum[0], ScalarType::Double, "float32 or float64");
  run<double>(blocks, shapes, coefficients, eps);
}

}  // namespace rlscuda
