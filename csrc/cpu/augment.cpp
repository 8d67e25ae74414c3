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
  // the plain intrinsics make g++ 12 warn of its own headers
  constexpr __mmask16 kAll = 0xFFFF;
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    const __m512 x = _mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepu8_epi32(kAll, bytes));
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

// 16 bytes from each of two places, side by side.
inline __m256i load_two(const uint8_t* first, const uint8_t* second) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128(reinterpret_cast<const __m128i*>(second)),
                                 1);
}

inline void store_two(uint8_t* first, uint8_t* second, __m256i value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(value));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(value, 1));
}

// Two times 16 pixels: each vector of 16 bytes, and its neighbour `apart` bytes further on.
template <class Order>
inline void rearrange(const uint8_t* const from[3], int64_t from_apart, uint8_t* const to[3], int64_t to_apart) {
  static constexpr Choices<Order> choices;
  __m256i source[3];
  for (int i = 0; i < 3; ++i) source[i] = load_two(from[i], from[i] + from_apart);
  for (int k = 0; k < 3; ++k) {
    __m256i target = _mm256_setzero_si256();
    for (int i = 0; i < 3; ++i) {
      const __m128i choice = _mm_load_si128(reinterpret_cast<const __m128i*>(choices.of[k][i]));
      target = _mm256_or_si256(target, _mm256_shuffle_epi8(source[i], _mm256_broadcastsi128_si256(choice)));
    }
    store_two(to[k], to[k] + to_apart, target);
  }
}

// Two times 16 bytes, the order of each turned round.
inline void reverse(const uint8_t* from, int64_t from_apart, uint8_t* to, int64_t to_apart) {
  const __m128i order = _mm_setr_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  store_two(to, to + to_apart,
            _mm256_shuffle_epi8(load_two(from, from + from_apart), _mm256_broadcastsi128_si256(order)));
}

#else

template <class Order>
inline void rearrange(const uint8_t* const from[3], int64_t from_apart, uint8_t* const to[3], int64_t to_apart) {
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 48; ++i) {
      const int source = Order::source(i);
      to[i / 16][half * to_apart + i % 16] = from[source / 16][half * from_apart + source % 16];
    }
  }
}

inline void reverse(const uint8_t* from, int64_t from_apart, uint8_t* to, int64_t to_apart) {
  for (int i = 0; i < 16; ++i) to[i] = from[15 - i];
  for (int i = 0; i < 16; ++i) to[to_apart + i] = from[from_apart + 15 - i];
}

#endif

// Calls step(i, j) for pixels i to i + 15 and j to j + 15, some of them twice where 32 does not divide their number,
// which is at least 16.
template <class Step>
inline void by_two_16(int64_t count, Step step) {
  if (count < 32) return step(0, count - 16);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) step(i, i + 16);
  if (i < count) step(count - 32, count - 16);
}

// Short runs without a call.
inline void copy(const uint8_t* from, uint8_t* to, int64_t count) {
  if (count > 256) {
    memcpy(to, from, count);
  } else if (count >= 16) {
    by_two_16(count, [&](int64_t i, int64_t j) {
      memcpy(to + i, from + i, 16);
      memcpy(to + j, from + j, 16);
    });
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

// `count` pixels in their order or turned round, from memory to memory of one channel or of several that are packed.
// Three channels and one have paths of their own; `C` is 0 for any number.
template <int C>
inline void copy_packed(const uint8_t* from, uint8_t* to, int64_t count, int64_t channels, bool mirrored) {
  if (!mirrored) return copy(from, to, count * channels);
  const int64_t last = count - 1;
  if (C == 1 && count >= 16) {
    by_two_16(count, [&](int64_t i, int64_t j) { reverse(from + count - 16 - i, i - j, to + i, j - i); });
  } else if (C == 3 && count >= 16) {
    by_two_16(count, [&](int64_t i, int64_t j) {
      const uint8_t* source = from + 3 * (count - 16 - i);
      uint8_t* target = to + 3 * i;
      const uint8_t* const sources[] = {source, source + 16, source + 32};
      uint8_t* const targets[] = {target, target + 16, target + 32};
      rearrange<Mirrored>(sources, 3 * (i - j), targets, 3 * (j - i));
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
    by_two_16(count, [&](int64_t i, int64_t j) {
      const uint8_t* source = from + (mirrored ? count - 16 - i : i);
      const uint8_t* const sources[] = {source, source + stride, source + 2 * stride};
      uint8_t* const targets[] = {to + 3 * i, to + 3 * i + 16, to + 3 * i + 32};
      if (mirrored) {
        rearrange<InterleavedMirrored>(sources, i - j, targets, 3 * (j - i));
      } else {
        rearrange<Interleaved>(sources, j - i, targets, 3 * (j - i));
      }
    });
    return;
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
    by_two_16(count, [&](int64_t i, int64_t j) {
      const uint8_t* source = from + 3 * (mirrored ? count - 16 - i : i);
      const uint8_t* const sources[] = {source, source + 16, source + 32};
      uint8_t* const targets[] = {to + i, to + stride + i, to + 2 * stride + i};
      if (mirrored) {
        rearrange<SeparatedMirrored>(sources, 3 * (i - j), targets, j - i);
      } else {
        rearrange<Separated>(sources, 3 * (j - i), targets, j - i);
      }
    });
    return;
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

// Output rows [first, first + count) as bytes: packed, or one plane's rows after the other's.
template <int C>
void move(const Augment& a, const uint8_t* image, const Window& window, int64_t first, int64_t count, uint8_t* to) {
  const int64_t channels = C ? C : a.channels, width = a.width, source_plane = a.height * width, plane = count * width;
  const Span rows(a.height, window.row), columns(width, window.column);
  const int64_t top = std::max(first, rows.begin), bottom = std::min(first + count, rows.end), run = columns.count();
  const bool mirrored = window.mirrored;
  if (bottom - top < count || run < width) memset(to, 0, plane * channels);
  if (bottom <= top || run == 0) return;
  const int64_t source = (top + window.row) * width + columns.from;
  const int64_t target = (top - first) * width + (mirrored ? width - columns.end : columns.begin);
  if (!a.packed && !a.out_packed) {
    for (int64_t c = 0; c < channels; ++c) {
      const uint8_t* from = image + source + c * source_plane;
      uint8_t* place = to + target + c * plane;
      for (int64_t row = 0; row < bottom - top; ++row) {
        copy_packed<1>(from + row * width, place + row * width, run, 1, mirrored);
      }
    }
    return;
  }
  for (int64_t row = 0; row < bottom - top; ++row) {
    const int64_t at = source + row * width, place = target + row * width;
    if (a.packed && a.out_packed) {
      copy_packed<C>(image + at * channels, to + place * channels, run, channels, mirrored);
    } else if (a.packed) {
      separate<C>(image + at * channels, to + place, plane, run, channels, mirrored);
    } else {
      interleave<C>(image + at, source_plane, to + place * channels, run, channels, mirrored);
    }
  }
}

// `pattern` holds a row of the square as it lies in the result: all pixels, or a plane's after the other's.
void fill_square(const Augment& a, int64_t sample_id, const std::vector<float>& pattern, float* out) {
  const Words words = sample_words(0, sample_id, a.seed, Stream::kCutout);
  const int64_t above = below(words.word[0], a.height) - a.cutout / 2;
  const int64_t before = below(words.word[1], a.width) - a.cutout / 2;
  const int64_t top = std::max<int64_t>(0, above), bottom = std::min(a.height, above + a.cutout);
  const int64_t left = std::max<int64_t>(0, before), right = std::min(a.width, before + a.cutout);
  if (right <= left) return;
  const int64_t side = std::min(a.cutout, a.width);
  for (int64_t row = top; row < bottom; ++row) {
    float* to = out + row * a.width + left;
    if (a.out_packed) {
      memcpy(out + (row * a.width + left) * a.channels, pattern.data(), (right - left) * a.channels * sizeof(float));
    } else {
      for (int64_t c = 0; c < a.channels; ++c) {
        memcpy(to + c * a.height * a.width, pattern.data() + c * side, (right - left) * sizeof(float));
      }
    }
  }
}

std::vector<float> square_pattern(const Augment& a) {
  const int64_t side = std::min(a.cutout, a.width);
  std::vector<float> pattern(side * a.channels);
  for (int64_t i = 0; i < side; ++i) {
    for (int64_t c = 0; c < a.channels; ++c) pattern[a.out_packed ? i * a.channels + c : c * side + i] = a.fill[c];
  }
  return pattern;
}

inline const uint8_t* image_of(const Augment& a, int64_t sample) {
  return a.images + (a.rows ? a.rows[sample] : sample) * a.image_stride;
}

template <int C>
void augment(const Augment& a, int64_t begin, int64_t end) {
  const int64_t plane = a.height * a.width, elements = a.channels * plane, row_bytes = a.channels * a.width;
  const int64_t lines = std::clamp<int64_t>(kBlock / row_bytes, 1, a.height);
  std::vector<uint8_t> moved(lines * row_bytes);
  const std::vector<float> pattern = square_pattern(a);
  for (int64_t sample = begin; sample < end; ++sample) {
    if (sample + 1 < end) {
      const uint8_t* next = image_of(a, sample + 1);
      for (int64_t i = 0; i < std::min(elements, kBlock); i += kLine) __builtin_prefetch(next + i, 0, 2);
    }
    const uint8_t* image = image_of(a, sample);
    float* out = a.out + sample * elements;
    const Window window(a, a.sample_ids[sample]);
    if (a.packed == a.out_packed && window.row == 0 && window.column == 0 && !window.mirrored) {
      convert(image, out, elements);
    } else {
      for (int64_t first = 0; first < a.height; first += lines) {
        const int64_t count = std::min(lines, a.height - first), run = count * a.width;
        move<C>(a, image, window, first, count, moved.data());
        if (a.out_packed || count == a.height) {
          convert(moved.data(), out + first * row_bytes, count * row_bytes);
        } else {
          for (int64_t c = 0; c < a.channels; ++c) {
            convert(moved.data() + c * run, out + c * plane + first * a.width, run);
          }
        }
      }
    }
    if (a.cutout > 0) fill_square(a, a.sample_ids[sample], pattern, out);
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
