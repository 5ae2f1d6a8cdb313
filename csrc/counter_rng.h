// Random numbers as a hash of (seed, purpose, stream, counter): no state, the same on host and
// device and for any split of the work. The hash is the finaliser of SplitMix64 (Steele, Lea and
// Flood 2014, "Fast splittable pseudorandom number generators") over a Weyl sequence.
#pragma once

#include <cstdint>

#include "rls_math.h"

namespace rlscuda {

// What a random number is for; each purpose has streams of its own.
enum class Purpose : uint64_t { kSign = 1, kImage = 2, kPosition = 3 };

constexpr uint64_t kWeyl = 0x9e3779b97f4a7c15u;

// Of one number, or of each of a vector.
template <class Bits>
RLS_HOST_DEVICE ALWAYS_INLINE Bits mix_bits(Bits z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The key of one stream: the rank row j of one draw.
RLS_HOST_DEVICE inline uint64_t stream_key(uint64_t seed, Purpose purpose, int64_t j) {
  return mix_bits(mix_bits(seed + uint64_t(purpose) * kWeyl) + uint64_t(j) * kWeyl);
}

RLS_HOST_DEVICE inline uint64_t random_bits(uint64_t key, int64_t counter) {
  return mix_bits(key + uint64_t(counter) * kWeyl);
}

// The top 63 bits, so that an int64 holds the number and orders it.
RLS_HOST_DEVICE inline int64_t random_int63(uint64_t key, int64_t counter) {
  return int64_t(random_bits(key, counter) >> 1);
}

// The signs of rows [row, row + 64), row 0 of them in bit 0; a set bit means -1.
RLS_HOST_DEVICE inline uint64_t sign_bits(uint64_t key, int64_t row) {
  const int64_t word = row >> 6;
  const int shift = int(row & 63);
  const uint64_t low = random_bits(key, word) >> shift;
  return shift ? low | random_bits(key, word + 1) << (64 - shift) : low;
}

}  // namespace rlscuda
