// Single-threaded parts of batch normalisation with ReLU, compiled once for each instruction set and chosen at run
// time.
#pragma once

#include "awp/bn_relu.h"

namespace awp::cpu {

// All take rows [begin, end).
struct BnReluKernels {
  // Sums of x - pivot and of their squares, [2, stride]; the pivots lie where the table has the mean. `sums`: as many
  // floats to work in.
  void (*statistics)(const BnRelu& a, int64_t begin, int64_t end, float* sums, double* result);
  void (*normalize)(const BnRelu& a, int64_t begin, int64_t end, void* out, uint8_t* mask);
  // Sums of g and of g (x - mean), g the gradient where the output is not 0; [2, stride].
  void (*sums)(const BnRelu& a, const void* grad, int64_t begin, int64_t end, float* result);
  // scale (g - constant - (x - mean) slope); [2, stride] coefficients, null: scale g.
  void (*grad_x)(const BnRelu& a, const void* grad, const float* coefficients, int64_t begin, int64_t end,
                 void* grad_x);
  // scale g, by the mask.
  void (*grad_x_by_mask)(const BnRelu& a, const void* grad, const uint8_t* mask, int64_t begin, int64_t end,
                         void* grad_x);
};

#if defined(AWP_HAVE_AVX2)
extern const BnReluKernels kAvx2BnRelu;
extern const BnReluKernels kAvx512BnRelu;
#endif

}  // namespace awp::cpu
