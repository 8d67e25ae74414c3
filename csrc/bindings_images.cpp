// The part of the bindings (see bindings.cpp) for operations on images; Python checked the arguments (awp_kernels/conv,
// awp_kernels/augment).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "awp/augment.h"
#include "awp/conv.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

awp::DType dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? awp::DType::kFloat32 : awp::DType::kBFloat16;
}

void parallel_for(int64_t count, int64_t grain, const awp::cpu::Body& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

// A channels_last batch [N, C, H, W].
awp::Images images(const Tensor& tensor) {
  return {tensor.data_ptr(), dtype_of(tensor), tensor.size(0), tensor.size(2), tensor.size(3), tensor.size(1)};
}

awp::DType product_dtype(bool bf16) { return bf16 ? awp::DType::kBFloat16 : awp::DType::kFloat32; }

// 0: not on this processor.
int64_t conv3x3_transformed_size(int64_t outputs, int64_t inputs, bool bf16) {
  const awp::DType dtype = product_dtype(bf16);
  return awp::cpu::conv3x3_multiplies(dtype) ? awp::cpu::conv3x3_transformed_size(outputs, inputs, dtype) : 0;
}

awp::Transformed transformed_weights(const Tensor& tensor) { return {tensor.data_ptr(), dtype_of(tensor)}; }

// Of all bytes of weights that lie without gaps.
int64_t conv3x3_fingerprint(Tensor weight) {
  return static_cast<int64_t>(
      awp::cpu::fingerprint(weight.const_data_ptr(), weight.numel() * weight.element_size(), parallel_for));
}

void conv3x3_transform(Tensor weight, bool transposed, Tensor out) {
  const awp::Filters filters{weight.data_ptr(),
                             dtype_of(weight),
                             weight.size(0),
                             weight.size(1),
                             {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)}};
  awp::cpu::conv3x3_transform(filters, transposed, transformed_weights(out), parallel_for);
}

void conv3x3(Tensor x, Tensor transformed, Tensor out) {
  awp::cpu::conv3x3(images(x), transformed_weights(transformed), images(out), parallel_for);
}

void conv3x3_grad_weight(Tensor x, Tensor grad_y, Tensor out) {
  awp::cpu::conv3x3_grad_weight(images(x), images(grad_y), static_cast<float*>(out.mutable_data_ptr()), parallel_for);
}

// `weights` is fp32 [9, inputs, outputs].
void stem3x3(Tensor x, Tensor weights, Tensor out) {
  awp::cpu::stem3x3(images(x), static_cast<const float*>(weights.const_data_ptr()), images(out), parallel_for);
}

void stem3x3_grad_x(Tensor grad_y, Tensor weights, Tensor out) {
  awp::cpu::stem3x3_grad_x(images(grad_y), static_cast<const float*>(weights.const_data_ptr()), images(out),
                           parallel_for);
}

// Images in contiguous or in channels_last order, whatever lies between them; `out` in one of the two without gaps.
void augment(Tensor images, std::optional<Tensor> rows, Tensor sample_ids, int64_t seed, int64_t pad, bool flip,
             int64_t cutout, std::vector<double> fill, Tensor out, bool packed, bool out_packed) {
  const std::vector<float> values(fill.begin(), fill.end());
  awp::Augment arguments{};
  arguments.images = static_cast<const uint8_t*>(images.const_data_ptr());
  arguments.image_stride = images.stride(0);
  arguments.packed = packed;
  arguments.channels = images.size(1);
  arguments.height = images.size(2);
  arguments.width = images.size(3);
  arguments.rows = rows ? static_cast<const int64_t*>(rows->const_data_ptr()) : nullptr;
  arguments.sample_ids = static_cast<const int64_t*>(sample_ids.const_data_ptr());
  arguments.samples = sample_ids.size(0);
  arguments.seed = static_cast<uint64_t>(seed);
  arguments.pad = pad;
  arguments.flip = flip;
  arguments.cutout = cutout;
  arguments.fill = values.data();
  arguments.out = static_cast<float*>(out.mutable_data_ptr());
  arguments.out_packed = out_packed;
  awp::cpu::augment(arguments, parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(awp_cpp, m) {
  m.def("conv3x3_transformed_size(int outputs, int inputs, bool bf16) -> int");
  m.def("conv3x3_fingerprint(Tensor weight) -> int");
  m.def("conv3x3_transform(Tensor weight, bool transposed, Tensor(a!) out) -> ()");
  m.def("conv3x3(Tensor x, Tensor transformed, Tensor(a!) out) -> ()");
  m.def("conv3x3_grad_weight(Tensor x, Tensor grad_y, Tensor(a!) out) -> ()");
  m.def("stem3x3(Tensor x, Tensor weights, Tensor(a!) out) -> ()");
  m.def("stem3x3_grad_x(Tensor grad_y, Tensor weights, Tensor(a!) out) -> ()");
  m.def(
      "augment(Tensor images, Tensor? rows, Tensor sample_ids, int seed, int pad, bool flip, int cutout, float[] fill, "
      "Tensor(a!) out, bool packed, bool out_packed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(awp_cpp, CPU, m) {
  m.impl("conv3x3_fingerprint", TORCH_BOX(&conv3x3_fingerprint));
  m.impl("conv3x3_transform", TORCH_BOX(&conv3x3_transform));
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_grad_weight", TORCH_BOX(&conv3x3_grad_weight));
  m.impl("stem3x3", TORCH_BOX(&stem3x3));
  m.impl("stem3x3_grad_x", TORCH_BOX(&stem3x3_grad_x));
  m.impl("augment", TORCH_BOX(&augment));
}

STABLE_TORCH_LIBRARY_IMPL(awp_cpp, CompositeExplicitAutograd, m) {
  m.impl("conv3x3_transformed_size", TORCH_BOX(&conv3x3_transformed_size));
}
