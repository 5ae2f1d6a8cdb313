// The torch-free launchers: raw pointers and sizes in, nothing of torch in their signatures.
// All strides are in elements.
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>
#include <utility>

#include "patch_geometry.h"
#include "rls_bank.h"
#include "rls_math.h"
#include "rls_ridge.h"

struct CUstream_st;

namespace rlscuda {

using CudaStream = CUstream_st*;  // cudaStream_t, without the headers of CUDA

// The type of the real part of a number.
template <class T>
struct RealOf {
  using type = T;
};
template <class R>
struct RealOf<std::complex<R>> {
  using type = R;
};
template <class T>
using Real = typename RealOf<T>::type;

// The update of the matrices of one layer: `batch` of them, the groups of a convolution.
template <class T>
struct RlsUpdate {
  T* P;                   // [batch, n, n], updated in place
  const T* S;             // [batch, rank, n]; of rank 0 where there is no summary: P stays
  T* U;                   // [batch, rank, n] or null, out: the rows P S^T
  Real<T>* h;             // [batch], out: mean of the diagonal of H, NaN where nothing may move
  Real<T>* power;         // [batch] or null, updated in place
  double* health;         // [kHealthSlots] or null, updated in place
  const bool* found_inf;  // [] or null: true where the step is void, which leaves P as it is
  const T* projection;    // [rank, n] or null: S P, where the caller knows it; CPU only
  T* projected;           // [projected_rows, n] or null: X P in, X P_new out; CPU only
  const T* projected_x;   // [projected_rows, n or n - 1]: X, without its column of ones
  int64_t batch, n, rank, projected_rows, projected_columns;
  UpdateRule rule;
  T* held;                // [batch, hold, rank, n] or null: V of the updates that P lacks
  HeldState* held_state;  // [batch], with `held`
  int64_t hold;           // updates that can be held
};
template <class T>
void rls_update_cpu(const RlsUpdate<T>* layers, int64_t count);
// Of one layer, whose P is Hermitian; knows no projection, no projected rows and nothing held.
template <class R>
void rls_update_cpu(const RlsUpdate<std::complex<R>>& layer);
// Takes no projection and no projected rows, and ranks up to 64.
template <class T>
void rls_update_cuda(const RlsUpdate<T>* layers, int64_t count, void* workspace, CudaStream stream);
// Bytes that it needs; contents do not matter.
template <class T>
int64_t rls_update_workspace_cuda(const RlsUpdate<T>* layers, int64_t count);

// One layer whose updates are held back, with `held`; takes neither a projection nor projected
// rows.
template <class T>
void rls_update_held_cuda(const RlsUpdate<T>& layer, void* workspace, CudaStream stream);
// Applies what is held; of the layer only P, held, held_state and the sizes count.
template <class T>
void rls_flush_cpu(const RlsUpdate<T>& layer);
template <class T>
void rls_flush_cuda(const RlsUpdate<T>& layer, void* workspace, CudaStream stream);
// Bytes that either of them needs; contents do not matter.
template <class T>
int64_t rls_held_workspace_cuda(const RlsUpdate<T>& layer);

// Where the elements of one output row of a parameter lie: [C, kh, kw] by strides, or dense.
struct RowLayout {
  int64_t size[3], stride[3], row_stride;
  bool dense;
};

// The move of one layer's weight; `second_moment` selects the adaptive form.
template <class T>
struct WeightStep {
  void* weight;       // [rows, n] of the parameter's dtype, updated in place
  void* bias;         // [rows] by bias_stride or null, likewise
  T* product;         // [rows, n (+ 1)]: G P; completed in place
  const T* grad;      // [rows, n]: G (adaptive form)
  const T* bias_row;  // P[n, :] of each group, or null where the product is complete
  int64_t bias_row_stride;
  const void* grad_bias;  // [rows] of the parameter's dtype, or null
  const T* h;             // [groups] or null; a row whose h is not finite is left alone
  const T* norms;         // [groups] or null: |D| of each group's product, see divisor_of
  int64_t matrices;       // of all layers of the call: |W| lies so many elements behind |D|
  T* first_moment;        // [rows, n (+ 1)] or null
  T* second_moment;       // [rows] or null
  const double* health;   // [kHealthSlots] or null: counts the steps in place of `step`
  const float* rate;      // [] or null: multiplies lr
  RowLayout layout;
  int64_t bias_stride, rows, groups, rows_per_group, n;
  double lr, momentum, beta2, weight_decay, eps, step;
  double gain;   // > 0: lr rises with the gain of an averaging update, lr gain / kappa_t
  double trust;  // with norms: the longest step, as a part of |W|
  bool divide_by_h;
};
// W is the dtype of the parameters, the same in all layers.
template <class T, class W>
void weight_step_cpu(const WeightStep<T>* layers, int64_t count);
template <class T, class W>
void weight_step_cuda(const WeightStep<T>* layers, int64_t count, CudaStream stream);

// Completes the product D of each layer by the bias' part, and writes the norms of D and of the
// weight with its bias, [2, matrices]. `squares` is room for [2, rows of all layers]; its contents
// do not matter.
template <class T, class W>
void complete_products_cpu(const WeightStep<T>* layers, int64_t count, T* norms, T* squares);
template <class T, class W>
void complete_products_cuda(const WeightStep<T>* layers, int64_t count, T* norms, T* squares,
                            CudaStream stream);

// What a step's place in the series makes of its rate, and the bias corrections of its moments.
struct StepConstants {
  double lr, correction1, correction2;
};
template <class T>
RLS_HOST_DEVICE inline StepConstants step_constants(const WeightStep<T>& a) {
  StepConstants c{a.lr * (a.rate ? double(*a.rate) : 1.0), 1, 1};
  if (a.health && a.gain > 0) {
    const double updates = steps_counted(a.health) - 1;  // before the update of this step
    c.lr *= a.gain / gain_at(a.gain, true, updates > 0 ? updates : 0);
  }
  if (a.second_moment) {
    const double step = a.health ? a.health[kSteps] : a.step;
    c.correction1 = 1 - pow(a.momentum, step);
    c.correction2 = 1 - pow(a.beta2, step);
  }
  return c;
}

// What the product D of a matrix is divided by: h or 1, or more where the step would be longer than
// trust |W|. Not finite where the matrix is to be left alone. `norms` is null, or |D| with |W| so
// many elements behind it; limit is lr / trust.
template <class T>
RLS_HOST_DEVICE inline T divisor_of(T h, bool divide_by_h, const T* norms, int64_t behind,
                                    T limit) {
  if (!std::isfinite(h)) return h;
  const T own = divide_by_h ? h : T(1), size = norms ? norms[behind] : T(0);
  if (!(size > 0)) return own;
  const T least = limit * *norms / size;
  return least <= own ? own : least;
}

// Whether delta^T [x, 1] is [grad, grad_bias], probed with one vector.
template <class T>
bool factors_agree_cpu(const T* grad, const T* x, const T* delta, const T* grad_bias, int64_t rows,
                       int64_t outputs, int64_t n);

// Whether an element has all bits of the exponent mask set.
template <class Bits>
bool nonfinite_cpu(const void* x, Bits exponent_mask, int64_t count);

// One of the tensors that nonfinite_cuda looks at; bits of an element of `width` bytes.
struct NonfiniteTensor {
  const void* data;
  int64_t count;
  uint64_t exponent_mask;
  int32_t width;
};
// *found = whether any tensor has such an element; all tensors in one pass.
void nonfinite_cuda(const NonfiniteTensor* tensors, int64_t count, bool* found, CudaStream stream);

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
// The same on the GPU; workspace: what patch_mean_workspace and patch_sketch_workspace ask for.
template <class T>
int64_t patch_mean_workspace(const T* x, const PatchGeometry& geometry);
template <class T>
void patch_mean_cuda(const T* x, const PatchGeometry& geometry, Accumulate<T>* workspace,
                     Accumulate<T>* out, CudaStream stream);
template <class T>
int64_t patch_sketch_workspace(const T* x, const PatchGeometry& geometry, const PatchDraw& draw);
template <class T>
void patch_sketch_cuda(const T* x, const PatchGeometry& geometry, const PatchDraw& draw,
                       Accumulate<T>* workspace, Accumulate<T>* out, CudaStream stream);
template <class T>
void patch_sample_cuda(const T* x, const PatchGeometry& geometry, const PatchDraw& draw,
                       Accumulate<T>* out, int64_t* keys, CudaStream stream);

// The streaming filter: its state, and a series of samples in their order.
constexpr int64_t kFilterRows =
    32;  // of V: updates of P that wait, samples and raises of the ridge
struct FilterState {
  double scale, rows;        // P_true = scale (P - sum_j sign[j] V_j^H V_j) over so many rows
  RidgeTurn turn;            // of stabilised forgetting, see rls_ridge.h
  double samples, energy;    // that the running power is over; the sum of all squares
  double sign[kFilterRows];  // -1 for a sample that left
};
constexpr int64_t kFilterSlots = sizeof(FilterState) / sizeof(double);
template <class T>
struct RlsFilter {
  T* P;             // [n, n], updated in place; of it the lower triangle counts
  T* W;             // [n_out, n], updated in place
  T* V;             // [kFilterRows, n] by v_stride, of the square-root form [2 kFilterRows, n]
  double* squares;  // [n]: sums of kappa |x_j|^2
  FilterState* state;
  int64_t n, n_out, v_stride;
  double forgetting, gain;
  double ridge;         // rho; negative for kRidge of the running power
  const T* X;           // [samples, n] by x_stride
  const T* Y;           // [samples, n_out] by y_stride
  T* predictions;       // [samples, n_out], out: W x of each sample before its own update
  T* history;           // [samples, n_out, n] or null, out: W after each sample
  const double* gains;  // [samples] or null: gain of each; < 0 for one that leaves, 0 for none
  const double* forgettings;  // [samples] or null
  int64_t samples, x_stride[2], y_stride[2];
};
// Returns how many samples were learnt: fewer than `samples` where the next one makes h or its
// error no finite, positive number. That one has changed nothing.
template <class T>
int64_t rls_filter_cpu(const RlsFilter<T>& args);
// Enters in P what waits, and fills its upper triangle.
template <class T>
void rls_filter_flush_cpu(const RlsFilter<T>& args);
// out [samples]: x P x of each row of X, from P and what waits.
template <class T>
void rls_filter_variance_cpu(const RlsFilter<T>& args, double* out);
// The same with a root L in the place of P, P_true = L L^T, all of which counts.
template <class T>
int64_t rls_root_filter_cpu(const RlsFilter<T>& args);
template <class T>
void rls_root_filter_flush_cpu(const RlsFilter<T>& args);
template <class T>
void rls_root_filter_variance_cpu(const RlsFilter<T>& args, double* out);

// The same for complex signals: P is Hermitian, the inverse of the sum of x x^H.
template <class R>
int64_t rls_filter_cpu(const RlsFilter<std::complex<R>>& args);
template <class R>
void rls_filter_flush_cpu(const RlsFilter<std::complex<R>>& args);
template <class R>
void rls_filter_variance_cpu(const RlsFilter<std::complex<R>>& args, double* out);

// The first row of [rows, cols] with a nan or inf in it, -1 where there is none.
template <class T>
int64_t nonfinite_row_cpu(const T* x, int64_t rows, int64_t cols, const int64_t stride[2]);
template <class R>
int64_t nonfinite_row_cpu(const std::complex<R>* x, int64_t rows, int64_t cols,
                          const int64_t stride[2]);

// One sample for each of `rows` filters of a bank, or for some of them; see rls_bank.h.
template <class T>
struct RlsBank {
  T* P;                  // [filters, n, n], updated in place
  T* W;                  // [filters, n_out, n], likewise
  BankState* state;      // [filters], likewise
  double* squares;       // [filters, n]: sums of x_j^2, likewise
  const BankRule* rule;  // [filters]
  const T* x;            // [rows, n] by x_stride, which is 0 where all filters share one
  const T* y;            // [rows, n_out]
  const T* weights;      // [rows] or null
  const bool* mask;      // [rows] or null: false where a filter is to learn nothing
  const int64_t* index;  // [rows] or null: the filter of each row, none twice
  T* predictions;        // [rows, n_out], out: W x before the update
  int64_t filters, rows, n, n_out, x_stride;
};
// The first row with a fault, and which; those that learn nothing have none. The index is sound.
template <class T>
std::pair<int64_t, BankFault> rls_bank_fault_cpu(const RlsBank<T>& bank);
// Takes rows without a fault.
template <class T>
void rls_bank_cpu(const RlsBank<T>& bank);
// Refuses and counts rows with a fault. workspace: [rows, n].
template <class T>
void rls_bank_cuda(const RlsBank<T>& bank, T* workspace, CudaStream stream);

// CUDART_VERSION of the toolkit that the CUDA half was built with.
int cuda_runtime_version();

}  // namespace rlscuda
