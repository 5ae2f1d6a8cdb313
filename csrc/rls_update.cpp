// rls_update_ and foreach_rls_update_: checks, dtype dispatch, launch.
#include <cmath>

#include "checks.h"
#include "cuda_call.h"
#include "kernels.h"
#include "ops.h"
#include "rls_math.h"

namespace rlscuda {
namespace {

void check_rule(const UpdateRule& rule) {
  RLS_CHECK(rule.forgetting > 0 && rule.forgetting <= 1, "forgetting must be in (0, 1], got ",
            rule.forgetting);
  const auto finite = [](double value, double least) { return value >= least && value < INFINITY; };
  RLS_CHECK(rule.gain > 0 && finite(rule.gain, 0), "gain must be > 0, got ", rule.gain);
  RLS_CHECK(finite(rule.decay, 0), "decay must be >= 0, got ", rule.decay);
  RLS_CHECK(finite(rule.diffusion, 0), "diffusion must be >= 0, got ", rule.diffusion);
  RLS_CHECK(finite(rule.drift, 0), "drift must be >= 0, got ", rule.drift);
  RLS_CHECK(rule.initial_scale > 0 && finite(rule.initial_scale, 0),
            "initial_scale must be > 0, got ", rule.initial_scale);
}

const bool* found_inf_pointer(const std::optional<Tensor>& found_inf, const Tensor& P) {
  if (!found_inf) return nullptr;
  check_same_device("found_inf", *found_inf, "P", P);
  RLS_CHECK(found_inf->numel() == 1 && found_inf->scalar_type() == ScalarType::Bool,
            "found_inf must be one bool, got ", shape_of(*found_inf));
  return static_cast<const bool*>(found_inf->const_data_ptr());
}

template <class T>
T* pointer_like(const char* name, const Tensor& t, const Tensor& P) {
  check_same_device(name, t, "P", P);
  check_same_dtype(name, t, "P", P);
  check_contiguous(name, t);
  return static_cast<T*>(t.mutable_data_ptr());
}

// The update of one layer's P [n, n] or [b, n, n] by rows S.
template <class T>
RlsUpdate<T> layer_update(const Tensor& P, const Tensor& S, const Tensor* power,
                          const Tensor* health) {
  const bool batched = P.dim() == 3;
  RLS_CHECK(batched || P.dim() == 2, "P must be [n, n] or [b, n, n], got ", shape_of(P));
  const int64_t n = P.size(-1), batch = batched ? P.size(0) : 1;
  RLS_CHECK(P.size(-2) == n, "P must be square, got ", shape_of(P));
  RLS_CHECK(S.dim() >= 1 && S.size(-1) == n, "s must have n=", n, " columns, got ", shape_of(S));
  RLS_CHECK(batched ? S.dim() == 3 && S.size(0) == batch : S.dim() <= 2, "s must be ",
            batched ? "[b, r, n] for a batched P" : "[n] or [r, n]", ", got ", shape_of(S));
  RlsUpdate<T> args{};
  args.P = pointer_like<T>("P", P, P);
  args.S = pointer_like<const T>("s", S, P);
  args.batch = batch;
  args.n = n;
  args.rank = S.dim() == 1 ? 1 : S.size(-2);
  if (power) {
    RLS_CHECK(power->numel() == batch, "power must have ", batch, " elements, got ",
              shape_of(*power));
    args.power = pointer_like<T>("power", *power, P);
  }
  if (health) {
    check_shape("health", *health, {kHealthSlots});
    RLS_CHECK(health->scalar_type() == ScalarType::Double, "health must be float64");
    check_contiguous("health", *health);
    check_same_device("health", *health, "P", P);
    args.health = static_cast<double*>(health->mutable_data_ptr());
  }
  return args;
}

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

// Calls f with a value of the dtype of P.
template <class F>
auto dispatch_matrix(const Tensor& P, const F& f) {
  if (P.scalar_type() == ScalarType::Float) return f(float{});
  RLS_CHECK(P.scalar_type() == ScalarType::Double, "P must be float32 or float64");
  return f(double{});
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
