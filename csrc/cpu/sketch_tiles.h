// The inner products of patch_sketch on the CPU. A column is one (rank row, tap) of the result; its
// signs along a line of x are those of the line, shifted. A tile keeps a few channels times a few
// columns in registers over many lines, so that each load feeds several multiply-adds.
#pragma once

#include <algorithm>

#include "counter_rng.h"
#include "simd.h"

namespace rlscuda {

// The signs of rows [row, row + count) as +-1; writes whole groups of 64.
template <class A>
ALWAYS_INLINE void expand(uint64_t key, int64_t row, int64_t count, A* to) {
  typedef std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t> Bits;
  constexpr int W = kLanes<A>;
  const Vec<Bits> one = reinterpret_cast<Vec<Bits>>(Vec<A>{} + A(1));
  Vec<Bits> lane;
  for (int k = 0; k < W; ++k) lane[k] = Bits(k);
  const int shift = int(row & 63);
  int64_t word = row >> 6;
  uint64_t low = random_bits(key, word);
  for (int64_t e = 0; e < count; e += 64, to += 64) {
    uint64_t bits = low;
    if (shift || e + 64 < count) low = random_bits(key, ++word);
    if (shift) bits = bits >> shift | low << (64 - shift);
    for (int v = 0; v < 64; v += W) {
      const Vec<Bits> sign = ((Vec<Bits>{} + Bits(bits >> v)) >> lane) << (8 * sizeof(A) - 1);
      store(to + v, reinterpret_cast<Vec<A>>(one | sign));
    }
  }
}

// A run of x along w, and the signs that meet it.
template <class A>
struct SketchLine {
  const A* x;
  const A* signs;
  int64_t length;
};

// For each tap row i: out[c * out_channel + i * out_row + out_offset[column]] += the sum over the
// lines of that tap row and over w of x[c, w] * signs[column, w].
template <class A>
struct SketchTile {
  const SketchLine<A>* lines;
  const int64_t* first_line;   // [tap_rows + 1]: where the lines of each tap row begin
  const int64_t* sign_offset;  // [columns], from the signs of a line
  const int64_t* out_offset;   // [columns]
  int64_t tap_rows, columns, channels;
  int64_t out_row, out_channel;  // out_channel is 1 where the channels of x are dense
  int64_t stride;  // of x from channel to channel (w is dense), or from w to w (channels are)
  A* out;

  // CHANNELS x COLUMNS inner products along w; every line has the same length, at least one vector.
  template <int CHANNELS, int COLUMNS>
  ALWAYS_INLINE void dot(int64_t i, int64_t channel, int64_t column) const {
    typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Int;
    constexpr int W = kLanes<A>;
    if (first_line[i] == first_line[i + 1]) return;
    const int64_t length = lines[first_line[i]].length, whole = length / W * W;
    Vec<Int> fresh;  // the lanes of the last, overlapping vector that earlier ones did not cover
    for (int k = 0; k < W; ++k) fresh[k] = k < W - (length - whole) ? 0 : -1;
    const int64_t* shift = sign_offset + column;
    Vec<A> acc[CHANNELS][COLUMNS] = {};
    for (int64_t l = first_line[i]; l < first_line[i + 1]; ++l) {
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
        out[(channel + c) * out_channel + i * out_row + out_offset[column + j]] += sum(acc[c][j]);
  }

  template <int CHANNELS, int COLUMNS>
  ALWAYS_INLINE void dot_columns(int64_t i, int64_t channel, int64_t column) const {
    for (; column + COLUMNS <= columns; column += COLUMNS)
      dot<CHANNELS, COLUMNS>(i, channel, column);
    if constexpr (COLUMNS > 1) {
      if (column < columns) dot_columns<CHANNELS, COLUMNS - 1>(i, channel, column);
    }
  }

  ALWAYS_INLINE void dots() const {
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4)
      for (int64_t i = 0; i < tap_rows; ++i) dot_columns<4, 3>(i, c, 0);
    for (; c + 2 <= channels; c += 2)
      for (int64_t i = 0; i < tap_rows; ++i) dot_columns<2, 5>(i, c, 0);
    for (; c < channels; ++c)
      for (int64_t i = 0; i < tap_rows; ++i) dot_columns<1, 5>(i, c, 0);
  }

  // VECTORS of channels x COLUMNS sums over pixels; the first `skip` channels are not its own.
  template <int VECTORS, int COLUMNS>
  ALWAYS_INLINE void pixel_sum(int64_t i, int64_t channel, int64_t column, int64_t skip) const {
    constexpr int W = kLanes<A>;
    const int64_t* shift = sign_offset + column;
    Vec<A> acc[COLUMNS][VECTORS] = {};
    for (int64_t l = first_line[i]; l < first_line[i + 1]; ++l) {
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
      A* to = out + channel + i * out_row + out_offset[column + j];
      for (int64_t k = 0; k < skip; ++k) acc[j][0][k] = 0;
      for (int v = 0; v < VECTORS; ++v) store(to + v * W, load(to + v * W) + acc[j][v]);
    }
  }

  template <int VECTORS, int COLUMNS>
  ALWAYS_INLINE void pixel_columns(int64_t i, int64_t channel, int64_t column, int64_t skip) const {
    for (; column + COLUMNS <= columns; column += COLUMNS)
      pixel_sum<VECTORS, COLUMNS>(i, channel, column, skip);
    if constexpr (COLUMNS > 1) {
      if (column < columns) pixel_columns<VECTORS, COLUMNS - 1>(i, channel, column, skip);
    }
  }

  // Channels are dense; there must be at least one vector of them.
  ALWAYS_INLINE void pixel_sums() const {
    constexpr int64_t W = kLanes<A>;
    int64_t c = 0;
    for (; c + 4 * W <= channels; c += 4 * W)
      for (int64_t i = 0; i < tap_rows; ++i) pixel_columns<4, 3>(i, c, 0, 0);
    for (; c + 2 * W <= channels; c += 2 * W)
      for (int64_t i = 0; i < tap_rows; ++i) pixel_columns<2, 5>(i, c, 0, 0);
    for (; c + W <= channels; c += W)
      for (int64_t i = 0; i < tap_rows; ++i) pixel_columns<1, 5>(i, c, 0, 0);
    if (c == channels) return;
    const int64_t last = channels - W;
    for (int64_t i = 0; i < tap_rows; ++i) pixel_columns<1, 5>(i, last, 0, c - last);
  }
};

}  // namespace rlscuda
