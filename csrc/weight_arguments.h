// What the operators on weights have in common: the arguments of a layer, and their dtypes.
#pragma once

#include "arguments.h"
#include "half.h"
#include "kernels.h"

namespace rlscuda {

inline RowLayout row_layout(const Tensor& weight) {
  RowLayout layout{};
  layout.dense = weight.is_contiguous();
  const int64_t dim = weight.dim();
  for (int64_t d = 0; d < 3; ++d) {
    layout.size[d] = d + 1 < dim ? weight.size(d + 1) : 1;
    layout.stride[d] = d + 1 < dim ? weight.stride(d + 1) : 0;
  }
  layout.row_stride = weight.numel() ? weight.stride(0) : 0;
  return layout;
}

// One row of P or one h for each group; all that say so must agree on the groups.
template <class T>
void set_groups(WeightStep<T>& args, const char* name, int64_t groups) {
  RLS_CHECK(groups > 0 && args.rows % groups == 0, name, " has ", groups,
            " groups, which do not divide ", args.rows, " rows");
  RLS_CHECK(args.groups == 0 || args.groups == groups, name, " has ", groups, " groups, bias_row ",
            args.groups);
  args.groups = groups;
  args.rows_per_group = args.rows / groups;
}

// A tensor [rows] of the dtype of the weight.
inline void check_bias(const char* name, const Tensor& t, const Tensor& weight) {
  check_shape(name, t, {weight.size(0)});
  check_same_dtype(name, t, "weight", weight);
}

// What all of them share: shapes against one another, then the common arguments. A weight and a
// bias that do not move are read alone.
template <class T>
WeightStep<T> common_args(Arguments& arguments, const Tensor& weight, const Tensor* bias,
                          const Tensor& product, const Tensor* bias_row, const Tensor* grad_bias,
                          bool moves = true) {
  const auto place = [&](const char* name, const Tensor& t) {
    return moves ? arguments.write_strided(name, t)
                 : const_cast<void*>(arguments.read_strided(name, t));
  };
  RLS_CHECK(weight.dim() == 2 || weight.dim() == 4, "weight must be [c, n] or [c, C, kh, kw], got ",
            shape_of(weight));
  WeightStep<T> args{};
  args.rows = weight.size(0);
  args.n = args.rows ? weight.numel() / args.rows : 0;
  args.rows_per_group = args.rows;
  const int64_t columns = args.n + (bias != nullptr);
  RLS_CHECK(product.numel() == args.rows * columns, "product must be [", args.rows, ", ", columns,
            "], got ", shape_of(product));
  args.weight = place("weight", weight);
  args.layout = row_layout(weight);
  args.product = arguments.write<T>("product", product);
  if (bias) {
    check_bias("bias", *bias, weight);
    args.bias = place("bias", *bias);
    args.bias_stride = bias->stride(0);
  }
  if (grad_bias) {
    check_bias("grad_bias", *grad_bias, weight);
    args.grad_bias = arguments.read<void>("grad_bias", *grad_bias);
  }
  if (bias_row) {
    RLS_CHECK(bias && grad_bias, "bias_row completes the product: bias and grad_bias expected");
    const int64_t dim = bias_row->dim();
    RLS_CHECK((dim == 1 || dim == 2) && bias_row->size(-1) == columns, "bias_row must be [",
              columns, "] or a batch of such, got ", shape_of(*bias_row));
    check_same_dtype("bias_row", *bias_row, "product", product);
    const int64_t groups = dim == 2 ? bias_row->size(0) : 1;
    set_groups(args, "bias_row", groups);
    if (bias_row->stride(-1) == 1) {  // the rows of P where they lie
      args.bias_row = static_cast<const T*>(arguments.read_strided("bias_row", *bias_row));
      args.bias_row_stride = groups > 1 ? bias_row->stride(0) : 0;
    } else {
      args.bias_row = arguments.read<T>("bias_row", *bias_row);
      args.bias_row_stride = columns;
    }
  }
  return args;
}

// Calls f with a value of the dtype of the parameters, beside matrices of T.
template <class T, class F>
void dispatch_storage(const Tensor& weight, const F& f) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    case ScalarType::Double:
      if constexpr (std::is_same_v<T, double>) return f(double{});
      [[fallthrough]];
    default:
      RLS_CHECK(false, "weight must be float32, bfloat16 or float16, or float64 with a float64 P, ",
                "got ", dtype_of(weight));
  }
}

// Calls f with a value of the compute type of `product`.
template <class F>
void dispatch_compute(const Tensor& product, const F& f) {
  if (product.scalar_type() == ScalarType::Float) return f(float{});
  check_dtype("product", product, ScalarType::Double, "float32 or float64");
  f(double{});
}

}  // namespace rlscuda
