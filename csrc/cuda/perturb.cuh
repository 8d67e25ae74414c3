// What the perturbation does to one run of elements, shared by all scopes.
#pragma once

#include "awp/perturb.h"
#include "awp/project.h"
#include "stream.cuh"

namespace awp::cuda {

struct Scaling {
  bool relative;  // gamma is a fraction of ||w||
  double gamma, eps;
  float eta, bound;  // bound < 0: none
};

inline Scaling scaling_of(const Perturb& p) { return {p.scale == Scale::kRelative, p.gamma, p.eps, p.eta, p.bound}; }

// Whether the move is w + scale * g.
inline bool is_plain(const Perturb& p) { return p.scale != Scale::kElementwise && !(p.bound >= 0); }

__device__ __forceinline__ float scale_from(SumPair squares, Scaling scaling) {
  return perturb_scale(scaling.gamma, scaling.eps, scaling.relative, squares.weight, squares.grad);
}

// A thread's share of the sums of squares of w and g; with `Scaled` of T g, T = |w| + eta, where `adaptive`.
template <bool Scaled, typename W, typename G>
__device__ __forceinline__ SumPair sum_squares(const W* weight, const G* grad, int64_t length, int rank, int size,
                                               bool adaptive = false, float eta = 0) {
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
                                     double value = static_cast<double>(g[i]);
                                     if constexpr (Scaled) {
                                       // exact: 24 bits times 24 bits
                                       if (adaptive) value *= static_cast<double>(fabsf(w[i]) + eta);
                                     }
                                     sum.grad = fma(value, value, sum.grad);
                                   }
                                 }
                               });
  return sum;
}

// Where a weight goes that does not just move by scale * grad.
__device__ __forceinline__ float moved_by(float weight, float grad, float scale, bool adaptive, Scaling scaling) {
  const float factor = fabsf(weight) + scaling.eta;
  const float moved = adaptive ? fmaf(scale * grad * factor, factor, weight) : fmaf(scale, grad, weight);
  return scaling.bound >= 0.0f ? project_relative(moved, weight, scaling.bound) : moved;
}

// Where no direction is followed: out = weight, to the bit where it is stored alike.
template <typename W>
__device__ __forceinline__ void keep(DType out_dtype, void* out, const W* weight, W* saved, int64_t length, int rank,
                                     int size) {
  const bool in_place = out == weight;
  if (in_place && saved == nullptr) return;
  walk<kPackOf<W, W>, 1>(length, aligned16(out, weight, saved), rank, size,
                         [&](auto pack, auto unroll, int64_t first, int64_t step) {
                           constexpr int N = decltype(pack)::value;
#pragma unroll
                           for (int m = 0; m < decltype(unroll)::value; ++m) {
                             const int64_t at = first + m * step;
                             const Pack<W, N> weights = load<N>(weight + at);
                             if (saved != nullptr) store<N>(saved + at, weights);
                             if (in_place) continue;
                             if (out_dtype == dtype_of<W>) {
                               store<N>(static_cast<W*>(out) + at, weights);
                             } else {
                               float w[N];
                               widen(weights, w);
                               store_as<N>(out_dtype, out, at, w);
                             }
                           }
                         });
}

// out = weight + scale * grad, or moved_by where not `Plain`; saved = weight; a null `saved` is left out. The output's
// dtype is told apart here, at the store, where it costs one uniform branch, instead of in three times as many kernels.
template <bool Plain, typename W, typename G>
__device__ __forceinline__ void move(DType out_dtype, void* out, const W* weight, const G* grad, W* saved,
                                     int64_t length, float scale, bool adaptive, Scaling scaling, int rank, int size) {
  if (!is_followed(scale)) return keep(out_dtype, out, weight, saved, length, rank, size);
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
                                   for (int i = 0; i < N; ++i) {
                                     w[i] = Plain ? fmaf(scale, g[i], w[i])
                                                  : moved_by(w[i], g[i], scale, adaptive, scaling);
                                   }
                                   store_as<N>(out_dtype, out, at, w);
                                 }
                               });
}

}  // namespace awp::cuda
