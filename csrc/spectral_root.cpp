// foreach_spectral_root_: checks, dtype dispatch, launch.
#include "spectral_root.h"

#include "arguments.h"
#include "cuda_call.h"
#include "ops.h"
#include "polynomials.h"

namespace rlscuda {
namespace {

// The shapes of a call: entry i of each list is for shape i, those of `power` for each layer.
struct Shapes {
  const std::vector<Tensor>&gram, &peak, &length, &power;
  const std::vector<int64_t>&block, &rows, &columns;
};

template <class T>
class Layers {
 public:
  Layers(const Shapes& shapes, Arguments& arguments) : shapes_(shapes), arguments_(arguments) {
    for (size_t i = 0; i < shapes.gram.size(); ++i) add(i);
    RLS_CHECK(next_ == shapes.power.size(), "power must have ", next_, " tensors, got ",
              shapes.power.size());
  }
  std::vector<RootLayer<T>> found;

 private:
  // The layers of shape i, whose matrices are in turn those of its tensors.
  void add(size_t i) {
    const Tensor &gram = shapes_.gram[i], &peak = shapes_.peak[i], &length = shapes_.length[i];
    const int64_t block = shapes_.block[i], rows = shapes_.rows[i], columns = shapes_.columns[i];
    RLS_CHECK(gram.dim() == 3 && gram.size(1) == gram.size(2), "every gram must be [b, m, m], got ",
              shape_of(gram));
    RLS_CHECK(block > 0 && rows > 0 && columns > 0,
              "block, rows and columns must be positive, got ", block, ", ", rows, " and ",
              columns);
    const int64_t m = std::min(block, columns), matrices = peak.numel();
    RLS_CHECK(m <= kMostRootRows, "every gram must have at most ", kMostRootRows, " rows, got ", m);
    RLS_CHECK(gram.size(1) == m, "every gram must be [b, m, m] of m = ", m, ", got ",
              shape_of(gram));
    for (const Tensor* t : {&gram, &peak, &length})
      check_same_dtype("every gram, peak and length", *t, "gram[0]", shapes_.gram[0]);
    check_shape("every peak", peak, {matrices});
    check_shape("every length", length, {matrices});
    RLS_CHECK(matrices > 0 && gram.size(0) % matrices == 0,
              "every gram must have blocks of its peak's ", matrices, " matrices, got ",
              shape_of(gram));
    RootLayer<T> layer{};
    layer.gram = arguments_.write<T>("gram", gram);
    layer.peak = arguments_.read<T>("peak", peak);
    layer.length = arguments_.read<T>("length", length);
    layer.parts = gram.size(0) / matrices;
    layer.set_shape(block, rows, columns);
    for (int64_t done = 0; done < matrices; done += layer.groups) {
      RLS_CHECK(next_ < shapes_.power.size(), "power must have more than ", next_, " tensors");
      const Tensor& power = shapes_.power[next_++];
      check_same_dtype("every power", power, "gram[0]", shapes_.gram[0]);
      layer.groups = power.numel();
      check_shape("every power", power, {layer.groups});
      RLS_CHECK(layer.groups > 0 && layer.groups <= matrices - done, "power must be of the ",
                matrices - done, " matrices that a gram has left, got ", layer.groups);
      layer.power = arguments_.read<T>("power", power);
      found.push_back(layer);
      if (layer.gram) layer.gram += layer.groups * layer.parts * m * m;
      layer.peak += layer.groups, layer.length += layer.groups;
    }
  }

  const Shapes& shapes_;
  Arguments& arguments_;
  size_t next_ = 0;  // of `power`
};

template <class T>
void run(const Shapes& shapes, const std::vector<double>& coefficients, double eps) {
  SpectralRoot<T> args = polynomials_of<T>(coefficients, eps);
  Arguments arguments("the first gram", shapes.gram[0]);
  const Layers<T> layers(shapes, arguments);
  arguments.check_apart();
  args.layers = layers.found.data(), args.count = int64_t(layers.found.size());
  run_on(
      shapes.gram[0], [&] { spectral_root_cpu(args); },
      [&](auto stream) { spectral_root_cuda(args, stream); });
}

}  // namespace

void foreach_spectral_root_(std::vector<Tensor> gram, std::vector<Tensor> peak,
                            std::vector<Tensor> length, std::vector<Tensor> power,
                            std::vector<int64_t> block, std::vector<int64_t> rows,
                            std::vector<int64_t> columns, std::vector<double> coefficients,
                            double eps) {
  const size_t count = gram.size();
  RLS_CHECK(count > 0, "gram must hold at least one shape");
  for (auto* list : {&peak, &length}) check_list_size("peak and length", *list, count);
  for (auto* list : {&block, &rows, &columns})
    RLS_CHECK(list->size() == count, "block, rows and columns must have ", count, " entries, got ",
              list->size());
  const Shapes shapes{gram, peak, length, power, block, rows, columns};
  if (gram[0].scalar_type() == ScalarType::Float) return run<float>(shapes, coefficients, eps);
  check_dtype("gram", gram[0], ScalarType::Double, "float32 or float64");
  run<double>(shapes, coefficients, eps);
}

}  // namespace rlscuda
