// Random starting points in the ball. Compile with -fmad=false: the noise is defined to the last bit.
#include "awp/cuda.h"
#include "awp/project.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace awp::cuda {

namespace {

constexpr int kLanes = 4;  // words of one Philox block

// Where a logical element of a sample lies in its run.
__device__ __forceinline__ int64_t memory_offset(const PgdInit& p, uint32_t element) {
  if (p.dims == 0) return element;
  int64_t offset = 0;
#pragma unroll 1
  for (int d = p.dims - 1; d >= 0; --d) {
    const auto size = static_cast<uint32_t>(p.sizes[d]);
    offset += static_cast<int64_t>(element % size) * p.strides[d];
    element /= size;
  }
  return offset;
}

// Calls next(x, lane) for each of a block's elements that exist and stores what it returns.
template <typename T, class Next>
__device__ __forceinline__ void update_lanes(const PgdInit& p, int64_t sample, uint32_t group, Next&& next) {
  const T* x = static_cast<const T*>(p.x) + sample * p.elements;
  T* x_adv = static_cast<T*>(p.x_adv) + sample * p.elements;
  const int64_t first = int64_t{kLanes} * group;
  if (p.dims == 0 && p.elements % kLanes == 0 && aligned16(p.x, p.x_adv)) {
    float value[kLanes];
    widen(load<kLanes>(x + first), value);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = next(value[lane], lane);
    store<kLanes>(x_adv + first, narrow<kLanes, T>(value));
    return;
  }
#pragma unroll
  for (int lane = 0; lane < kLanes; ++lane) {
    if (first + lane < p.elements) {
      const int64_t at = memory_offset(p, static_cast<uint32_t>(first + lane));
      x_adv[at] = from_float<T>(next(to_float(x[at]), lane));
    }
  }
}

// Finds a thread's Philox block among `total`, by a 32-bit division where that will do; false beyond the last.
__device__ __forceinline__ bool find_group(uint32_t groups, int64_t total, int64_t* sample, uint32_t* group) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= total) return false;
  *sample = total <= UINT32_MAX ? static_cast<uint32_t>(index) / groups : index / groups;
  *group = static_cast<uint32_t>(index - *sample * groups);
  return true;
}

}  // namespace

// One thread a Philox block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pgd_init_linf(const __grid_constant__ PgdInit p, uint32_t groups, int64_t total) {
  int64_t sample;
  uint32_t group;
  if (!find_group(groups, total, &sample, &group)) return;
  const Words words = sample_words(group, p.sample_ids[sample], p.seed, Stream::kUniform);
  const float unit = p.epsilon * (1.0f / 16777216.0f);
  update_lanes<T>(p, sample, group, [&](float x, int lane) {
    return project_linf(x + uniform_integer(words.word[lane]) * unit, x, p.epsilon, 0.0f, 1.0f);
  });
}

// The same with normal noise, neither projected nor clipped.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pgd_init_normal(const __grid_constant__ PgdInit p, uint32_t groups, int64_t total) {
  int64_t sample;
  uint32_t group;
  if (!find_group(groups, total, &sample, &group)) return;
  float z[kLanes];
  normal_block(group, p.sample_ids[sample], p.seed, z);
  update_lanes<T>(p, sample, group, [&](float x, int lane) { return x + z[lane] * p.epsilon; });
}

// One block a sample; the normals are drawn a second time instead of being kept.
template <typename T>
__global__ void __launch_bounds__(kSampleThreads) pgd_init_l2(const __grid_constant__ PgdInit p) {
  __shared__ long long shared[kSampleThreads / kWarp];
  const int64_t sample = blockIdx.x;
  const int64_t id = p.sample_ids[sample];
  const int64_t normals = p.elements + 2;
  long long sum = 0;
  for (int64_t group = threadIdx.x; group * kLanes < normals; group += kSampleThreads) {
    float z[kLanes];
    normal_block(static_cast<uint32_t>(group), id, p.seed, z);
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      if (group * kLanes + lane < normals) sum += square_fixed_point(z[lane]);
    }
  }
  sum = block_sum<kSampleThreads>(sum, shared);
  const auto factor = static_cast<float>(p.radius / sqrt(static_cast<double>(sum) * (1.0 / 4294967296.0)));
  for (int64_t group = threadIdx.x; group * kLanes < p.elements; group += kSampleThreads) {
    float z[kLanes];
    normal_block(static_cast<uint32_t>(group), id, p.seed, z);
    update_lanes<T>(p, sample, static_cast<uint32_t>(group),
                    [&](float x, int lane) { return clamp(x + z[lane] * factor, 0.0f, 1.0f); });
  }
}

cudaError_t pgd_init(const PgdInit& p, cudaStream_t stream) {
  if (p.samples == 0 || p.elements == 0) return cudaSuccess;
  if (p.elements > int64_t{1} << 30) return cudaErrorInvalidValue;
  return visit(p.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    if (p.norm == Norm::kL2) return launch(pgd_init_l2<T>, p.samples, kSampleThreads, stream, p);
    const int64_t groups = ceil_div(p.elements, kLanes), total = groups * p.samples;
    const auto kernel = p.norm == Norm::kNormal ? pgd_init_normal<T> : pgd_init_linf<T>;
    return launch(kernel, ceil_div(total, kThreads), kThreads, stream, p, static_cast<uint32_t>(groups), total);
  });
}

}  // namespace awp::cuda
