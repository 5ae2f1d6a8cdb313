// The checks that the updates of P share: arguments to what the launchers take.
#pragma once

#include <cmath>
#include <optional>

#include "checks.h"
#include "kernels.h"

namespace rlscuda {

inline void check_rule(const UpdateRule& rule) {
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

inline const bool* found_inf_pointer(const std::optional<Tensor>& found_inf, const Tensor& P) {
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

// A layer of which only P [n, n] or [b, n, n] is known.
template <class T>
RlsUpdate<T> layer_of(const Tensor& P) {
  const bool batched = P.dim() == 3;
  RLS_CHECK(batched || P.dim() == 2, "P must be [n, n] or [b, n, n], got ", shape_of(P));
  RLS_CHECK(P.size(-2) == P.size(-1), "P must be square, got ", shape_of(P));
  RlsUpdate<T> layer{};
  layer.P = pointer_like<T>("P", P, P);
  layer.batch = batched ? P.size(0) : 1;
  layer.n = P.size(-1);
  return layer;
}

// The update of one layer's P by rows S.
template <class T>
RlsUpdate<T> layer_update(const Tensor& P, const Tensor& S, const Tensor* power,
                          const Tensor* health) {
  RlsUpdate<T> args = layer_of<T>(P);
  const bool batched = P.dim() == 3;
  const int64_t n = args.n, batch = args.batch;
  RLS_CHECK(S.dim() >= 1 && S.size(-1) == n, "s must have n=", n, " columns, got ", shape_of(S));
  RLS_CHECK(batched ? S.dim() == 3 && S.size(0) == batch : S.dim() <= 2, "s must be ",
            batched ? "[b, r, n] for a batched P" : "[n] or [r, n]", ", got ", shape_of(S));
  args.S = pointer_like<const T>("s", S, P);
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

// Calls f with a value of the dtype of P.
template <class F>
auto dispatch_matrix(const Tensor& P, const F& f) {
  if (P.scalar_type() == ScalarType::Float) return f(float{});
  RLS_CHECK(P.scalar_type() == ScalarType::Double, "P must be float32 or float64");
  return f(double{});
}

}  // namespace rlscuda
