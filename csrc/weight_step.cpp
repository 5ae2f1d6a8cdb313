// weight_step_, adaptive_weight_step_ and foreach_weight_step_: checks, dtype dispatch, launch.
#include "cuda_call.h"
#include "ops.h"
#include "weight_arguments.h"

namespace rlscuda {
namespace {

const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

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

template <class T>
void launch(const Tensor& weight, const WeightStep<T>* layers, int64_t count) {
  dispatch_storage<T>(weight, [&](auto zero) {
    using W = decltype(zero);
    run_on(
        weight, [&] { weight_step_cpu<T, W>(layers, count); },
        [&](auto stream) { weight_step_cuda<T, W>(layers, count, stream); });
  });
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
                          std::vector<Tensor> health, const std::optional<Tensor>& rate,
                          const std::optional<Tensor>& norms, double lr, double momentum,
                          double beta2, double weight_decay, double eps, double gain, double trust,
                          bool divide_by_h) {
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
    const int64_t matrices = h.numel();
    int64_t h_left = matrices;
    const T* next_norm = nullptr;
    if (norms) {
      RLS_CHECK(second_moment.empty(), "the adaptive form takes no norms");
      RLS_CHECK(trust > 0, "trust must be > 0, got ", trust);
      check_shape("norms", *norms, {2, matrices});
      check_same_dtype("norms", *norms, "product", product[0]);
      next_norm = arguments.read<T>("norms", *norms);
    }
    for (size_t i = 0; i < count; ++i) {
      check_same_dtype("every weight", weight[i], "the first", weight[0]);
      check_same_dtype("every product", product[i], "the first", product[0]);
      auto args = common_args<T>(arguments, weight[i], given(bias[i]), product[i],
                                 given(bias_row[i]), given(grad_bias[i]));
      set_groups(args, "h", groups[i]);
      RLS_CHECK(groups[i] <= h_left, "h must have as many elements as the layers have groups");
      args.h = next_h;
      next_h += groups[i];
      if (norms) {
        args.norms = next_norm;
        next_norm += groups[i];
      }
      args.matrices = matrices;
      args.trust = trust;
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
