// patch_sample on the CPU: row j is the patch of the image whose hash is the least of stream j, at
// the position that a second hash names. Merging two batches is keeping the row of the lesser hash.

#include "counter_rng.h"
#include "half.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace rlscuda {
namespace {

// The patch of one image at position (oh, ow), in the order of the columns.
template <class T, class A>
void gather(const T* x, const PatchGeometry& g, int64_t oh, int64_t ow, int64_t k, int64_t rank,
            A* out) {
  thread_local Scratch<int64_t> taps;  // offsets in a channel, -1 in the padding
  taps.resize(g.taps());
  for (int64_t i = 0; i < g.kernel_h; ++i) {
    const int64_t h = g.source_h(oh, i);
    for (int64_t j = 0; j < g.kernel_w; ++j) {
      const int64_t w = g.source_w(ow, j);
      taps[i * g.kernel_w + j] = h < 0 || w < 0 ? -1 : h * g.stride_h + w * g.stride_w;
    }
  }
  const int64_t per_group = g.channels / g.groups, count = g.taps();
  const int64_t* offset = taps.data();
  for (int64_t group = 0; group < g.groups; ++group) {
    A* to = out + (group * rank + k) * g.row_size();
    if (count == 1 && g.stride_c == 1 && offset[0] >= 0) {  // a row of a Linear input, or a pixel
      for (int64_t c = 0; c < per_group; ++c) to[c] = to_compute<A>(x[offset[0] + c]);
      x += per_group, to += per_group;
    } else {
      for (int64_t c = 0; c < per_group; ++c, x += g.stride_c)
        for (int64_t t = 0; t < count; ++t) *to++ = offset[t] < 0 ? 0 : to_compute<A>(x[offset[t]]);
    }
    if (g.ones) *to = 1;
  }
}

// The least hash of a stream over `images` counters from `offset` on, and the first image that has
// it: kLanes of them at a time.
constexpr int kLanes = 8;
typedef uint64_t Hashes __attribute__((vector_size(8 * kLanes)));
typedef int64_t Numbers __attribute__((vector_size(8 * kLanes)));

ALWAYS_INLINE void find_least(uint64_t key, int64_t offset, int64_t images, int64_t* hash,
                              int64_t* image) {
  Numbers least{}, first{}, at{};
  Hashes counter{};
  for (int lane = 0; lane < kLanes; ++lane) {
    counter[lane] = key + uint64_t(offset + lane) * kWeyl;
    least[lane] = INT64_MAX;
    at[lane] = lane;
  }
  int64_t b = 0;
  for (; b + kLanes <= images; b += kLanes, counter += kLanes * kWeyl, at += kLanes) {
    const Numbers drawn = Numbers(mix_bits(counter) >> 1);
    first = drawn < least ? at : first;
    least = drawn < least ? drawn : least;
  }
  *hash = INT64_MAX, *image = 0;
  const auto take = [&](int64_t drawn, int64_t from) {
    if (drawn < *hash || (drawn == *hash && from < *image)) *hash = drawn, *image = from;
  };
  for (int lane = 0; lane < kLanes; ++lane) take(least[lane], first[lane]);
  for (; b < images; ++b) take(random_int63(key, offset + b), b);
}

}  // namespace

SIMD_CLONES void least_hash(uint64_t key, int64_t offset, int64_t images, int64_t* hash,
                            int64_t* image) {
  find_least(key, offset, images, hash, image);
}

template <class T>
void patch_sample_cpu(const T* x, const PatchGeometry& g, const PatchDraw& draw, Accumulate<T>* out,
                      int64_t* keys) {
  constexpr int64_t kGrain = 16384;  // hashes and elements below which a thread is not worth waking
  const int64_t work = g.images + g.channels * g.taps();
  parallel_for(0, draw.rank, kGrain / work + 1, [&](int64_t k0, int64_t k1) {
    for (int64_t k = k0; k < k1; ++k) {
      const uint64_t key = stream_key(draw.seed, Purpose::kImage, k);
      int64_t image;
      least_hash(key, draw.offset, g.images, &keys[k], &image);
      const uint64_t place = stream_key(draw.seed, Purpose::kPosition, k);
      const int64_t position = random_int63(place, draw.offset + image) % g.positions();
      gather(x + image * g.stride_n, g, position / g.out_w, position % g.out_w, k, draw.rank, out);
    }
  });
}

template void patch_sample_cpu(const float*, const PatchGeometry&, const PatchDraw&, float*,
                               int64_t*);
template void patch_sample_cpu(const double*, const PatchGeometry&, const PatchDraw&, double*,
                               int64_t*);
template void patch_sample_cpu(const BFloat16*, const PatchGeometry&, const PatchDraw&, float*,
                               int64_t*);
template void patch_sample_cpu(const Half*, const PatchGeometry&, const PatchDraw&, float*,
                               int64_t*);

}  // namespace rlscuda
