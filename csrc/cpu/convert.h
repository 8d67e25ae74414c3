// 16-bit storage to and from float, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "awp/philox.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace awp::cpu {
namespace {

inline float half_to_float(uint16_t half) {
  // scaling by 2^112 moves the exponent's bias, for subnormal numbers too
  const float magnitude = bits_to_float((half & 0x7FFF) << 13) * bits_to_float(0x77800000);
  const int32_t special = (half & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;
  return bits_to_float(float_to_bits(magnitude) | special | (half & 0x8000) << 16);
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = static_cast<uint32_t>(float_to_bits(value));
  const uint32_t sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x47800000u) {  // 2^16 and more, infinity, NaN
    magnitude = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 lets the adder round at the last place
    magnitude =
        static_cast<uint32_t>(float_to_bits(bits_to_float(static_cast<int32_t>(magnitude)) + 0.5f)) - 0x3F000000u;
  } else {
    magnitude = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | magnitude);
}

inline float bfloat16_to_float(uint16_t value) { return bits_to_float(static_cast<int32_t>(uint32_t{value} << 16)); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = static_cast<uint32_t>(float_to_bits(value));
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

inline void halves_to_floats(const uint16_t* source, float* target, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
#endif
  for (; i < count; ++i) target[i] = half_to_float(source[i]);
}

inline void floats_to_halves(const float* source, uint16_t* target, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  for (; i < count; ++i) target[i] = float_to_half(source[i]);
}

// The values as floats: the array itself where it holds floats, else converted into `buffer`.
inline const float* as_floats(const void* source, DType dtype, float* buffer, int64_t count) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(source);
  const uint16_t* values = static_cast<const uint16_t*>(source);
  if (dtype == DType::kFloat16) {
    halves_to_floats(values, buffer, count);
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = bfloat16_to_float(values[i]);
  }
  return buffer;
}

// Where to compute floats that store_floats then puts into `target`.
inline float* float_target(void* target, DType dtype, float* buffer) {
  return dtype == DType::kFloat32 ? static_cast<float*>(target) : buffer;
}

inline void store_floats(void* target, DType dtype, const float* buffer, int64_t count) {
  uint16_t* values = static_cast<uint16_t*>(target);
  if (dtype == DType::kFloat16) {
    floats_to_halves(buffer, values, count);
  } else if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) values[i] = float_to_bfloat16(buffer[i]);
  }
}

}  // namespace
}  // namespace awp::cpu
