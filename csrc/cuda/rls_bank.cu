// rls_filter_bank_ on the GPU: a block a filter, from prediction to raises, in one launch.
//
// A block is one warp where n is at most 32, so that many filters share a multiprocessor and a
// barrier costs next to nothing, and kLarge threads beyond. Threads lie along the columns of P, as
// many rows at a time as fit; P is read for u = P x (a column of u takes a column of P), and read
// and written for the update, the second time from the L1 or L2 cache. u and v go through the
// workspace, a row of it a block. Sums of n terms have a fixed order; those that make h, and the
// sums of squares, are in float64, all else in T. Nothing is decided by the host: rows with a fault
// are refused and counted here, and so are all but the first that name one filter.
#include "kernels.h"
#include "launch.h"

namespace rlscuda {
namespace {

constexpr int kLarge = 256;

// The sum over the block, known to every thread.
template <int THREADS>
__device__ __forceinline__ double block_sum(double x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  if constexpr (THREADS > 32) {
    __shared__ double sums[THREADS / 32];
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int w = 0; w < THREADS / 32; ++w) x += sums[w];
    __syncthreads();
  }
  return x;
}

// Where a thread stands in a matrix of n columns: its first row and column, and the steps to the
// next. Threads beyond the last whole row have none.
template <int THREADS>
struct Place {
  int row, rows, column, columns;
  __device__ explicit Place(int64_t n) {
    columns = int(min(n, int64_t(THREADS)));
    rows = THREADS / columns;
    row = threadIdx.x / columns;
    column = threadIdx.x % columns;
  }
  __device__ bool works() const { return row < rows; }
};

// out = P x.
template <int THREADS, class T>
__device__ __forceinline__ void product(const T* P, const T* x, T* out, int64_t n) {
  __shared__ T parts[THREADS];
  const Place<THREADS> place(n);
  for (int64_t c0 = 0; c0 < n; c0 += place.columns) {
    const int64_t c = c0 + place.column;
    T sum = 0;
    if (place.works() && c < n)
      for (int64_t j = place.row; j < n; j += place.rows) sum += P[j * n + c] * x[j];
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (place.row == 0 && c < n) {
      for (int r = 1; r < place.rows; ++r) sum += parts[r * place.columns + place.column];
      out[c] = sum;
    }
    __syncthreads();
  }
}

// P <- scale (P - v v^T), symmetric to the bit.
template <int THREADS, class T>
__device__ __forceinline__ void subtract(T* P, const T* v, T scale, int64_t n) {
  const Place<THREADS> place(n);
  if (place.works())
    for (int64_t i = place.row; i < n; i += place.rows)
      for (int64_t j = place.column; j < n; j += place.columns)
        P[i * n + j] = scale * (P[i * n + j] - v[i] * v[j]);
  __syncthreads();
}

template <int THREADS, class T>
__device__ __forceinline__ void start_anew(T* P, double scale, int64_t n) {
  __syncthreads();  // until all have read what they decide by
  const Place<THREADS> place(n);
  if (place.works())
    for (int64_t i = place.row; i < n; i += place.rows)
      for (int64_t j = place.column; j < n; j += place.columns)
        P[i * n + j] = i == j ? T(scale) : T(0);
}

// The raises that are due; false where one of them would break P. All threads agree.
template <int THREADS, class T>
__device__ __forceinline__ bool raise(T* P, T* v, const double* squares, const BankRule& rule,
                                      BankState& state, double h, double all, int64_t n) {
  constexpr double kEpsilon = sizeof(T) == 4 ? FLT_EPSILON : DBL_EPSILON;
#pragma unroll 1
  for (int64_t due = ridge_due(state.turn, rule.forgetting, h, n); due > 0; --due) {
    const int64_t j = int64_t(state.turn.next);
    const double raised = bank_raise(rule, state, squares[j], all, n, kEpsilon);
    const double divisor = 1 + raised * double(P[j * (n + 1)]);
    if (!divides(divisor)) return false;
    const T root = T(std::sqrt(raised / divisor));
    for (int64_t i = threadIdx.x; i < n; i += THREADS) v[i] = root * P[j * n + i];
    __syncthreads();
    subtract<THREADS>(P, v, T(1), n);
    state.turn.next = double(j + 1 < n ? j + 1 : 0);
  }
  return true;
}

// How many other rows name the filter of this one; less than 0 where an earlier one does, to which
// the filter belongs.
template <int THREADS>
__device__ __forceinline__ double named_again(const int64_t* index, int64_t rows, int64_t row) {
  bool before = false;
  double after = 0;
  for (int64_t other = threadIdx.x; other < rows; other += THREADS)
    if (other != row && index[other] == index[row]) other < row ? before = true : after += 1;
  after = block_sum<THREADS>(after);
  return __syncthreads_or(before) ? -1 : after;
}

template <class T, int THREADS>
__global__ void __launch_bounds__(THREADS, THREADS == 32 ? 16 : 1)
    rls_bank_kernel(RlsBank<T> bank, T* workspace) {
  const int64_t row = blockIdx.x, n = bank.n;
  const int64_t filter = bank.index ? bank.index[row] : row;
  T* prediction = bank.predictions + row * bank.n_out;
  const double again = bank.index ? named_again<THREADS>(bank.index, bank.rows, row) : 0;
  if (filter < 0 || filter >= bank.filters || again < 0) {
    for (int64_t k = threadIdx.x; k < bank.n_out; k += THREADS) prediction[k] = T(NAN);
    return;
  }
  T* W = bank.W + filter * bank.n_out * n;
  const T* x = bank.x + row * bank.x_stride;
  const T* y = bank.y + row * bank.n_out;

  // predictions, and whether x and the errors are finite
  bool finite = true, sound = true;
  for (int64_t k = threadIdx.x / 32; k < bank.n_out; k += THREADS / 32) {
    T sum = 0;
    for (int64_t j = threadIdx.x % 32; j < n; j += 32) sum += W[k * n + j] * x[j];
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (threadIdx.x % 32 == 0) prediction[k] = sum;
    finite &= std::isfinite(y[k]) != 0;
    sound &= std::isfinite(y[k] - sum) != 0;
  }
  for (int64_t j = threadIdx.x; j < n; j += THREADS) finite &= std::isfinite(x[j]) != 0;
  finite = __syncthreads_and(finite);
  sound = __syncthreads_and(sound);

  const BankRule rule = bank.rule[filter];
  const double weight = bank.mask && !bank.mask[row] ? 0
                        : bank.weights               ? double(bank.weights[row])
                                                     : 1.0;
  const double gain = rule.gain * weight;
  BankState state = bank.state[filter];
  state.turn = sound_turn(state.turn, n);
  state.refused += again;
  __syncthreads();  // before anything is written
  const bool valid = finite && is_rule<T>(rule) && gain >= 0 && gain <= DBL_MAX;
  if (weight == 0 || gain == 0 || !valid) {
    if (threadIdx.x == 0) bank.state[filter].refused = state.refused + (weight != 0 && !valid);
    return;
  }

  T* P = bank.P + filter * n * n;
  T* v = workspace + row * n;
  double* squares = bank.squares + filter * n;
  product<THREADS>(P, x, v, n);
  double xu = 0, all = 0;
  for (int64_t i = threadIdx.x; i < n; i += THREADS) {
    xu += double(x[i]) * double(v[i]);
    all += squares[i] + gain * double(x[i]) * double(x[i]);
  }
  xu = block_sum<THREADS>(xu);
  all = block_sum<THREADS>(all);
  const double h = rule.forgetting + gain * xu;
  if (all == 0 && rule.ridge < 0) {
    ++state.updates;
  } else if (!(sound && divides(h) && all <= DBL_MAX)) {
    start_anew<THREADS>(P, rule.initial_scale, n);
    ++state.resets;
  } else {
    ++state.updates;
    const T root = T(std::sqrt(gain / h));
    for (int64_t i = threadIdx.x; i < n; i += THREADS) {
      squares[i] += gain * double(x[i]) * double(x[i]);
      v[i] *= root;
    }
    __syncthreads();
    const Place<THREADS> place(n);
    if (place.works())
      for (int64_t k = place.row; k < bank.n_out; k += place.rows)
        for (int64_t j = place.column; j < n; j += place.columns)
          W[k * n + j] += root * (y[k] - prediction[k]) * v[j];
    subtract<THREADS>(P, v, T(1 / rule.forgetting), n);
    if (rule.forgetting < 1 && rule.ridge != 0 &&
        !raise<THREADS>(P, v, squares, rule, state, h, all, n)) {
      start_anew<THREADS>(P, rule.initial_scale, n);
      ++state.resets;
    }
  }
  if (threadIdx.x == 0) bank.state[filter] = state;
}

}  // namespace

template <class T>
void rls_bank_cuda(const RlsBank<T>& bank, T* workspace, CudaStream stream) {
  if (bank.rows == 0) return;
  if (bank.n <= 32)
    launch(rls_bank_kernel<T, 32>, grid_of(bank.rows), dim3(32), 0, stream, bank, workspace);
  else
    launch(rls_bank_kernel<T, kLarge>, grid_of(bank.rows), dim3(kLarge), 0, stream, bank,
           workspace);
}

template void rls_bank_cuda<float>(const RlsBank<float>&, float*, CudaStream);
template void rls_bank_cuda<double>(const RlsBank<double>&, double*, CudaStream);

}  // namespace rlscuda
