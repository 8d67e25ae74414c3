// Batch normalisation and ReLU in one, on [rows, channels] of fp32 or bf16 (channels_last images); fp32 arithmetic.
#pragma once

#include <cstdint>

#include "awp/cpu.h"
#include "awp/types.h"

namespace awp {

// Rows of a table of [kBnRows, stride] floats, one column a channel: what a forward pass leaves for the backward pass.
enum BnRow : int32_t { kBnMean, kBnInvstd, kBnScale, kBnBias, kBnRows };

struct BnRelu {
  const void* x;
  DType dtype;  // of x, out and the gradients
  int64_t rows, channels;
  float* table;
  int64_t stride;  // floats, channels rounded up to 16
};

struct BnParameters {
  const float *weight, *bias;              // null: 1 and 0
  float *running_mean, *running_variance;  // null: not tracked
  double momentum, eps;
};

namespace cpu {

// Whether this processor has a kernel.
bool bn_relu_available();

// Normalises by the batch, fills the table, moves the running statistics.
void bn_relu_train(const BnRelu& arguments, const BnParameters& parameters, void* out, const ParallelFor& parallel_for);

// Normalises by the running statistics. `mask`, if not null, takes a bit an element, [rows, stride / 8] bytes.
void bn_relu_eval(const BnRelu& arguments, const BnParameters& parameters, void* out, uint8_t* mask,
                  const ParallelFor& parallel_for);

// `train`: how the forward pass normalised. Null: not wanted. In eval mode with a mask x is not read, and neither
// grad_weight nor grad_bias can be had.
void bn_relu_backward(const BnRelu& arguments, bool train, const void* grad, const uint8_t* mask, void* grad_x,
                      float* grad_weight, float* grad_bias, const ParallelFor& parallel_for);

}  // namespace cpu
}  // namespace awp
