// What all elements of an SGD step are computed with, found once: shared by the CPU and CUDA kernels.
#pragma once

#include <cmath>

#include "awp/philox.h"
#include "awp/types.h"

namespace awp {

AWP_HOST_DEVICE double read(const Number& number) {
  if (number.at == nullptr) return number.value;
  switch (number.type) {
    case NumberType::kFloat64:
      return *static_cast<const double*>(number.at);
    case NumberType::kBool:
      return *static_cast<const uint8_t*>(number.at) != 0 ? 1.0 : 0.0;
    default:
      return static_cast<double>(*static_cast<const float*>(number.at));
  }
}

struct SgdFactors {
  bool leave_out;  // weights, buffers and averages stay as they are
  float grad;      // what gradients are multiplied by: unscaling and clipping in one
  float descent;   // -lr
  float average_weight;
};

AWP_HOST_DEVICE SgdFactors sgd_factors(const SgdRule& rule) {
  const double norm = read(rule.grad_norm);
  // of infinity and NaN both, the difference to itself is NaN
  const bool leave_out = read(rule.found_inf) != 0.0 || norm - norm != 0.0;
  const double scale = read(rule.grad_scale);
  double clip = 1.0;
  if (rule.max_norm >= 0) {
    clip = rule.max_norm / (norm / scale + 1e-6);
    clip = clip > 1.0 ? 1.0 : clip;
  }
  return {leave_out, static_cast<float>(clip / scale), -static_cast<float>(read(rule.lr)),
          static_cast<float>(read(rule.average_weight))};
}

}  // namespace awp
