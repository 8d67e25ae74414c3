// One norm over a list of arrays of any dtypes: sums of squares chunk by chunk, then their sum.
#include "awp/cuda.h"
#include "chunk.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "stream.cuh"

namespace awp::cuda {

__global__ void __launch_bounds__(kThreads, 4)
    norm_sums(const __grid_constant__ NormTable table, int64_t elements, double* sums) {
  __shared__ double shared[kWarps];
  const Chunk chunk = find_chunk(table, static_cast<int32_t>(blockIdx.x), elements);
  const int thread = static_cast<int>(threadIdx.x);
  const void* data = table.data[chunk.entry];
  double sum;
  switch (table.dtype[chunk.entry]) {
    case DType::kFloat16:
      sum = sum_squares_of(static_cast<const Half*>(data) + chunk.begin, chunk.length, thread, kThreads);
      break;
    case DType::kBFloat16:
      sum = sum_squares_of(static_cast<const BFloat16*>(data) + chunk.begin, chunk.length, thread, kThreads);
      break;
    default:
      sum = sum_squares_of(static_cast<const float*>(data) + chunk.begin, chunk.length, thread, kThreads);
  }
  const double total = block_sum<kThreads>(sum, shared);
  if (thread == 0) sums[blockIdx.x] = total;
}

// One block.
__global__ void __launch_bounds__(kThreads) norm_total(const double* sums, int32_t count, double* norm) {
  __shared__ double shared[kWarps];
  double sum = 0;
#pragma unroll 4
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) sum += sums[i];
  const double total = block_sum<kThreads>(sum, shared);
  if (threadIdx.x == 0) *norm = sqrt(total);
}

int64_t total_norm_workspace_bytes(const TotalNorm& n) {
  return total_chunks(n, chunk_elements(n)) * static_cast<int64_t>(sizeof(double));
}

cudaError_t total_norm(const TotalNorm& n, void* workspace, cudaStream_t stream) {
  const int64_t elements = chunk_elements(n);
  double* sums = static_cast<double*>(workspace);
  NormTable table;
  int64_t chunks = 0;
  for (int64_t i = 0; i < n.count; chunks += table.blocks) {
    i = fill_norms(&table, n, i, elements);
    const cudaError_t error = launch(norm_sums, table.blocks, kThreads, stream, table, elements, sums + chunks);
    if (error != cudaSuccess) return error;
  }
  return launch(norm_total, 1, kThreads, stream, sums, static_cast<int32_t>(chunks), n.norm);
}

}  // namespace awp::cuda
