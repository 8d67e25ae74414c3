// Scope filter: one pass; the second look at a filter is served by L1 and L2.
#include "launch.cuh"
#include "perturb.cuh"
#include "reduce.cuh"

namespace awp::cuda {

template <typename W, typename G, bool Plain>
__global__ void __launch_bounds__(kThreads, 4)
    perturb_filter(const __grid_constant__ PerturbTable table, DType out_dtype, Scaling scaling, float* scales) {
  __shared__ SumPair shared[kWarps];
  const int32_t block = blockIdx.x;
  const int entry = find_entry(table.first_block, table.count, block);
  const int64_t run = table.run[entry];
  const bool whole_block = run > kShortFilter;
  const int thread = static_cast<int>(threadIdx.x);
  const int rank = whole_block ? thread : thread % kWarp;
  const int size = whole_block ? kThreads : kWarp;
  const int32_t local = block - table.first_block[entry];
  const int32_t filter = whole_block ? local : local * kWarps + thread / kWarp;
  // whole warps leave, and only where no barrier follows
  if (filter >= table.filters[entry]) return;

  const int64_t begin = filter * run;
  const W* weight = static_cast<const W*>(table.weight[entry]) + begin;
  const G* grad = static_cast<const G*>(table.grad[entry]) + begin;
  const bool adaptive = table.adaptive[entry];
  SumPair sum = sum_squares<!Plain>(weight, grad, run, rank, size, adaptive, scaling.eta);
  sum = whole_block ? block_sum<kThreads>(sum, shared) : warp_sum(sum);
  const float scale = scale_from(sum, scaling);
  if (rank == 0) scales[table.first_scale[entry] + filter] = scale;

  W* saved = static_cast<W*>(table.saved[entry]);
  move<Plain>(out_dtype, advance(table.out[entry], out_dtype, begin), weight, grad,
              saved != nullptr ? saved + begin : nullptr, run, scale, adaptive, scaling, rank, size);
}

namespace {

template <typename W, typename G>
cudaError_t perturb_tables(const Perturb& p, cudaStream_t stream) {
  const auto kernel = is_plain(p) ? perturb_filter<W, G, true> : perturb_filter<W, G, false>;
  PerturbTable table;
  float* scales = p.scales;
  for (int64_t i = 0; i < p.count;) {
    i = fill_filters(&table, p, i);
    if (table.blocks == 0 && i < p.count) return cudaErrorInvalidValue;
    const cudaError_t error = launch(kernel, table.blocks, kThreads, stream, table, p.out_dtype, scaling_of(p), scales);
    if (error != cudaSuccess) return error;
    scales += table.scales;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t perturb_filters(const Perturb& p, cudaStream_t stream) {
  return visit(p.weight_dtype, [&](auto weight) {
    return visit(p.grad_dtype, [&](auto grad) {
      return perturb_tables<typename decltype(weight)::type, typename decltype(grad)::type>(p, stream);
    });
  });
}

}  // namespace awp::cuda
