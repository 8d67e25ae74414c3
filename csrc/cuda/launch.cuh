// Launching, and the choice of a template by dtype.
#pragma once

#include <cuda_runtime.h>

#include "pack.cuh"

namespace awp::cuda {

// Also reports an error that an earlier call left behind, as cudaGetLastError does.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

template <typename T>
struct Type {
  using type = T;
};

template <class Visitor>
auto visit(DType dtype, Visitor&& visitor) {
  switch (dtype) {
    case DType::kFloat16:
      return visitor(Type<Half>{});
    case DType::kBFloat16:
      return visitor(Type<BFloat16>{});
    default:
      return visitor(Type<float>{});
  }
}

}  // namespace awp::cuda
