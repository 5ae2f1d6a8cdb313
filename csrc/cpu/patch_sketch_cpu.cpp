// patch_sketch on the CPU, without im2col:
//
//   sketch[k, c, i, j] = 1/sqrt(R) sum_b sum_oh <x[b, c, source_h(oh, i), :], E[k, b, j, oh, :]>
//   E[k, b, j, oh, w] = the sum of the signs of the rows (b, oh, ow) with source_w(ow, j) = w
//
// so that the work is inner products of dense lines of x with lines of signs, which all channels
// share. At stride 1 the E of all j are one line of signs between zeros, read at shifted places;
// otherwise they are built, which serves every stride, dilation and padding mode. Lines of x are
// read where they lie if w is dense (rows) or the channels are (pixels); narrow dense planes are
// taken as one line each (every tap has its own E then); the rest is converted image by image.
// A task is a chunk of the images and a block of the channels. Both depend on the shape alone and
// are reduced in order, so the result does not depend on the number of threads.

#include "counter_rng.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "simd_convert.h"
#include "sketch_tiles.h"

namespace rlscuda {

#define SKETCH_KERNELS(A)                                                          \
  SIMD_CLONES void sketch_rows(const SketchTile<A>& tile) { tile.dots(); }         \
  SIMD_CLONES void sketch_pixels(const SketchTile<A>& tile) { tile.pixel_sums(); } \
  SIMD_CLONES void expand_signs(uint64_t key, int64_t row, int64_t count, A* to) { \
    expand(key, row, count, to);                                                   \
  }
SKETCH_KERNELS(float)
SKETCH_KERNELS(double)
#undef SKETCH_KERNELS

#define CONVERT_RUN(T)                                                                            \
  SIMD_CLONES void convert_run(const T* from, int64_t count, float* to) {                         \
    int64_t e = 0;                                                                                \
    for (; e + kLanes<float> <= count; e += kLanes<float>) store(to + e, load_compute(from + e)); \
    for (; e < count; ++e) to[e] = to_compute<float>(from[e]);                                    \
  }
CONVERT_RUN(BFloat16)
CONVERT_RUN(Half)
#undef CONVERT_RUN

namespace {

constexpr int64_t kNear = 1 << 12;     // elements, of E or of the x of a tile, for the L1 cache
constexpr int64_t kFar = 1 << 15;      // the same of all rank rows or channels, for the L2 cache
constexpr int64_t kTasks = 32;         // wanted
constexpr int64_t kGrain = 1 << 18;    // multiply-adds below which a task is not worth its while
constexpr int64_t kPartial = 1 << 20;  // elements of all partial results

template <class T>
void convert(const T* from, int64_t count, Accumulate<T>* to) {
  if constexpr (sizeof(T) == sizeof(Accumulate<T>)) {
    std::copy_n(from, count, to);
  } else {
    convert_run(from, count, to);
  }
}

template <class T>
class Sketch {
  using A = Accumulate<T>;
  static constexpr int64_t kLane = kLanes<A>;

 public:
  Sketch(const T* x, const PatchGeometry& geometry, const PatchDraw& draw)
      : x_(x), g_(geometry), draw_(draw) {
    total_ = g_.images * g_.positions();
    last_width_ = g_.width;
    merge_plane();
    choose_layout();
    choose_tasks();
    choose_signs();
    source_h_.resize(g_.kernel_h * g_.out_h);
    source_w_.resize(g_.kernel_w * g_.out_w);
    for (int64_t i = 0; i < g_.kernel_h; ++i)
      for (int64_t oh = 0; oh < g_.out_h; ++oh) source_h_[i * g_.out_h + oh] = g_.source_h(oh, i);
    for (int64_t j = 0; j < g_.kernel_w; ++j)
      for (int64_t ow = 0; ow < g_.out_w; ++ow) source_w_[j * g_.out_w + ow] = g_.source_w(ow, j);
  }

  void run(A* out) const {
    thread_local Scratch<A> scratch;
    thread_local Scratch<double> sign_sums;
    scratch.assign(chunks_ * size_, A(0));
    sign_sums.assign(chunks_ * draw_.rank, 0.0);
    A* partial = scratch.data();
    double* ones = sign_sums.data();
    parallel_for(0, chunks_ * blocks_, kGrain / (work_ / (chunks_ * blocks_) + 1) + 1,
                 [&](int64_t first, int64_t last) {
                   for (int64_t task = first; task < last; ++task) {
                     const int64_t q = task / blocks_, block = task % blocks_;
                     const int64_t b0 = q * g_.images / chunks_, b1 = (q + 1) * g_.images / chunks_;
                     Task(*this, partial + q * size_, block).run(b0, b1);
                     if (g_.ones && block == 0) sum_signs(b0, b1, ones + q * draw_.rank);
                   }
                 });
    const double scale = 1 / std::sqrt(double(total_));
    const int64_t n = g_.channels * g_.taps();
    parallel_for(0, draw_.rank, kGrain / (n * chunks_) + 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        A* total = partial + k * n;
        for (int64_t q = 1; q < chunks_; ++q)
          for (int64_t e = 0; e < n; ++e) total[e] += total[q * size_ + e];
        double sum = 0;
        for (int64_t q = 0; q < chunks_; ++q) sum += ones[q * draw_.rank + k];
        const int64_t taps = g_.taps(), per_group = g_.channels / g_.groups;
        for (int64_t group = 0; group < g_.groups; ++group) {
          A* to = out + (group * draw_.rank + k) * g_.row_size();
          const A* from = total + group * per_group * (pixels_ ? 1 : taps);
          for (int64_t c = 0; c < per_group; ++c)
            for (int64_t t = 0; t < taps; ++t)
              *to++ = A(scale) * (pixels_ ? from[t * g_.channels + c] : from[c * taps + t]);
          if (g_.ones) *to = A(scale * sum);
        }
      }
    });
  }

 private:
  // One tap that covers the input exactly: a Linear layer's rows become the pixels of an image, and
  // a dense plane becomes one line.
  void merge_plane() {
    const bool whole = g_.taps() == 1 && g_.step_h == 1 && g_.step_w == 1 &&
                       g_.out_h == g_.height && g_.out_w == g_.width;
    if (!whole) return;
    const int64_t plane = g_.height * g_.width;
    if (plane == 1) {
      g_.width = g_.out_w = std::clamp<int64_t>(kFar / 2 / g_.channels, 8, 64);
      g_.stride_w = g_.stride_n;
      g_.stride_n *= g_.width;
      last_width_ = (g_.images - 1) % g_.width + 1;
      g_.images = (g_.images - 1) / g_.width + 1;
    } else if (g_.stride_h == g_.width * g_.stride_w) {
      g_.height = g_.out_h = 1;
      g_.width = g_.out_w = last_width_ = plane;
    }
  }

  void choose_layout() {
    const bool same = sizeof(T) == sizeof(A);
    const bool many = g_.channels >= kLane, dense_c = g_.stride_c == 1, dense_w = g_.stride_w == 1;
    const int64_t plane = g_.height * g_.width;
    length_ = g_.width;
    if (same && many && dense_c) {
      pixels_ = true;
    } else if (same && dense_w && g_.width >= kLane && last_width_ == g_.width) {
      // rows where they lie
    } else if (same && dense_w && g_.stride_h == g_.width && plane >= kLane &&
               last_width_ == g_.width && plane * g_.taps() <= kFar) {
      flat_ = true;
      length_ = plane;
    } else {
      copied_ = true;
      pixels_ = many && (dense_c || g_.width < kLane);
      if (!pixels_) length_ = (g_.width + kLane - 1) / kLane * kLane;
    }
  }

  void choose_signs() {
    const int64_t reach = (g_.kernel_w - 1) * g_.dilation_w;
    const bool inside = g_.pad_w == 0 && g_.out_w + reach <= g_.width;
    shifted_ = !flat_ && g_.step_w == 1 && (g_.padding == Padding::kZeros || inside);
    lead_ = shifted_ ? std::max<int64_t>(0, reach - g_.pad_w) : 0;
    planes_ = flat_ ? g_.taps() : shifted_ ? 1 : g_.kernel_w;
    sign_stride_ = shifted_ ? lead_ + std::max(g_.pad_w + length_, g_.out_w) : length_;
    const int64_t line = pixels_ ? std::min<int64_t>(g_.channels, 4 * kLane) * g_.width
                                 : std::min<int64_t>(g_.channels, 4) * length_;
    band_ = flat_ ? g_.out_h
                  : std::clamp(std::min(kNear / (planes_ * sign_stride_), 2 * kNear / line),
                               int64_t(1), g_.out_h);
    sign_size_ = flat_ ? planes_ * length_ : planes_ * band_ * sign_stride_;
    const int64_t lines = flat_ ? 1 : band_;
    const int64_t least = band_ < g_.out_h ? 1 : std::min(g_.images, 512 / (lines * length_) + 1);
    rank_step_ = std::clamp<int64_t>(kFar / (sign_size_ * least), 1, draw_.rank);
    batch_ = least;  // a tile should see as many elements as pay for its sums
    if (band_ < g_.out_h) return;
    const int64_t block = g_.channels / blocks_ * g_.height * g_.width;
    batch_ =
        std::min({kNear / (sign_size_ * rank_step_), 2 * kNear / (line * lines), kFar / block});
    batch_ = std::clamp(batch_, least, g_.images);
  }

  // Chunks of the images first; blocks of the channels where the images are few or are copied.
  void choose_tasks() {
    size_ = draw_.rank * g_.channels * g_.taps();
    work_ = total_ * size_;
    const int64_t wanted = std::min(kTasks, work_ / kGrain + 1);
    chunks_ = std::clamp<int64_t>(std::min(wanted, kPartial / size_), 1, g_.images);
    blocks_ = std::min((wanted - 1) / chunks_ + 1, g_.channels / 32);
    if (copied_) blocks_ = std::max(blocks_, g_.channels * g_.height * g_.width / (2 * kFar));
    blocks_ = std::clamp<int64_t>(blocks_, 1, std::max<int64_t>(1, g_.channels / kLane));
  }

  void sum_signs(int64_t b0, int64_t b1, double* sums) const {
    const int64_t first = b0 * g_.positions(), end = std::min(b1 * g_.positions(), total_);
    for (int64_t k = 0; k < draw_.rank; ++k) {
      const uint64_t key = stream_key(draw_.seed, Purpose::kSign, k);
      int64_t negative = 0;
      for (int64_t row = first; row < end; row += 64) {
        const int64_t rest = end - row;
        const uint64_t bits = sign_bits(key, draw_.offset + row);
        negative += __builtin_popcountll(rest < 64 ? bits & ((uint64_t(1) << rest) - 1) : bits);
      }
      sums[k] = double(end - first - 2 * negative);
    }
  }

  // One block of the channels over one chunk of the images.
  class Task {
   public:
    Task(const Sketch& sketch, A* partial, int64_t block)
        : s_(sketch), g_(sketch.g_), c0_(block * g_.channels / sketch.blocks_) {
      channels_ = (block + 1) * g_.channels / s_.blocks_ - c0_;
      out_ = partial + c0_ * (s_.pixels_ ? 1 : g_.taps());
    }

    void run(int64_t b0, int64_t b1) const {
      thread_local Scratch<A> copy, signs, row;
      thread_local Scratch<SketchLine<A>> lines;
      thread_local Scratch<int64_t> offsets;
      signs.resize(s_.sign_size_ * s_.rank_step_ * s_.batch_);
      row.resize((s_.band_ * g_.out_w / 64 + 1) * 64);
      lines.resize(s_.batch_ * s_.band_ * g_.kernel_h);
      offsets.resize(2 * s_.rank_step_ * g_.taps() + g_.kernel_h + 1);
      if (s_.copied_) copy.resize(s_.batch_ * copy_size());
      for (int64_t b = b0; b < b1; b += s_.batch_) {
        const int64_t images = std::min(s_.batch_, b1 - b);
        const A* from = nullptr;
        if (s_.copied_) {
          for (int64_t m = 0; m < images; ++m) copy_image(b + m, copy.data() + m * copy_size());
          from = copy.data();
        } else {
          from = reinterpret_cast<const A*>(s_.x_) + b * g_.stride_n + c0_ * g_.stride_c;
        }
        for (int64_t o = 0; o < g_.out_h; o += s_.band_) {
          const int64_t o_end = std::min(o + s_.band_, g_.out_h);
          for (int64_t k = 0; k < s_.draw_.rank; k += s_.rank_step_) {
            const int64_t ranks = std::min(s_.rank_step_, s_.draw_.rank - k);
            for (int64_t r = 0; r < ranks; ++r)
              for (int64_t m = 0; m < images; ++m)
                place_signs(k + r, b + m, o, o_end, row.data(),
                            signs.data() + (r * s_.batch_ + m) * s_.sign_size_);
            multiply(from, signs.data(), lines.data(), offsets.data(), k, ranks, b, images, o,
                     o_end);
          }
        }
      }
    }

   private:
    // The copy of an image is [H, W, channels] for pixels, [channels, H, length] for rows.
    int64_t copy_size() const {
      return g_.height * channels_ * (s_.pixels_ ? g_.width : s_.length_);
    }

    int64_t width(int64_t b) const { return b + 1 < g_.images ? g_.width : s_.last_width_; }

    void copy_image(int64_t b, A* to) const {
      const T* image = s_.x_ + b * g_.stride_n + c0_ * g_.stride_c;
      const int64_t pixels = width(b);
      for (int64_t h = 0; h < g_.height; ++h) {
        const T* from = image + h * g_.stride_h;
        if (s_.pixels_ && g_.stride_c == 1) {
          for (int64_t w = 0; w < pixels; ++w)
            convert(from + w * g_.stride_w, channels_, to + (h * g_.width + w) * channels_);
          continue;
        }
        for (int64_t c = 0; c < channels_; ++c) {
          const T* line = from + c * g_.stride_c;
          A* dense = to + (c * g_.height + h) * s_.length_;
          if (s_.pixels_) {
            for (int64_t w = 0; w < pixels; ++w)
              to[(h * g_.width + w) * channels_ + c] = to_compute<A>(line[w * g_.stride_w]);
            continue;
          }
          if (g_.stride_w == 1) {
            convert(line, pixels, dense);
          } else {
            for (int64_t w = 0; w < pixels; ++w) dense[w] = to_compute<A>(line[w * g_.stride_w]);
          }
          std::fill(dense + pixels, dense + s_.length_, A(0));
        }
      }
    }

    // E of rank row k and image b for output rows [o, o_end).
    void place_signs(int64_t k, int64_t b, int64_t o, int64_t o_end, A* row, A* to) const {
      const uint64_t key = stream_key(s_.draw_.seed, Purpose::kSign, k);
      expand_signs(key, s_.draw_.offset + b * g_.positions() + o * g_.out_w, (o_end - o) * g_.out_w,
                   row);
      std::fill_n(to, s_.sign_size_, A(0));
      for (int64_t oh = o; oh < o_end; ++oh, row += g_.out_w) {
        if (s_.shifted_) {
          std::copy_n(row, g_.out_w, to + (oh - o) * s_.sign_stride_ + s_.lead_);
          continue;
        }
        for (int64_t tap = 0; tap < s_.planes_; ++tap) {
          const int64_t h = s_.flat_ ? s_.source_h_[tap / g_.kernel_w * g_.out_h + oh] : 0;
          const int64_t* source = s_.source_w_.data() + tap % g_.kernel_w * g_.out_w;
          if (h < 0) continue;
          A* line = s_.flat_ ? to + tap * s_.length_ + h * g_.width
                             : to + (tap * s_.band_ + oh - o) * s_.sign_stride_;
          for (int64_t ow = 0; ow < g_.out_w; ++ow)
            if (const int64_t w = source[ow]; w >= 0) line[w] += row[ow];
        }
      }
    }

    void multiply(const A* x, const A* signs, SketchLine<A>* lines, int64_t* offsets, int64_t k,
                  int64_t ranks, int64_t b, int64_t images, int64_t o, int64_t o_end) const {
      const int64_t per_rank = s_.flat_ ? g_.taps() : g_.kernel_w;
      int64_t* out_offsets = offsets + ranks * per_rank;
      int64_t* first_line = out_offsets + ranks * per_rank;
      for (int64_t r = 0; r < ranks; ++r) {
        for (int64_t j = 0; j < per_rank; ++j) {
          const int64_t shift = s_.shifted_ ? s_.lead_ + g_.pad_w - j * g_.dilation_w
                                : s_.flat_  ? j * s_.length_
                                            : j * s_.band_ * s_.sign_stride_;
          offsets[r * per_rank + j] = r * s_.batch_ * s_.sign_size_ + shift;
          out_offsets[r * per_rank + j] =
              (k + r) * g_.channels * g_.taps() + j * (s_.pixels_ ? g_.channels : 1);
        }
      }
      const int64_t stride_n = s_.copied_ ? copy_size() : g_.stride_n;
      const int64_t line = s_.pixels_ ? g_.width * channels_ : s_.length_;
      const int64_t stride_h = s_.copied_ ? line : g_.stride_h;
      SketchTile<A> tile{};
      tile.lines = lines, tile.first_line = first_line;
      tile.sign_offset = offsets, tile.out_offset = out_offsets;
      tile.tap_rows = s_.flat_ ? 1 : g_.kernel_h;
      tile.columns = ranks * per_rank, tile.channels = channels_;
      tile.out_row = g_.kernel_w * (s_.pixels_ ? g_.channels : 1);
      tile.out_channel = s_.pixels_ ? 1 : g_.taps();
      tile.stride = s_.copied_   ? (s_.pixels_ ? channels_ : g_.height * s_.length_)
                    : s_.pixels_ ? g_.stride_w
                                 : g_.stride_c;
      tile.out = out_;
      int64_t count = 0;
      for (int64_t i = 0; i < tile.tap_rows; ++i) {
        first_line[i] = count;
        const int64_t* source = s_.source_h_.data() + i * g_.out_h;
        for (int64_t m = 0; m < images; ++m) {
          const A* image = x + m * stride_n;
          const A* image_signs = signs + m * s_.sign_size_;
          const int64_t length = s_.pixels_ ? width(b + m) : s_.length_;
          if (s_.flat_) {
            lines[count++] = {image, image_signs, length};
            continue;
          }
          for (int64_t oh = o; oh < o_end; ++oh)
            if (source[oh] >= 0)
              lines[count++] = {image + source[oh] * stride_h,
                                image_signs + (oh - o) * s_.sign_stride_, length};
        }
      }
      first_line[tile.tap_rows] = count;
      s_.pixels_ ? sketch_pixels(tile) : sketch_rows(tile);
    }

    const Sketch& s_;
    const PatchGeometry& g_;
    int64_t c0_, channels_;
    A* out_;
  };

  const T* x_;
  PatchGeometry g_;
  PatchDraw draw_;
  int64_t total_, last_width_;  // rows; pixels of a line of the last image
  bool pixels_ = false, flat_ = false, copied_ = false, shifted_ = false;
  int64_t length_;                                   // of a line of x
  int64_t planes_, lead_, sign_stride_, sign_size_;  // E of an image: planes of lines
  int64_t band_, rank_step_, batch_;                 // output rows, rank rows, images at a time
  int64_t blocks_, chunks_;                          // of channels, of images
  int64_t size_, work_;                              // of one partial result; multiply-adds in all
  Scratch<int64_t> source_h_, source_w_;             // [kernel_h, out_h], [kernel_w, out_w]
};

}  // namespace

template <class T>
void patch_sketch_cpu(const T* x, const PatchGeometry& geometry, const PatchDraw& draw,
                      Accumulate<T>* out) {
  Sketch<T>(x, geometry, draw).run(out);
}

template void patch_sketch_cpu(const float*, const PatchGeometry&, const PatchDraw&, float*);
template void patch_sketch_cpu(const double*, const PatchGeometry&, const PatchDraw&, double*);
template void patch_sketch_cpu(const BFloat16*, const PatchGeometry&, const PatchDraw&, float*);
template void patch_sketch_cpu(const Half*, const PatchGeometry&, const PatchDraw&, float*);

}  // namespace rlscuda
