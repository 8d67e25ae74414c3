// Compiled once for each instruction set, with AWP_BN_ACT naming the table. Nothing here may be shared with other
// files by the linker, so no containers.
#include "bn_act.h"

#include <immintrin.h>

#include <type_traits>

#include "vector.h"

namespace awp::cpu {
namespace {

// One vector of the table or of results.
inline const float* row_of(const BnAct& a, BnRow row) { return a.table + row * a.stride; }

template <class T, class U>
inline T* rows_at(const BnAct& a, U* images, int64_t row) {
  return images ? static_cast<T*>(images) + row * a.channels : nullptr;
}

// Calls f(channel, whole) for every vector of channels; `whole` is a constant, so that the usual case has no branches.
template <class F>
inline void for_vectors(const BnAct& a, const F& f) {
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

// z as it is stored, of x at `at`; with kAdd it is made of x and the residual.
template <bool kAdd, class T>
inline Vector load_z(const T* x, const T* residual, T* z, int64_t at, int64_t count) {
  if constexpr (!kAdd) return load_at(x + at, count);
  const Vector sum = load_at(x + at, count) + load_at(residual + at, count);
  store_at(z + at, sum, count);
  return rounded<T>(sum);
}

constexpr int64_t kRun = 64;  // rows whose deviations are added up in fp32

// Adds the rows' deviations to sums and their squares to squares.
template <bool kAdd, int kRows, class T>
inline void add_rows(const BnAct& a, int64_t row, float* sums, float* squares) {
  const T *x = rows_at<const T>(a, a.x, row), *residual = rows_at<const T>(a, a.residual, row);
  T* z = rows_at<T>(a, a.z, row);
  const float* pivots = row_of(a, kBnMean);
  for_vectors(a, [&](int64_t channel, int64_t count) {
    const Vector pivot = load(pivots + channel);
    Vector sum = load(sums + channel), square = load(squares + channel);
    const auto deviation = [&](int64_t i) {
      return load_z<kAdd>(x, residual, z, i * a.channels + channel, count) - pivot;
    };
    if constexpr (kRows == 4) {
      const Vector d0 = deviation(0), d1 = deviation(1), d2 = deviation(2), d3 = deviation(3);
      sum += (d0 + d1) + (d2 + d3);
      square += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    } else {
      const Vector d = deviation(0);
      sum += d;
      square += d * d;
    }
    store(sums + channel, sum);
    store(squares + channel, square);
  });
}

template <class T, bool kAdd>
void statistics_of(const BnAct& a, int64_t begin, int64_t end, float* sums, double* result) {
  for (int64_t i = 0; i < 2 * a.stride; ++i) result[i] = 0;
  for (int64_t row = begin; row < end;) {
    const int64_t last = row + kRun < end ? row + kRun : end;
    for (int64_t i = 0; i < 2 * a.stride; ++i) sums[i] = 0;
    for (; row + 4 <= last; row += 4) add_rows<kAdd, 4, T>(a, row, sums, sums + a.stride);
    for (; row < last; ++row) add_rows<kAdd, 1, T>(a, row, sums, sums + a.stride);
    for (int64_t i = 0; i < 2 * a.stride; ++i) result[i] += sums[i];
  }
}

inline Vector affine(const BnAct& a, Vector z, int64_t channel) {
  return (z - load(row_of(a, kBnMean) + channel)) * load(row_of(a, kBnScale) + channel) +
         load(row_of(a, kBnBias) + channel);
}

// Within 2 units in the last place; NaN stays NaN. Coefficients: Moshier, Cephes Mathematical Library, expf.
inline Vector exp_of(Vector x) {
  x = x < -87.0f ? Vector{} - 87.0f : x > 88.0f ? Vector{} + 88.0f : x;
  // the sum's last bits are the rounded number
  constexpr float kMagic = 12582912.0f;
  const Vector shifted = x * 1.44269504f + kMagic, n = shifted - kMagic;
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector series = 1.9875691500e-4f * r + 1.3981999507e-3f;
  series = series * r + 8.3334519073e-3f;
  series = series * r + 4.1665795894e-2f;
  series = series * r + 1.6666665459e-1f;
  series = series * r + 5.0000001201e-1f;
  const Integers exponent = __builtin_convertvector(n == n ? n : Vector{}, Integers) + 127;
  return (series * (r * r) + r + 1.0f) * (Vector)(exponent << 23);
}

inline Vector sigmoid(Vector u) { return 1.0f / (1.0f + exp_of(-u)); }

template <Activation kind>
inline Vector activated(Vector u) {
  if constexpr (kind == Activation::kRelu) return u <= 0 ? Vector{} : u;  // NaN goes through
  if constexpr (kind == Activation::kSilu) return u * sigmoid(u);
  return u;
}

// The gradient before the activation.
template <Activation kind>
inline Vector through_activation(Vector u, Vector gradient) {
  if constexpr (kind == Activation::kRelu) return u <= 0 ? Vector{} : gradient;
  if constexpr (kind == Activation::kSilu) {
    const Vector s = sigmoid(u);
    return gradient * (s + u * (s * (1.0f - s)));
  }
  return gradient;
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

template <class T, Activation kind, bool kAdd>
void normalize_to(const BnAct& a, int64_t begin, int64_t end, void* y, uint8_t* mask) {
  for (int64_t row = begin; row < end; ++row) {
    const T *x = rows_at<const T>(a, kAdd ? a.x : a.z, row), *residual = rows_at<const T>(a, a.residual, row);
    T *z = rows_at<T>(a, a.z, row), *to = rows_at<T>(a, y, row);
    uint8_t* bits = mask ? mask + row * (a.stride / 8) : nullptr;
    for_vectors(a, [&](int64_t channel, int64_t count) {
      const Vector value = affine(a, load_z<kAdd>(x, residual, z, channel, count), channel);
      store_at(to + channel, activated<kind>(value), count);
      if (bits) {
        const uint32_t set = bits_of(value);
        memcpy(bits + channel / 8, &set, kLanes / 8);
      }
    });
  }
}

template <class T, Activation kind>
void sums_of(const BnAct& a, const void* grad, int64_t begin, int64_t end, float* result) {
  for (int64_t i = 0; i < 2 * a.stride; ++i) result[i] = 0;
  for (int64_t row = begin; row < end; row += 2) {
    const T *z = rows_at<const T>(a, a.z, row), *given = rows_at<const T>(a, grad, row);
    const bool pair = row + 1 < end;
    for_vectors(a, [&](int64_t channel, int64_t count) {
      const Vector mean = load(row_of(a, kBnMean) + channel);
      Vector sum = {}, product = {};
      const auto add = [&](int64_t at) {
        const Vector value = load_at(z + at, count);
        const Vector g = through_activation<kind>(affine(a, value, channel), load_at(given + at, count));
        sum += g;
        product += g * (value - mean);
      };
      add(channel);
      if (pair) add(a.channels + channel);
      store(result + channel, load(result + channel) + sum);
      store(result + a.stride + channel, load(result + a.stride + channel) + product);
    });
  }
}

template <class T, Activation kind>
void grad_x_to(const BnAct& a, const BnGradients& g, const float* coefficients, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T *z = rows_at<const T>(a, a.z, row), *given = rows_at<const T>(a, g.y, row);
    const T* beside = rows_at<const T>(a, g.z, row);
    T* to = rows_at<T>(a, g.x, row);
    const uint8_t* bits = g.mask ? g.mask + row * (a.stride / 8) : nullptr;
    for_vectors(a, [&](int64_t channel, int64_t count) {
      Vector gradient = load_at(given + channel, count);
      if (bits) {
        uint32_t set = 0;
        memcpy(&set, bits + channel / 8, kLanes / 8);
        gradient = where_bits(set, gradient);
      } else {
        const Vector value = load_at(z + channel, count);
        gradient = through_activation<kind>(affine(a, value, channel), gradient);
        if (coefficients) {
          gradient -= load(coefficients + channel) +
                      (value - load(row_of(a, kBnMean) + channel)) * load(coefficients + a.stride + channel);
        }
      }
      gradient *= load(row_of(a, kBnScale) + channel);
      store_at(to + channel, beside ? gradient + load_at(beside + channel, count) : gradient, count);
    });
  }
}

// Calls f with an element of the images' type and the activation as a constant.
template <class F>
inline void visit(const BnAct& a, const F& f) {
  const auto with_type = [&](auto element) {
    switch (a.activation) {
      case Activation::kRelu:
        return f(element, std::integral_constant<Activation, Activation::kRelu>{});
      case Activation::kSilu:
        return f(element, std::integral_constant<Activation, Activation::kSilu>{});
      default:
        return f(element, std::integral_constant<Activation, Activation::kNone>{});
    }
  };
  a.dtype == DType::kFloat32 ? with_type(Float32{}) : with_type(BFloat16{});
}

void statistics(const BnAct& a, int64_t begin, int64_t end, float* sums, double* result) {
  const auto of = [&](auto element) {
    using T = decltype(element);
    (a.residual ? statistics_of<T, true> : statistics_of<T, false>)(a, begin, end, sums, result);
  };
  a.dtype == DType::kFloat32 ? of(Float32{}) : of(BFloat16{});
}

void normalize(const BnAct& a, bool add, int64_t begin, int64_t end, void* y, uint8_t* mask) {
  visit(a, [&](auto element, auto kind) {
    using T = decltype(element);
    constexpr Activation kKind = decltype(kind)::value;
    (add ? normalize_to<T, kKind, true> : normalize_to<T, kKind, false>)(a, begin, end, y, mask);
  });
}

void sums(const BnAct& a, const void* grad, int64_t begin, int64_t end, float* result) {
  visit(a, [&](auto element, auto kind) {
    sums_of<decltype(element), decltype(kind)::value>(a, grad, begin, end, result);
  });
}

void grad_x(const BnAct& a, const BnGradients& g, const float* coefficients, int64_t begin, int64_t end) {
  visit(a, [&](auto element, auto kind) {
    grad_x_to<decltype(element), decltype(kind)::value>(a, g, coefficients, begin, end);
  });
}

}  // namespace

const BnActKernels AWP_BN_ACT = {statistics, normalize, sums, grad_x};

}  // namespace awp::cpu
