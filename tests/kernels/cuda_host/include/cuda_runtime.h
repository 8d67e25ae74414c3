// Stand-in for CUDA's header, with which g++ compiles the kernels and runs them a thread at a time, so that their index
// arithmetic, barriers and alignment can be checked where there is no GPU. Launches run at once, block after block.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define AWP_COUNT_BYTES(count) emulator::bytes += static_cast<int64_t>(count)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

struct dim3 {
  unsigned x = 1;
  dim3() = default;
  explicit dim3(unsigned count) : x(count) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx;

namespace emulator {
extern int launches;
extern int64_t bytes;
void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);
void exchange(void* value, size_t bytes, int lanes);
}  // namespace emulator

void __syncthreads();

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  emulator::exchange(&value, sizeof value, lanes);
  return value;
}

template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  ++emulator::launches;
  emulator::run(config->gridDim.x, config->blockDim.x, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
