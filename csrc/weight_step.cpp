// weight_step_ and adaptive_weight_step_: checks, dtype dispatch, launch.
#include <cmath>

#include "checks.h"
#include "half.h"
#include "kernels.h"
#include "ops.h"

namespace rlscuda {
namespace {

RowLayout row_layout(const Tensor& weight) {
  RowLayout layout{};
  layout.dense = weight.is_contiguous();
  const int64_t dim = weight.dim();
  for (int64_t d = 0; d < 3; ++d) {
    layout.size[d] = d + 1 < dim ? weight.size(d + 1) : 1;
    layout.stride[d] = d + 1 < dim ? weight.stride(d + 1) : 0;
  }
  layout.row_stride = weight.stride(0);
  return layout;
}

// What both forms share: shapes against one another, then the common arguments.
template <class T>
WeightStep<T> common_args(const Tensor& weight, const std::optional<Tensor>& bias,
                          const Tensor& product, const std::optional<Tensor>& bias_row,
                          const std::optional<Tensor>& grad_bias, const std::optional<Tensor>& h) {
  RLS_CHECK(weight.dim() == 2 || weight.dim() == 4, "weight must be [c, n] or [c, C, kh, kw], got ",
            shape_of(weight));
  const int64_t rows = weight.size(0), n = rows ? weight.numel() / rows : 0;
  const int64_t columns = n + bias.has_value();
  RLS_CHECK(product.numel() == rows * columns && product.is_contiguous(), "product must be [", rows,
            ", ", columns, "], got ", shape_of(product));
  WeightStep<T> args{};
  args.rows_per_group = rows;
  if (bias) {
    check_shape("bias", *bias, {rows});
    check_same_dtype("bias", *bias, "weight", weight);
    check_contiguous("bias", *bias);
  }
  if (grad_bias) {
    check_shape("grad_bias", *grad_bias, {rows});
    check_same_dtype("grad_bias", *grad_bias, "weight", weight);
    check_contiguous("grad_bias", *grad_bias);
    args.grad_bias = grad_bias->const_data_ptr();
  }
  if (bias_row) {
    RLS_CHECK(bias && grad_bias, "bias_row completes the product: bias and grad_bias expected");
    const int64_t groups = bias_row->dim() == 2 ? bias_row->size(0) : 1;
    RLS_CHECK(bias_row->dim() <= 2 && bias_row->size(-1) == columns && bias_row->stride(-1) == 1,
              "bias_row must be [", columns, "] or a batch of such, got ", shape_of(*bias_row));
    RLS_CHECK(rows % groups == 0, "bias_row has ", groups, " groups, which do not divide ", rows,
              " rows");
    check_same_dtype("bias_row", *bias_row, "product", product);
    args.bias_row = static_cast<const T*>(bias_row->const_data_ptr());
    args.bias_row_stride = groups > 1 ? bias_row->stride(0) : 0;
    args.rows_per_group = rows / groups;
  }
  if (h) {
    const int64_t groups = h->numel();
    RLS_CHECK(groups > 0 && rows % groups == 0, "h has ", groups, " groups, which do not divide ",
              rows, " rows");
    check_same_dtype("h", *h, "product", product);
    check_contiguous("h", *h);
    args.h = static_cast<const T*>(h->const_data_ptr());
    args.rows_per_group = rows / groups;
  }
  args.weight = weight.mutable_data_ptr();
  args.bias = bias ? bias->mutable_data_ptr() : nullptr;
  args.product = static_cast<T*>(product.mutable_data_ptr());
  args.layout = row_layout(weight);
  args.rows = rows;
  args.n = n;
  return args;
}

template <class T>
T* moment_pointer(const char* name, const Tensor& moment, int64_t numel, const Tensor& product) {
  RLS_CHECK(moment.numel() == numel, name, " must have ", numel, " elements, got ",
            shape_of(moment));
  check_same_dtype(name, moment, "product", product);
  check_contiguous(name, moment);
  return static_cast<T*>(moment.mutable_data_ptr());
}

template <class T>
void launch(const Tensor& weight, const WeightStep<T>& args) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return weight_step_cpu<T, float>(args);
    case ScalarType::BFloat16:
      return weight_step_cpu<T, BFloat16>(args);
    case ScalarType::Half:
      return weight_step_cpu<T, Half>(args);
    case ScalarType::Double:
      if constexpr (std::is_same_v<T, double>) return weight_step_cpu<double, double>(args);
      [[fallthrough]];
    default:
      RLS_CHECK(false, "weight must be float32, bfloat16 or float16, or float64 with a float64 P");
  }
}

// Calls f with a value of the compute type of `product`.
template <class F>
void dispatch_compute(const Tensor& product, const F& f) {
  if (product.scalar_type() == ScalarType::Float) return f(float{});
  RLS_CHECK(product.scalar_type() == ScalarType::Double, "product must be float32 or float64");
  f(double{});
}

}  // namespace

void weight_step_(Tensor weight, std::optional<Tensor> bias, Tensor product,
                  const std::optional<Tensor>& bias_row, const std::optional<Tensor>& grad_bias,
                  const std::optional<Tensor>& h, std::optional<Tensor> momentum_buffer, double lr,
                  double momentum, double weight_decay, bool divide_by_h) {
  dispatch_compute(product, [&](auto zero) {
    using T = decltype(zero);
    auto args = common_args<T>(weight, bias, product, bias_row, grad_bias, h);
    if (momentum_buffer)
      args.first_moment =
          moment_pointer<T>("momentum_buffer", *momentum_buffer, product.numel(), product);
    args.lr = lr;
    args.momentum = momentum;
    args.weight_decay = weight_decay;
    args.divide_by_h = divide_by_h;
    launch(weight, args);
  });
}

void adaptive_weight_step_(Tensor weight, std::optional<Tensor> bias, Tensor product,
                           const Tensor& grad, const std::optional<Tensor>& bias_row,
                           const std::optional<Tensor>& grad_bias, const std::optional<Tensor>& h,
                           Tensor first_moment, Tensor second_moment, double lr, double beta1,
                           double beta2, double weight_decay, double eps, int64_t step) {
  RLS_CHECK(step >= 1, "step must count from 1, got ", step);
  dispatch_compute(product, [&](auto zero) {
    using T = decltype(zero);
    auto args = common_args<T>(weight, bias, product, bias_row, grad_bias, h);
    RLS_CHECK(!bias || grad_bias, "grad_bias is expected where there is a bias");
    RLS_CHECK(grad.numel() == weight.numel(), "grad must have ", weight.numel(), " elements, got ",
              shape_of(grad));
    check_same_dtype("grad", grad, "product", product);
    check_contiguous("grad", grad);
    args.grad = static_cast<const T*>(grad.const_data_ptr());
    args.first_moment = moment_pointer<T>("first_moment", first_moment, product.numel(), product);
    args.second_moment = moment_pointer<T>("second_moment", second_moment, args.rows, product);
    args.lr = lr;
    args.momentum = beta1;
    args.beta2 = beta2;
    args.weight_decay = weight_decay;
    args.eps = eps;
    args.correction1 = 1 - std::pow(beta1, double(step));
    args.correction2 = 1 - std::pow(beta2, double(step));
    launch(weight, args);
  });
}

}  // namespace rlscuda
