// The torch-free launchers: raw pointers and sizes in, nothing of torch in their signatures.
// All strides are in elements.
#pragma once

#include <cstdint>

namespace rlscuda {

// Arguments of one `rls_update_` on a batch of matrices.
template <class T>
struct RlsUpdate {
  T* P;            // [batch, n, n], updated in place
  const T* S;      // [batch, rank, n]
  T* U;            // [batch, rank, n], out: the rows P S^T
  T* h;            // [batch], out: mean of the diagonal of H, NaN where no update was made
  T* power;        // [batch] or null, updated in place
  double* health;  // [kHealthSlots] or null, updated in place
  int64_t batch, n, rank;
  double forgetting, gain, decay, diffusion, initial_scale;
  bool refuse;  // the caller knows the step to be void: leave P as it is
};
template <class T>
void rls_update_cpu(const RlsUpdate<T>& args);

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
