// The operators that library.cpp registers; each is defined in the file of its own name.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace rlscuda {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> rls_update_(Tensor P, const Tensor& S, double forgetting, double gain,
                                       double decay, double diffusion, double initial_scale,
                                       const std::optional<Tensor>& power,
                                       const std::optional<Tensor>& health,
                                       const std::optional<Tensor>& found_inf);

Tensor foreach_rls_update_(std::vector<Tensor> P, std::vector<Tensor> S, std::vector<Tensor> power,
                           std::vector<Tensor> health, const std::optional<Tensor>& found_inf,
                           std::vector<Tensor> projection, std::vector<Tensor> projected,
                           std::vector<Tensor> projected_x, double forgetting, double gain,
                           double decay, double diffusion, double drift, double initial_scale,
                           bool averaging);

std::tuple<Tensor, Tensor> rls_update_held_(Tensor P, Tensor held, Tensor state, const Tensor& S,
                                            double forgetting, double gain, double decay,
                                            double diffusion, double initial_scale,
                                            const std::optional<Tensor>& power,
                                            const std::optional<Tensor>& health,
                                            const std::optional<Tensor>& found_inf);

void rls_flush_(Tensor P, const Tensor& held, Tensor state);

Tensor rls_filter_bank_(Tensor P, Tensor W, Tensor state, Tensor squares, const Tensor& rule,
                        const Tensor& x, const Tensor& y, const std::optional<Tensor>& weights,
                        const std::optional<Tensor>& mask, const std::optional<Tensor>& index);

bool factors_agree(const Tensor& grad, const Tensor& x, const Tensor& delta,
                   const std::optional<Tensor>& grad_bias);

Tensor nonfinite(std::vector<Tensor> tensors);

void weight_step_(Tensor weight, std::optional<Tensor> bias, Tensor product,
                  const std::optional<Tensor>& bias_row, const std::optional<Tensor>& grad_bias,
                  const std::optional<Tensor>& h, std::optional<Tensor> momentum_buffer, double lr,
                  double momentum, double weight_decay, bool divide_by_h);

void adaptive_weight_step_(Tensor weight, std::optional<Tensor> bias, Tensor product,
                           const Tensor& grad, const std::optional<Tensor>& bias_row,
                           const std::optional<Tensor>& grad_bias, const std::optional<Tensor>& h,
                           Tensor first_moment, Tensor second_moment, double lr, double beta1,
                           double beta2, double weight_decay, double eps, int64_t step);

void foreach_weight_step_(std::vector<Tensor> weight, std::vector<Tensor> bias,
                          std::vector<Tensor> product, std::vector<Tensor> grad,
                          std::vector<Tensor> bias_row, std::vector<Tensor> grad_bias,
                          const Tensor& h, std::vector<int64_t> groups,
                          std::vector<Tensor> first_moment, std::vector<Tensor> second_moment,
                          std::vector<Tensor> health, const std::optional<Tensor>& rate,
                          const std::optional<Tensor>& norms, double lr, double momentum,
                          double beta2, double weight_decay, double eps, double gain, double trust,
                          bool divide_by_h);

Tensor foreach_complete_products_(std::vector<Tensor> product, std::vector<Tensor> weight,
                                  std::vector<Tensor> bias, std::vector<Tensor> bias_row,
                                  std::vector<Tensor> grad_bias, std::vector<int64_t> groups);

std::tuple<Tensor, Tensor, Tensor> foreach_nesterov_(std::vector<Tensor> grad,
                                                     std::vector<Tensor> grad_bias,
                                                     std::vector<Tensor> average, const Tensor& h,
                                                     std::vector<int64_t> place,
                                                     std::vector<int64_t> groups,
                                                     std::vector<int64_t> rows, double momentum);

void foreach_spectral_direction_(Tensor momentum, Tensor product, std::vector<Tensor> P,
                                 const Tensor& peak, const Tensor& length,
                                 std::vector<Tensor> power, std::vector<int64_t> blocks,
                                 std::vector<int64_t> block, std::vector<int64_t> rows,
                                 std::vector<int64_t> columns, std::vector<double> coefficients,
                                 double eps);

void foreach_spectral_root_(std::vector<Tensor> gram, std::vector<Tensor> peak,
                            std::vector<Tensor> length, std::vector<Tensor> power,
                            std::vector<int64_t> block, std::vector<int64_t> rows,
                            std::vector<int64_t> columns, std::vector<double> coefficients,
                            double eps);

Tensor patch_mean(const Tensor& x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                  int64_t padding_mode, bool ones);

Tensor patch_sketch(const Tensor& x, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                    int64_t padding_mode, bool ones, int64_t rank, int64_t seed, int64_t offset);

std::tuple<Tensor, Tensor> patch_sample(const Tensor& x, std::vector<int64_t> kernel_size,
                                        std::vector<int64_t> stride, std::vector<int64_t> padding,
                                        std::vector<int64_t> dilation, int64_t groups,
                                        int64_t padding_mode, bool ones, int64_t rank, int64_t seed,
                                        int64_t offset);

}  // namespace rlscuda
