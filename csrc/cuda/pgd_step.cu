// One ascent step, projection and clipping. Compile with -fmad=false: every rounding is the definition's.
#include "awp/cuda.h"
#include "awp/project.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace awp::cuda {

namespace {

template <int N, typename G>
__device__ __forceinline__ void load_grad(const G* grad, const uint8_t* mask, int64_t at, float (&value)[N]) {
  widen(load<N>(grad + at), value);
  if (mask == nullptr) return;
  uint8_t keep[N];
  load<N>(mask + at).unpack(keep);
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = keep[i] != 0 ? value[i] : 0.0f;
}

template <typename T, typename G>
struct Arrays {
  T* x_adv;
  const T* x;
  const G* grad;
  const uint8_t* mask;

  __device__ __forceinline__ Arrays(const PgdStep& p, int64_t at)
      : x_adv(static_cast<T*>(p.x_adv) + at),
        x(static_cast<const T*>(p.x) + at),
        grad(static_cast<const G*>(p.grad) + at),
        mask(p.mask != nullptr ? p.mask + at : nullptr) {}
  __device__ __forceinline__ bool aligned() const { return aligned16(x_adv, x, grad, mask); }
};

template <int N, typename T, typename G>
__device__ __forceinline__ void step_linf(const PgdStep& p, const Arrays<T, G>& a, int64_t at) {
  float value[N], x[N], grad[N];
  widen(load<N>(a.x_adv + at), value);
  widen(load<N>(a.x + at), x);
  load_grad(a.grad, a.mask, at, grad);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // NaN compares false twice: sign 0
    const float sign = static_cast<float>((grad[i] > 0.0f) - (grad[i] < 0.0f));
    value[i] = project_linf(value[i] + p.step * sign, x[i], p.epsilon, p.low, p.high);
  }
  store<N>(a.x_adv + at, narrow<N, T>(value));
}

// The image after the ascent step, before the projection, and the clean one.
template <int N, typename T, typename G>
__device__ __forceinline__ void load_moved(const Arrays<T, G>& a, int64_t at, bool usable, double factor,
                                           float (&value)[N], float (&x)[N]) {
  float grad[N];
  widen(load<N>(a.x_adv + at), value);
  widen(load<N>(a.x + at), x);
  load_grad(a.grad, a.mask, at, grad);
  if (!usable) return;
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] += static_cast<float>(factor * static_cast<double>(grad[i]));
}

}  // namespace

// One pack a thread.
template <typename T, typename G>
__global__ void __launch_bounds__(kThreads) pgd_step_linf(const __grid_constant__ PgdStep p, int64_t total) {
  constexpr int N = kPackOf<T, G>;
  const Arrays<T, G> arrays(p, 0);
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  if (first + N <= total && arrays.aligned()) {
    step_linf<N>(p, arrays, first);
  } else {
#pragma unroll 1
    for (int64_t at = first; at < first + N && at < total; ++at) step_linf<1>(p, arrays, at);
  }
}

// One block a sample. The moved image is computed three times from L1 and L2 instead of being kept.
template <typename T, typename G>
__global__ void __launch_bounds__(kSampleThreads) pgd_step_l2(const __grid_constant__ PgdStep p) {
  constexpr int kPack = kPackOf<T, G>;
  __shared__ double shared[kSampleThreads / kWarp];
  const Arrays<T, G> arrays(p, blockIdx.x * p.elements);
  const bool wide = arrays.aligned();
  const int rank = static_cast<int>(threadIdx.x);

  double squares = 0;
  walk<kPack, 2>(p.elements, wide, rank, kSampleThreads, [&](auto pack, auto unroll, int64_t first, int64_t step) {
    constexpr int N = decltype(pack)::value, M = decltype(unroll)::value;
    float grad[M][N];
#pragma unroll
    for (int m = 0; m < M; ++m) load_grad(arrays.grad, arrays.mask, first + m * step, grad[m]);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        squares = fma(static_cast<double>(grad[m][i]), static_cast<double>(grad[m][i]), squares);
      }
    }
  });
  const double norm = sqrt(block_sum<kSampleThreads>(squares, shared));
  // also false for NaN
  const bool usable = norm > 0.0 && norm <= 1.7976931348623157e308;
  const double factor = usable ? p.step_size / norm : 0.0;

  double distance_squares = 0;
  walk<kPack, 1>(p.elements, wide, rank, kSampleThreads, [&](auto pack, auto unroll, int64_t first, int64_t step) {
    constexpr int N = decltype(pack)::value, M = decltype(unroll)::value;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float value[N], x[N];
      load_moved(arrays, first + m * step, usable, factor, value, x);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const double delta = static_cast<double>(value[i] - x[i]);
        distance_squares = fma(delta, delta, distance_squares);
      }
    }
  });
  const double distance = sqrt(block_sum<kSampleThreads>(distance_squares, shared));
  const bool outside = distance > p.radius;
  const float shrink = outside ? static_cast<float>(p.radius / distance) : 1.0f;

  walk<kPack, 1>(p.elements, wide, rank, kSampleThreads, [&](auto pack, auto unroll, int64_t first, int64_t step) {
    constexpr int N = decltype(pack)::value, M = decltype(unroll)::value;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float value[N], x[N];
      load_moved(arrays, first + m * step, usable, factor, value, x);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (outside) value[i] = x[i] + (value[i] - x[i]) * shrink;
        value[i] = clamp(value[i], p.low, p.high);
      }
      store<N>(arrays.x_adv + first + m * step, narrow<N, T>(value));
    }
  });
}

cudaError_t pgd_step(const PgdStep& p, cudaStream_t stream) {
  const int64_t total = p.samples * p.elements;
  if (total == 0) return cudaSuccess;
  return visit(p.dtype, [&](auto dtype) {
    return visit(p.grad_dtype, [&](auto grad_dtype) {
      using T = typename decltype(dtype)::type;
      using G = typename decltype(grad_dtype)::type;
      if (p.norm == Norm::kL2) return launch(pgd_step_l2<T, G>, p.samples, kSampleThreads, stream, p);
      return launch(pgd_step_linf<T, G>, ceil_div(total, int64_t{kThreads} * kPackOf<T, G>), kThreads, stream, p,
                    total);
    });
  });
}

}  // namespace awp::cuda
