// Single-threaded kernels on flat arrays, compiled once for each instruction set and chosen at run time.
#pragma once

#include "awp/sgd.h"
#include "awp/types.h"

namespace awp::cpu {

struct Kernels {
  const char* instruction_set;
  double (*sum_of_squares)(const void* values, DType dtype, int64_t count);
  // of T * grad, for `count` elements of a tensor from `begin` on
  double (*sum_of_scaled_squares)(const Perturb& p, const PerturbTensor& tensor, int64_t begin, int64_t count);
  // out = weight + scale * grad, with grad * T^2 for grad where the tensor is adaptive, within the bound; saved =
  // weight
  void (*perturb)(const Perturb& p, const PerturbTensor& tensor, int64_t begin, int64_t count, float scale);
  // steps `count` elements of a tensor from `begin` on; returns the sum of squares of what its weights then are
  double (*sgd_step)(const SgdStep& step, const SgdTensor& tensor, const SgdFactors& factors, int64_t begin,
                     int64_t count);
  void (*copy)(void* destination, const void* source, int64_t bytes);
  void (*pgd_init_linf)(const PgdInit& arguments, int64_t sample);
  void (*pgd_init_l2)(const PgdInit& arguments, int64_t sample);
  void (*pgd_init_normal)(const PgdInit& arguments, int64_t sample);
  void (*pgd_step_linf)(const PgdStep& arguments, int64_t begin, int64_t end);
  void (*pgd_step_l2)(const PgdStep& arguments, int64_t sample);
};

extern const Kernels kBaselineKernels;
#if defined(AWP_HAVE_AVX2)
extern const Kernels kAvx2Kernels;
#endif

inline const void* advance(const void* pointer, DType dtype, int64_t elements) {
  return static_cast<const char*>(pointer) + elements * size_of(dtype);
}
inline void* advance(void* pointer, DType dtype, int64_t elements) {
  return static_cast<char*>(pointer) + elements * size_of(dtype);
}

}  // namespace awp::cpu
