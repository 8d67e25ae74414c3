// Compiled once for each instruction set, with AWP_STEM naming the table. Nothing here may be shared with other files
// by the linker, so no containers.
#include "stem.h"

#include <algorithm>

#include "vector.h"

namespace awp::cpu {
namespace {

// Pixels that are computed together, so that weights are loaded once for all of them.
#if defined(__AVX512F__)
constexpr int kPixels = 8, kGradPixels = 4;
#else
constexpr int kPixels = 4, kGradPixels = 2;
#endif

// Three rows of x with a zero around them, [3][width + 2][channels].
int64_t scratch(const Images& few) { return 3 * (few.width + 2) * few.channels; }

void copy_rows(const Images& x, int64_t sample, int64_t row, float* to) {
  const int64_t length = x.width * x.channels;
  for (int64_t y = row - 1; y <= row + 1; ++y, to += length + 2 * x.channels) {
    std::fill_n(to, length + 2 * x.channels, 0.0f);
    if (y < 0 || y >= x.height) continue;
    memcpy(to + x.channels, static_cast<const float*>(x.data) + (sample * x.height + y) * length,
           length * sizeof(float));
  }
}

// kCount pixels from `column` on, two vectors of outputs (one, where `alone`).
template <int kCount, class T>
void pixels(const Images& x, const float* rows, const float* weights, int64_t outputs, int64_t column, int64_t output,
            bool alone, T* to) {
  const int64_t step = (x.width + 2) * x.channels;
  Vector sums[kCount][2] = {};
  for (int64_t tap = 0; tap < 9; ++tap) {
    const float* from = rows + tap / 3 * step + (column + tap % 3) * x.channels;
    for (int64_t c = 0; c < x.channels; ++c) {
      const float* weight = weights + (tap * x.channels + c) * outputs + output;
      const Vector left = load(weight), right = alone ? Vector{} : load(weight + kLanes);
      _Pragma("GCC unroll 8") for (int p = 0; p < kCount; ++p) {
        sums[p][0] += from[p * x.channels + c] * left;
        sums[p][1] += from[p * x.channels + c] * right;
      }
    }
  }
  _Pragma("GCC unroll 8") for (int p = 0; p < kCount; ++p) {
    store(to + (column + p) * outputs + output, sums[p][0]);
    if (!alone) store(to + (column + p) * outputs + output + kLanes, sums[p][1]);
  }
}

template <class T>
void row_of(const Images& x, const float* weights, const Images& y, int64_t sample, int64_t row, float* rows) {
  copy_rows(x, sample, row, rows);
  T* to = static_cast<T*>(y.data) + (sample * y.height + row) * y.width * y.channels;
  for (int64_t output = 0; output < y.channels; output += 2 * kLanes) {
    const bool alone = output + kLanes >= y.channels;
    int64_t column = 0;
    for (; column + kPixels <= x.width; column += kPixels) {
      pixels<kPixels, T>(x, rows, weights, y.channels, column, output, alone, to);
    }
    for (; column < x.width; ++column) pixels<1, T>(x, rows, weights, y.channels, column, output, alone, to);
  }
}

// The lanes' sum, halves first, so that the order is one for all.
inline float sum_of(Vector value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// kCount pixels of kChannels channels from `column` on; lanes are outputs.
template <int kCount, int kChannels, class T>
void grad_pixels(const Images& grad_y, const float* weights, int64_t sample, int64_t row, int64_t column,
                 const T* zeros, float* to) {
  const int64_t outputs = grad_y.channels;
  const T* image = static_cast<const T*>(grad_y.data) + sample * grad_y.height * grad_y.width * outputs;
  Vector sums[kCount][kChannels] = {};
  for (int64_t tap = 0; tap < 9; ++tap) {
    // the output's pixel that this tap took the row's pixel to
    const int64_t y = row + 1 - tap / 3, shift = 1 - tap % 3;
    if (y < 0 || y >= grad_y.height) continue;
    const T* from[kCount];
    for (int p = 0; p < kCount; ++p) {
      const int64_t x = column + p + shift;
      from[p] = x >= 0 && x < grad_y.width ? image + (y * grad_y.width + x) * outputs : zeros;
    }
    const float* weight = weights + tap * kChannels * outputs;
    for (int64_t k = 0; k < outputs; k += kLanes) {
      Vector w[kChannels];
      _Pragma("GCC unroll 4") for (int c = 0; c < kChannels; ++c) w[c] = load(weight + c * outputs + k);
      _Pragma("GCC unroll 4") for (int p = 0; p < kCount; ++p) {
        const Vector g = load(from[p] + k);
        _Pragma("GCC unroll 4") for (int c = 0; c < kChannels; ++c) sums[p][c] += g * w[c];
      }
    }
  }
  for (int p = 0; p < kCount; ++p) {
    for (int c = 0; c < kChannels; ++c) to[p * kChannels + c] = sum_of(sums[p][c]);
  }
}

template <int kChannels, class T>
void grad_row_of(const Images& grad_y, const float* weights, const Images& grad_x, int64_t sample, int64_t row,
                 const float* zeros) {
  const T* nothing = reinterpret_cast<const T*>(zeros);
  float* to = static_cast<float*>(grad_x.data) + (sample * grad_x.height + row) * grad_x.width * kChannels;
  int64_t column = 0;
  for (; column + kGradPixels <= grad_x.width; column += kGradPixels, to += kGradPixels * kChannels) {
    grad_pixels<kGradPixels, kChannels>(grad_y, weights, sample, row, column, nothing, to);
  }
  for (; column < grad_x.width; ++column, to += kChannels) {
    grad_pixels<1, kChannels>(grad_y, weights, sample, row, column, nothing, to);
  }
}

void any_row(const Images& x, const float* weights, const Images& y, int64_t sample, int64_t row, float* rows) {
  (y.dtype == DType::kFloat32 ? row_of<Float32> : row_of<BFloat16>)(x, weights, y, sample, row, rows);
}

template <class T>
void grad_row_by_channels(const Images& grad_y, const float* weights, const Images& grad_x, int64_t sample, int64_t row,
                          const float* zeros) {
  static_assert(kFewChannels == 4);
  constexpr decltype(&grad_row_of<1, T>) kByChannels[] = {grad_row_of<1, T>, grad_row_of<2, T>, grad_row_of<3, T>,
                                                          grad_row_of<4, T>};
  kByChannels[grad_x.channels - 1](grad_y, weights, grad_x, sample, row, zeros);
}

void any_grad_row(const Images& grad_y, const float* weights, const Images& grad_x, int64_t sample, int64_t row,
                  const float* zeros) {
  (grad_y.dtype == DType::kFloat32 ? grad_row_by_channels<Float32>
                                   : grad_row_by_channels<BFloat16>)(grad_y, weights, grad_x, sample, row, zeros);
}

}  // namespace

const Stem AWP_STEM = {scratch, any_row, any_grad_row};

}  // namespace awp::cpu
