// Counter-based random numbers, the same operations in the same order as kernels/awp_kernels/philox.py.
// Every line is one IEEE operation: compile with -ffp-contract=off, or nvcc -fmad=false.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define AWP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define AWP_HOST_DEVICE inline
#endif

namespace awp {

enum class Stream : uint32_t { kUniform = 0, kNormal = 1, kAugment = 2, kCutout = 6 };

struct Words {
  uint32_t word[4];
};

AWP_HOST_DEVICE Words philox4x32(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The four words of elements 4 * block .. 4 * block + 3 of one sample.
AWP_HOST_DEVICE Words sample_words(uint32_t block, int64_t sample_id, uint64_t seed, Stream stream) {
  const uint64_t id = static_cast<uint64_t>(sample_id);
  return philox4x32(
      {{block, static_cast<uint32_t>(stream), static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)}},
      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// An odd integer in (-2^24, 2^24); times 2^-24 uniform in (-1, 1).
AWP_HOST_DEVICE float uniform_integer(uint32_t word) {
  return static_cast<float>(2 * static_cast<int32_t>(word >> 8) + 1 - (1 << 24));
}

AWP_HOST_DEVICE float bits_to_float(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

AWP_HOST_DEVICE int32_t float_to_bits(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Two standard normal numbers by Box-Muller.
AWP_HOST_DEVICE void normal_pair(uint32_t radius_word, uint32_t angle_word, float* first, float* second) {
  const int32_t bits = float_to_bits(static_cast<float>((radius_word >> 8) + 1));
  int32_t exponent = (bits >> 23) - 127;
  float mantissa = bits_to_float((bits & 0x7FFFFF) | 0x3F800000);
  if (mantissa > 1.41421356237309504880f) {
    mantissa = mantissa * 0.5f;
    exponent = exponent + 1;
  }
  const float s = (mantissa - 1.0f) / (mantissa + 1.0f);
  const float s2 = s * s;
  float series = static_cast<float>(1.0 / 9);
  series = series * s2 + static_cast<float>(1.0 / 7);
  series = series * s2 + static_cast<float>(1.0 / 5);
  series = series * s2 + static_cast<float>(1.0 / 3);
  series = series * s2 + 1.0f;
  const float logarithm = static_cast<float>(exponent - 24) * 0.69314718055994530942f + (s * 2.0f) * series;
#if defined(__CUDA_ARCH__)
  const float radius = __fsqrt_rn(logarithm * -2.0f);
#else
  const float radius = std::sqrt(logarithm * -2.0f);
#endif

  const uint32_t angle_bits = angle_word >> 8;
  const uint32_t quadrant = angle_bits >> 22;
  const float turn = static_cast<float>(angle_bits & 0x3FFFFFu) * (1.0f / 4194304.0f) - 0.5f;
  const float angle = turn * 1.57079632679489661923f;
  const float a2 = angle * angle;
  float sine = static_cast<float>(1.0 / 362880);
  sine = sine * a2 + static_cast<float>(-1.0 / 5040);
  sine = sine * a2 + static_cast<float>(1.0 / 120);
  sine = sine * a2 + static_cast<float>(-1.0 / 6);
  sine = sine * a2 + 1.0f;
  sine = angle * sine;
  float cosine = static_cast<float>(1.0 / 40320);
  cosine = cosine * a2 + static_cast<float>(-1.0 / 720);
  cosine = cosine * a2 + static_cast<float>(1.0 / 24);
  cosine = cosine * a2 + -0.5f;
  cosine = cosine * a2 + 1.0f;

  const float x = (quadrant & 1) ? sine : cosine;
  const float y = (quadrant & 1) ? cosine : sine;
  *first = radius * (quadrant == 1 || quadrant == 2 ? -x : x);
  *second = radius * (quadrant >= 2 ? -y : y);
}

// The normal numbers of elements 4 * block .. 4 * block + 3 of one sample.
AWP_HOST_DEVICE void normal_block(uint32_t block, int64_t sample_id, uint64_t seed, float* z) {
  const Words words = sample_words(block, sample_id, seed, Stream::kNormal);
  normal_pair(words.word[0], words.word[1], &z[0], &z[1]);
  normal_pair(words.word[2], words.word[3], &z[2], &z[3]);
}

// z^2 in units of 2^-32: integer sums do not depend on their order.
AWP_HOST_DEVICE int64_t square_fixed_point(float z) { return static_cast<int64_t>((z * z) * 4294967296.0f); }

}  // namespace awp
