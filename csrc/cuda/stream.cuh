// What the operations on lists of tensors share: sums of squares, and stores by a dtype that is known at run time.
#pragma once

#include "pack.cuh"
#include "plan.h"

namespace awp::cuda {

// Packs of each array in flight a thread: 64 bytes of loads, 64 KB on a multiprocessor.
constexpr int kUnroll = 2;

// A thread's share of an array's sum of squares.
template <typename G>
__device__ __forceinline__ double sum_squares_of(const G* values, int64_t length, int rank, int size) {
  double sum = 0;
  walk<kPackOf<G, G>, 2 * kUnroll>(length, aligned16(values), rank, size,
                                   [&](auto pack, auto unroll, int64_t first, int64_t step) {
                                     constexpr int N = decltype(pack)::value, M = decltype(unroll)::value;
                                     Pack<G, N> packs[M];
#pragma unroll
                                     for (int m = 0; m < M; ++m) packs[m] = load<N>(values + first + m * step);
#pragma unroll
                                     for (int m = 0; m < M; ++m) {
                                       float g[N];
                                       widen(packs[m], g);
#pragma unroll
                                       for (int i = 0; i < N; ++i) {
                                         sum = fma(static_cast<double>(g[i]), static_cast<double>(g[i]), sum);
                                       }
                                     }
                                   });
  return sum;
}

__device__ __forceinline__ void* advance(void* pointer, DType dtype, int64_t elements) {
  return static_cast<char*>(pointer) + elements * (dtype == DType::kFloat32 ? 4 : 2);
}

template <int N>
__device__ __forceinline__ void store_as(DType dtype, void* to, int64_t at, const float (&value)[N]) {
  switch (dtype) {
    case DType::kFloat16:
      return store<N>(static_cast<Half*>(to) + at, narrow<N, Half>(value));
    case DType::kBFloat16:
      return store<N>(static_cast<BFloat16*>(to) + at, narrow<N, BFloat16>(value));
    default:
      return store<N>(static_cast<float*>(to) + at, narrow<N, float>(value));
  }
}

}  // namespace awp::cuda
