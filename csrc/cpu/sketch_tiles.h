// The inner products of patch_sketch on the CPU. A column is one (rank row, tap) of the result; its
// signs along a line of x are those of the line, shifted. A tile keeps a few channels times a few
// columns in registers over many lines, so that each load feeds several multiply-adds.
#pragma once

#include <algorithm>

#include "simd.h"

namespace rlscuda {

// A run of x along w, and the signs that meet it.
template <class A>
struct SketchLine {
  const A* x;
  const A* signs;
  int64_t length;
};

// out[c * taps + out_offset[column]] += sum over lines and w of x[c, w] * signs[column, w].
template <class A>
struct SketchTile {
  const SketchLine<A>* lines;
  int64_t line_count;
  const int64_t* sign_offset;  // [columns], from the signs of a line
  const int64_t* out_offset;   // [columns]
  int64_t columns, channels, taps;
  int64_t stride;  // of x from channel to channel (w is dense), or from w to w (channels are)
  A* out;

  // CHANNELS x COLUMNS inner products along w; every line has the same length, at least one vector.
  template <int CHANNELS, int COLUMNS>
  ALWAYS_INLINE void dot(int64_t channel, int64_t column) const {
    typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Int;
    constexpr int W = kLanes<A>;
    const int64_t length = lines[0].length, whole = length / W * W;
    Vec<Int> fresh;  // the lanes of the last, overlapping vector that earlier ones did not cover
    for (int k = 0; k < W; ++k) fresh[k] = k < W - (length - whole) ? 0 : -1;
    const int64_t* shift = sign_offset + column;
    Vec<A> acc[CHANNELS][COLUMNS] = {};
    for (int64_t l = 0; l < line_count; ++l) {
      const A* x = lines[l].x + channel * stride;
      const A* signs = lines[l].signs;
      for (int64_t w = 0; w < whole; w += W) {
        Vec<A> s[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) s[j] = load(signs + shift[j] + w);
        for (int c = 0; c < CHANNELS; ++c) {
          const Vec<A> v = load(x + c * stride + w);
          for (int j = 0; j < COLUMNS; ++j) acc[c][j] += v * s[j];
        }
      }
      if (whole < length) {
        Vec<A> s[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) s[j] = load(signs + shift[j] + length - W);
        for (int c = 0; c < CHANNELS; ++c) {
          const Vec<Int> bits = reinterpret_cast<Vec<Int>>(load(x + c * stride + length - W));
          const Vec<A> v = reinterpret_cast<Vec<A>>(bits & fresh);
          for (int j = 0; j < COLUMNS; ++j) acc[c][j] += v * s[j];
        }
      }
    }
    for (int c = 0; c < CHANNELS; ++c)
      for (int j = 0; j < COLUMNS; ++j)
        out[(channel + c) * taps + out_offset[column + j]] += sum(acc[c][j]);
  }

  template <int CHANNELS, int COLUMNS>
  ALWAYS_INLINE void dot_columns(int64_t channel, int64_t column) const {
    for (; column + COLUMNS <= columns; column += COLUMNS) dot<CHANNELS, COLUMNS>(channel, column);
    if constexpr (COLUMNS > 1) {
      if (column < columns) dot_columns<CHANNELS, COLUMNS - 1>(channel, column);
    }
  }

  ALWAYS_INLINE void dots() const {
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) dot_columns<4, 3>(c, 0);
    for (; c < channels; ++c) dot_columns<1, 5>(c, 0);
  }

  // VECTORS of channels x COLUMNS sums over pixels; the first `skip` channels are another tile's.
  template <int VECTORS, int COLUMNS>
  ALWAYS_INLINE void pixel_sum(int64_t channel, int64_t column, int64_t skip) const {
    constexpr int W = kLanes<A>;
    const int64_t* shift = sign_offset + column;
    Vec<A> acc[COLUMNS][VECTORS] = {};
    for (int64_t l = 0; l < line_count; ++l) {
      const A* x = lines[l].x + channel;
      const A* signs = lines[l].signs;
      for (int64_t w = 0; w < lines[l].length; ++w, x += stride) {
        A s[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) s[j] = signs[shift[j] + w];
        for (int v = 0; v < VECTORS; ++v) {
          const Vec<A> pixel = load(x + v * W);
          for (int j = 0; j < COLUMNS; ++j) acc[j][v] += pixel * s[j];
        }
      }
    }
    for (int j = 0; j < COLUMNS; ++j) {
      A* to = out + channel * taps + out_offset[column + j];
      for (int64_t k = skip; k < VECTORS * W; ++k) to[k * taps] += acc[j][k / W][k % W];
    }
  }

  template <int VECTORS, int COLUMNS>
  ALWAYS_INLINE void pixel_columns(int64_t channel, int64_t column, int64_t skip) const {
    for (; column + COLUMNS <= columns; column += COLUMNS)
      pixel_sum<VECTORS, COLUMNS>(channel, column, skip);
    if constexpr (COLUMNS > 1) {
      if (column < columns) pixel_columns<VECTORS, COLUMNS - 1>(channel, column, skip);
    }
  }

  // Channels are dense; there must be at least one vector of them.
  ALWAYS_INLINE void pixel_sums() const {
    constexpr int64_t W = kLanes<A>;
    int64_t c = 0;
    for (; c + 4 * W <= channels; c += 4 * W) pixel_columns<4, 3>(c, 0, 0);
    for (; c + W <= channels; c += W) pixel_columns<1, 5>(c, 0, 0);
    if (c < channels) pixel_columns<1, 5>(channels - W, 0, c - (channels - W));
  }
};

}  // namespace rlscuda
