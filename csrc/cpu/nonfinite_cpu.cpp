// nonfinite on the CPU: whether any element has all exponent bits set (infinity or NaN).
#include <atomic>

#include "kernels.h"
#include "parallel.h"

namespace rlscuda {
namespace {

template <class Bits>
ALWAYS_INLINE bool any_set(const Bits* x, Bits mask, int64_t begin, int64_t end) {
  Bits found = 0;
  for (int64_t i = begin; i < end; ++i) found |= Bits((x[i] & mask) == mask);
  return found != 0;
}

}  // namespace

SIMD_CLONES bool any_nonfinite(const uint16_t* x, uint16_t mask, int64_t begin, int64_t end) {
  return any_set(x, mask, begin, end);
}
SIMD_CLONES bool any_nonfinite(const uint32_t* x, uint32_t mask, int64_t begin, int64_t end) {
  return any_set(x, mask, begin, end);
}
SIMD_CLONES bool any_nonfinite(const uint64_t* x, uint64_t mask, int64_t begin, int64_t end) {
  return any_set(x, mask, begin, end);
}

template <class Bits>
bool nonfinite_cpu(const void* x, Bits exponent_mask, int64_t count) {
  std::atomic<bool> found{false};
  const Bits* bits = static_cast<const Bits*>(x);
  parallel_for(0, count, 65536, [&](int64_t begin, int64_t end) {
    if (any_nonfinite(bits, exponent_mask, begin, end))
      found.store(true, std::memory_order_relaxed);
  });
  return found;
}

template bool nonfinite_cpu<uint16_t>(const void*, uint16_t, int64_t);
template bool nonfinite_cpu<uint32_t>(const void*, uint32_t, int64_t);
template bool nonfinite_cpu<uint64_t>(const void*, uint64_t, int64_t);

}  // namespace rlscuda
