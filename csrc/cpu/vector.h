// Vectors of floats, as wide as the instruction set that a file is compiled for, loaded from fp32 or bf16.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace awp::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

// How an element is stored.
typedef float Float32;
typedef uint16_t BFloat16;

inline Vector load(const Float32* from) {
  Vector value;
  memcpy(&value, from, sizeof value);
  return value;
}

inline Vector load(const BFloat16* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  return (Vector)bits;
}

inline void store(Float32* to, Vector value) { memcpy(to, &value, sizeof value); }

inline Halves round_to_bfloat16(Vector value) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)value);
#endif
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const Integers number = value == value;
  const Bits chosen = ((Bits)number & rounded) | (~(Bits)number & 0x7FC0u);
  return __builtin_convertvector(chosen, Halves);
}

inline void store(BFloat16* to, Vector value) {
  const Halves halves = round_to_bfloat16(value);
  memcpy(to, &halves, sizeof halves);
}

// What a value is once it is stored as T.
template <class T>
inline Vector rounded(Vector value) {
  if constexpr (sizeof(T) == sizeof(float)) return value;
  return (Vector)(__builtin_convertvector(round_to_bfloat16(value), Bits) << 16);
}

// The first `count` lanes; the others are zero.
template <class T>
inline Vector load_some(const T* from, int64_t count) {
  T values[kLanes] = {};
  memcpy(values, from, count * sizeof(T));
  return load(values);
}

template <class T>
inline void store_some(T* to, Vector value, int64_t count) {
  T values[kLanes];
  store(values, value);
  memcpy(to, values, count * sizeof(T));
}

}  // namespace
}  // namespace awp::cpu
