// Scopes layer and global: one pass that sums squares chunk by chunk, one that moves the weights.
#include "awp/cuda.h"
#include "chunk.cuh"
#include "launch.cuh"
#include "perturb.cuh"
#include "reduce.cuh"

namespace awp::cuda {

// Declared here, defined in perturb_filter.cu, so that the two compile side by side.
cudaError_t perturb_filters(const Perturb& p, cudaStream_t stream);

// sums: one entry a block; without the weights' where not `Relative`.
template <typename W, typename G, bool Relative>
__global__ void __launch_bounds__(kThreads, 4)
    perturb_sums(const __grid_constant__ PerturbTable table, int64_t elements, float eta, SumPair* sums) {
  __shared__ SumPair shared[kThreads / kWarp];
  const Chunk chunk = find_chunk(table, static_cast<int32_t>(blockIdx.x), elements);
  const W* weight = static_cast<const W*>(table.weight[chunk.entry]) + chunk.begin;
  const G* grad = static_cast<const G*>(table.grad[chunk.entry]) + chunk.begin;
  SumPair sum{0, 0};
  if constexpr (Relative) {
    sum = sum_squares<false>(weight, grad, chunk.length, threadIdx.x, kThreads);
  } else if (table.adaptive[chunk.entry]) {
    sum.grad = sum_squares<true>(weight, grad, chunk.length, threadIdx.x, kThreads, true, eta).grad;
  } else {
    sum.grad = sum_squares_of(grad, chunk.length, threadIdx.x, kThreads);
  }
  const SumPair total = block_sum<kThreads>(sum, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// Scope global: all_sums sums at `sums` give the one scale, which every tensor's first block writes. Scope layer:
// all_sums is 0, and `sums` belongs to the table's first chunk.
template <typename W, typename G, bool Plain>
__global__ void __launch_bounds__(kThreads, 4)
    perturb_move(const __grid_constant__ PerturbTable table, int64_t elements, const SumPair* sums, int32_t all_sums,
                 DType out_dtype, Scaling scaling, const double* norms, int32_t tensors, float* scales) {
  __shared__ SumPair shared[kThreads / kWarp];
  // backwards: what the first pass read last is still in L2
  const int32_t block = table.blocks - 1 - static_cast<int32_t>(blockIdx.x);
  const Chunk chunk = find_chunk(table, block, elements);
  const int32_t first = all_sums > 0 ? 0 : table.first_block[chunk.entry];
  const int32_t end = all_sums > 0                    ? all_sums
                      : chunk.entry + 1 < table.count ? table.first_block[chunk.entry + 1]
                                                      : table.blocks;
  SumPair sum{0, 0};
#pragma unroll 4
  for (int32_t i = first + static_cast<int32_t>(threadIdx.x); i < end; i += kThreads) sum = sum + sums[i];
  if (norms != nullptr) {
    const int32_t first_norm = all_sums > 0 ? 0 : chunk.entry;
    const int32_t end_norm = all_sums > 0 ? tensors : chunk.entry + 1;
    for (int32_t i = first_norm + static_cast<int32_t>(threadIdx.x); i < end_norm; i += kThreads) {
      sum.weight += norms[i] * norms[i];
    }
  }
  const float scale = scale_from(block_sum<kThreads>(sum, shared), scaling);
  if (threadIdx.x == 0 && chunk.begin == 0) scales[table.first_scale[chunk.entry]] = scale;

  const W* weight = static_cast<const W*>(table.weight[chunk.entry]) + chunk.begin;
  W* saved = static_cast<W*>(table.saved[chunk.entry]);
  move<Plain>(out_dtype, advance(table.out[chunk.entry], out_dtype, chunk.begin), weight,
              static_cast<const G*>(table.grad[chunk.entry]) + chunk.begin,
              saved != nullptr ? saved + chunk.begin : nullptr, chunk.length, scale, table.adaptive[chunk.entry],
              scaling, threadIdx.x, kThreads);
}

namespace {

template <typename W, typename G>
cudaError_t perturb_chunks(const Perturb& p, SumPair* sums, cudaStream_t stream) {
  const int64_t elements = chunk_elements(p);
  const bool global = p.scope == Scope::kGlobal;
  const auto sums_kernel =
      p.scale == Scale::kRelative && p.weight_norms == nullptr ? perturb_sums<W, G, true> : perturb_sums<W, G, false>;
  const auto move_kernel = is_plain(p) ? perturb_move<W, G, true> : perturb_move<W, G, false>;
  PerturbTable table;
  int64_t chunk = 0;
  for (int64_t i = 0; i < p.count; chunk += table.blocks) {
    i = fill_chunks(&table, p, i, elements);
    const cudaError_t error = launch(sums_kernel, table.blocks, kThreads, stream, table, elements, p.eta, sums + chunk);
    if (error != cudaSuccess) return error;
  }
  const auto all_sums = static_cast<int32_t>(global ? chunk : 0);
  // full tables, the last one first: see perturb_move
  for (int64_t i = (p.count - 1) / kPerturbCapacity * kPerturbCapacity; i >= 0; i -= kPerturbCapacity) {
    fill_chunks(&table, p, i, elements);
    chunk -= table.blocks;
    const double* norms = p.weight_norms == nullptr || global ? p.weight_norms : p.weight_norms + i;
    const cudaError_t error =
        launch(move_kernel, table.blocks, kThreads, stream, table, elements, global ? sums : sums + chunk, all_sums,
               p.out_dtype, scaling_of(p), norms, static_cast<int32_t>(p.count), global ? p.scales : p.scales + i);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t perturb_workspace_bytes(const Perturb& p) {
  if (p.scope == Scope::kFilter) return 0;
  return total_chunks(p, chunk_elements(p)) * static_cast<int64_t>(sizeof(SumPair));
}

cudaError_t perturb(const Perturb& p, void* workspace, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  if (p.scope == Scope::kFilter) return perturb_filters(p, stream);
  return visit(p.weight_dtype, [&](auto weight) {
    return visit(p.grad_dtype, [&](auto grad) {
      return perturb_chunks<typename decltype(weight)::type, typename decltype(grad)::type>(
          p, static_cast<SumPair*>(workspace), stream);
    });
  });
}

}  // namespace awp::cuda
