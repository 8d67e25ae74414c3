// Which of the kernels for wide vectors this processor runs.
#pragma once

#include <cstdlib>
#include <cstring>

namespace awp::cpu {

// The table for the widest instruction set; null where there is none. AWP_CPU=avx512, avx2 or baseline holds it back,
// for tests.
template <class Table>
const Table* widest([[maybe_unused]] const Table* avx2, [[maybe_unused]] const Table* avx512,
                    [[maybe_unused]] const Table* avx512_bf16 = nullptr) {
#if defined(AWP_HAVE_AVX2)
  const char* given = std::getenv("AWP_CPU");
  const auto limited = [given](const char* to) { return given && std::strcmp(given, to) == 0; };
  if (limited("baseline")) return nullptr;
  if (!limited("avx2") && __builtin_cpu_supports("avx512f")) {
    const bool bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
    return bf16 && avx512_bf16 && !limited("avx512") ? avx512_bf16 : avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2;
#endif
  return nullptr;
}

}  // namespace awp::cpu
