// factors_agree: checks, dtype dispatch, launch.
#include "arguments.h"
#include "kernels.h"
#include "ops.h"

namespace rlscuda {
namespace {

template <class T>
bool launch(const Tensor& grad, const Tensor& x, const Tensor& delta, const Tensor* grad_bias) {
  Arguments arguments("grad", grad);
  const T* G = arguments.read<T>("grad", grad);
  const T* X = arguments.read<T>("x", x);
  const T* D = arguments.read<T>("delta", delta);
  const T* g = grad_bias ? arguments.read<T>("grad_bias", *grad_bias) : nullptr;
  return factors_agree_cpu(G, X, D, g, x.size(0), grad.size(0), grad.size(1));
}

}  // namespace

bool factors_agree(const Tensor& grad, const Tensor& x, const Tensor& delta,
                   const std::optional<Tensor>& grad_bias) {
  RLS_CHECK(grad.dim() == 2 && x.dim() == 2, "grad and x must be matrices, got ", shape_of(grad),
            " and ", shape_of(x));
  check_shape("x", x, {x.size(0), grad.size(1)});
  check_shape("delta", delta, {x.size(0), grad.size(0)});
  check_same_dtype("x", x, "grad", grad);
  check_same_dtype("delta", delta, "grad", grad);
  const Tensor* bias = grad_bias ? &*grad_bias : nullptr;
  if (bias) {
    check_shape("grad_bias", *bias, {grad.size(0)});
    check_same_dtype("grad_bias", *bias, "grad", grad);
  }
  if (grad.scalar_type() == ScalarType::Float) return launch<float>(grad, x, delta, bias);
  check_dtype("grad", grad, ScalarType::Double, "float32 or float64");
  return launch<double>(grad, x, delta, bias);
}

}  // namespace rlscuda
