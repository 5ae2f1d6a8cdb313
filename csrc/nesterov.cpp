// foreach_nesterov_: checks, dtype dispatch, launch.
#include "nesterov.h"

#include "arguments.h"
#include "cuda_call.h"
#include "half.h"
#include "ops.h"

namespace rlscuda {
namespace {

template <class W, class T>
void run(const Tensor& out, const Nesterov<T>& args) {
  run_on(
      out, [&] { nesterov_cpu<T, W>(args); },
      [&](auto stream) { nesterov_cuda<T, W>(args, stream); });
}

// The dtype of the biases' gradients is that of the parameters.
template <class T>
void launch(const Tensor& out, const Tensor& grad_bias, const Nesterov<T>& args) {
  if (!args.layers[0].grad_bias) return run<T>(out, args);
  switch (grad_bias.scalar_type()) {
    case ScalarType::Float:
      return run<float>(out, args);
    case ScalarType::BFloat16:
      return run<BFloat16>(out, args);
    case ScalarType::Half:
      return run<Half>(out, args);
    case ScalarType::Double:
      if constexpr (std::is_same_v<T, double>) return run<double>(out, args);
      [[fallthrough]];
    default:
      RLS_CHECK(false, "grad_bias must be float32, bfloat16 or float16, or float64 beside a ",
                "float64 average, got ", dtype_of(grad_bias));
  }
}

// Calls f with a value of the dtype of the averages.
template <class F>
auto dispatch_average(const Tensor& average, const F& f) {
  if (average.scalar_type() == ScalarType::Float) return f(float{});
  check_dtype("average", average, ScalarType::Double, "float32 or float64");
  return f(double{});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> foreach_nesterov_(std::vector<Tensor> grad,
                                                     std::vector<Tensor> grad_bias,
                                                     std::vector<Tensor> average, const Tensor& h,
                                                     std::vector<int64_t> place, int64_t groups,
                                                     int64_t rows, double momentum) {
  const size_t count = average.size();
  RLS_CHECK(count > 0, "average must hold at least one layer");
  for (auto* list : {&grad, &grad_bias}) check_list_size("grad and grad_bias", *list, count);
  RLS_CHECK(place.size() == count, "place must have ", count, " entries, got ", place.size());
  RLS_CHECK(momentum >= 0 && momentum < 1, "momentum must be in [0, 1), got ", momentum);
  return dispatch_average(average[0], [&](auto zero) {
    using T = decltype(zero);
    Arguments arguments("the first average", average[0]);
    RLS_CHECK(average[0].dim() == 2 && grad[0].dim() == 2, "average must be [c, n] and grad [c, n]",
              " or [c, n - 1], got ", shape_of(average[0]), " and ", shape_of(grad[0]));
    const int64_t all = average[0].size(0), n = average[0].size(1), columns = grad[0].size(1);
    RLS_CHECK(groups > 0 && all % groups == 0, "groups must divide ", all, " rows, got ", groups);
    RLS_CHECK(columns == n || columns + 1 == n, "grad must have ", n, " columns, or one less with ",
              "a grad_bias, got ", columns);
    Nesterov<T> args{};
    args.rows = all / groups, args.columns = columns, args.n = n, args.groups = groups;
    args.padded = rows, args.momentum = momentum;
    const int64_t least = std::max<int64_t>(1, args.rows);
    RLS_CHECK(rows >= least, "rows must be at least ", least, ", got ", rows);
    check_same_dtype("h", h, "average[0]", average[0]);
    const T* scales = arguments.read<T>("h", h);
    std::vector<NesterovLayer<T>> layers;
    for (size_t i = 0; i < count; ++i) {
      check_shape("every average", average[i], {all, n});
      check_shape("every grad", grad[i], {all, columns});
      check_same_dtype("every average", average[i], "the first", average[0]);
      check_same_dtype("every grad", grad[i], "average", average[0]);
      NesterovLayer<T> layer{};
      layer.grad = arguments.read<T>("grad", grad[i]);
      layer.average = arguments.write<T>("average", average[i]);
      check_same_dtype("every grad_bias", grad_bias[i], "the first", grad_bias[0]);
      if (columns < n) {
        check_shape("every grad_bias", grad_bias[i], {all});
        layer.grad_bias = arguments.read<void>("grad_bias", grad_bias[i]);
      } else {
        check_shape("every grad_bias", grad_bias[i], {0});
      }
      RLS_CHECK(place[i] >= 0 && place[i] <= h.numel() - groups, "place must be in h, which has ",
                h.numel(), " elements, got ", place[i], " for ", groups, " groups");
      layer.h = scales + place[i];
      layers.push_back(layer);
    }
    arguments.check_apart();
    int64_t matrices;
    RLS_CHECK(!__builtin_mul_overflow(int64_t(count), groups, &matrices),
              "average must hold fewer matrices");
    Tensor out = new_tensor(average[0], {matrices, rows, n}, average[0].scalar_type());
    Tensor peak = new_tensor(average[0], {matrices}, average[0].scalar_type());
    Tensor length = new_tensor(average[0], {matrices}, average[0].scalar_type());
    Tensor workspace = new_tensor(average[0], {2, matrices, rows}, average[0].scalar_type());
    args.layers = layers.data(), args.count = int64_t(count);
    args.out = static_cast<T*>(out.mutable_data_ptr());
    args.peak = static_cast<T*>(peak.mutable_data_ptr());
    args.length = static_cast<T*>(length.mutable_data_ptr());
    args.row_peak = static_cast<T*>(workspace.mutable_data_ptr());
    args.row_squares = args.row_peak + matrices * rows;
    launch(out, grad_bias[0], args);
    return std::make_tuple(out, peak, length);
  });
}

}  // namespace rlscuda
