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

// The dtype of the biases' gradients, where there are any, is that of the parameters.
template <class T>
void launch(const Tensor& out, const Tensor* grad_bias, const Nesterov<T>& args) {
  if (!grad_bias) return run<T>(out, args);
  switch (grad_bias->scalar_type()) {
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
                "float64 average, got ", dtype_of(*grad_bias));
  }
}

// Calls f with a value of the dtype of the averages.
template <class F>
auto dispatch_average(const Tensor& average, const F& f) {
  if (average.scalar_type() == ScalarType::Float) return f(float{});
  check_dtype("average", average, ScalarType::Double, "float32 or float64");
  return f(double{});
}

// The lists of a call: entry i of each is for layer i.
struct Lists {
  const std::vector<Tensor>&grad, &grad_bias, &average;
  const std::vector<int64_t>&place, &groups, &rows;
};

// The layers of a call, and where what it makes of them lies.
template <class T>
struct Layers {
  std::vector<NesterovLayer<T>> found;
  std::vector<int64_t> starts;  // of each layer in `out`
  int64_t elements = 0, all_rows = 0, matrices = 0;
  const Tensor* grad_bias = nullptr;  // the first there is

  void add(const Lists& lists, size_t i, const Tensor& h, const T* scales, Arguments& arguments) {
    const Tensor &average = lists.average[i], &grad = lists.grad[i], &bias = lists.grad_bias[i];
    const int64_t groups = lists.groups[i], place = lists.place[i];
    RLS_CHECK(average.dim() == 2 && grad.dim() == 2, "average must be [c, n] and grad [c, n] or ",
              "[c, n - 1], got ", shape_of(average), " and ", shape_of(grad));
    const int64_t c = average.size(0), n = average.size(1), columns = grad.size(1);
    RLS_CHECK(n > 0, "average must have columns, got ", shape_of(average));
    RLS_CHECK(groups > 0 && c % groups == 0, "groups must divide ", c, " rows, got ", groups);
    RLS_CHECK(columns == n || columns + 1 == n, "grad must have ", n, " columns, or one less with ",
              "a grad_bias, got ", columns);
    check_shape("every grad", grad, {c, columns});
    check_same_dtype("every average", average, "the first", lists.average[0]);
    check_same_dtype("every grad", grad, "average", average);
    NesterovLayer<T> layer{};
    layer.groups = groups, layer.rows = c / groups, layer.columns = columns, layer.n = n;
    layer.padded = lists.rows[i], layer.first_row = all_rows, layer.first_matrix = matrices;
    const int64_t least = std::max<int64_t>(1, layer.rows);
    RLS_CHECK(layer.padded >= least, "rows must be at least ", least, ", got ", layer.padded);
    layer.grad = arguments.read<T>("grad", grad);
    layer.average = arguments.write<T>("average", average);
    check_shape("every grad_bias", bias, {columns < n ? c : 0});
    if (columns < n) {
      if (!grad_bias) grad_bias = &bias;
      check_same_dtype("every grad_bias", bias, "the first", *grad_bias);
      layer.grad_bias = arguments.read<void>("grad_bias", bias);
    }
    RLS_CHECK(place >= 0 && place <= h.numel() - groups, "place must be in h, which has ",
              h.numel(), " elements, got ", place, " for ", groups, " groups");
    layer.h = scales + place;
    starts.push_back(elements);
    found.push_back(layer);
    int64_t size;
    RLS_CHECK(!__builtin_mul_overflow(groups, layer.padded, &size) &&
                  !__builtin_add_overflow(all_rows, size, &all_rows) &&
                  !__builtin_mul_overflow(size, n, &size) &&
                  !__builtin_add_overflow(elements, size, &elements),
              "rows must be fewer, got ", layer.padded);
    matrices += groups;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> foreach_nesterov_(std::vector<Tensor> grad,
                                                     std::vector<Tensor> grad_bias,
                                                     std::vector<Tensor> average, const Tensor& h,
                                                     std::vector<int64_t> place,
                                                     std::vector<int64_t> groups,
                                                     std::vector<int64_t> rows, double momentum) {
  const size_t count = average.size();
  RLS_CHECK(count > 0, "average must hold at least one layer");
  for (auto* list : {&grad, &grad_bias}) check_list_size("grad and grad_bias", *list, count);
  for (auto* list : {&place, &groups, &rows})
    RLS_CHECK(list->size() == count, "place, groups and rows must have ", count, " entries, got ",
              list->size());
  RLS_CHECK(momentum >= 0 && momentum < 1, "momentum must be in [0, 1), got ", momentum);
  return dispatch_average(average[0], [&](auto zero) {
    using T = decltype(zero);
    Arguments arguments("the first average", average[0]);
    check_same_dtype("h", h, "average[0]", average[0]);
    const T* scales = arguments.read<T>("h", h);
    Layers<T> layers;
    const Lists lists{grad, grad_bias, average, place, groups, rows};
    for (size_t i = 0; i < count; ++i) layers.add(lists, i, h, scales, arguments);
    arguments.check_apart();
    const auto made = [&](int64_t size) {
      return new_tensor(average[0], {size}, average[0].scalar_type());
    };
    Tensor out = made(layers.elements), workspace = made(2 * layers.all_rows);
    Tensor peak = made(layers.matrices), length = made(layers.matrices);
    T* data = static_cast<T*>(out.mutable_data_ptr());
    for (size_t i = 0; i < count; ++i) layers.found[i].out = data + layers.starts[i];
    Nesterov<T> args{};
    args.layers = layers.found.data(), args.count = int64_t(count);
    args.momentum = momentum;
    args.peak = static_cast<T*>(peak.mutable_data_ptr());
    args.length = static_cast<T*>(length.mutable_data_ptr());
    args.row_peak = static_cast<T*>(workspace.mutable_data_ptr());
    args.row_squares = args.row_peak + layers.all_rows;
    launch(out, layers.grad_bias, args);
    return std::make_tuple(out, peak, length);
  });
}

}  // namespace rlscuda
