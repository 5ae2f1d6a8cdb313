// factors_agree: checks, dtype dispatch, launch.
#include "checks.h"
#include "kernels.h"
#include "ops.h"

namespace rlscuda {
namespace {

template <class T>
bool launch(const Tensor& grad, const Tensor& x, const Tensor& delta,
            const std::optional<Tensor>& grad_bias) {
  return factors_agree_cpu(static_cast<const T*>(grad.const_data_ptr()),
                           static_cast<const T*>(x.const_data_ptr()),
                           static_cast<const T*>(delta.const_data_ptr()),
                           grad_bias ? static_cast<const T*>(grad_bias->const_data_ptr()) : nullptr,
                           x.size(0), grad.size(0), grad.size(1));
}

}  // namespace

bool factors_agree(const Tensor& grad, const Tensor& x, const Tensor& delta,
                   const std::optional<Tensor>& grad_bias) {
  RLS_CHECK(grad.dim() == 2 && x.dim() == 2, "grad and x must be matrices, got ", shape_of(grad),
            " and ", shape_of(x));
  check_shape("x", x, {x.size(0), grad.size(1)});
  check_shape("delta", delta, {x.size(0), grad.size(0)});
  check_contiguous("grad", grad);
  check_contiguous("x", x);
  check_contiguous("delta", delta);
  check_same_dtype("x", x, "grad", grad);
  check_same_dtype("delta", delta, "grad", grad);
  if (grad_bias) {
    check_shape("grad_bias", *grad_bias, {grad.size(0)});
    check_contiguous("grad_bias", *grad_bias);
    check_same_dtype("grad_bias", *grad_bias, "grad", grad);
  }
  if (grad.scalar_type() == ScalarType::Float) return launch<float>(grad, x, delta, grad_bias);
  RLS_CHECK(grad.scalar_type() == ScalarType::Double, "grad must be float32 or float64");
  return launch<double>(grad, x, delta, grad_bias);
}

}  // namespace rlscuda
