// rls_update_ and foreach_rls_update_: checks, dtype dispatch, launch.
#include "checks.h"
#include "cuda_call.h"
#include "kernels.h"
#include "ops.h"
#include "rls_checks.h"

namespace rlscuda {
namespace {

// Runs the updates on the device of P.
template <class T>
void launch(const Tensor& P, const std::vector<RlsUpdate<T>>& layers) {
  const auto count = int64_t(layers.size());
  run_on(
      P, [&] { rls_update_cpu(layers.data(), count); },
      [&](auto stream) {
        for (const auto& layer : layers)
          RLS_CHECK(!layer.projection && !layer.projected,
                    "projection and projected are expected only on the CPU");
        Tensor workspace =
            new_tensor(P, {rls_update_workspace_cuda(layers.data(), count)}, ScalarType::Byte);
        rls_update_cuda(layers.data(), count, workspace.mutable_data_ptr(), stream);
      });
}

}  // namespace

std::tuple<Tensor, Tensor> rls_update_(Tensor P, const Tensor& S, double forgetting, double gain,
                                       double decay, double diffusion, double initial_scale,
                                       const std::optional<Tensor>& power,
                                       const std::optional<Tensor>& health,
                                       const std::optional<Tensor>& found_inf) {
  return dispatch_matrix(P, [&](auto zero) {
    using T = decltype(zero);
    auto args = layer_update<T>(P, S, power ? &*power : nullptr, health ? &*health : nullptr);
    RLS_CHECK(args.rank >= 1, "s must have at least one row, got ", shape_of(S));
    args.rule = {forgetting, gain, decay, diffusion, 0, initial_scale, false};
    check_rule(args.rule);
    args.found_inf = found_inf_pointer(found_inf, P);
    Tensor U = new_tensor(S, S.sizes(), S.scalar_type());
    Tensor h = P.dim() == 3 ? new_tensor(P, {args.batch}, P.scalar_type())
                            : new_tensor(P, {}, P.scalar_type());
    args.U = static_cast<T*>(U.mutable_data_ptr());
    args.h = static_cast<T*>(h.mutable_data_ptr());
    launch<T>(P, {args});
    return std::tuple(U, h);
  });
}

Tensor foreach_rls_update_(std::vector<Tensor> P, std::vector<Tensor> S, std::vector<Tensor> power,
                           std::vector<Tensor> health, const std::optional<Tensor>& found_inf,
                           std::vector<Tensor> projection, std::vector<Tensor> projected,
                           std::vector<Tensor> projected_x, double forgetting, double gain,
                           double decay, double diffusion, double drift, double initial_scale,
                           bool averaging) {
  const size_t count = P.size();
  RLS_CHECK(count > 0, "P must hold at least one layer");
  check_list_size("s", S, count);
  check_list_size("power", power, count, true);
  check_list_size("health", health, count);
  for (auto* list : {&projection, &projected, &projected_x})
    check_list_size("projection, projected and projected_x", *list, count, true);
  return dispatch_matrix(P[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<RlsUpdate<T>> layers;
    int64_t matrices = 0;
    for (size_t i = 0; i < count; ++i) {
      check_same_dtype("every P", P[i], "the first", P[0]);
      check_same_device("every P", P[i], "the first", P[0]);
      auto args = layer_update<T>(P[i], S[i], power.empty() ? nullptr : &power[i], &health[i]);
      args.rule = {forgetting, gain, decay, diffusion, drift, initial_scale, averaging};
      args.found_inf = found_inf_pointer(found_inf, P[0]);
      matrices += args.batch;
      if (!projection.empty() && projection[i].numel() > 0) {
        check_shape("projection", projection[i], {args.rank, args.n});
        args.projection = pointer_like<const T>("projection", projection[i], P[i]);
      }
      if (!projected.empty() && projected[i].numel() > 0) {
        RLS_CHECK(P[i].dim() == 2, "projected is for one matrix P [n, n], got ", shape_of(P[i]));
        args.projected_rows = projected[i].size(0);
        args.projected_columns = projected_x[i].size(-1);
        check_shape("projected", projected[i], {args.projected_rows, args.n});
        RLS_CHECK(args.projected_columns <= args.n, "projected_x must have at most ", args.n,
                  " columns, got ", shape_of(projected_x[i]));
        check_shape("projected_x", projected_x[i], {args.projected_rows, args.projected_columns});
        args.projected = pointer_like<T>("projected", projected[i], P[i]);
        args.projected_x = pointer_like<const T>("projected_x", projected_x[i], P[i]);
      }
      layers.push_back(args);
    }
    check_rule(layers[0].rule);
    Tensor h = new_tensor(P[0], {matrices}, P[0].scalar_type());
    T* next = static_cast<T*>(h.mutable_data_ptr());
    for (auto& layer : layers) {
      layer.h = next;
      next += layer.batch;
    }
    launch(P[0], layers);
    return h;
  });
}

}  // namespace rlscuda
