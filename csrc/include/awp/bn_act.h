// Residual sum, batch normalisation and activation in one, on [rows, channels] of channels_last images; fp32
// arithmetic:
//   z = x + residual, rounded as it is stored; y = activation(scale (z - mean) + bias).
#pragma once

#include <cstdint>

#include "awp/cpu.h"
#include "awp/types.h"

namespace awp {

// Rows of a table of [kBnRows, stride] floats, one column a channel: what a forward pass leaves for the backward pass.
enum BnRow : int32_t { kBnMean, kBnInvstd, kBnScale, kBnBias, kBnRows };

enum class Activation : int32_t { kNone, kRelu, kSilu };

// Null pointers: not given, or not wanted.
struct BnAct {
  const void *x, *residual;
  void* z;      // without a residual x itself, which is not written
  DType dtype;  // of all images
  int64_t rows, channels;
  Activation activation;
  float* table;
  int64_t stride;  // floats, channels rounded up to 16
};

struct BnParameters {
  const float *weight, *bias;              // null: 1 and 0
  float *running_mean, *running_variance;  // null: not tracked
  double momentum, eps;
  double* statistics;  // [2, channels], takes the batch's means and sums of squared deviations; null: not wanted
};

struct BnGradients {
  const void *y, *z;    // given; z null: 0
  const uint8_t* mask;  // what `bn_act_eval` left; z is not read then
  bool train;           // how the forward pass normalised
  // [2, stride]: what is taken from g, and by how much z - mean; null: by the sums over these rows
  const float* coefficients;
  void* x;  // of x and of the residual alike
  float *weight, *bias;
};

namespace cpu {

// Whether this processor has a kernel; fp32 and bf16.
bool bn_act_available();

// Fills the table by the batch and moves the running statistics; normalises, unless y is null.
void bn_act_train(const BnAct& arguments, const BnParameters& parameters, void* y, const ParallelFor& parallel_for);

// Normalises by the running statistics. `mask`, for ReLU, takes a bit an element, [rows, stride / 8] bytes.
void bn_act_eval(const BnAct& arguments, const BnParameters& parameters, void* y, uint8_t* mask,
                 const ParallelFor& parallel_for);

// With a mask neither the weight's gradient nor the bias's can be had.
void bn_act_backward(const BnAct& arguments, const BnGradients& gradients, const ParallelFor& parallel_for);

}  // namespace cpu
}  // namespace awp
