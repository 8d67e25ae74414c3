// Single-threaded parts of the convolution of images of few channels, compiled once for each instruction set and chosen
// at run time.
#pragma once

#include "awp/conv.h"

namespace awp::cpu {

// Both take a row of an image, and `scratch` as its size says.
struct Stem {
  int64_t (*scratch)(const Images& few);
  void (*row)(const Images& x, const float* weights, const Images& y, int64_t sample, int64_t row, float* scratch);
  void (*grad_row)(const Images& grad_y, const float* weights, const Images& grad_x, int64_t sample, int64_t row,
                   const float* zeros);
};

#if defined(AWP_HAVE_AVX2)
extern const Stem kAvx2Stem;
extern const Stem kAvx512Stem;
extern const Stem kAvx512Bf16Stem;
#endif

}  // namespace awp::cpu
