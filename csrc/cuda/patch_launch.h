// What the launchers of the patch kernels share.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "half.h"
#include "patch_geometry.h"

namespace rlscuda {

RLS_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether each of `size` elements, `stride` apart, begins a vector of `lanes` where the first does.
inline bool begins_vectors(int64_t size, int64_t stride, int64_t lanes) {
  return size == 1 || stride % lanes == 0;
}

// Inside a plane and inside a row of the result the kernels count in 32 bits; across channels,
// images and memory in 64.
inline void check_plane(const PatchGeometry& g) {
  constexpr int64_t kMost = int64_t(1) << 30;
  const int64_t high = (g.out_h - 1) * g.step_h + (g.kernel_h - 1) * g.dilation_h + 1 + g.height;
  const int64_t wide = (g.out_w - 1) * g.step_w + (g.kernel_w - 1) * g.dilation_w + 1 + g.width;
  if (high > kMost || wide > kMost || g.positions() > kMost || high * wide > 4 * kMost ||
      g.row_size() * g.groups > kMost || g.channels * g.height > kMost)
    throw std::runtime_error("x has a plane, or its patches a row, beyond 2^30 elements");
}

// Parts into which `images` are split so that about `blocks` blocks run, `per_chunk` of them to a
// block: each thread, with `side_by_side` images to a step, has a few images but not too many, for
// the sake of rounding. Depends on shapes alone, so that a result is the same on every device.
inline int64_t images_per_chunk(int64_t images, int64_t side_by_side, int64_t tiles) {
  constexpr int64_t kBlocks = 1024, kLeast = 8, kMost = 128;
  const int64_t wanted = ceil_div(images * tiles, kBlocks);
  const int64_t least = kLeast * side_by_side, most = kMost * side_by_side;
  const int64_t bounded = wanted < least ? least : wanted > most ? most : wanted;
  return bounded < images ? bounded : images;
}

}  // namespace rlscuda
