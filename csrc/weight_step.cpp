// weight_step_, adaptive_weight_step_ and foreach_weight_step_: checks, dtype dispatch, launch.
#include "arguments.h"
#include "cuda_call.h"
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

const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// A tensor [rows] of the dtype of the weight.
void check_bias(const char* name, const Tensor& t, const Tensor& weight) {
  check_shape(name, t, {weight.size(0)});
  check_same_dtype(name, t, "weight", weight);
}

// What both forms share: shapes against one another, then the common arguments.
template <class T>
WeightStep<T> common_args(Arguments& arguments, const Tensor& weight, const Tensor* bias,
                          const Tensor& product, const Tensor* bias_row, const Tensor* grad_bias) {
  RLS_CHECK(weight.dim() == 2 || weight.dim() == 4, "weight must be [c, n] or [c, C, kh, kw], got ",
            shape_of(weight));
  WeightStep<T> args{};
  args.rows = weight.size(0);
  args.n = args.rows ? weight.numel() / args.rows : 0;
  args.rows_per_group = args.rows;
  const int64_t columns = args.n + (bias != nullptr);
  RLS_CHECK(product.numel() == args.rows * columns, "product must be [", args.rows, ", ", columns,
            "], got ", shape_of(product));
  args.weight = arguments.write_strided("weight", weight);
  args.layout = row_layout(weight);
  args.product = arguments.write<T>("product", product);
  if (bias) {
    check_bias("bias", *bias, weight);
    args.bias = arguments.write_strided("bias", *bias);
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

template <class T>
const T* h_pointer(Arguments& arguments, const Tensor& h, const Tensor& product) {
  check_same_dtype("h", h, "product", product);
  return arguments.read<T>("h", h);
}

template <class T>
void set_h(Arguments& arguments, WeightStep<T>& args, const std::optional<Tensor>& h,
           const Tensor& product) {
  if (!h) return;
  args.h = h_pointer<T>(arguments, *h, product);
  set_groups(args, "h", h->numel());
}

template <class T>
T* moment_pointer(Arguments& arguments, const char* name, const Tensor& moment, int64_t numel,
                  const Tensor& product) {
  RLS_CHECK(moment.numel() == numel, name, " must have ", numel, " elements, got ",
            shape_of(moment));
  check_same_dtype(name, moment, "product", product);
  return arguments.write<T>(name, moment);
}

template <class T>
const T* grad_pointer(Arguments& arguments, const Tensor& grad, const Tensor& weight,
                      const Tensor& product) {
  RLS_CHECK(grad.numel() == weight.numel(), "grad must have ", weight.numel(), " elements, got ",
            shape_of(grad));
  check_same_dtype("grad", grad, "product", product);
  return arguments.read<T>("grad", grad);
}

// The numbers of a step; a decay of 1 would divide by the correction 1 - 1.
template <class T>
void check_numbers(const WeightStep<T>& args) {
  check_number<T>("lr", args.lr);
  check_number<T>("weight_decay", args.weight_decay);
  check_number<T>("1 - lr weight_decay", 1 - args.lr * args.weight_decay);
  if (args.second_moment) {
    RLS_CHECK(args.momentum >= 0 && args.momentum < 1, "beta1 must be in [0, 1), got ",
              args.momentum);
    RLS_CHECK(args.beta2 >= 0 && args.beta2 < 1, "beta2 must be in [0, 1), got ", args.beta2);
    RLS_CHECK(args.eps >= 0, "eps must be >= 0, got ", args.eps);
    check_number<T>("eps", args.eps);
  } else {
    check_number<T>("momentum", args.momentum);
    RLS_CHECK(args.momentum == 0 || args.first_moment || !args.product,
              "momentum needs a momentum_buffer");
  }
}

template <class W, class T>
void run(const Tensor& weight, const WeightStep<T>* layers, int64_t count) {
  run_on(
      weight, [&] { weight_step_cpu<T, W>(layers, count); },
      [&](auto stream) { weight_step_cuda<T, W>(layers, count, stream); });
}

template <class T>
void launch(const Tensor& weight, const WeightStep<T>* layers, int64_t count) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return run<float>(weight, layers, count);
    case ScalarType::BFloat16:
      return run<BFloat16>(weight, layers, count);
    case ScalarType::Half:
      return run<Half>(weight, layers, count);
    case ScalarType::Double:
      if constexpr (std::is_same_v<T, double>) return run<double>(weight, layers, count);
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

}  // namespace

void weight_step_(Tensor weight, std::optional<Tensor> bias, Tensor product,
                  const std::optional<Tensor>& bias_row, const std::optional<Tensor>& grad_bias,
                  const std::optional<Tensor>& h, std::optional<Tensor> momentum_buffer, double lr,
                  double momentum, double weight_decay, bool divide_by_h) {
  dispatch_compute(product, [&](auto zero) {
    using T = decltype(zero);
    Arguments arguments("weight", weight);
    auto args = common_args<T>(arguments, weight, pointer(bias), product, pointer(bias_row),
                               pointer(grad_bias));
    set_h(arguments, args, h, product);
    if (momentum_buffer)
      args.first_moment = moment_pointer<T>(arguments, "momentum_buffer", *momentum_buffer,
                                            product.numel(), product);
    args.lr = lr;
    args.momentum = momentum;
    args.weight_decay = weight_decay;
    args.divide_by_h = divide_by_h;
    check_numbers(args);
    arguments.check_apart();
    launch(weight, &args, 1);
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
    Arguments arguments("weight", weight);
    auto args = common_args<T>(arguments, weight, pointer(bias), product, pointer(bias_row),
                               pointer(grad_bias));
    RLS_CHECK(!bias || grad_bias, "grad_bias is expected where there is a bias");
    set_h(arguments, args, h, product);
    args.grad = grad_pointer<T>(arguments, grad, weight, product);
    args.first_moment =
        moment_pointer<T>(arguments, "first_moment", first_moment, product.numel(), product);
    args.second_moment =
        moment_pointer<T>(arguments, "second_moment", second_moment, args.rows, product);
    args.lr = lr;
    args.momentum = beta1;
    args.beta2 = beta2;
    args.weight_decay = weight_decay;
    args.eps = eps;
    args.step = double(step);
    check_numbers(args);
    arguments.check_apart();
    launch(weight, &args, 1);
  });
}

void foreach_weight_step_(std::vector<Tensor> weight, std::vector<Tensor> bias,
                          std::vector<Tensor> product, std::vector<Tensor> grad,
                          std::vector<Tensor> bias_row, std::vector<Tensor> grad_bias,
                          const Tensor& h, std::vector<int64_t> groups,
                          std::vector<Tensor> first_moment, std::vector<Tensor> second_moment,
                          std::vector<Tensor> health, const std::optional<Tensor>& rate, double lr,
                          double momentum, double beta2, double weight_decay, double eps,
                          double gain, bool divide_by_h) {
  const size_t count = weight.size();
  RLS_CHECK(count > 0, "weight must hold at least one layer");
  for (auto* list : {&bias, &product, &bias_row, &grad_bias, &health})
    check_list_size("every list", *list, count);
  for (auto* list : {&grad, &first_moment, &second_moment})
    check_list_size("grad, first_moment and second_moment", *list, count, true);
  RLS_CHECK(second_moment.empty() || (!grad.empty() && !first_moment.empty()),
            "the adaptive form needs grad and first_moment beside second_moment");
  RLS_CHECK(groups.size() == count, "groups must have ", count, " entries, got ", groups.size());
  RLS_CHECK(!rate || (rate->numel() == 1 && rate->scalar_type() == ScalarType::Float),
            "rate must be one float32, got ", shape_of(*rate));
  dispatch_compute(product[0], [&](auto zero) {
    using T = decltype(zero);
    const auto given = [](const Tensor& t) { return t.numel() > 0 ? &t : nullptr; };
    Arguments arguments("the first weight", weight[0]);
    std::vector<WeightStep<T>> layers;
    const T* next_h = h_pointer<T>(arguments, h, product[0]);
    const float* factor = rate ? arguments.read<float>("rate", *rate) : nullptr;
    int64_t h_left = h.numel();
    for (size_t i = 0; i < count; ++i) {
      check_same_dtype("every weight", weight[i], "the first", weight[0]);
      check_same_dtype("every product", product[i], "the first", product[0]);
      auto args = common_args<T>(arguments, weight[i], given(bias[i]), product[i],
                                 given(bias_row[i]), given(grad_bias[i]));
      set_groups(args, "h", groups[i]);
      RLS_CHECK(groups[i] <= h_left, "h must have as many elements as the layers have groups");
      args.h = next_h;
      next_h += groups[i];
      h_left -= groups[i];
      if (!first_moment.empty())
        args.first_moment = moment_pointer<T>(arguments, "first_moment", first_moment[i],
                                              product[i].numel(), product[i]);
      if (!second_moment.empty()) {
        RLS_CHECK(!args.bias == !args.grad_bias,
                  "the adaptive form needs grad_bias with a bias, and only there");
        args.second_moment =
            moment_pointer<T>(arguments, "second_moment", second_moment[i], args.rows, product[i]);
        args.grad = grad_pointer<T>(arguments, grad[i], weight[i], product[i]);
      }
      check_shape("health", health[i], {kHealthSlots});
      check_dtype("health", health[i], ScalarType::Double, "float64");
      args.health = arguments.read<double>("health", health[i]);
      args.rate = factor;
      args.lr = lr;
      args.momentum = momentum;
      args.beta2 = beta2;
      args.weight_decay = weight_decay;
      args.eps = eps;
      args.gain = gain;
      args.divide_by_h = divide_by_h;
      check_numbers(args);
      layers.push_back(args);
    }
    RLS_CHECK(h_left == 0, "h must have as many elements as the layers have groups");
    RLS_CHECK(gain >= 0 && gain < INFINITY, "gain must be >= 0, got ", gain);
    arguments.check_apart();
    launch(weight[0], layers.data(), int64_t(count));
  });
}

}  // namespace rlscuda
