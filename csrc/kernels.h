// The torch-free launchers: raw pointers and sizes in, nothing of torch in their signatures.
// All strides are in elements.
#pragma once

#include <cstdint>

#include "patch_geometry.h"

namespace rlscuda {

// Arguments of one `rls_update_` on a batch of matrices.
template <class T>
struct RlsUpdate {
  T* P;                 // [batch, n, n], updated in place
  const T* S;           // [batch, rank, n]
  T* U;                 // [batch, rank, n], out: the rows P S^T
  T* h;                 // [batch], out: mean of the diagonal of H, NaN where no update was made
  T* power;             // [batch] or null, updated in place
  double* health;       // [kHealthSlots] or null, updated in place
  const T* projection;  // [rank, n] or null: S P, where the caller knows it
  T* projected;         // [projected_rows, n] or null: X P in, X P_new less its diffusion out
  int64_t batch, n, rank, projected_rows;
  double forgetting, gain, decay, diffusion, initial_scale;
  bool refuse;  // the caller knows the step to be void: leave P as it is
};
template <class T>
void rls_update_cpu(const RlsUpdate<T>& args);

// Where the elements of one output row of a parameter lie: [C, kh, kw] by strides, or dense.
struct RowLayout {
  int64_t size[3], stride[3], row_stride;
  bool dense;
};

// Arguments of one weight update; `second_moment` selects the adaptive form.
template <class T>
struct WeightStep {
  void* weight;       // [rows, n] of the parameter's dtype, updated in place
  void* bias;         // [rows] or null, likewise
  T* product;         // [rows, n (+ 1)]: G P; completed in place
  const T* grad;      // [rows, n]: G (adaptive form)
  const T* bias_row;  // P[n, :] of each group, or null where the product is complete
  int64_t bias_row_stride;
  const void* grad_bias;  // [rows] of the parameter's dtype, or null
  const T* h;             // [groups] or null; a row whose h is not finite is left alone
  T* first_moment;        // [rows, n (+ 1)] or null
  T* second_moment;       // [rows] or null
  RowLayout layout;
  int64_t rows, rows_per_group, n;
  double lr, momentum, beta2, weight_decay, eps, correction1, correction2;
  bool divide_by_h;
};
template <class T, class W>
void weight_step_cpu(const WeightStep<T>& args);

// Whether delta^T [x, 1] is [grad, grad_bias], probed with one vector.
template <class T>
bool factors_agree_cpu(const T* grad, const T* x, const T* delta, const T* grad_bias, int64_t rows,
                       int64_t outputs, int64_t n);

// Whether an element has all bits of the exponent mask set.
template <class Bits>
bool nonfinite_cpu(const void* x, Bits exponent_mask, int64_t count);

// Summaries of the im2col matrix of x; out is [groups, row_size()], or [groups, rank, row_size()].
template <class T>
void patch_mean_cpu(const T* x, const PatchGeometry& geometry, Accumulate<T>* out);
template <class T>
void patch_sketch_cpu(const T* x, const PatchGeometry& geometry, const PatchDraw& draw,
                      Accumulate<T>* out);
// keys [rank]: the hash by which each image was chosen.
template <class T>
void patch_sample_cpu(const T* x, const PatchGeometry& geometry, const PatchDraw& draw,
                      Accumulate<T>* out, int64_t* keys);
// Arguments of one call of the streaming filter: a series of samples in their order.
template <class T>
struct RlsFilter {
  T* P;            // [n, n], updated in place
  T* W;            // [n_out, n], updated in place
  const T* X;      // [samples, n] by x_stride
  const T* Y;      // [samples, n_out] by y_stride
  T* predictions;  // [samples, n_out], out: W x of each sample before its own update
  int64_t samples, n, n_out;
  int64_t x_stride[2], y_stride[2];
  double forgetting, gain, decay, diffusion, initial_scale;
};
// Returns the number of resets of P.
template <class T>
int64_t rls_filter_cpu(const RlsFilter<T>& args);

// The first row of [rows, cols] with a nan or inf in it, -1 where there is none.
template <class T>
int64_t nonfinite_row_cpu(const T* x, int64_t rows, int64_t cols, const int64_t stride[2]);

// CUDART_VERSION of the toolkit that the CUDA half was built with.
int cuda_runtime_version();

}  // namespace rlscuda
