// What the patch ops share before their kernels: checks of the geometry, and dispatch on the dtype.
#pragma once

#include "arguments.h"
#include "half.h"
#include "patch_geometry.h"

namespace rlscuda {

using IntList = std::vector<int64_t>;

// The schema names the mode by a number: a string argument of the stable ABI leaks at every call.
inline Padding padding_of(int64_t mode) {
  RLS_CHECK(mode >= 0 && mode < kPaddingModes,
            "padding_mode must be 0 (zeros), 1 (reflect), 2 (replicate) or 3 (circular), got ",
            mode);
  return Padding(mode);
}

// Entries are at most 2^31 - 1, so that no product of two can overflow.
inline void check_list(const char* name, const IntList& list, size_t count, int64_t least) {
  RLS_CHECK(list.size() == count, name, " must have ", count, " integers, got ", list.size());
  for (int64_t value : list) {
    RLS_CHECK(value >= least, name, " must be at least ", least, ", got ", value);
    RLS_CHECK(value <= INT32_MAX, name, " must be at most ", INT32_MAX, ", got ", value);
  }
}

inline void check_patch_input(const Tensor& x) {
  RLS_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", shape_of(x));
  RLS_CHECK(x.numel() > 0, "x must not be empty, got ", shape_of(x));
  Arguments("x", x).read_strided("x", x);
}

// x with a layout that the kernels walk: rows along w or pixels along c dense, else a copy.
inline Tensor walkable(const Tensor& x) {
  const bool rows = x.size(3) == 1 || x.stride(3) == 1, pixels = x.size(1) > 1 && x.stride(1) == 1;
  return rows || pixels ? x : dense_copy(x);
}

// Refuses work out of all proportion to x, which nothing could interrupt for minutes: a padding of
// 2^27, say. Up to `free` is allowed whatever the size of x, and `each` for every element.
inline void check_work(const Tensor& x, const char* what, double work, double free, double each) {
  double elements = 1;  // of x in memory: one that was expanded has fewer than it shows
  for (int64_t d = 0; d < 4; ++d) elements *= x.stride(d) ? double(x.size(d)) : 1.0;
  RLS_CHECK(work <= free + each * elements, "padding, kernel and rank must be in proportion to x ",
            shape_of(x), ", got ", work, " ", what);
}

// The multiply-adds of a kernel.
inline void check_products(const Tensor& x, double products) {
  check_work(x, "multiply-adds", products, 1LL << 31, 1 << 18);
}

// The rows of the im2col matrix times those of the result.
inline void check_patches(const Tensor& x, const PatchGeometry& g, int64_t rank) {
  check_work(x, "patches", double(g.images) * double(g.positions()) * double(rank), 1 << 27, 4096);
}

// The geometry of a convolution over x [N, C, H, W]; padding is (left, right, top, bottom).
inline PatchGeometry patch_geometry(const Tensor& x, const IntList& kernel_size,
                                    const IntList& stride, const IntList& padding,
                                    const IntList& dilation, int64_t groups, int64_t padding_mode,
                                    bool ones) {
  check_list("kernel_size", kernel_size, 2, 1);
  check_list("stride", stride, 2, 1);
  check_list("padding", padding, 4, 0);
  check_list("dilation", dilation, 2, 1);
  RLS_CHECK(groups >= 1 && x.size(1) % groups == 0, "groups must divide the ", x.size(1),
            " channels of x, got ", groups);
  const Padding mode = padding_of(padding_mode);
  for (int d = 0; d < 4; ++d) {
    const int64_t size = x.size(d < 2 ? 3 : 2);
    RLS_CHECK(mode != Padding::kReflect || padding[d] < size, "reflect padding must be less than ",
              size, ", got ", padding[d]);
    RLS_CHECK(mode != Padding::kCircular || padding[d] <= size, "circular padding must be at most ",
              size, ", got ", padding[d]);
  }
  PatchGeometry g{};
  g.images = x.size(0), g.channels = x.size(1), g.height = x.size(2), g.width = x.size(3);
  g.stride_n = x.stride(0), g.stride_c = x.stride(1);
  g.stride_h = x.stride(2), g.stride_w = x.stride(3);
  // a stride along one element may be anything: let it continue the dimension inside
  if (g.width == 1 && g.stride_c != 1) g.stride_w = 1;
  if (g.height == 1) g.stride_h = g.width * g.stride_w;
  if (g.channels == 1) g.stride_c = g.height * g.stride_h;
  g.kernel_h = kernel_size[0], g.kernel_w = kernel_size[1];
  g.step_h = stride[0], g.step_w = stride[1];
  g.pad_w = padding[0], g.pad_h = padding[2];
  g.dilation_h = dilation[0], g.dilation_w = dilation[1];
  g.groups = groups, g.padding = mode, g.ones = ones;
  const int64_t span_h = g.height + padding[2] + padding[3] - g.dilation_h * (g.kernel_h - 1);
  const int64_t span_w = g.width + padding[0] + padding[1] - g.dilation_w * (g.kernel_w - 1);
  RLS_CHECK(span_h >= 1 && span_w >= 1, "a dilated kernel of ", g.kernel_h, " x ", g.kernel_w,
            " does not fit the padded input of x ", shape_of(x));
  g.out_h = (span_h - 1) / g.step_h + 1, g.out_w = (span_w - 1) / g.step_w + 1;
  const double high = double(span_h) + double(g.dilation_h) * double(g.kernel_h - 1);
  const double wide = double(span_w) + double(g.dilation_w) * double(g.kernel_w - 1);
  const double taps = std::max(double(g.kernel_h) * high, double(g.kernel_w) * wide);
  check_work(x, "taps along one side", taps, 1 << 27, 4096);
  check_patches(x, g, 1);
  return g;
}

// Calls f with the typed data pointer of x and returns what it returns.
template <class F>
auto dispatch_element(const Tensor& x, const F& f) {
  const void* data = x.const_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(static_cast<const float*>(data));
    case ScalarType::Double:
      return f(static_cast<const double*>(data));
    case ScalarType::BFloat16:
      return f(static_cast<const BFloat16*>(data));
    default:
      RLS_CHECK(x.scalar_type() == ScalarType::Half,
                "x must be float32, float64, bfloat16 or float16, got ", dtype_of(x));
      return f(static_cast<const Half*>(data));
  }
}

// The draw of `rank` rows, whose counters go on from `offset`; each row costs `columns` of x.
inline PatchDraw patch_draw(const Tensor& x, const PatchGeometry& g, int64_t rank, int64_t seed,
                            int64_t offset) {
  RLS_CHECK(rank >= 1, "rank must be at least 1, got ", rank);
  RLS_CHECK(offset >= 0, "offset must be at least 0, got ", offset);
  check_patches(x, g, rank);
  int64_t end;
  RLS_CHECK(!__builtin_add_overflow(offset, g.images * g.positions(), &end),
            "offset must leave room for the patches of x below 2^63, got ", offset);
  return {rank, offset, uint64_t(seed)};
}

// The dtype of a summary of x.
inline ScalarType summary_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace rlscuda
