// The im2col matrix of a convolution, without the matrix: which element of x each of its entries
// is.
//
// Row b * L + oh * out_w + ow is the patch of image b at output position (oh, ow), L = out_h *
// out_w; column c * kh * kw + i * kw + j is the tap (i, j) of channel c, the order of
// torch.nn.functional .unfold. The entry is x[b, c, source_h(oh, i), source_w(ow, j)], 0 where the
// source is -1.
#pragma once

#include <cstdint>
#include <type_traits>

#include "rls_math.h"

namespace rlscuda {

// The type in which elements of type T are summed.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

enum class Padding { kZeros, kReflect, kReplicate, kCircular };
constexpr int64_t kPaddingModes = 4;

struct PatchGeometry {
  int64_t images, channels, height, width;               // of x
  int64_t stride_n, stride_c, stride_h, stride_w;        // of x, in elements
  int64_t kernel_h, kernel_w, step_h, step_w;            // of the convolution
  int64_t pad_h, pad_w, dilation_h, dilation_w, groups;  // padding at the top and on the left
  int64_t out_h, out_w;
  Padding padding;
  bool ones;  // append the column of ones that stands for a bias

  RLS_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
  RLS_HOST_DEVICE int64_t positions() const { return out_h * out_w; }
  RLS_HOST_DEVICE int64_t columns() const { return channels / groups * taps(); }
  // Elements of one row of the result, its column of ones included.
  RLS_HOST_DEVICE int64_t row_size() const { return columns() + ones; }
  RLS_HOST_DEVICE int64_t source_h(int64_t oh, int64_t i) const {
    return source(oh * step_h - pad_h + i * dilation_h, height);
  }
  RLS_HOST_DEVICE int64_t source_w(int64_t ow, int64_t j) const {
    return source(ow * step_w - pad_w + j * dilation_w, width);
  }
  // The element of a line of `size` elements that stands at `index` of the padded line, or -1.
  template <class Int>
  RLS_HOST_DEVICE Int source(Int index, Int size) const {
    if (index >= 0 && index < size) return index;
    switch (padding) {
      case Padding::kReflect:
        return index < 0 ? -index : 2 * (size - 1) - index;
      case Padding::kReplicate:
        return index < 0 ? 0 : size - 1;
      case Padding::kCircular:
        return index < 0 ? index + size : index - size;
      default:
        return -1;
    }
  }
};

// One random summary: `rank` rows from the streams of `seed`, counters starting at `offset`.
struct PatchDraw {
  int64_t rank, offset;
  uint64_t seed;
};

}  // namespace rlscuda
