// Which of the kernels for wide vectors this processor runs.
#pragma once

#include <cstdlib>
#include <cstring>

namespace awp::cpu {

// The table for the widest instruction set; null where there is none. AWP_CPU=avx2 or AWP_CPU=baseline holds it back,
// for tests.
template <class Table>
const Table* widest([[maybe_unused]] const Table* avx2, [[maybe_unused]] const Table* avx512) {
#if defined(AWP_HAVE_AVX2)
  const char* limit = std::getenv("AWP_CPU");
  if (limit && std::strcmp(limit, "baseline") == 0) return nullptr;
  if (!limit || std::strcmp(limit, "avx2") != 0) {
    if (__builtin_cpu_supports("avx512f")) return avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2;
#endif
  return nullptr;
}

}  // namespace awp::cpu
