// foreach_spectral_root_: checks, dtype dispatch, launch.
#include "cuda_call.h"
#include "ops.h"
#include "spectral_layers.h"

namespace rlscuda {
namespace {

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
  const Shapes shapes{gram, peak, length, power, block, rows, columns};
  RLS_CHECK(!gram.empty(), "gram must hold at least one shape");
  check_lists(gram.size(), peak, length, block, rows, columns);
  if (gram[0].scalar_type() == ScalarType::Float) return run<float>(shapes, coefficients, eps);
  check_dtype("gram", gram[0], ScalarType::Double, "float32 or float64");
  run<double>(shapes, coefficients, eps);
}

}  // namespace rlscuda
