// Multithreading through torch's own pool, and the SIMD clones of a kernel.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <exception>
#include <mutex>

#include "rls_math.h"

// A function so marked is compiled once per SIMD level and dispatched when the library is loaded.
// It must be a non-template with external linkage; what it calls must be ALWAYS_INLINE. A level has
// fused multiply-adds of every width or of none: where a row's whole vectors fused and its rest did
// not, P would lose its symmetry to the bit (avx512f alone fuses no 32-byte vector).
#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 17) || (!defined(__clang__) && __GNUC__ >= 12))
#define SIMD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define HAS_SIMD_CLONES 1
#else
#define SIMD_CLONES
#define HAS_SIMD_CLONES 0
#endif

namespace rlscuda {

// Calls f(begin, end) on ranges of at least `grain` iterations.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end - begin <= grain) {
    if (end > begin) f(begin, end);
    return;
  }
  // the C interface of the pool would replace what an exception says
  std::exception_ptr failure;
  std::mutex guard;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      f(first, last);
    } catch (...) {
      const std::lock_guard lock(guard);
      failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace rlscuda
