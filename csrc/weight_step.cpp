// weight_step_, adaptive_weight_step_ and foreach_weight_step_: checks, dtype dispatch, launch.
#include "checks.h"
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
  layout.row_stride = weight.stride(0);
  return layout;
}

template <class T>
void set_groups(WeightStep<T>& args, const char* name, int64_t rows, int64_t groups) {
  RLS_CHECK(groups > 0 && rows % groups == 0, name, " has ", groups,
            " groups, which do not divide ", rows, " rows");
  args.rows_per_group = rows / groups;
}

const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

// What both forms share: shapes against one another, then the common arguments. `h` is [groups].
template <class T>
WeightStep<T> common_args(const Tensor& weight, const Tensor* bias, const Tensor& product,
                          const Tensor* bias_row, const Tensor* grad_bias) {
  RLS_CHECK(weight.dim() == 2 || weight.dim() == 4, "weight must be [c, n] or [c, C, kh, kw], got ",
            shape_of(weight));
  const int64_t rows = weight.size(0), n = rows ? weight.numel() / rows : 0;
  const int64_t columns = n + (bias != nullptr);
  RLS_CHECK(product.numel() == rows * columns && product.is_contiguous(), "product must be [", rows,
            ", ", columns, "], got ", shape_of(product));
  WeightStep<T> args{};
  args.rows_per_group = rows;
  check_same_device("product", product, "weight", weight);
  if (bias) {
    check_same_device("bias", *bias, "weight", weight);
    check_shape("bias", *bias, {rows});
    check_same_dtype("bias", *bias, "weight", weight);
    check_contiguous("bias", *bias);
  }
  if (grad_bias) {
    check_same_device("grad_bias", *grad_bias, "weight", weight);
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
    check_same_device("bias_row", *bias_row, "weight", weight);
    check_same_dtype("bias_row", *bias_row, "product", product);
    args.bias_row = static_cast<const T*>(bias_row->const_data_ptr());
    args.bias_row_stride = groups > 1 ? bias_row->stride(0) : 0;
    set_groups(args, "bias_row", rows, groups);
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
const T* h_pointer(const Tensor& h, const Tensor& product) {
  check_same_device("h", h, "product", product);
  check_same_dtype("h", h, "product", product);
  check_contiguous("h", h);
  return static_cast<const T*>(h.const_data_ptr());
}

template <class T>
void set_h(WeightStep<T>& args, const std::optional<Tensor>& h, const Tensor& product) {
  if (!h) return;
  args.h = h_pointer<T>(*h, product);
  set_groups(args, "h", args.rows, h->numel());
}

template <class T>
T* moment_pointer(const char* name, const Tensor& moment, int64_t numel, const Tensor& product) {
  RLS_CHECK(moment.numel() == numel, name, " must have ", numel, " elements, got ",
            shape_of(moment));
  check_same_device(name, moment, "product", product);
  check_same_dtype(name, moment, "product", product);
  check_contiguous(name, moment);
  return static_cast<T*>(moment.mutable_data_ptr());
}

template <class T>
const T* grad_pointer(const Tensor& grad, const Tensor& weight, const Tensor& product) {
  RLS_CHECK(grad.numel() == weight.numel(), "grad must have ", weight.numel(), " elements, got ",
            shape_of(grad));
  check_same_device("grad", grad, "product", product);
  check_same_dtype("grad", grad, "product", product);
  check_contiguous("grad", grad);
  return static_cast<const T*>(grad.const_data_ptr());
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
    auto args =
        common_args<T>(weight, pointer(bias), product, pointer(bias_row), pointer(grad_bias));
    set_h(args, h, product);
    if (momentum_buffer)
      args.first_moment =
          moment_pointer<T>("momentum_buffer", *momentum_buffer, product.numel(), product);
    args.lr = lr;
    args.momentum = momentum;
    args.weight_decay = weight_decay;
    args.divide_by_h = divide_by_h;
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
    auto args =
        common_args<T>(weight, pointer(bias), product, pointer(bias_row), pointer(grad_bias));
    RLS_CHECK(!bias || grad_bias, "grad_bias is expected where there is a bias");
    set_h(args, h, product);
    args.grad = grad_pointer<T>(grad, weight, product);
    args.first_moment = moment_pointer<T>("first_moment", first_moment, product.numel(), product);
    args.second_moment = moment_pointer<T>("second_moment", second_moment, args.rows, product);
    args.lr = lr;
    args.momentum = beta1;
    args.beta2 = beta2;
    args.weight_decay = weight_decay;
    args.eps = eps;
    args.step = double(step);
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
  RLS_CHECK(groups.size() == count, "groups must have ", count, " entries, got ", groups.size());
  if (rate) {
    RLS_CHECK(rate->numel() == 1 && rate->scalar_type() == ScalarType::Float,
              "rate must be one float32, got ", shape_of(*rate));
    check_same_device("rate", *rate, "the first product", product[0]);
  }
  dispatch_compute(product[0], [&](auto zero) {
    using T = decltype(zero);
    const auto given = [](const Tensor& t) { return t.numel() > 0 ? &t : nullptr; };
    std::vector<WeightStep<T>> layers;
    const T* next_h = h_pointer<T>(h, product[0]);
    int64_t h_left = h.numel();
    for (size_t i = 0; i < count; ++i) {
      check_same_dtype("every weight", weight[i], "the first", weight[0]);
      check_same_device("every weight", weight[i], "the first", weight[0]);
      check_same_dtype("every product", product[i], "the first", product[0]);
      auto args = common_args<T>(weight[i], given(bias[i]), product[i], given(bias_row[i]),
                                 given(grad_bias[i]));
      set_groups(args, "h", args.rows, groups[i]);
      args.h = next_h;
      next_h += groups[i];
      h_left -= groups[i];
      RLS_CHECK(h_left >= 0, "h must have as many elements as the layers have groups");
      if (!first_moment.empty())
        args.first_moment =
            moment_pointer<T>("first_moment", first_moment[i], product[i].numel(), product[i]);
      if (!second_moment.empty()) {
        RLS_CHECK(!grad.empty() && args.first_moment && !args.bias == !args.grad_bias,
                  "the adaptive form needs grad, first_moment, and grad_bias with a bias");
        args.second_moment =
            moment_pointer<T>("second_moment", second_moment[i], args.rows, product[i]);
        args.grad = grad_pointer<T>(grad[i], weight[i], product[i]);
      }
      check_shape("health", health[i], {kHealthSlots});
      RLS_CHECK(health[i].scalar_type() == ScalarType::Double, "health must be float64");
      check_same_device("health", health[i], "weight", weight[i]);
      args.health = static_cast<const double*>(health[i].const_data_ptr());
      args.rate = rate ? static_cast<const float*>(rate->const_data_ptr()) : nullptr;
      args.lr = lr;
      args.momentum = momentum;
      args.beta2 = beta2;
      args.weight_decay = weight_decay;
      args.eps = eps;
      args.gain = gain;
      args.divide_by_h = divide_by_h;
      layers.push_back(args);
    }
    launch(weight[0], layers.data(), int64_t(count));
  });
}

}  // namespace rlscuda
