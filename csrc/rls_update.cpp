// rls_update_ and foreach_rls_update_: checks, dtype dispatch, launch.
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

template <class R>
void launch(const Tensor& P, const std::vector<RlsUpdate<std::complex<R>>>& layers) {
  run_on(
      P, [&] { rls_update_cpu(layers[0]); },
      [&](auto) {
        RLS_CHECK(false, "P must be float32 or float64 on a GPU, got ", dtype_of(P),
                  ", which is updated on the CPU alone");
      });
}

// Calls f with a value of the dtype of P, which may be complex.
template <class F>
auto dispatch_field(const Tensor& P, const F& f) {
  if (P.scalar_type() == ScalarType::ComplexFloat) return f(std::complex<float>{});
  if (P.scalar_type() == ScalarType::ComplexDouble) return f(std::complex<double>{});
  if (P.scalar_type() == ScalarType::Float) return f(float{});
  check_dtype("P", P, ScalarType::Double, "float32, float64, complex64 or complex128");
  return f(double{});
}

}  // namespace

std::tuple<Tensor, Tensor> rls_update_(Tensor P, const Tensor& S, double forgetting, double gain,
                                       double decay, double diffusion, double initial_scale,
                                       const std::optional<Tensor>& power,
                                       const std::optional<Tensor>& health,
                                       const std::optional<Tensor>& found_inf) {
  return dispatch_field(P, [&](auto zero) {
    using T = decltype(zero);
    Arguments arguments("P", P);
    auto args =
        layer_update<T>(arguments, P, S, power ? &*power : nullptr, health ? &*health : nullptr);
    RLS_CHECK(args.rank >= 1, "s must have at least one row, got ", shape_of(S));
    args.rule = {forgetting, gain, decay, diffusion, 0, initial_scale, false};
    check_rule<T>(args.rule);
    args.found_inf = found_inf_pointer(arguments, found_inf);
    arguments.check_apart();
    Tensor U = new_tensor(S, S.sizes(), S.scalar_type());
    Tensor h = P.dim() == 3 ? new_tensor(P, {args.batch}, real_dtype(P))
                            : new_tensor(P, {}, real_dtype(P));
    args.U = static_cast<T*>(U.mutable_data_ptr());
    args.h = static_cast<Real<T>*>(h.mutable_data_ptr());
    launch(P, std::vector{args});
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
  for (auto* list : {&projection, &projected})
    check_list_size("projection and projected", *list, count, true);
  check_list_size("projected_x", projected_x, projected.size());
  return dispatch_matrix(P[0], [&](auto zero) {
    using T = decltype(zero);
    std::vector<RlsUpdate<T>> layers;
    Arguments arguments("the first P", P[0]);
    const bool* void_step = found_inf_pointer(arguments, found_inf);
    int64_t matrices = 0;
    for (size_t i = 0; i < count; ++i) {
      check_same_dtype("every P", P[i], "the first", P[0]);
      auto args =
          layer_update<T>(arguments, P[i], S[i], power.empty() ? nullptr : &power[i], &health[i]);
      args.rule = {forgetting, gain, decay, diffusion, drift, initial_scale, averaging};
      args.found_inf = void_step;
      RLS_CHECK(!__builtin_add_overflow(matrices, args.batch, &matrices),
                "P must hold fewer matrices");
      if (!projection.empty() && projection[i].numel() > 0) {
        RLS_CHECK(P[i].dim() == 2, "projection is for one matrix P [n, n], got ", shape_of(P[i]));
        check_shape("projection", projection[i], {args.rank, args.n});
        check_same_dtype("projection", projection[i], "P", P[i]);
        args.projection = arguments.read<T>("projection", projection[i]);
      }
      if (!projected.empty() && projected[i].numel() > 0) {
        RLS_CHECK(P[i].dim() == 2, "projected is for one matrix P [n, n], got ", shape_of(P[i]));
        RLS_CHECK(projected[i].dim() == 2 && projected[i].size(1) == args.n,
                  "projected must be [N, ", args.n, "], got ", shape_of(projected[i]));
        args.projected_rows = projected[i].size(0);
        const Tensor& X = projected_x[i];
        RLS_CHECK(X.dim() == 2 && X.size(0) == args.projected_rows && X.size(1) <= args.n,
                  "projected_x must be [", args.projected_rows, ", ", args.n,
                  "] or without the columns of ones, got ", shape_of(X));
        args.projected_columns = X.size(1);
        check_same_dtype("projected", projected[i], "P", P[i]);
        check_same_dtype("projected_x", X, "P", P[i]);
        args.projected = arguments.write<T>("projected", projected[i]);
        args.projected_x = arguments.read<T>("projected_x", X);
      }
      layers.push_back(args);
    }
    check_rule<T>(layers[0].rule);
    arguments.check_apart();
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
