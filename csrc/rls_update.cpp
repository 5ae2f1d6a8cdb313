// rls_update_: checks, dtype dispatch, launch.
#include "checks.h"
#include "kernels.h"
#include "ops.h"
#include "rls_math.h"

namespace rlscuda {
namespace {

template <class T>
std::tuple<Tensor, Tensor> launch(Tensor& P, const Tensor& S, bool batched, RlsUpdate<T> args,
                                  const std::optional<Tensor>& power,
                                  const std::optional<Tensor>& health) {
  Tensor U = new_tensor(S, S.sizes(), S.scalar_type());
  Tensor h =
      batched ? new_tensor(P, {args.batch}, P.scalar_type()) : new_tensor(P, {}, P.scalar_type());
  args.P = static_cast<T*>(P.mutable_data_ptr());
  args.S = static_cast<const T*>(S.const_data_ptr());
  args.U = static_cast<T*>(U.mutable_data_ptr());
  args.h = static_cast<T*>(h.mutable_data_ptr());
  args.power = power ? static_cast<T*>(power->mutable_data_ptr()) : nullptr;
  args.health = health ? static_cast<double*>(health->mutable_data_ptr()) : nullptr;
  rls_update_cpu(args);
  return {U, h};
}

}  // namespace

std::tuple<Tensor, Tensor> rls_update_(Tensor P, const Tensor& S, double forgetting, double gain,
                                       double decay, double diffusion, double initial_scale,
                                       const std::optional<Tensor>& power,
                                       const std::optional<Tensor>& health,
                                       const std::optional<Tensor>& found_inf) {
  const bool batched = P.dim() == 3;
  RLS_CHECK(batched || P.dim() == 2, "P must be [n, n] or [b, n, n], got ", shape_of(P));
  const int64_t n = P.size(-1), batch = batched ? P.size(0) : 1;
  RLS_CHECK(P.size(-2) == n, "P must be square, got ", shape_of(P));
  RLS_CHECK(S.dim() >= 1 && S.size(-1) == n, "s must have n=", n, " columns, got ", shape_of(S));
  RLS_CHECK(batched ? S.dim() == 3 && S.size(0) == batch : S.dim() <= 2, "s must be ",
            batched ? "[b, r, n] for a batched P" : "[n] or [r, n]", ", got ", shape_of(S));
  const int64_t rank = S.dim() == 1 ? 1 : S.size(-2);
  RLS_CHECK(rank >= 1, "s must have at least one row, got ", shape_of(S));
  check_contiguous("P", P);
  check_contiguous("s", S);
  check_same_dtype("s", S, "P", P);
  RLS_CHECK(forgetting > 0 && forgetting <= 1, "forgetting must be in (0, 1], got ", forgetting);
  RLS_CHECK(gain > 0, "gain must be > 0, got ", gain);
  if (power) {
    RLS_CHECK(power->numel() == batch, "power must have ", batch, " elements, got ",
              shape_of(*power));
    check_same_dtype("power", *power, "P", P);
    check_contiguous("power", *power);
  }
  if (health) {
    check_shape("health", *health, {kHealthSlots});
    RLS_CHECK(health->scalar_type() == ScalarType::Double, "health must be float64");
    check_contiguous("health", *health);
  }
  bool refuse = false;
  if (found_inf) {
    RLS_CHECK(found_inf->numel() == 1 && found_inf->scalar_type() == ScalarType::Bool,
              "found_inf must be one bool, got ", shape_of(*found_inf));
    refuse = *static_cast<const bool*>(found_inf->const_data_ptr());
  }
  const auto fill = [&](auto args) {
    args.batch = batch;
    args.n = n;
    args.rank = rank;
    args.forgetting = forgetting;
    args.gain = gain;
    args.decay = decay;
    args.diffusion = diffusion;
    args.initial_scale = initial_scale;
    args.refuse = refuse;
    return args;
  };
  if (P.scalar_type() == ScalarType::Float)
    return launch(P, S, batched, fill(RlsUpdate<float>{}), power, health);
  RLS_CHECK(P.scalar_type() == ScalarType::Double, "P must be float32 or float64");
  return launch(P, S, batched, fill(RlsUpdate<double>{}), power, health);
}

}  // namespace rlscuda
