// Which elements of which tensor a block works on.
#pragma once

#include <cuda_runtime.h>

#include "plan.h"

namespace awp::cuda {

struct Chunk {
  int entry;
  int64_t begin, length;
};

template <class Table>
__device__ __forceinline__ Chunk find_chunk(const Table& table, int32_t block, int64_t elements) {
  const int entry = find_entry(table.first_block, table.count, block);
  const int64_t begin = (block - table.first_block[entry]) * elements;
  const int64_t left = table.run[entry] - begin;
  return {entry, begin, left < elements ? left : elements};
}

}  // namespace awp::cuda
