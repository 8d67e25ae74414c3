// What a kernel is told: plain pointers and sizes, checked by the caller (docs/areas/kernels.md lists the guarantees).
#pragma once

#include <cstdint>

namespace awp {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Scope : int32_t { kLayer = 0, kGlobal = 1, kFilter = 2 };
// What a perturbation's length is measured in: ||w||, 1, or T = |w| + eta element by element.
enum class Scale : int32_t { kRelative = 0, kAbsolute = 1, kElementwise = 2 };
// Of the noise: uniform in a ball, or normal.
enum class Norm : int32_t { kLinf = 0, kL2 = 1, kNormal = 2 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// One tensor of a multi-tensor operation: flat arrays of numel elements in the same order.
struct PerturbTensor {
  void* out;           // may be weight itself
  const void* weight;  //
  const void* grad;    //
  void* saved;         // takes the weight's bits; null: not wanted
  int64_t numel;       //
  int64_t filters;     // runs of numel / filters elements; used by Scope::kFilter alone, at least 1
  bool adaptive;       // T = |w| + eta, else T = 1; used by Scale::kElementwise alone
};

struct Perturb {
  const PerturbTensor* tensors;
  int64_t count;
  DType out_dtype, weight_dtype, grad_dtype;  // saved has weight_dtype
  Scope scope;
  Scale scale;
  double gamma, eps;
  float eta;      // of Scale::kElementwise
  float bound;    // |out - weight| <= bound * |weight|, rounded toward zero; negative: no bound
  float* scales;  // [count], [1] or [sum of filters]; NaN where a direction is not followed
  // Scale::kRelative, all scopes but filter: ||w|| of every tensor, [count]; null: to be found
  const double* weight_norms = nullptr;
};

// Whether a tensor's elements are multiplied by T.
inline bool is_adaptive(const Perturb& p, const PerturbTensor& t) {
  return p.scale == Scale::kElementwise && t.adaptive;
}

// One tensor of an optimizer step: flat arrays of numel elements in the same order.
struct SgdTensor {
  float* weight;
  const void* grad;
  float* buffer;   // null: no momentum
  float* average;  // null: none is kept
  void* out;       // null: no copy is wanted
  int64_t numel;
  float decay;
};

// A number that the host knows, or one in the device's memory that kernels read when they run.
enum class NumberType : int32_t { kFloat32 = 0, kFloat64 = 1, kBool = 2 };
struct Number {
  double value;
  const void* at;  // null: value
  NumberType type;
};

struct SgdRule {
  Number lr, average_weight, grad_scale, found_inf, grad_norm;
  double max_norm;  // negative: gradients are not clipped
  float momentum;
  bool nesterov;
};

struct SgdStep {
  const SgdTensor* tensors;
  int64_t count;
  DType grad_dtype, out_dtype;
  SgdRule rule;
  double* norms;  // ||w|| of every stepped tensor, [count]
};

struct NormTensor {
  const void* data;
  DType dtype;
  int64_t numel;
};

struct TotalNorm {
  const NormTensor* tensors;
  int64_t count;
  double* norm;  // [1]
};

struct CopyTensor {
  void* destination;
  const void* source;
  int64_t bytes;
};

constexpr int kMaxSampleDims = 8;

// A batch of images: sample n is the n-th run of `elements` values.
struct PgdInit {
  void* x_adv;
  const void* x;
  const int64_t* sample_ids;  // [samples]
  DType dtype;
  int64_t samples, elements;
  int32_t dims;                     // of one sample; 0 where logical order is memory order
  int64_t sizes[kMaxSampleDims];    // of one sample, logical order
  int64_t strides[kMaxSampleDims];  // in elements
  Norm norm;
  float epsilon;  // rounded toward zero; normal: the standard deviation
  double radius;  // l2: epsilon less the rounding margin
  uint64_t seed;
};

struct PgdStep {
  void* x_adv;
  const void* grad;
  const void* x;
  const uint8_t* mask;  // null: everywhere
  DType dtype, grad_dtype;
  int64_t samples, elements;
  Norm norm;
  double step_size;  // l2
  float step;        // linf: step_size in fp32
  float epsilon;     // rounded toward zero
  double radius;     // l2: epsilon less the rounding margin
  float low, high;   // the clip range
};

// A step on images [samples, channels, height, width], and the network's next input made of them. `grad` is that for
// `out`, of its dtype and order; x_adv, x and mask have strides of their own.
struct PgdStepNormalize : PgdStep {
  void* out;  // [samples, height, width, padded]: (x_adv - mean) / std, then zeros
  const float *mean, *std;
  int64_t channels, height, width, padded;
  int64_t channel_stride, row_stride, column_stride;
};

}  // namespace awp
