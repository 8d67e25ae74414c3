// The exact projections, one element: shared by the CPU and CUDA kernels.
#pragma once

#include <cmath>

#include "awp/philox.h"

namespace awp {

// x - epsilon, rounded up: the error of the sum is found exactly (Knuth's TwoSum), then one ulp inward where it
// matters.
AWP_HOST_DEVICE float lower_bound(float x, float epsilon) {
  const float sum = x - epsilon;
  const float back = sum - x;
  const float error = (x - (sum - back)) + (-epsilon - back);
  const int32_t bits = float_to_bits(sum);
  // below zero a larger number has smaller bits; a sum of 0 is exact
  return error > 0.0f ? bits_to_float(sum > 0.0f ? bits + 1 : bits - 1) : sum;
}

// x + epsilon, rounded down.
AWP_HOST_DEVICE float upper_bound(float x, float epsilon) {
  const float sum = x + epsilon;
  const float back = sum - x;
  const float error = (x - (sum - back)) + (epsilon - back);
  const int32_t bits = float_to_bits(sum);
  return error < 0.0f ? bits_to_float(sum > 0.0f ? bits - 1 : bits + 1) : sum;
}

// NaN in value stays NaN.
AWP_HOST_DEVICE float clamp(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

AWP_HOST_DEVICE float project_linf(float value, float x, float epsilon, float low, float high) {
  const float lower = lower_bound(x, epsilon), upper = upper_bound(x, epsilon);
  return clamp(value, lower > low ? lower : low, upper < high ? upper : high);
}

// Clamps to bound * |center| around center.
AWP_HOST_DEVICE float project_relative(float value, float center, float bound) {
  const float product = fabsf(center) * bound;
  // one number less, as the product may have been rounded up
  const float radius = product > 0.0f ? bits_to_float(float_to_bits(product) - 1) : product;
  return clamp(value, lower_bound(center, radius), upper_bound(center, radius));
}

}  // namespace awp
