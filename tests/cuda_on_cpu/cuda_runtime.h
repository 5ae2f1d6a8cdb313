// Stands in for the CUDA runtime, so that kernels compile as C++ and run on the CPU.
// What is here is what the kernels use; README.md says how it works.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <type_traits>

#define CUDART_VERSION 0
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

using std::max;
using std::min;

// --- the host's side of the runtime

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// --- the engine (engine.cpp)

extern constinit thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

using Where = std::source_location;
enum class Wait { kNothing, kBlock, kWarp, kShuffle, kBallot, kAdd, kMin, kMax, kOr };

// Runs body() once for each thread of each block; writes the launch down instead where launches are
// recorded, with the kernel and those of its arguments that are integers.
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const std::string& integers,
                void (*body)(const void*), const void* context);

// The shared variable declared at `where`, one for each block, full of NaN at its start.
void* shared(size_t bytes, Where where);
void* dynamic_shared();
template <class T>
T& shared(Where where = Where::current()) {
  return *static_cast<T*>(shared(sizeof(T), where));
}

// Waits for the threads of the block, or for the lanes of the mask; the result of the collective
// for this lane. source: the lane to read from.
uint64_t wait(Wait kind, unsigned mask, uint64_t value, int source, Where where);
int lane();

template <class T>
uint64_t to_word(T x) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &x, sizeof x);
  return word;
}
template <class T>
T shuffle(unsigned mask, T x, int source, int width, Where where) {
  const int first = lane() & -width;  // of this lane's segment
  const bool inside = source >= first && source < first + width;
  const uint64_t word = wait(Wait::kShuffle, mask, to_word(x), inside ? source : lane(), where);
  T result;
  std::memcpy(&result, &word, sizeof result);
  return result;
}

template <class Param, class T>
std::string as_text(const T& x) {
  if constexpr (std::is_integral_v<Param>) return " " + std::to_string(x);
  return "";
}

}  // namespace cuda_on_cpu

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args&&... args) {
  const auto call = [kernel, ... values = static_cast<Params>(args)] { kernel(values...); };
  return cuda_on_cpu::run(
      *config, reinterpret_cast<const void*>(kernel), (cuda_on_cpu::as_text<Params>(args) + ...),
      [](const void* f) { (*static_cast<const decltype(call)*>(f))(); }, &call);
}

// --- the device's side

#define WHERE cuda_on_cpu::Where where = cuda_on_cpu::Where::current()

inline void __syncthreads(WHERE) { wait(cuda_on_cpu::Wait::kBlock, 0, 0, 0, where); }
inline void __syncwarp(unsigned mask = ~0u, WHERE) {
  wait(cuda_on_cpu::Wait::kWarp, mask, 0, 0, where);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32, WHERE) {
  const int first = cuda_on_cpu::lane() & -width;
  return cuda_on_cpu::shuffle(mask, x, first + (source & (width - 1)), width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, WHERE) {
  return cuda_on_cpu::shuffle(mask, x, cuda_on_cpu::lane() ^ bits, width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32, WHERE) {
  return cuda_on_cpu::shuffle(mask, x, cuda_on_cpu::lane() + int(by), width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32, WHERE) {
  return cuda_on_cpu::shuffle(mask, x, cuda_on_cpu::lane() - int(by), width, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, WHERE) {
  return unsigned(wait(cuda_on_cpu::Wait::kBallot, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, WHERE) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, WHERE) {
  return __ballot_sync(mask, predicate, where) == mask;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x, WHERE) {
  return unsigned(wait(cuda_on_cpu::Wait::kAdd, mask, x, 0, where));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned x, WHERE) {
  return unsigned(wait(cuda_on_cpu::Wait::kOr, mask, x, 0, where));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x, WHERE) {
  return unsigned(wait(cuda_on_cpu::Wait::kMin, mask, x, 0, where));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x, WHERE) {
  return unsigned(wait(cuda_on_cpu::Wait::kMax, mask, x, 0, where));
}
// Counts the threads of the block for which the predicate holds.
inline int __syncthreads_count(int predicate, WHERE) {
  return int(wait(cuda_on_cpu::Wait::kBlock, 0, predicate != 0, 0, where));
}
inline int __syncthreads_or(int predicate, WHERE) {
  return __syncthreads_count(predicate, where) > 0;
}
inline int __syncthreads_and(int predicate, WHERE) {
  return __syncthreads_count(predicate, where) == int(blockDim.x * blockDim.y * blockDim.z);
}
#undef WHERE

inline void __threadfence() {}
inline void __threadfence_block() {}

// Blocks and threads take turns, so plain operations are atomic.
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> x) {
  const T old = *at;
  *at = old + x;
  return old;
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> x) {
  const T old = *at;
  *at = std::max(old, x);
  return old;
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> x) {
  const T old = *at;
  *at = std::min(old, x);
  return old;
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> x) {
  const T old = *at;
  *at = old | x;
  return old;
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> x) {
  const T old = *at;
  *at = x;
  return old;
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  const T old = *at;
  if (old == expected) *at = x;
  return old;
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, std::type_identity_t<T> x) {
  *to = x;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(unsigned(x)) + 1 : 0; }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
