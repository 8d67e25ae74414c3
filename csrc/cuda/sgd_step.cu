// The SGD step of a list of tensors: one pass, and the norms of what it leaves.
#include "awp/cuda.h"
#include "awp/sgd.h"
#include "chunk.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "stream.cuh"

namespace awp::cuda {
namespace {

// One tensor's arrays from a chunk's first element on.
template <typename G>
struct Run {
  float* weight;
  const G* grad;
  float* buffer;
  float* average;
  void* out;  // null: not wanted
  DType out_dtype;
  int64_t length;
  float decay;
};

template <typename G>
__device__ __forceinline__ Run<G> run_of(const SgdTable& table, const Chunk& chunk, DType out_dtype) {
  const int entry = chunk.entry;
  const auto from = [&](float* first) { return first == nullptr ? nullptr : first + chunk.begin; };
  void* out = table.out[entry];
  return {table.weight[entry] + chunk.begin,
          static_cast<const G*>(table.grad[entry]) + chunk.begin,
          from(table.buffer[entry]),
          from(table.average[entry]),
          out == nullptr ? nullptr : advance(out, out_dtype, chunk.begin),
          out_dtype,
          chunk.length,
          table.decay[entry]};
}

template <int N>
__device__ __forceinline__ double add_squares(double sum, const float (&value)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum = fma(static_cast<double>(value[i]), static_cast<double>(value[i]), sum);
  return sum;
}

// A thread's share of a step that is left out: `out` is written, and the sum of squares of w is found.
template <typename G>
__device__ __forceinline__ double leave_out(const Run<G>& run, int rank, int size) {
  double sum = 0;
  walk<4, kUnroll>(run.length, aligned16(run.weight, run.out), rank, size,
                   [&](auto pack, auto unroll, int64_t first, int64_t step) {
                     constexpr int N = decltype(pack)::value, M = decltype(unroll)::value;
                     Pack<float, N> weights[M];
#pragma unroll
                     for (int m = 0; m < M; ++m) weights[m] = load_once<N>(run.weight + first + m * step);
#pragma unroll
                     for (int m = 0; m < M; ++m) {
                       float w[N];
                       widen(weights[m], w);
                       if (run.out != nullptr) store_as<N>(run.out_dtype, run.out, first + m * step, w);
                       sum = add_squares(sum, w);
                     }
                   });
  return sum;
}

// A thread's share of a step; the sum of squares of what its weights then are.
template <typename G, bool Momentum, bool Average>
__device__ __forceinline__ double update(const Run<G>& run, const SgdRule& rule, const SgdFactors& factors, int rank,
                                         int size) {
  double sum = 0;
  walk<4, kUnroll>(run.length, aligned16(run.weight, run.grad, run.buffer, run.average, run.out), rank, size,
                   [&](auto pack, auto unroll, int64_t first, int64_t step) {
                     constexpr int N = decltype(pack)::value, M = decltype(unroll)::value;
                     Pack<float, N> weights[M], buffers[M], averages[M];
                     Pack<G, N> grads[M];
#pragma unroll
                     for (int m = 0; m < M; ++m) {
                       const int64_t at = first + m * step;
                       weights[m] = load_once<N>(run.weight + at);
                       grads[m] = load_once<N>(run.grad + at);
                       if constexpr (Momentum) buffers[m] = load_once<N>(run.buffer + at);
                       if constexpr (Average) averages[m] = load_once<N>(run.average + at);
                     }
#pragma unroll
                     for (int m = 0; m < M; ++m) {
                       const int64_t at = first + m * step;
                       float w[N], d[N];
                       widen(weights[m], w);
                       widen(grads[m], d);
#pragma unroll
                       for (int i = 0; i < N; ++i) {
                         d[i] = factors.grad * d[i];
                         if (run.decay != 0.0f) d[i] = fmaf(run.decay, w[i], d[i]);
                       }
                       if constexpr (Momentum) {
                         float b[N];
                         widen(buffers[m], b);
#pragma unroll
                         for (int i = 0; i < N; ++i) {
                           b[i] = fmaf(rule.momentum, b[i], d[i]);
                           d[i] = rule.nesterov ? fmaf(rule.momentum, b[i], d[i]) : b[i];
                         }
                         store_once<N>(run.buffer + at, narrow<N, float>(b));
                       }
#pragma unroll
                       for (int i = 0; i < N; ++i) w[i] = fmaf(factors.descent, d[i], w[i]);
                       store<N>(run.weight + at, narrow<N, float>(w));
                       if constexpr (Average) {
                         float a[N];
                         widen(averages[m], a);
#pragma unroll
                         for (int i = 0; i < N; ++i) a[i] = fmaf(factors.average_weight, w[i] - a[i], a[i]);
                         store_once<N>(run.average + at, narrow<N, float>(a));
                       }
                       if (run.out != nullptr) store_as<N>(run.out_dtype, run.out, at, w);
                       sum = add_squares(sum, w);
                     }
                   });
  return sum;
}

}  // namespace

// sums: one entry a block.
template <typename G, bool Momentum, bool Average>
__global__ void __launch_bounds__(kThreads, 4)
    sgd_update(const __grid_constant__ SgdTable table, int64_t elements, DType out_dtype,
               const __grid_constant__ SgdRule rule, double* sums) {
  __shared__ double shared[kWarps];
  const Chunk chunk = find_chunk(table, static_cast<int32_t>(blockIdx.x), elements);
  const Run<G> run = run_of<G>(table, chunk, out_dtype);
  const SgdFactors factors = sgd_factors(rule);
  const int thread = static_cast<int>(threadIdx.x);
  const double sum = factors.leave_out ? leave_out(run, thread, kThreads)
                                       : update<G, Momentum, Average>(run, rule, factors, thread, kThreads);
  const double total = block_sum<kThreads>(sum, shared);
  if (thread == 0) sums[blockIdx.x] = total;
}

// A warp for each tensor.
__global__ void __launch_bounds__(kThreads)
    sgd_norms(const __grid_constant__ SumsTable table, const double* sums, double* norms) {
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t entry = static_cast<int32_t>(blockIdx.x) * kWarps + thread / kWarp;
  if (entry >= table.count) return;
  double sum = 0;
#pragma unroll 4
  for (int32_t i = table.first[entry] + thread % kWarp; i < table.first[entry + 1]; i += kWarp) sum += sums[i];
  const double total = warp_sum(sum);
  if (thread % kWarp == 0) norms[entry] = sqrt(total);
}

namespace {

template <typename G>
auto kernel_for(bool momentum, bool average) {
  if (momentum) return average ? sgd_update<G, true, true> : sgd_update<G, true, false>;
  return average ? sgd_update<G, false, true> : sgd_update<G, false, false>;
}

}  // namespace

int64_t sgd_step_workspace_bytes(const SgdStep& s) {
  return total_chunks(s, chunk_elements(s)) * static_cast<int64_t>(sizeof(double));
}

cudaError_t sgd_step(const SgdStep& s, void* workspace, cudaStream_t stream) {
  if (s.count == 0) return cudaSuccess;
  const int64_t elements = chunk_elements(s);
  double* sums = static_cast<double*>(workspace);
  const SgdTensor& any = s.tensors[0];
  const auto kernel = visit(s.grad_dtype, [&](auto grad) {
    return kernel_for<typename decltype(grad)::type>(any.buffer != nullptr, any.average != nullptr);
  });
  SgdTable table;
  for (int64_t i = 0; i < s.count; sums += table.blocks) {
    double* norms = s.norms + i;
    i = fill_steps(&table, s, i, elements);
    cudaError_t error = launch(kernel, table.blocks, kThreads, stream, table, elements, s.out_dtype, s.rule, sums);
    if (error != cudaSuccess) return error;
    error = launch(sgd_norms, ceil_div(table.count, kWarps), kThreads, stream, sums_of(table), sums, norms);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace awp::cuda
