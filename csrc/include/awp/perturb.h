// How long a perturbation is: shared by the CPU and CUDA kernels.
#pragma once

#include <cmath>

#include "awp/philox.h"

namespace awp {

// gamma * ||w|| / (||g|| + eps), from sums of squares, `relative`; else gamma / (||g|| + eps). NaN where a direction is
// not to be followed: a norm is not finite, or the scale is not in fp32.
AWP_HOST_DEVICE float perturb_scale(double gamma, double eps, bool relative, double weight_squares,
                                    double grad_squares) {
  const double length = relative ? sqrt(weight_squares) : 1.0, norm = sqrt(grad_squares);
  const float scale = static_cast<float>(gamma * length / (norm + eps));
  // an infinite length makes the scale infinite, an infinite norm makes it 0
  const bool finite = norm < HUGE_VAL && fabsf(scale) < HUGE_VALF;
  return finite ? scale : NAN;
}

// Elsewhere w is written as it is, as NaN * 0 is NaN and -0.0 + 0.0 is 0.0.
AWP_HOST_DEVICE bool is_followed(float scale) { return fabsf(scale) > 0.0f; }

}  // namespace awp
