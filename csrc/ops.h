// The operators that library.cpp registers; each is defined in the file of its own name.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace rlscuda {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> rls_update_(Tensor P, const Tensor& S, double forgetting, double gain,
                                       double decay, double diffusion, double initial_scale,
                                       const std::optional<Tensor>& power,
                                       const std::optional<Tensor>& health,
                                       const std::optional<Tensor>& found_inf);

}  // namespace rlscuda
