// Single-threaded parts of batch normalisation with an activation, compiled once for each instruction set and chosen at
// run time.
#pragma once

#include "awp/bn_act.h"

namespace awp::cpu {

// All take rows [begin, end).
struct BnActKernels {
  // Writes z where there is a residual. Sums of z - pivot and of their squares, [2, stride]; the pivots lie where the
  // table has the mean. `sums`: as many floats to work in.
  void (*statistics)(const BnAct& a, int64_t begin, int64_t end, float* sums, double* result);
  // From z; or, `add`, from x and the residual, writing z.
  void (*normalize)(const BnAct& a, bool add, int64_t begin, int64_t end, void* y, uint8_t* mask);
  // Sums of g and of g (z - mean), g the gradient before the activation; [2, stride].
  void (*sums)(const BnAct& a, const void* grad, int64_t begin, int64_t end, float* result);
  // scale (g - constant - (z - mean) slope) and z's gradient; [2, stride] coefficients, null: scale g.
  void (*grad_x)(const BnAct& a, const BnGradients& g, const float* coefficients, int64_t begin, int64_t end);
};

#if defined(AWP_HAVE_AVX2)
extern const BnActKernels kAvx2BnAct;
extern const BnActKernels kAvx512BnAct;
extern const BnActKernels kAvx512Bf16BnAct;
#endif

}  // namespace awp::cpu
