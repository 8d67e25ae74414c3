// Packs of neighbouring elements, loaded and stored as one access and computed with in fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "plan.h"

// The host's emulator counts the bytes that go from and to memory here.
#ifndef AWP_COUNT_BYTES
#define AWP_COUNT_BYTES(bytes)
#endif

namespace awp::cuda {

// Storage types: only their bits are kept, so that a copy is exact.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
constexpr DType dtype_of = std::is_same_v<T, Half>       ? DType::kFloat16
                           : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                         : DType::kFloat32;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float to_float(BFloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ Half from_float<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

// The widest access that fits a pack.
template <int Bytes>
using Word =
    std::conditional_t<Bytes % 16 == 0, uint4,
                       std::conditional_t<Bytes == 8, uint2,
                                          std::conditional_t<Bytes % 4 == 0, unsigned,
                                                             std::conditional_t<Bytes == 2, unsigned short, uint8_t>>>>;

template <typename T, int N>
struct Pack {
  using WordT = Word<N* static_cast<int>(sizeof(T))>;
  static constexpr int kWords = N * static_cast<int>(sizeof(T)) / static_cast<int>(sizeof(WordT));
  WordT word[kWords];

  __device__ __forceinline__ void unpack(T (&value)[N]) const { memcpy(value, word, sizeof word); }
  __device__ __forceinline__ void pack(const T (&value)[N]) { memcpy(word, value, sizeof word); }
};

// Elements a thread takes at a time: 16 bytes of the wider type, so that neighbouring threads leave no gaps.
template <typename A, typename B>
constexpr int kPackOf = 16 / static_cast<int>(sizeof(A) > sizeof(B) ? sizeof(A) : sizeof(B));

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  Pack<T, N> pack;
  AWP_COUNT_BYTES(sizeof pack);
  const auto* words = reinterpret_cast<const typename Pack<T, N>::WordT*>(from);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kWords; ++i) pack.word[i] = words[i];
  return pack;
}

// For what is not read again soon: gives way first in L2.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_once(const T* from) {
  Pack<T, N> pack;
  AWP_COUNT_BYTES(sizeof pack);
  const auto* words = reinterpret_cast<const typename Pack<T, N>::WordT*>(from);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kWords; ++i) pack.word[i] = __ldcs(words + i);
  return pack;
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  AWP_COUNT_BYTES(sizeof pack);
  auto* words = reinterpret_cast<typename Pack<T, N>::WordT*>(to);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kWords; ++i) words[i] = pack.word[i];
}

template <int N, typename T>
__device__ __forceinline__ void store_once(T* to, const Pack<T, N>& pack) {
  AWP_COUNT_BYTES(sizeof pack);
  auto* words = reinterpret_cast<typename Pack<T, N>::WordT*>(to);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kWords; ++i) __stcs(words + i, pack.word[i]);
}

template <int N, typename T>
__device__ __forceinline__ void widen(const Pack<T, N>& pack, float (&value)[N]) {
  T raw[N];
  pack.unpack(raw);
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = to_float(raw[i]);
}

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> narrow(const float (&value)[N]) {
  T raw[N];
#pragma unroll
  for (int i = 0; i < N; ++i) raw[i] = from_float<T>(value[i]);
  Pack<T, N> pack;
  pack.pack(raw);
  return pack;
}

// Null pointers count as aligned.
template <typename... Pointers>
__device__ __forceinline__ bool aligned16(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

}  // namespace awp::cuda
