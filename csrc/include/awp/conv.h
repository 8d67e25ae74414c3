// 3x3 convolutions, stride 1, padding 1, by Winograd's F(4x4, 3x3); the caller brings memory and threads.
#pragma once

#include <cstdint>

#include "awp/cpu.h"
#include "awp/types.h"

namespace awp {

// A batch in channels_last order: [samples, height, width, channels], fp32 or bf16.
struct Images {
  void* data;
  DType dtype;
  int64_t samples, height, width, channels;
};

// [outputs, inputs, 3, 3] in any memory order, fp32 or bf16.
struct Filters {
  void* data;
  DType dtype;
  int64_t outputs, inputs;
  int64_t strides[4];  // in elements
};

// Transformed weights, in the dtype that is multiplied; sums are fp32. Aligned to 64 bytes.
struct Transformed {
  void* data;
  DType dtype;
};

namespace cpu {

// Whether this processor has a kernel (AVX2 with FMA, or AVX-512F).
bool conv3x3_available();

// Whether it multiplies this dtype: fp32, and bf16 where the processor has instructions for it.
bool conv3x3_multiplies(DType dtype);

// Elements that transformed weights take.
int64_t conv3x3_transformed_size(int64_t outputs, int64_t inputs, DType dtype);

// `transposed`: for the gradient with respect to the input, which is the convolution of the output's gradient with the
// turned weights.
void conv3x3_transform(const Filters& weights, bool transposed, const Transformed& transformed,
                       const ParallelFor& parallel_for);

// A number that any change within one aligned 8 bytes changes for certain, and others but for one chance in 2^64.
uint64_t fingerprint(const void* data, int64_t bytes, const ParallelFor& parallel_for);

void conv3x3(const Images& x, const Transformed& transformed, const Images& y, const ParallelFor& parallel_for);

// grad_weight: fp32 [outputs, 3, 3, inputs].
void conv3x3_grad_weight(const Images& x, const Images& grad_y, float* grad_weight, const ParallelFor& parallel_for);

// Images of so few channels are convolved directly: fp32 [samples, height, width, channels].
constexpr int64_t kFewChannels = 4;

// 3x3, stride 1, padding 1; weights: fp32 [9][x.channels][y.channels], and y.channels a multiple of 16.
void stem3x3(const Images& x, const float* weights, const Images& y, const ParallelFor& parallel_for);
void stem3x3_grad_x(const Images& grad_y, const float* weights, const Images& grad_x, const ParallelFor& parallel_for);

}  // namespace cpu
}  // namespace awp
