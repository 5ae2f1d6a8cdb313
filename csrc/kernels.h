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

// CUDART_VERSION of the toolkit that the CUDA half was built with.
int cuda_runtime_version();

}  // namespace rlscuda
