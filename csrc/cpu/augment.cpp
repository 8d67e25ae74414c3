// Compiled once for each instruction set, with AWP_AUGMENT naming the table. Whatever moves pixels does so in bytes,
// some rows at a time in the first-level cache; then they are converted in one run.
#include "augment.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "awp/philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace awp::cpu {
namespace {

// Bytes that are moved before they are converted, if a row has no more.
constexpr int64_t kBlock = 4096;
constexpr int64_t kLine = 64;

#if defined(__AVX2__)

// x / 255 rounded to nearest, for every byte: 1 / 255 to twice fp32's digits, and one rounding.
constexpr float kHigh = static_cast<float>(1.0 / 255);
constexpr float kLow = static_cast<float>(1.0 / 255 - static_cast<double>(kHigh));

inline float quotient(uint8_t value) {
  const float x = static_cast<float>(value);
  return __builtin_fmaf(x, kHigh, x * kLow);
}

inline void convert(const uint8_t* from, float* to, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    _mm512_storeu_ps(to + i, _mm512_fmadd_ps(x, _mm512_set1_ps(kHigh), _mm512_mul_ps(x, _mm512_set1_ps(kLow))));
  }
#endif
  for (; i + 8 <= count; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
    const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
    _mm256_storeu_ps(to + i, _mm256_fmadd_ps(x, _mm256_set1_ps(kHigh), _mm256_mul_ps(x, _mm256_set1_ps(kLow))));
  }
  for (; i < count; ++i) to[i] = quotient(from[i]);
}

#else

struct Table {
  float of[256];
  Table() {
    for (int value = 0; value < 256; ++value) of[value] = static_cast<float>(value) / 255.0f;
  }
};

inline void convert(const uint8_t* from, float* to, int64_t count) {
  static const Table table;
  for (int64_t i = 0; i < count; ++i) to[i] = table.of[from[i]];
}

#endif

// How 16 pixels of three channels are rearranged: byte `to` of 48 is byte source(to).
struct Interleaved {
  static constexpr int source(int to) { return to % 3 * 16 + to / 3; }
};
struct Separated {
  static constexpr int source(int to) { return to % 16 * 3 + to / 16; }
};
// The same with the pixels' order turned round.
struct InterleavedMirrored {
  static constexpr int source(int to) { return to % 3 * 16 + 15 - to / 3; }
};
struct SeparatedMirrored {
  static constexpr int source(int to) { return (15 - to % 16) * 3 + to / 16; }
};
struct Mirrored {
  static constexpr int source(int to) { return (15 - to / 3) * 3 + to % 3; }
};

#if defined(__AVX2__)

// For each of three target vectors, which bytes come from each of three sources.
template <class Order>
struct Choices {
  alignas(16) uint8_t of[3][3][16];
  constexpr Choices() : of() {
    for (int to = 0; to < 48; ++to) {
      for (int from = 0; from < 3; ++from) {
        const int source = Order::source(to) - from * 16;
        of[to / 16][from][to % 16] = source >= 0 && source < 16 ? static_cast<uint8_t>(source) : 0x80;
      }
    }
  }
};

template <class Order>
inline void rearrange(const uint8_t* const from[3], uint8_t* const to[3]) {
  static constexpr Choices<Order> choices;
  __m128i source[3];
  for (int i = 0; i < 3; ++i) source[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i]));
  for (int k = 0; k < 3; ++k) {
    __m128i target = _mm_setzero_si128();
    for (int i = 0; i < 3; ++i) {
      const __m128i choice = _mm_load_si128(reinterpret_cast<const __m128i*>(choices.of[k][i]));
      target = _mm_or_si128(target, _mm_shuffle_epi8(source[i], choice));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to[k]), target);
  }
}

inline void reverse16(const uint8_t* from, uint8_t* to) {
  const __m128i order = _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(bytes, order));
}

#else

template <class Order>
inline void rearrange(const uint8_t* const from[3], uint8_t* const to[3]) {
  for (int i = 0; i < 48; ++i) to[i / 16][i % 16] = from[Order::source(i) / 16][Order::source(i) % 16];
}

inline void reverse16(const uint8_t* from, uint8_t* to) {
  for (int i = 0; i < 16; ++i) to[i] = from[15 - i];
}

#endif

// Calls step(i) for the first of 16 pixels each, the last of them anew where 16 does not divide their number, which is
// at least 16.
template <class Step>
inline void by_16(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) step(i);
  if (i < count) step(count - 16);
}

// Short runs without a call.
inline void copy(const uint8_t* from, uint8_t* to, int64_t count) {
  if (count > 128) {
    memcpy(to, from, count);
  } else if (count >= 16) {
    by_16(count, [&](int64_t i) { memcpy(to + i, from + i, 16); });
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

inline void zero(uint8_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

// `count` pixels in their order or turned round, from memory to memory of one channel or of several that are packed.
// Three channels and one have paths of their own; `C` is 0 for any number.
template <int C>
inline void copy_packed(const uint8_t* from, uint8_t* to, int64_t count, int64_t channels, bool mirrored) {
  if (!mirrored) return copy(from, to, count * channels);
  const int64_t last = count - 1;
  if (C == 1 && count >= 16) {
    by_16(count, [&](int64_t i) { reverse16(from + count - 16 - i, to + i); });
  } else if (C == 3 && count >= 16) {
    by_16(count, [&](int64_t i) {
      const uint8_t* source = from + 3 * (count - 16 - i);
      uint8_t* target = to + 3 * i;
      const uint8_t* const sources[] = {source, source + 16, source + 32};
      uint8_t* const targets[] = {target, target + 16, target + 32};
      rearrange<Mirrored>(sources, targets);
    });
  } else {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < channels; ++c) to[i * channels + c] = from[(last - i) * channels + c];
    }
  }
}

// From planes `stride` bytes apart to packed pixels.
template <int C>
inline void interleave(const uint8_t* from, int64_t stride, uint8_t* to, int64_t count, int64_t channels,
                       bool mirrored) {
  if (C == 3 && count >= 16) {
    const auto some = [&](int64_t at, int64_t i, auto order) {
      const uint8_t* const sources[] = {from + at, from + stride + at, from + 2 * stride + at};
      uint8_t* const targets[] = {to + 3 * i, to + 3 * i + 16, to + 3 * i + 32};
      rearrange<decltype(order)>(sources, targets);
    };
    if (mirrored) return by_16(count, [&](int64_t i) { some(count - 16 - i, i, InterleavedMirrored()); });
    return by_16(count, [&](int64_t i) { some(i, i, Interleaved()); });
  }
  for (int64_t c = 0; c < channels; ++c) {
    const uint8_t* plane = from + c * stride;
    for (int64_t i = 0; i < count; ++i) to[i * channels + c] = plane[mirrored ? count - 1 - i : i];
  }
}

// From packed pixels to planes `stride` bytes apart.
template <int C>
inline void separate(const uint8_t* from, uint8_t* to, int64_t stride, int64_t count, int64_t channels, bool mirrored) {
  if (C == 3 && count >= 16) {
    const auto some = [&](int64_t at, int64_t i, auto order) {
      const uint8_t* source = from + 3 * at;
      const uint8_t* const sources[] = {source, source + 16, source + 32};
      uint8_t* const targets[] = {to + i, to + stride + i, to + 2 * stride + i};
      rearrange<decltype(order)>(sources, targets);
    };
    if (mirrored) return by_16(count, [&](int64_t i) { some(count - 16 - i, i, SeparatedMirrored()); });
    return by_16(count, [&](int64_t i) { some(i, i, Separated()); });
  }
  for (int64_t c = 0; c < channels; ++c) {
    uint8_t* plane = to + c * stride;
    for (int64_t i = 0; i < count; ++i) plane[i] = from[(mirrored ? count - 1 - i : i) * channels + c];
  }
}

// The rows or columns begin to end - 1 of an output of `size`, which come from the input's from `from` on.
struct Span {
  Span(int64_t size, int64_t offset)
      : begin(std::clamp<int64_t>(-offset, 0, size)),
        end(std::max(begin, std::min(size, size - offset))),
        from(begin + offset) {}
  int64_t begin, end, from;
  int64_t count() const { return end - begin; }
};

// floor(word * count / 2^32), and less than `count`.
int64_t below(uint32_t word, int64_t count) {
  return static_cast<int64_t>(uint64_t{word} * static_cast<uint64_t>(count) >> 32);
}

struct Window {
  Window(const Augment& a, int64_t sample_id) {
    if (a.pad == 0 && !a.flip) return;
    const Words words = sample_words(0, sample_id, a.seed, Stream::kAugment);
    row = below(words.word[0], 2 * a.pad + 1) - a.pad;
    column = below(words.word[1], 2 * a.pad + 1) - a.pad;
    mirrored = a.flip && (words.word[2] & 1) != 0;
  }
  int64_t row = 0, column = 0;
  bool mirrored = false;
};

// Output rows [first, first + count) as bytes: packed, or one plane's rows after the other's, `rows_apart` apart.
template <int C>
struct Mover {
  const Augment& a;
  const uint8_t* image;
  Span rows, columns;
  bool mirrored;

  Mover(const Augment& arguments, const uint8_t* from, const Window& window)
      : a(arguments),
        image(from),
        rows(a.height, window.row),
        columns(a.width, window.column),
        mirrored(window.mirrored) {}

  // The pixels of one output row, or of one plane's, from packed ones or from planes.
  void row(int64_t place, uint8_t* to, int64_t plane_stride) const {
    const int64_t channels = C ? C : a.channels, width = a.width, count = columns.count();
    const int64_t step = a.out_packed ? channels : 1;
    const int64_t planes = a.out_packed ? 1 : channels;
    const bool blank = place < rows.begin || place >= rows.end || count == 0;
    const int64_t begin = blank ? width : mirrored ? width - columns.end : columns.begin;
    for (int64_t p = 0; p < planes; ++p) {
      zero(to + p * plane_stride, begin * step);
      if (!blank) zero(to + p * plane_stride + (begin + count) * step, (width - begin - count) * step);
    }
    if (blank) return;
    const int64_t source = (place - rows.begin + rows.from) * width + columns.from;
    const int64_t source_plane = a.height * width;
    to += begin * step;
    if (a.packed && a.out_packed) {
      copy_packed<C>(image + source * channels, to, count, channels, mirrored);
    } else if (a.packed) {
      separate<C>(image + source * channels, to, plane_stride, count, channels, mirrored);
    } else if (a.out_packed) {
      interleave<C>(image + source, source_plane, to, count, channels, mirrored);
    } else {
      for (int64_t p = 0; p < channels; ++p) {
        copy_packed<1>(image + source + p * source_plane, to + p * plane_stride, count, 1, mirrored);
      }
    }
  }
};

void fill_square(const Augment& a, int64_t sample_id, float* out) {
  const Words words = sample_words(0, sample_id, a.seed, Stream::kCutout);
  const int64_t top = below(words.word[0], a.height) - a.cutout / 2;
  const int64_t left = below(words.word[1], a.width) - a.cutout / 2;
  const int64_t bottom = std::min(a.height, top + a.cutout), right = std::min(a.width, left + a.cutout);
  const int64_t first = std::max<int64_t>(0, left);
  for (int64_t row = std::max<int64_t>(0, top); row < bottom; ++row) {
    if (a.out_packed) {
      float* to = out + (row * a.width + first) * a.channels;
      for (int64_t column = first; column < right; ++column) {
        for (int64_t c = 0; c < a.channels; ++c) *to++ = a.fill[c];
      }
    } else {
      for (int64_t c = 0; c < a.channels; ++c) {
        float* to = out + (c * a.height + row) * a.width;
        std::fill(to + first, to + right, a.fill[c]);
      }
    }
  }
}

inline const uint8_t* image_of(const Augment& a, int64_t sample) {
  return a.images + (a.rows ? a.rows[sample] : sample) * a.image_stride;
}

template <int C>
void augment(const Augment& a, int64_t begin, int64_t end) {
  const int64_t plane = a.height * a.width, elements = a.channels * plane, row_bytes = a.channels * a.width;
  const int64_t lines = std::clamp<int64_t>(kBlock / row_bytes, 1, a.height);
  std::vector<uint8_t> bytes(lines * row_bytes);
  for (int64_t sample = begin; sample < end; ++sample) {
    if (sample + 1 < end) {
      const uint8_t* next = image_of(a, sample + 1);
      for (int64_t i = 0; i < std::min(elements, kBlock); i += kLine) __builtin_prefetch(next + i);
    }
    const Mover<C> mover(a, image_of(a, sample), Window(a, a.sample_ids[sample]));
    float* out = a.out + sample * elements;
    for (int64_t first = 0; first < a.height; first += lines) {
      const int64_t count = std::min(lines, a.height - first), run = count * a.width;
      const int64_t step = a.out_packed ? row_bytes : a.width;
      for (int64_t i = 0; i < count; ++i) mover.row(first + i, bytes.data() + i * step, run);
      if (a.out_packed) {
        convert(bytes.data(), out + first * row_bytes, count * row_bytes);
      } else {
        for (int64_t c = 0; c < a.channels; ++c) {
          convert(bytes.data() + c * run, out + c * plane + first * a.width, run);
        }
      }
    }
    if (a.cutout > 0) fill_square(a, a.sample_ids[sample], out);
  }
}

void augment_any(const Augment& a, int64_t begin, int64_t end) {
  switch (a.channels) {
    case 1:
      return augment<1>(a, begin, end);
    case 3:
      return augment<3>(a, begin, end);
    default:
      return augment<0>(a, begin, end);
  }
}

}  // namespace

const AugmentKernels AWP_AUGMENT = {augment_any};

}  // namespace awp::cpu
