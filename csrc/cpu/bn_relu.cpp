// Compiled once for each instruction set, with AWP_BN_RELU naming the table. Nothing here may be shared with other
// files by the linker, so no containers.
#include "bn_relu.h"

#include <immintrin.h>

#include "vector.h"

namespace awp::cpu {
namespace {

// One vector of the table or of results.
inline const float* row_of(const BnRelu& a, BnRow row) { return a.table + row * a.stride; }

// Calls f(channel, whole) for every vector of channels; `whole` is a constant, so that the usual case has no branches.
template <class F>
inline void for_vectors(const BnRelu& a, const F& f) {
  int64_t channel = 0;
  for (; channel + kLanes <= a.channels; channel += kLanes) f(channel, int64_t{kLanes});
  if (channel < a.channels) f(channel, a.channels - channel);
}

template <class T>
inline Vector load_at(const T* from, int64_t count) {
  return count == kLanes ? load(from) : load_some(from, count);
}

template <class T>
inline void store_at(T* to, Vector value, int64_t count) {
  if (count == kLanes) {
    store(to, value);
  } else {
    store_some(to, value, count);
  }
}

constexpr int64_t kRun = 64;  // rows whose deviations are added up in fp32

// Adds the rows' deviations to sums and their squares to squares.
template <int kRows, class T>
inline void add_rows(const BnRelu& a, const T* x, float* sums, float* squares) {
  const float* pivots = row_of(a, kBnMean);
  for_vectors(a, [&](int64_t channel, int64_t count) {
    const Vector pivot = load(pivots + channel);
    Vector sum = load(sums + channel), square = load(squares + channel);
    if constexpr (kRows == 4) {
      const T* at = x + channel;
      const Vector d0 = load_at(at, count) - pivot, d1 = load_at(at + a.channels, count) - pivot;
      const Vector d2 = load_at(at + 2 * a.channels, count) - pivot, d3 = load_at(at + 3 * a.channels, count) - pivot;
      sum += (d0 + d1) + (d2 + d3);
      square += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    } else {
      const Vector d = load_at(x + channel, count) - pivot;
      sum += d;
      square += d * d;
    }
    store(sums + channel, sum);
    store(squares + channel, square);
  });
}

template <class T>
void statistics(const BnRelu& a, int64_t begin, int64_t end, float* sums, double* result) {
  const T* x = static_cast<const T*>(a.x);
  for (int64_t i = 0; i < 2 * a.stride; ++i) result[i] = 0;
  for (int64_t row = begin; row < end;) {
    const int64_t last = row + kRun < end ? row + kRun : end;
    for (int64_t i = 0; i < 2 * a.stride; ++i) sums[i] = 0;
    for (; row + 4 <= last; row += 4) add_rows<4>(a, x + row * a.channels, sums, sums + a.stride);
    for (; row < last; ++row) add_rows<1>(a, x + row * a.channels, sums, sums + a.stride);
    for (int64_t i = 0; i < 2 * a.stride; ++i) result[i] += sums[i];
  }
}

inline Vector affine(const BnRelu& a, Vector x, int64_t channel) {
  return (x - load(row_of(a, kBnMean) + channel)) * load(row_of(a, kBnScale) + channel) +
         load(row_of(a, kBnBias) + channel);
}

// A bit a lane, set where the value is neither negative nor 0; NaN counts as set, as torch has it.
inline uint32_t bits_of(Vector value) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)value, _mm512_setzero_ps(), _CMP_NLE_UQ);
#else
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)value, _mm256_setzero_ps(), _CMP_NLE_UQ)));
#endif
}

inline Vector where_bits(uint32_t bits, Vector value) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)value);
#else
  const Integers lane = {1, 2, 4, 8, 16, 32, 64, 128};
  const Integers set = (lane & static_cast<int32_t>(bits)) != 0;
  return (Vector)((Integers)value & set);
#endif
}

template <class T>
void normalize(const BnRelu& a, int64_t begin, int64_t end, void* out, uint8_t* mask) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.channels;
    T* y = static_cast<T*>(out) + row * a.channels;
    uint8_t* bits = mask ? mask + row * (a.stride / 8) : nullptr;
    for_vectors(a, [&](int64_t channel, int64_t count) {
      const Vector value = affine(a, load_at(x + channel, count), channel);
      store_at(y + channel, value <= 0 ? Vector{} : value, count);
      if (bits) {
        const uint32_t set = bits_of(value);
        memcpy(bits + channel / 8, &set, kLanes / 8);
      }
    });
  }
}

template <class T>
inline Vector masked_gradient(const BnRelu& a, Vector x, const T* grad, int64_t channel, int64_t count) {
  const Vector g = load_at(grad + channel, count);
  return affine(a, x, channel) <= 0 ? Vector{} : g;
}

template <class T>
void sums(const BnRelu& a, const void* grad, int64_t begin, int64_t end, float* result) {
  for (int64_t i = 0; i < 2 * a.stride; ++i) result[i] = 0;
  for (int64_t row = begin; row < end; row += 2) {
    const T* x = static_cast<const T*>(a.x) + row * a.channels;
    const T* g = static_cast<const T*>(grad) + row * a.channels;
    const bool pair = row + 1 < end;
    for_vectors(a, [&](int64_t channel, int64_t count) {
      const Vector mean = load(row_of(a, kBnMean) + channel);
      const Vector x0 = load_at(x + channel, count);
      const Vector g0 = masked_gradient(a, x0, g, channel, count);
      Vector sum = g0, product = g0 * (x0 - mean);
      if (pair) {
        const Vector x1 = load_at(x + a.channels + channel, count);
        const Vector g1 = masked_gradient(a, x1, g + a.channels, channel, count);
        sum += g1;
        product += g1 * (x1 - mean);
      }
      store(result + channel, load(result + channel) + sum);
      store(result + a.stride + channel, load(result + a.stride + channel) + product);
    });
  }
}

template <class T>
void grad_x(const BnRelu& a, const void* grad, const float* coefficients, int64_t begin, int64_t end, void* out) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.channels;
    const T* g = static_cast<const T*>(grad) + row * a.channels;
    T* to = static_cast<T*>(out) + row * a.channels;
    for_vectors(a, [&](int64_t channel, int64_t count) {
      const Vector value = load_at(x + channel, count);
      Vector gradient = masked_gradient(a, value, g, channel, count);
      if (coefficients) {
        gradient -= load(coefficients + channel) +
                    (value - load(row_of(a, kBnMean) + channel)) * load(coefficients + a.stride + channel);
      }
      store_at(to + channel, gradient * load(row_of(a, kBnScale) + channel), count);
    });
  }
}

template <class T>
void grad_x_by_mask(const BnRelu& a, const void* grad, const uint8_t* mask, int64_t begin, int64_t end, void* out) {
  for (int64_t row = begin; row < end; ++row) {
    const T* g = static_cast<const T*>(grad) + row * a.channels;
    T* to = static_cast<T*>(out) + row * a.channels;
    const uint8_t* bits = mask + row * (a.stride / 8);
    for_vectors(a, [&](int64_t channel, int64_t count) {
      uint32_t set = 0;
      memcpy(&set, bits + channel / 8, kLanes / 8);
      const Vector gradient = load_at(g + channel, count) * load(row_of(a, kBnScale) + channel);
      store_at(to + channel, where_bits(set, gradient), count);
    });
  }
}

#define AWP_EITHER(function, a) ((a).dtype == DType::kFloat32 ? function<Float32> : function<BFloat16>)

void any_statistics(const BnRelu& a, int64_t begin, int64_t end, float* sums, double* result) {
  AWP_EITHER(statistics, a)(a, begin, end, sums, result);
}

void any_normalize(const BnRelu& a, int64_t begin, int64_t end, void* out, uint8_t* mask) {
  AWP_EITHER(normalize, a)(a, begin, end, out, mask);
}

void any_sums(const BnRelu& a, const void* grad, int64_t begin, int64_t end, float* result) {
  AWP_EITHER(sums, a)(a, grad, begin, end, result);
}

void any_grad_x(const BnRelu& a, const void* grad, const float* coefficients, int64_t begin, int64_t end, void* out) {
  AWP_EITHER(grad_x, a)(a, grad, coefficients, begin, end, out);
}

void any_grad_x_by_mask(const BnRelu& a, const void* grad, const uint8_t* mask, int64_t begin, int64_t end, void* out) {
  AWP_EITHER(grad_x_by_mask, a)(a, grad, mask, begin, end, out);
}

}  // namespace

const BnReluKernels AWP_BN_RELU = {any_statistics, any_normalize, any_sums, any_grad_x, any_grad_x_by_mask};

}  // namespace awp::cpu
