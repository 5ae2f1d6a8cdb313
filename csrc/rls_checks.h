// The checks that the updates of P share: arguments to what the launchers take.
#pragma once

#include <cmath>
#include <optional>

#include "arguments.h"
#include "kernels.h"

namespace rlscuda {

constexpr int64_t kMostRank = 4096;  // rows of a summary: H [r, r] and its factor stay small

// The rule, of which everything that P is multiplied by or set to must be a number of type T.
template <class T>
void check_rule(const UpdateRule& rule) {
  constexpr double kMost = std::numeric_limits<Real<T>>::max();
  RLS_CHECK(rule.forgetting > 0 && rule.forgetting <= 1, "forgetting must be in (0, 1], got ",
            rule.forgetting);
  const auto within = [](double value, double most) { return value >= 0 && value <= most; };
  RLS_CHECK(rule.gain > 0 && within(rule.gain, kMost), "gain must be > 0, got ", rule.gain);
  RLS_CHECK(within(rule.decay, kMost), "decay must be >= 0, got ", rule.decay);
  RLS_CHECK(within(rule.diffusion, kMost), "diffusion must be >= 0, got ", rule.diffusion);
  RLS_CHECK(within(rule.drift, kMost), "drift must be >= 0, got ", rule.drift);
  RLS_CHECK(Real<T>(rule.initial_scale) > 0 && within(rule.initial_scale, kMost),
            "initial_scale must be > 0, got ", rule.initial_scale);
  RLS_CHECK(rule.decay / rule.forgetting <= kMost, "decay / forgetting must be finite, got ",
            rule.decay, " / ", rule.forgetting);
  const double largest = rule.averaging ? std::max(rule.gain, 1.0) : rule.gain;
  RLS_CHECK(rule.drift <= 1 / largest, "drift must be at most ", 1 / largest,
            ", or P could turn negative, got ", rule.drift);
}

inline const bool* found_inf_pointer(Arguments& arguments, const std::optional<Tensor>& found_inf) {
  if (!found_inf) return nullptr;
  RLS_CHECK(found_inf->numel() == 1 && found_inf->scalar_type() == ScalarType::Bool,
            "found_inf must be one bool, got ", dtype_of(*found_inf), " ", shape_of(*found_inf));
  return arguments.read<bool>("found_inf", *found_inf);
}

// A layer of which only P [n, n] or [b, n, n] is known.
template <class T>
RlsUpdate<T> layer_of(Arguments& arguments, const Tensor& P) {
  const bool batched = P.dim() == 3;
  RLS_CHECK(batched || P.dim() == 2, "P must be [n, n] or [b, n, n], got ", shape_of(P));
  RLS_CHECK(P.size(-2) == P.size(-1), "P must be square, got ", shape_of(P));
  RlsUpdate<T> layer{};
  layer.P = arguments.write<T>("P", P);
  layer.batch = batched ? P.size(0) : 1;
  layer.n = P.size(-1);
  return layer;
}

inline bool is_complex(const Tensor& t) {
  return t.scalar_type() == ScalarType::ComplexFloat ||
         t.scalar_type() == ScalarType::ComplexDouble;
}

// The dtype of h and of power.
inline ScalarType real_dtype(const Tensor& P) {
  if (!is_complex(P)) return P.scalar_type();
  return P.scalar_type() == ScalarType::ComplexFloat ? ScalarType::Float : ScalarType::Double;
}

// The update of one layer's P by rows S.
template <class T>
RlsUpdate<T> layer_update(Arguments& arguments, const Tensor& P, const Tensor& S,
                          const Tensor* power, const Tensor* health) {
  RlsUpdate<T> args = layer_of<T>(arguments, P);
  const bool batched = P.dim() == 3;
  const int64_t n = args.n, batch = args.batch;
  RLS_CHECK(S.dim() >= 1 && S.size(-1) == n, "s must have n=", n, " columns, got ", shape_of(S));
  RLS_CHECK(batched ? S.dim() == 3 && S.size(0) == batch : S.dim() <= 2, "s must be ",
            batched ? "[b, r, n] for a batched P" : "[n] or [r, n]", ", got ", shape_of(S));
  check_same_dtype("s", S, "P", P);
  args.S = arguments.read<T>("s", S);
  args.rank = S.dim() == 1 ? 1 : S.size(-2);
  RLS_CHECK(args.rank <= kMostRank, "s must have at most ", kMostRank, " rows, got ", shape_of(S));
  if (power) {
    RLS_CHECK(power->numel() == batch, "power must have ", batch, " elements, got ",
              shape_of(*power));
    RLS_CHECK(power->scalar_type() == real_dtype(P), "power must have the ",
              is_complex(P) ? "real " : "", "dtype of P, ",
              real_dtype(P) == ScalarType::Float ? "float32" : "float64", ", got ",
              dtype_of(*power));
    args.power = arguments.write<Real<T>>("power", *power);
  }
  if (health) {
    check_shape("health", *health, {kHealthSlots});
    check_dtype("health", *health, ScalarType::Double, "float64");
    args.health = arguments.write<double>("health", *health);
  }
  return args;
}

// Calls f with a value of the dtype of P.
template <class F>
auto dispatch_matrix(const Tensor& P, const F& f) {
  if (P.scalar_type() == ScalarType::Float) return f(float{});
  check_dtype("P", P, ScalarType::Double, "float32 or float64");
  return f(double{});
}

}  // namespace rlscuda
