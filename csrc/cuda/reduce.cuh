// Sums over a warp or a block in a fixed order; every thread gets the result.
#pragma once

#include <cuda_runtime.h>

#include "plan.h"

namespace awp::cuda {

__device__ __forceinline__ SumPair operator+(SumPair a, SumPair b) { return {a.weight + b.weight, a.grad + b.grad}; }

template <typename T>
__device__ __forceinline__ T from_lane(T value, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
}
__device__ __forceinline__ SumPair from_lane(SumPair value, int lanes) {
  return {from_lane(value.weight, lanes), from_lane(value.grad, lanes)};
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = value + from_lane(value, lanes);
  return value;
}

// `shared` holds one value a warp; free again when the call returns.
template <int Threads, typename T>
__device__ __forceinline__ T block_sum(T value, T* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = shared[0];
#pragma unroll
  for (int i = 1; i < Threads / kWarp; ++i) total = total + shared[i];
  __syncthreads();
  return total;
}

}  // namespace awp::cuda
