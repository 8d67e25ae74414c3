// Single-threaded kernels for images of bytes, compiled once for each instruction set and chosen at run time.
#pragma once

#include "awp/augment.h"

namespace awp::cpu {

struct AugmentKernels {
  // the samples [begin, end)
  void (*augment)(const Augment& arguments, int64_t begin, int64_t end);
};

extern const AugmentKernels kBaselineAugment;
#if defined(AWP_HAVE_AVX2)
extern const AugmentKernels kAvx2Augment, kAvx512Augment;
#endif

}  // namespace awp::cpu
