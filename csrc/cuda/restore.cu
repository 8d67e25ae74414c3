// Bit-exact copies of a list of arrays.
#include "awp/cuda.h"
#include "launch.cuh"

namespace awp::cuda {

namespace {

template <typename WordT>
__device__ __forceinline__ void copy_words(char* destination, const char* source, int64_t bytes) {
  const auto* from = reinterpret_cast<const WordT*>(source);
  auto* to = reinterpret_cast<WordT*>(destination);
  constexpr int kLoads = 4;
  const int32_t words = static_cast<int32_t>(bytes / static_cast<int64_t>(sizeof(WordT)));
  int32_t i = static_cast<int32_t>(threadIdx.x);
#pragma unroll 1
  for (; i + (kLoads - 1) * kThreads < words; i += kLoads * kThreads) {
    WordT word[kLoads];
#pragma unroll
    for (int load = 0; load < kLoads; ++load) word[load] = __ldcs(from + i + load * kThreads);
#pragma unroll
    for (int load = 0; load < kLoads; ++load) to[i + load * kThreads] = word[load];
  }
#pragma unroll 1
  for (; i < words; i += kThreads) to[i] = __ldcs(from + i);
}

}  // namespace

__global__ void __launch_bounds__(kThreads, 4) restore_copy(const __grid_constant__ CopyTable table) {
  const int32_t block = static_cast<int32_t>(blockIdx.x);
  const int entry = find_entry(table.first_block, table.count, block);
  const int64_t begin = (block - table.first_block[entry]) * kCopyChunk;
  const int64_t left = table.bytes[entry] - begin;
  const int64_t bytes = left < kCopyChunk ? left : kCopyChunk;
  char* destination = static_cast<char*>(table.destination[entry]) + begin;
  const char* source = static_cast<const char*>(table.source[entry]) + begin;

  int64_t done = 0;
  if (aligned16(destination, source)) {
    done = bytes / 16 * 16;
    copy_words<uint4>(destination, source, done);
  } else if (((reinterpret_cast<uintptr_t>(destination) | reinterpret_cast<uintptr_t>(source)) & 3) == 0) {
    done = bytes / 4 * 4;
    copy_words<unsigned>(destination, source, done);
  }
  copy_words<unsigned char>(destination + done, source + done, bytes - done);
}

cudaError_t restore(const CopyTensor* tensors, int64_t count, cudaStream_t stream) {
  CopyTable table;
  for (int64_t i = 0; i < count;) {
    i = fill_copies(&table, tensors, count, i);
    if (table.blocks == 0 && i < count) return cudaErrorInvalidValue;
    const cudaError_t error = launch(restore_copy, table.blocks, kThreads, stream, table);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace awp::cuda
