// foreach_complete_products_: checks, dtype dispatch, launch.
#include "cuda_call.h"
#include "ops.h"
#include "weight_arguments.h"

namespace rlscuda {

Tensor foreach_complete_products_(std::vector<Tensor> product, std::vector<Tensor> weight,
                                  std::vector<Tensor> bias, std::vector<Tensor> bias_row,
                                  std::vector<Tensor> grad_bias, std::vector<int64_t> groups) {
  const size_t count = product.size();
  RLS_CHECK(count > 0, "product must hold at least one layer");
  for (auto* list : {&weight, &bias, &bias_row, &grad_bias})
    check_list_size("every list", *list, count);
  RLS_CHECK(groups.size() == count, "groups must have ", count, " entries, got ", groups.size());
  std::optional<Tensor> norms;
  dispatch_compute(product[0], [&](auto zero) {
    using T = decltype(zero);
    const auto given = [](const Tensor& t) { return t.numel() > 0 ? &t : nullptr; };
    Arguments arguments("the first product", product[0]);
    std::vector<WeightStep<T>> layers;
    int64_t matrices = 0, rows = 0;
    for (size_t i = 0; i < count; ++i) {
      check_same_dtype("every weight", weight[i], "the first", weight[0]);
      check_same_dtype("every product", product[i], "the first", product[0]);
      auto args = common_args<T>(arguments, weight[i], given(bias[i]), product[i],
                                 given(bias_row[i]), given(grad_bias[i]), false);
      set_groups(args, "the layer", groups[i]);
      matrices += args.groups;
      rows += args.rows;
      layers.push_back(args);
    }
    arguments.check_apart();
    norms = new_tensor(product[0], {2, matrices}, product[0].scalar_type());
    Tensor squares = new_tensor(product[0], {2, rows}, product[0].scalar_type());
    T* to = static_cast<T*>(norms->mutable_data_ptr());
    T* room = static_cast<T*>(squares.mutable_data_ptr());
    dispatch_storage<T>(weight[0], [&](auto zero) {
      using W = decltype(zero);
      run_on(
          product[0], [&] { complete_products_cpu<T, W>(layers.data(), int64_t(count), to, room); },
          [&](auto stream) {
            complete_products_cuda<T, W>(layers.data(), int64_t(count), to, room, stream);
          });
    });
  });
  return *norms;
}

}  // namespace rlscuda
