// What the perturbation does to one run of elements, shared by all scopes.
#pragma once

#include "pack.cuh"
#include "plan.h"

namespace awp::cuda {

// Packs of each array in flight a thread: 64 bytes of loads, 64 KB on a multiprocessor.
constexpr int kUnroll = 2;

struct Scaling {
  double gamma, eps;
};

__device__ __forceinline__ float scale_from(SumPair squares, Scaling scaling) {
  return static_cast<float>(scaling.gamma * sqrt(squares.weight) / (sqrt(squares.grad) + scaling.eps));
}

// A thread's share of the sums of squares.
template <typename W, typename G>
__device__ __forceinline__ SumPair sum_squares(const W* weight, const G* grad, int64_t length, int rank, int size) {
  SumPair sum{0, 0};
  walk<kPackOf<W, G>, kUnroll>(length, aligned16(weight, grad), rank, size,
                               [&](auto pack, auto unroll, int64_t first, int64_t step) {
                                 constexpr int N = decltype(pack)::value, M = decltype(unroll)::value;
                                 Pack<W, N> weights[M];
                                 Pack<G, N> grads[M];
#pragma unroll
                                 for (int m = 0; m < M; ++m) {
                                   weights[m] = load<N>(weight + first + m * step);
                                   grads[m] = load<N>(grad + first + m * step);
                                 }
#pragma unroll
                                 for (int m = 0; m < M; ++m) {
                                   float w[N], g[N];
                                   widen(weights[m], w);
                                   widen(grads[m], g);
#pragma unroll
                                   for (int i = 0; i < N; ++i) {
                                     sum.weight = fma(static_cast<double>(w[i]), static_cast<double>(w[i]), sum.weight);
                                     sum.grad = fma(static_cast<double>(g[i]), static_cast<double>(g[i]), sum.grad);
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

// out = weight + scale * grad, saved = weight; a null `saved` is left out. The output's dtype is told apart here, at
// the store, where it costs one uniform branch, instead of in three times as many kernels.
template <typename W, typename G>
__device__ __forceinline__ void move(DType out_dtype, void* out, const W* weight, const G* grad, W* saved,
                                     int64_t length, float scale, int rank, int size) {
  walk<kPackOf<W, G>, kUnroll>(length, aligned16(out, weight, grad, saved), rank, size,
                               [&](auto pack, auto unroll, int64_t first, int64_t step) {
                                 constexpr int N = decltype(pack)::value, M = decltype(unroll)::value;
                                 Pack<W, N> weights[M];
                                 Pack<G, N> grads[M];
#pragma unroll
                                 for (int m = 0; m < M; ++m) {
                                   weights[m] = load_once<N>(weight + first + m * step);
                                   grads[m] = load_once<N>(grad + first + m * step);
                                 }
#pragma unroll
                                 for (int m = 0; m < M; ++m) {
                                   const int64_t at = first + m * step;
                                   if (saved != nullptr) store_once<N>(saved + at, weights[m]);
                                   float w[N], g[N];
                                   widen(weights[m], w);
                                   widen(grads[m], g);
#pragma unroll
                                   for (int i = 0; i < N; ++i) w[i] = fmaf(scale, g[i], w[i]);
                                   store_as<N>(out_dtype, out, at, w);
                                 }
                               });
}

}  // namespace awp::cuda
