// rls_update_held_ and rls_flush_: checks, dtype dispatch, launch.
#include "cuda_call.h"
#include "kernels.h"
#include "ops.h"
#include "rls_checks.h"

namespace rlscuda {
namespace {

// Adds what is held of P to the layer, whose P and sizes are known.
template <class T>
void hold_back(Arguments& arguments, RlsUpdate<T>& layer, const Tensor& P, const Tensor& held,
               const Tensor& state) {
  const bool batched = P.dim() == 3;
  RLS_CHECK(held.dim() == P.dim() + 1, "held must be ", batched ? "[b, K, r, n]" : "[K, r, n]",
            ", got ", shape_of(held));
  layer.hold = held.size(-3);
  if (batched) {
    check_shape("held", held, {layer.batch, layer.hold, layer.rank, layer.n});
    check_shape("state", state, {layer.batch, kHeldSlots});
  } else {
    check_shape("held", held, {layer.hold, layer.rank, layer.n});
    check_shape("state", state, {kHeldSlots});
  }
  RLS_CHECK(layer.hold >= 2 && layer.hold <= kHeldRows && layer.rank <= kHeldRows &&
                layer.hold * layer.rank <= kHeldRows,
            "held must have K >= 2 updates and at most ", kHeldRows, " rows, got ", shape_of(held));
  check_dtype("state", state, ScalarType::Double, "float64");
  check_same_dtype("held", held, "P", P);
  layer.held = arguments.write<T>("held", held);
  layer.held_state = arguments.write<HeldState>("state", state);
  arguments.check_apart();
}

// Calls on_host(), or on_device(workspace, stream).
template <class T, class Host, class Device>
void run_held(const Tensor& P, const RlsUpdate<T>& layer, const Host& on_host,
              [[maybe_unused]] const Device& on_device) {
  run_on(P, on_host, [&](auto stream) {
    Tensor workspace = new_tensor(P, {rls_held_workspace_cuda(layer)}, ScalarType::Byte);
    on_device(workspace.mutable_data_ptr(), stream);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> rls_update_held_(Tensor P, Tensor held, Tensor state, const Tensor& S,
                                            double forgetting, double gain, double decay,
                                            double diffusion, double initial_scale,
                                            const std::optional<Tensor>& power,
                                            const std::optional<Tensor>& health,
                                            const std::optional<Tensor>& found_inf) {
  return dispatch_matrix(P, [&](auto zero) {
    using T = decltype(zero);
    Arguments arguments("P", P);
    auto layer =
        layer_update<T>(arguments, P, S, power ? &*power : nullptr, health ? &*health : nullptr);
    RLS_CHECK(layer.rank >= 1, "s must have at least one row, got ", shape_of(S));
    layer.rule = {forgetting, gain, decay, diffusion, 0, initial_scale, false};
    check_rule<T>(layer.rule);
    layer.found_inf = found_inf_pointer(arguments, found_inf);
    hold_back(arguments, layer, P, held, state);
    Tensor U = new_tensor(S, S.sizes(), S.scalar_type());
    Tensor h = P.dim() == 3 ? new_tensor(P, {layer.batch}, P.scalar_type())
                            : new_tensor(P, {}, P.scalar_type());
    layer.U = static_cast<T*>(U.mutable_data_ptr());
    layer.h = static_cast<T*>(h.mutable_data_ptr());
    run_held(
        P, layer, [&] { rls_update_cpu(&layer, 1); },
        [&](void* workspace, auto stream) { rls_update_held_cuda(layer, workspace, stream); });
    return std::tuple(U, h);
  });
}

void rls_flush_(Tensor P, const Tensor& held, Tensor state) {
  dispatch_matrix(P, [&](auto zero) {
    using T = decltype(zero);
    Arguments arguments("P", P);
    auto layer = layer_of<T>(arguments, P);
    layer.rank = held.dim() >= 2 ? held.size(-2) : 0;
    hold_back(arguments, layer, P, held, state);
    run_held(
        P, layer, [&] { rls_flush_cpu(layer); },
        [&](void* workspace, auto stream) { rls_flush_cuda(layer, workspace, stream); });
  });
}

}  // namespace rlscuda
