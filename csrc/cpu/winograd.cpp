// Compiled once for each instruction set, with AWP_WINOGRAD naming the table. Nothing here may be shared with other
// files by the linker, so no containers.
//
// The points are 0, +-3/4, +-3/2 and infinity: exact in binary, and with half the error of the usual 0, +-1, +-2.
#include "winograd.h"

#include <algorithm>

#include "vector.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace awp::cpu {
namespace {

constexpr float kA = 0.75f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;
constexpr float kProduct = kA2 * kB2, kSum = kA2 + kB2;
constexpr double kWeightA = 1 / (2.0 * kA2 * (kA2 - kB2)), kWeightB = 1 / (2.0 * kB2 * (kB2 - kA2));
constexpr float kG0 = 1.0 / kProduct, kGa = kWeightA, kGb = kWeightB;
constexpr float kGa1 = kWeightA * kA, kGb1 = kWeightB * kB, kGa2 = kWeightA * kA2, kGb2 = kWeightB * kB2;

#if defined(__AVX512F__)
constexpr int kRows = 14;     // of a product's piece that is held in registers; it has two vectors of columns
constexpr int kGradRows = 8;  // divides kLanes
constexpr int64_t kBlock = kRows;
#else
constexpr int kRows = 6;
constexpr int kGradRows = 4;
constexpr int64_t kBlock = 2 * kRows;
#endif
constexpr int64_t kPanel = 2 * kLanes;

#define AWP_UNROLL _Pragma("GCC unroll 36")

// The transforms of one dimension, of vectors `step` apart.

// Input, 6 -> 6.
template <int kFrom, int kTo>
inline void transform_input(const Vector* d, Vector* v) {
  const Vector a = d[4 * kFrom] - kB2 * d[2 * kFrom], b = d[4 * kFrom] - kA2 * d[2 * kFrom];
  const Vector c = kA * (d[3 * kFrom] - kB2 * d[kFrom]), e = kB * (d[3 * kFrom] - kA2 * d[kFrom]);
  v[0] = (d[4 * kFrom] - kSum * d[2 * kFrom]) + kProduct * d[0];
  v[1 * kTo] = a + c;
  v[2 * kTo] = a - c;
  v[3 * kTo] = b + e;
  v[4 * kTo] = b - e;
  v[5 * kTo] = (d[5 * kFrom] - kSum * d[3 * kFrom]) + kProduct * d[kFrom];
}

// Output, 6 -> 4.
template <int kFrom, int kTo>
inline void transform_output(const Vector* m, Vector* y) {
  const Vector sum_a = m[kFrom] + m[2 * kFrom], sum_b = m[3 * kFrom] + m[4 * kFrom];
  const Vector difference_a = m[kFrom] - m[2 * kFrom], difference_b = m[3 * kFrom] - m[4 * kFrom];
  y[0] = m[0] + sum_a + sum_b;
  y[1 * kTo] = kA * difference_a + kB * difference_b;
  y[2 * kTo] = kA2 * sum_a + kB2 * sum_b;
  y[3 * kTo] = m[5 * kFrom] + kA3 * difference_a + kB3 * difference_b;
}

// The output's gradient, 4 -> 6.
template <int kFrom, int kTo>
inline void transform_grad_output(const Vector* y, Vector* m) {
  const Vector even_a = y[0] + kA2 * y[2 * kFrom], even_b = y[0] + kB2 * y[2 * kFrom];
  const Vector odd_a = kA * y[kFrom] + kA3 * y[3 * kFrom], odd_b = kB * y[kFrom] + kB3 * y[3 * kFrom];
  m[0] = y[0];
  m[1 * kTo] = even_a + odd_a;
  m[2 * kTo] = even_a - odd_a;
  m[3 * kTo] = even_b + odd_b;
  m[4 * kTo] = even_b - odd_b;
  m[5 * kTo] = y[3 * kFrom];
}

// Weights, 3 -> 6.
template <int kFrom, int kTo>
inline void transform_weights(const Vector* g, Vector* u) {
  const Vector even_a = kGa * g[0] + kGa2 * g[2 * kFrom], even_b = kGb * g[0] + kGb2 * g[2 * kFrom];
  const Vector odd_a = kGa1 * g[kFrom], odd_b = kGb1 * g[kFrom];
  u[0] = kG0 * g[0];
  u[1 * kTo] = even_a + odd_a;
  u[2 * kTo] = even_a - odd_a;
  u[3 * kTo] = even_b + odd_b;
  u[4 * kTo] = even_b - odd_b;
  u[5 * kTo] = g[2 * kFrom];
}

// The weight's gradient, 6 -> 3.
template <int kFrom, int kTo>
inline void transform_grad_weight(const Vector* u, Vector* g) {
  const Vector sum_a = u[kFrom] + u[2 * kFrom], sum_b = u[3 * kFrom] + u[4 * kFrom];
  g[0] = kG0 * u[0] + (kGa * sum_a + kGb * sum_b);
  g[1 * kTo] = kGa1 * (u[kFrom] - u[2 * kFrom]) + kGb1 * (u[3 * kFrom] - u[4 * kFrom]);
  g[2 * kTo] = u[5 * kFrom] + (kGa2 * sum_a + kGb2 * sum_b);
}

// Where a tile lies in a batch of images.
struct Place {
  int64_t sample, row, column;  // of its first output pixel
};

inline int64_t tiles_over(int64_t length) { return (length + 3) / 4; }

inline Place place_of(const Images& images, int64_t tile) {
  const int64_t wide = tiles_over(images.width), high = tiles_over(images.height);
  return {tile / (wide * high), 4 * (tile / wide % high), 4 * (tile % wide)};
}

// Pointers to kSize x kSize pixels from (row, column) on; outside the image, to zeros.
template <int kSize, class T>
void find_pixels(const Images& images, int64_t sample, int64_t row, int64_t column, const T* zeros,
                 const T* (&pixels)[kSize * kSize]) {
  const T* image = static_cast<const T*>(images.data) + sample * images.height * images.width * images.channels;
  for (int64_t i = 0; i < kSize; ++i) {
    const bool inside = row + i >= 0 && row + i < images.height;
    for (int64_t j = 0; j < kSize; ++j) {
      pixels[i * kSize + j] = inside && column + j >= 0 && column + j < images.width
                                  ? image + ((row + i) * images.width + column + j) * images.channels
                                  : zeros;
    }
  }
}

// Column j of kSize x kSize pixels.
template <int kSize, class T>
inline void load_column(const T* const* pixels, int j, int64_t channel, int64_t count, Vector* values) {
  if (count >= kLanes) {
    AWP_UNROLL for (int i = 0; i < kSize; ++i) values[i] = load(pixels[i * kSize + j] + channel);
  } else {
    for (int i = 0; i < kSize; ++i) values[i] = load_some(pixels[i * kSize + j] + channel, count);
  }
}

template <class P = Float32>
inline P* tile_at(const Tiles& tiles, int64_t channel, int64_t tile) {
  return static_cast<P*>(tiles.values) + (channel * tiles.tiles + tile * kLanes);
}

template <class T, class P>
void input(const Images& x, int64_t first, int64_t count, const float* zeros, const Tiles& into, int64_t at) {
  for (int64_t tile = 0; tile < count; ++tile) {
    const Place place = place_of(x, first + tile);
    const T* pixels[36];
    find_pixels<6>(x, place.sample, place.row - 1, place.column - 1, reinterpret_cast<const T*>(zeros), pixels);
    for (int64_t channel = 0; channel < x.channels; channel += kLanes) {
      Vector half[36];
      AWP_UNROLL for (int j = 0; j < 6; ++j) {
        Vector column[6];
        load_column<6>(pixels, j, channel, x.channels - channel, column);
        transform_input<1, 6>(column, half + j);
      }
      P* to = tile_at<P>(into, channel, at + tile);
      AWP_UNROLL for (int i = 0; i < 6; ++i) {
        Vector row[6];
        transform_input<1, 1>(half + 6 * i, row);
        AWP_UNROLL for (int j = 0; j < 6; ++j) store(to + (6 * i + j) * into.stride, row[j]);
      }
    }
  }
}

template <class T>
void grad_output(const Images& grad_y, int64_t first, int64_t count, const float* zeros, const Tiles& into,
                 int64_t at) {
  for (int64_t tile = 0; tile < count; ++tile) {
    const Place place = place_of(grad_y, first + tile);
    const T* pixels[16];
    find_pixels<4>(grad_y, place.sample, place.row, place.column, reinterpret_cast<const T*>(zeros), pixels);
    for (int64_t channel = 0; channel < grad_y.channels; channel += kLanes) {
      Vector half[24];
      AWP_UNROLL for (int j = 0; j < 4; ++j) {
        Vector column[4];
        load_column<4>(pixels, j, channel, grad_y.channels - channel, column);
        transform_grad_output<1, 4>(column, half + j);
      }
      float* to = tile_at(into, channel, at + tile);
      AWP_UNROLL for (int i = 0; i < 6; ++i) {
        Vector row[6];
        transform_grad_output<1, 1>(half + 4 * i, row);
        AWP_UNROLL for (int j = 0; j < 6; ++j) store(to + (6 * i + j) * into.stride, row[j]);
      }
    }
  }
}

// What is multiplied at once: a number, or two neighbouring ones in bf16, whose products are added up.
template <class P>
struct Factor {
  float values;
  static Vector add(Vector sum, Factor factor, const Factor* column) {
    return sum + factor.values * load(&column->values);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Factor<BFloat16> {
  uint32_t values;
  static Vector add(Vector sum, Factor factor, const Factor* column) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(factor.values)),
                                    (__m512bh)_mm512_loadu_si512(column));
  }
};
#endif

template <class P>
constexpr int64_t kTogether = sizeof(Factor<P>) / sizeof(P);

// kCount rows of the product of one position: [rows, inputs] x [inputs, kPanel]. `factors`: inputs / kTogether.
template <class P, int kCount>
void multiply(const Factor<P>* rows, int64_t block_stride, const Factor<P>* columns, int64_t factors, float* product) {
  constexpr int64_t kBlockFactors = kLanes / kTogether<P>, kLine = 64 / (kBlockFactors * int64_t{sizeof(Factor<P>)});
  Vector sums[kCount][2] = {};
  for (int64_t begin = 0; begin < factors; begin += kBlockFactors, rows += block_stride) {
    const int64_t size = std::min(kBlockFactors, factors - begin);
    // pieces too short and too far apart for the hardware to foresee
    AWP_UNROLL for (int r = 0; r < kCount; r += kLine) __builtin_prefetch(rows + block_stride + r * kBlockFactors);
    for (int64_t c = 0; c < size; ++c, columns += kPanel) {
      AWP_UNROLL for (int r = 0; r < kCount; ++r) {
        const Factor<P> factor = rows[r * kBlockFactors + c];
        sums[r][0] = Factor<P>::add(sums[r][0], factor, columns);
        sums[r][1] = Factor<P>::add(sums[r][1], factor, columns + kLanes);
      }
    }
  }
  AWP_UNROLL for (int r = 0; r < kCount; ++r) {
    store(product + r * kPanel, sums[r][0]);
    store(product + r * kPanel + kLanes, sums[r][1]);
  }
}

template <class P>
using Multiply = void (*)(const Factor<P>*, int64_t, const Factor<P>*, int64_t, float*);
template <class P>
constexpr Multiply<P> kMultiply[] = {
    nullptr,         multiply<P, 1>, multiply<P, 2>, multiply<P, 3>,  multiply<P, 4>,  multiply<P, 5>,  multiply<P, 6>,
#if defined(__AVX512F__)
    multiply<P, 7>,  multiply<P, 8>, multiply<P, 9>, multiply<P, 10>, multiply<P, 11>, multiply<P, 12>, multiply<P, 13>,
    multiply<P, 14>,
#endif
};

template <class T>
void store_tile(const Images& y, const Place& place, int64_t channel, const Vector* values) {
  const int64_t height = std::min<int64_t>(4, y.height - place.row);
  const int64_t width = std::min<int64_t>(4, y.width - place.column);
  const int64_t count = y.channels - channel;
  T* to =
      static_cast<T*>(y.data) + ((place.sample * y.height + place.row) * y.width + place.column) * y.channels + channel;
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      T* pixel = to + (i * y.width + j) * y.channels;
      if (count >= kLanes) {
        store(pixel, values[4 * i + j]);
      } else {
        store_some(pixel, values[4 * i + j], count);
      }
    }
  }
}

template <class T, class P>
void output(const Tiles& from, const void* transformed, int64_t panel, int64_t inputs, const Images& y, int64_t first,
            int64_t count, float* products) {
  // a line more, so that the 36 do not fall into one set of the cache
  const int64_t stride = count * kPanel + 16;
  const int64_t groups = (count + kRows - 1) / kRows, factors = (inputs + kTogether<P> - 1) / kTogether<P>;
  for (int64_t position = 0; position < kPositions; ++position) {
    const auto* columns =
        static_cast<const Factor<P>*>(transformed) + (panel * kPositions + position) * factors * kPanel;
    const P* rows = static_cast<const P*>(from.values) + position * from.stride;
    for (int64_t group = 0, row = 0; group < groups; ++group) {
      const int64_t size = (count - row + groups - group - 1) / (groups - group);
      kMultiply<P>[size](reinterpret_cast<const Factor<P>*>(rows + row* kLanes), from.tiles* kLanes / kTogether<P>,
                         columns, factors, products + position* stride + row* kPanel);
      row += size;
    }
  }
  for (int64_t tile = 0; tile < count; ++tile) {
    const Place place = place_of(y, first + tile);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t channel = panel * kPanel + half * kLanes;
      if (channel >= y.channels) break;
      const float* product = products + tile * kPanel + half * kLanes;
      Vector columns[24], values[16];
      AWP_UNROLL for (int j = 0; j < 6; ++j) {
        Vector column[6];
        AWP_UNROLL for (int i = 0; i < 6; ++i) column[i] = load(product + (6 * i + j) * stride);
        transform_output<1, 6>(column, columns + j);
      }
      AWP_UNROLL for (int i = 0; i < 4; ++i) transform_output<1, 1>(columns + 6 * i, values + 4 * i);
      store_tile<T>(y, place, channel, values);
    }
  }
}

inline void put(float* to, Vector value, bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX2__)
  if (stream) return _mm256_stream_ps(to, (__m256)value);
#endif
  store(to, value);
}

// A vector of factors of one input, or of two.
inline Vector factors_of(const Vector* u, Float32) { return u[0]; }
inline Vector factors_of(const Vector* u, BFloat16) {
  const Bits low = __builtin_convertvector(round_to_bfloat16(u[0]), Bits);
  return (Vector)(low | __builtin_convertvector(round_to_bfloat16(u[1]), Bits) << 16);
}

template <class T, class P>
void weights(const Filters& weights, bool transposed, void* transformed, bool stream, int64_t begin, int64_t end) {
  const int64_t outputs = transposed ? weights.inputs : weights.outputs;
  const int64_t inputs = transposed ? weights.outputs : weights.inputs;
  const int64_t output_stride = weights.strides[transposed ? 1 : 0];
  const int64_t input_stride = weights.strides[transposed ? 0 : 1];
  const int64_t factors = (inputs + kTogether<P> - 1) / kTogether<P>;
  const T* values = static_cast<const T*>(weights.data);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t size = std::min(kPanel, outputs - panel * kPanel);
    for (int64_t factor = 0; factor < factors; ++factor) {
      Vector u[2][36][kTogether<P>] = {};
      for (int64_t i = 0, c = factor * kTogether<P>; i < kTogether<P> && c < inputs; ++i, ++c) {
        T taps[9][kPanel] = {};
        const T* from = values + panel * kPanel * output_stride + c * input_stride;
        for (int64_t k = 0; k < size; ++k) {
          for (int64_t tap = 0; tap < 9; ++tap) {
            const int64_t turned = transposed ? 8 - tap : tap;
            taps[tap][k] = from[k * output_stride + turned / 3 * weights.strides[2] + turned % 3 * weights.strides[3]];
          }
        }
        AWP_UNROLL for (int half = 0; half < 2; ++half) {
          Vector g[9], columns[18];
          Vector* to = &u[half][0][i];
          AWP_UNROLL for (int tap = 0; tap < 9; ++tap) g[tap] = load(taps[tap] + half * kLanes);
          AWP_UNROLL for (int j = 0; j < 3; ++j) transform_weights<3, 3>(g + j, columns + j);
          AWP_UNROLL for (int r = 0; r < 6; ++r) {
            transform_weights<1, kTogether<P>>(columns + 3 * r, to + 6 * r * kTogether<P>);
          }
        }
      }
      float* to = static_cast<float*>(transformed) + (panel * kPositions * factors + factor) * kPanel;
      for (int64_t position = 0; position < kPositions; ++position, to += factors * kPanel) {
        put(to, factors_of(u[0][position], P{}), stream);
        put(to + kLanes, factors_of(u[1][position], P{}), stream);
      }
    }
  }
#if defined(__SSE2__)
  if (stream) _mm_sfence();
#endif
}

// kGradRows output channels by kColumns vectors of input channels of one position.
template <int kColumns>
void multiply_transposed(const float* rows, const float* columns, int64_t block_stride, int64_t count,
                         const float* ahead, bool add, float* sums, int64_t row_stride) {
  Vector values[kGradRows][kColumns] = {};
  if (add) {
    AWP_UNROLL for (int r = 0; r < kGradRows; ++r) {
      AWP_UNROLL for (int v = 0; v < kColumns; ++v) values[r][v] = load(sums + r * row_stride + v * kLanes);
    }
  }
  for (int64_t tile = 0; tile < count; ++tile, rows += kLanes, columns += kLanes, ahead += kLanes) {
    __builtin_prefetch(ahead);
    Vector column[kColumns];
    AWP_UNROLL for (int v = 0; v < kColumns; ++v) column[v] = load(columns + v * block_stride);
    AWP_UNROLL for (int r = 0; r < kGradRows; ++r) {
      AWP_UNROLL for (int v = 0; v < kColumns; ++v) values[r][v] += rows[r] * column[v];
    }
  }
  AWP_UNROLL for (int r = 0; r < kGradRows; ++r) {
    AWP_UNROLL for (int v = 0; v < kColumns; ++v) store(sums + r * row_stride + v * kLanes, values[r][v]);
  }
}

// How the sums lie: [position][output][input], a line more a position.
struct Sums {
  Sums(int64_t outputs, int64_t inputs)
      : vectors((inputs + kLanes - 1) / kLanes),
        rows((outputs + kGradRows - 1) / kGradRows * kGradRows),
        row_stride(vectors * kLanes),
        stride(rows * row_stride + 16) {}
  int64_t vectors, rows, row_stride, stride;
};

void grad_products(const Tiles& x, const Tiles& grad_y, int64_t count, int64_t output, int64_t outputs, int64_t input,
                   int64_t inputs, bool add, float* sums) {
  const Sums layout(outputs, inputs);
  const int64_t block_stride = x.tiles * kLanes;
  for (int64_t position = 0; position < kPositions; ++position) {
    for (int64_t v = 0; v < layout.vectors; v += 2) {
      const float* columns = tile_at(x, input + v * kLanes, 0) + position * x.stride;
      for (int64_t row = 0; row < layout.rows; row += kGradRows) {
        const int64_t k = output + row;
        const float* from = tile_at(grad_y, k / kLanes * kLanes, 0) + k % kLanes + position * grad_y.stride;
        float* to = sums + position * layout.stride + row * layout.row_stride + v * kLanes;
        // of the next position, each piece brings a part
        const int64_t part = row / kGradRows, other = output + (part - 2) * kLanes;
        const float* ahead = part < 2 ? columns + x.stride + part * block_stride : columns;
        if (part >= 2 && other < output + outputs) ahead = tile_at(grad_y, other, 0) + (position + 1) * grad_y.stride;
        if (v + 1 < layout.vectors) {
          multiply_transposed<2>(from, columns, block_stride, count, ahead, add, to, layout.row_stride);
        } else {
          multiply_transposed<1>(from, columns, block_stride, count, ahead, add, to, layout.row_stride);
        }
      }
    }
  }
}

void grad_weight(const float* sums, int64_t output, int64_t outputs, int64_t input, int64_t inputs, bool add,
                 const Filters& grad) {
  const Sums layout(outputs, inputs);
  float* gradient = static_cast<float*>(grad.data);
  for (int64_t row = 0; row < outputs; ++row) {
    for (int64_t v = 0; v < layout.vectors; ++v) {
      const float* from = sums + row * layout.row_stride + v * kLanes;
      Vector columns[18], taps[9];
      AWP_UNROLL for (int j = 0; j < 6; ++j) {
        Vector column[6];
        AWP_UNROLL for (int i = 0; i < 6; ++i) column[i] = load(from + (6 * i + j) * layout.stride);
        transform_grad_weight<1, 6>(column, columns + j);
      }
      AWP_UNROLL for (int i = 0; i < 3; ++i) transform_grad_weight<1, 1>(columns + 6 * i, taps + 3 * i);
      const int64_t size = std::min<int64_t>(kLanes, inputs - v * kLanes);
      float* to = gradient + (output + row) * 9 * grad.inputs + input + v * kLanes;
      for (int tap = 0; tap < 9; ++tap, to += grad.inputs) {
        if (size == kLanes) {
          store(to, add ? load(to) + taps[tap] : taps[tap]);
        } else {
          store_some(to, add ? load_some(to, size) + taps[tap] : taps[tap], size);
        }
      }
    }
  }
}

template <class P>
void any_weights(const Filters& w, bool transposed, void* transformed, bool stream, int64_t begin, int64_t end) {
  const auto chosen = w.dtype == DType::kFloat32 ? weights<Float32, P> : weights<BFloat16, P>;
  chosen(w, transposed, transformed, stream, begin, end);
}

template <class P>
void any_input(const Images& x, int64_t first, int64_t count, const float* zeros, const Tiles& into, int64_t at) {
  (x.dtype == DType::kFloat32 ? input<Float32, P> : input<BFloat16, P>)(x, first, count, zeros, into, at);
}

template <class P>
void any_output(const Tiles& from, const void* transformed, int64_t panel, int64_t inputs, const Images& y,
                int64_t first, int64_t count, float* products) {
  const auto chosen = y.dtype == DType::kFloat32 ? output<Float32, P> : output<BFloat16, P>;
  chosen(from, transformed, panel, inputs, y, first, count, products);
}

template <class P>
constexpr Products kProducts = {sizeof(P),      kTogether<P>, kBlock * kTogether<P>,
                                any_weights<P>, any_input<P>, any_output<P>};

void any_grad_output(const Images& grad_y, int64_t first, int64_t count, const float* zeros, const Tiles& into,
                     int64_t at) {
  (grad_y.dtype == DType::kFloat32 ? grad_output<Float32> : grad_output<BFloat16>)(grad_y, first, count, zeros, into,
                                                                                   at);
}

}  // namespace

const Winograd AWP_WINOGRAD = {
    AWP_INSTRUCTION_SET, kLanes,        kProducts<Float32>,
#if defined(__AVX512BF16__)
    kProducts<BFloat16>,
#else
    {},
#endif
    any_grad_output,     grad_products, grad_weight,
};

}  // namespace awp::cpu
