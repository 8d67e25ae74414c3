// The one file that knows torch, through LibTorch's stable ABI: one build serves every later torch and every Python.
// Arguments were checked in Python (kernels/awp_kernels/_checks.py); these operations are private to the package.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "awp/bn_act.h"
#include "awp/cpu.h"
#if defined(AWP_WITH_CUDA)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "awp/cuda.h"
#endif

// libstdc++'s shared_ptr asks glibc for it, which has it since 2.32, while torch runs on 2.28: "there may be threads"
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

awp::DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return awp::DType::kFloat32;
    case ScalarType::Half:
      return awp::DType::kFloat16;
    case ScalarType::BFloat16:
      return awp::DType::kBFloat16;
    default:
      throw std::runtime_error("expected float32, float16 or bfloat16");
  }
}

void parallel_for(int64_t count, int64_t grain, const awp::cpu::Body& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

// Runs operations on CPU tensors.
struct Cpu {
  explicit Cpu(const Tensor&) {}
  void run(const awp::Perturb& p) const { awp::cpu::perturb(p, parallel_for); }
  void run(const awp::SgdStep& s) const { awp::cpu::sgd_step(s, parallel_for); }
  void run(const awp::TotalNorm& n) const { awp::cpu::total_norm(n, parallel_for); }
  void run(const awp::PgdInit& p) const { awp::cpu::pgd_init(p, parallel_for); }
  void run(const awp::PgdStep& p) const { awp::cpu::pgd_step(p, parallel_for); }
  void restore(const awp::CopyTensor* tensors, int64_t count) const { awp::cpu::restore(tensors, count, parallel_for); }
  void train(const awp::BnAct& a, const awp::BnParameters& p, void* y) const {
    awp::cpu::bn_act_train(a, p, y, parallel_for);
  }
  void eval(const awp::BnAct& a, const awp::BnParameters& p, void* y, uint8_t* mask) const {
    awp::cpu::bn_act_eval(a, p, y, mask, parallel_for);
  }
  void run(const awp::BnAct& a, const awp::BnGradients& g) const { awp::cpu::bn_act_backward(a, g, parallel_for); }
};

bool bn_act_available() { return awp::cpu::bn_act_available(); }

std::string instruction_set() { return awp::cpu::instruction_set(); }

#if defined(AWP_WITH_CUDA)

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error));
}

using CurrentStream = decltype(&aoti_torch_get_current_cuda_stream);

// torch's function, which CUDA builds of torch alone have, or null. Looked up among what torch has loaded: linking to
// it would tie the library to such builds, and a weak symbol stays null, as torch loads its libraries locally.
CurrentStream current_stream() {
  static const CurrentStream found = [] {
    constexpr char kName[] = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, kName);
    // the second one depends on all others, under whatever name they are
    for (const char* library : {"libtorch_cuda.so", "libtorch_python.so"}) {
      if (symbol != nullptr) break;
      // stays open, as torch's libraries do
      if (void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(handle, kName);
    }
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  return found;
}

bool stream_bound() { return current_stream() != nullptr; }

// Makes the tensor's device current, and runs operations on torch's stream there.
class Cuda {
 public:
  explicit Cuda(const Tensor& tensor) : tensor_(tensor), current_stream_(bound()), guard_(tensor.get_device_index()) {
    // torch 2.11 and 2.13 have other macros for it
    if (current_stream_(tensor.get_device_index(), &stream_) != TORCH_SUCCESS)
      throw std::runtime_error("torch does not tell its current CUDA stream");
  }
  void run(const awp::Perturb& p) const {
    check(awp::cuda::perturb(p, scratch(awp::cuda::perturb_workspace_bytes(p)).mutable_data_ptr(), stream()));
  }
  void run(const awp::SgdStep& s) const {
    check(awp::cuda::sgd_step(s, scratch(awp::cuda::sgd_step_workspace_bytes(s)).mutable_data_ptr(), stream()));
  }
  void run(const awp::TotalNorm& n) const {
    check(awp::cuda::total_norm(n, scratch(awp::cuda::total_norm_workspace_bytes(n)).mutable_data_ptr(), stream()));
  }
  void run(const awp::PgdInit& p) const { check(awp::cuda::pgd_init(p, stream())); }
  void run(const awp::PgdStep& p) const { check(awp::cuda::pgd_step(p, stream())); }
  void run(const awp::PgdStepNormalize& p) const { check(awp::cuda::pgd_step_normalize(p, stream())); }
  void restore(const awp::CopyTensor* tensors, int64_t count) const {
    check(awp::cuda::restore(tensors, count, stream()));
  }
  void train(const awp::BnAct& a, const awp::BnParameters& p, void* y) const {
    check(awp::cuda::bn_act_train(a, p, y, scratch(awp::cuda::bn_act_workspace_bytes(a)).mutable_data_ptr(), stream()));
  }
  void eval(const awp::BnAct& a, const awp::BnParameters& p, void* y, uint8_t* mask) const {
    check(awp::cuda::bn_act_eval(a, p, y, mask, stream()));
  }
  void run(const awp::BnAct& a, const awp::BnGradients& g) const {
    check(awp::cuda::bn_act_backward(a, g, scratch(awp::cuda::bn_act_workspace_bytes(a)).mutable_data_ptr(), stream()));
  }

 private:
  static CurrentStream bound() {
    if (!stream_bound())
      throw std::runtime_error("this torch tells no CUDA stream: expected a CUDA build of torch >= 2.11");
    return current_stream();
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }
  // Doubles, for their alignment; torch's allocator knows the stream, so it may go before the kernels have run.
  Tensor scratch(int64_t bytes) const {
    return torch::stable::new_empty(tensor_, {(bytes + 7) / 8}, ScalarType::Double);
  }

  const Tensor& tensor_;
  CurrentStream current_stream_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

// The operations, each as its schema below has it; `Device` is Cpu or Cuda.

// Returns the scales. `adaptive` is empty, or holds a flag a tensor.
template <class Device>
Tensor perturb(Tensors out, Tensors weights, Tensors grads, Tensors saved, double gamma, int64_t scope, double eps,
               int64_t scale, double eta, std::optional<double> bound, std::vector<int64_t> adaptive,
               std::optional<Tensor> weight_norms) {
  const Device device(weights[0]);
  std::vector<awp::PerturbTensor> tensors(weights.size());
  int64_t filters = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    tensors[i] = {out[i].mutable_data_ptr(),
                  weight.const_data_ptr(),
                  grads[i].const_data_ptr(),
                  saved.empty() ? nullptr : saved[i].mutable_data_ptr(),
                  weight.numel(),
                  weight.dim() > 1 ? weight.size(0) : 1,
                  adaptive.empty() || adaptive[i] != 0};
    filters += tensors[i].filters;
  }
  const auto kind = static_cast<awp::Scope>(scope);
  const int64_t count = static_cast<int64_t>(weights.size());
  const int64_t norms = kind == awp::Scope::kLayer ? count : kind == awp::Scope::kGlobal ? 1 : filters;
  Tensor scales = torch::stable::new_empty(weights[0], {norms}, ScalarType::Float);
  device.run(awp::Perturb{tensors.data(), count, dtype_of(out[0]), dtype_of(weights[0]), dtype_of(grads[0]), kind,
                          static_cast<awp::Scale>(scale), gamma, eps, static_cast<float>(eta),
                          static_cast<float>(bound.value_or(-1.0)), static_cast<float*>(scales.mutable_data_ptr()),
                          weight_norms ? static_cast<const double*>(weight_norms->const_data_ptr()) : nullptr});
  return scales;
}

template <class Device>
void restore(Tensors weights, Tensors saved) {
  const Device device(weights[0]);
  std::vector<awp::CopyTensor> tensors(weights.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = {weights[i].mutable_data_ptr(), saved[i].const_data_ptr(),
                  weights[i].numel() * static_cast<int64_t>(weights[i].element_size())};
  }
  device.restore(tensors.data(), static_cast<int64_t>(tensors.size()));
}

awp::Number number(double value, const std::optional<Tensor>& tensor) {
  if (!tensor) return {value, nullptr, awp::NumberType::kFloat32};
  switch (tensor->scalar_type()) {
    case ScalarType::Float:
      return {value, tensor->const_data_ptr(), awp::NumberType::kFloat32};
    case ScalarType::Double:
      return {value, tensor->const_data_ptr(), awp::NumberType::kFloat64};
    case ScalarType::Bool:
      return {value, tensor->const_data_ptr(), awp::NumberType::kBool};
    default:
      throw std::runtime_error("expected float32, float64 or bool");
  }
}

// Returns the norms.
template <class Device>
Tensor sgd_step(Tensors weights, Tensors grads, Tensors momentum_buffers, Tensors averages, Tensors out,
                std::vector<double> weight_decay, double lr, std::optional<Tensor> lr_tensor, double momentum,
                bool nesterov, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                std::optional<Tensor> grad_norm, std::optional<double> max_norm, double average_weight,
                std::optional<Tensor> average_weight_tensor) {
  const Device device(weights[0]);
  std::vector<awp::SgdTensor> tensors(weights.size());
  const auto floats = [](const Tensors& list, size_t i) {
    return list.empty() ? nullptr : static_cast<float*>(list[i].mutable_data_ptr());
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    tensors[i] = {floats(weights, i),
                  grads[i].const_data_ptr(),
                  floats(momentum_buffers, i),
                  floats(averages, i),
                  out.empty() ? nullptr : out[i].mutable_data_ptr(),
                  weights[i].numel(),
                  static_cast<float>(weight_decay[i])};
  }
  const awp::SgdRule rule{number(lr, lr_tensor),        number(average_weight, average_weight_tensor),
                          number(1, grad_scale),        number(0, found_inf),
                          number(0, grad_norm),         max_norm.value_or(-1.0),
                          static_cast<float>(momentum), nesterov};
  const int64_t count = static_cast<int64_t>(tensors.size());
  Tensor norms = torch::stable::new_empty(weights[0], {count}, ScalarType::Double);
  device.run(awp::SgdStep{tensors.data(), count, dtype_of(grads[0]),
                          out.empty() ? awp::DType::kFloat32 : dtype_of(out[0]), rule,
                          static_cast<double*>(norms.mutable_data_ptr())});
  return norms;
}

template <class Device>
Tensor total_norm(Tensors list) {
  const Device device(list[0]);
  std::vector<awp::NormTensor> tensors(list.size());
  for (size_t i = 0; i < list.size(); ++i) tensors[i] = {list[i].const_data_ptr(), dtype_of(list[i]), list[i].numel()};
  Tensor norm = torch::stable::new_empty(list[0], {}, ScalarType::Double);
  device.run(awp::TotalNorm{tensors.data(), static_cast<int64_t>(tensors.size()),
                            static_cast<double*>(norm.mutable_data_ptr())});
  return norm;
}

template <class Device>
void pgd_init(Tensor x_adv, Tensor x, Tensor sample_ids, double epsilon, double radius, int64_t norm, int64_t seed) {
  awp::PgdInit arguments{};
  arguments.x_adv = x_adv.mutable_data_ptr();
  arguments.x = x.const_data_ptr();
  arguments.sample_ids = static_cast<const int64_t*>(sample_ids.const_data_ptr());
  arguments.dtype = dtype_of(x_adv);
  arguments.samples = x_adv.size(0);
  arguments.elements = x_adv.numel() / x_adv.size(0);
  arguments.dims = x_adv.is_contiguous() ? 0 : static_cast<int32_t>(x_adv.dim() - 1);
  for (int32_t d = 0; d < arguments.dims; ++d) {
    arguments.sizes[d] = x_adv.size(d + 1);
    arguments.strides[d] = x_adv.stride(d + 1);
  }
  arguments.norm = static_cast<awp::Norm>(norm);
  arguments.epsilon = static_cast<float>(epsilon);
  arguments.radius = radius;
  arguments.seed = static_cast<uint64_t>(seed);
  Device(x_adv).run(arguments);
}

awp::PgdStep pgd_step_arguments(const Tensor& x_adv, const Tensor& grad, const Tensor& x,
                                const std::optional<Tensor>& mask, double step_size, double epsilon, double radius,
                                int64_t norm, double low, double high) {
  awp::PgdStep arguments{};
  arguments.x_adv = x_adv.mutable_data_ptr();
  arguments.grad = grad.const_data_ptr();
  arguments.x = x.const_data_ptr();
  arguments.mask = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  arguments.dtype = dtype_of(x_adv);
  arguments.grad_dtype = dtype_of(grad);
  arguments.samples = x_adv.size(0);
  arguments.elements = x_adv.numel() / x_adv.size(0);
  arguments.norm = static_cast<awp::Norm>(norm);
  arguments.step_size = step_size;
  arguments.step = static_cast<float>(step_size);
  arguments.epsilon = static_cast<float>(epsilon);
  arguments.radius = radius;
  arguments.low = static_cast<float>(low);
  arguments.high = static_cast<float>(high);
  return arguments;
}

template <class Device>
void pgd_step(Tensor x_adv, Tensor grad, Tensor x, std::optional<Tensor> mask, double step_size, double epsilon,
              double radius, int64_t norm, double low, double high) {
  Device(x_adv).run(pgd_step_arguments(x_adv, grad, x, mask, step_size, epsilon, radius, norm, low, high));
}

#if defined(AWP_WITH_CUDA)
// `out` is channels_last.
void pgd_step_normalize(Tensor mean, Tensor std, Tensor out, Tensor x_adv, Tensor grad, Tensor x,
                        std::optional<Tensor> mask, double step_size, double epsilon, double radius, int64_t norm,
                        double low, double high) {
  const awp::PgdStep step = pgd_step_arguments(x_adv, grad, x, mask, step_size, epsilon, radius, norm, low, high);
  Cuda(x_adv).run(awp::PgdStepNormalize{step, out.mutable_data_ptr(), static_cast<const float*>(mean.const_data_ptr()),
                                        static_cast<const float*>(std.const_data_ptr()), x_adv.size(1), x_adv.size(2),
                                        x_adv.size(3), out.size(1), x_adv.stride(1), x_adv.stride(2), x_adv.stride(3)});
}
#endif

using Optional = std::optional<Tensor>;

template <class T = void>
T* data_of(const Optional& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

// `like` is a channels_last batch [N, C, H, W] of the images' kind.
awp::BnAct bn_act_arguments(const void* x, const void* residual, void* z, const Tensor& like, int64_t activation,
                            const Tensor& table) {
  return {x,
          residual,
          z,
          dtype_of(like),
          like.size(0) * like.size(2) * like.size(3),
          like.size(1),
          static_cast<awp::Activation>(activation),
          static_cast<float*>(table.data_ptr()),
          table.size(1)};
}

template <class Device>
void bn_act_train(Tensor x, Optional residual, Optional weight, Optional bias, Optional running_mean,
                  Optional running_var, double momentum, double eps, int64_t activation, Optional z, Optional y,
                  Tensor table, Optional statistics) {
  void* sum = z ? z->data_ptr() : x.data_ptr();
  const awp::BnParameters parameters{data_of<float>(weight),
                                     data_of<float>(bias),
                                     data_of<float>(running_mean),
                                     data_of<float>(running_var),
                                     momentum,
                                     eps,
                                     data_of<double>(statistics)};
  Device(x).train(bn_act_arguments(x.data_ptr(), data_of(residual), sum, x, activation, table), parameters, data_of(y));
}

template <class Device>
void bn_act_eval(Tensor x, Optional residual, Optional weight, Optional bias, Tensor running_mean, Tensor running_var,
                 double eps, int64_t activation, Optional z, Tensor y, Tensor table, Optional mask) {
  void* sum = z ? z->data_ptr() : x.data_ptr();
  const awp::BnParameters parameters{data_of<float>(weight),
                                     data_of<float>(bias),
                                     static_cast<float*>(running_mean.data_ptr()),
                                     static_cast<float*>(running_var.data_ptr()),
                                     0,
                                     eps,
                                     nullptr};
  Device(x).eval(bn_act_arguments(x.data_ptr(), data_of(residual), sum, x, activation, table), parameters, y.data_ptr(),
                 data_of<uint8_t>(mask));
}

template <class Device>
void bn_act_backward(Tensor grad, Optional grad_z, Optional z, Tensor table, Optional mask, int64_t activation,
                     bool train, Optional coefficients, Optional grad_x, Optional grad_weight, Optional grad_bias) {
  const awp::BnGradients gradients{grad.data_ptr(),
                                   data_of(grad_z),
                                   data_of<uint8_t>(mask),
                                   train,
                                   data_of<float>(coefficients),
                                   data_of(grad_x),
                                   data_of<float>(grad_weight),
                                   data_of<float>(grad_bias)};
  Device(grad).run(bn_act_arguments(nullptr, nullptr, data_of(z), grad, activation, table), gradients);
}

}  // namespace

#define AWP_DEFINE_OPERATIONS(m)                                                                                     \
  m.def(                                                                                                             \
      "perturb(Tensor(a!)[] out, Tensor[] weights, Tensor[] grads, Tensor(b!)[] saved, float gamma, int scope, "     \
      "float eps, int scale, float eta, float? bound, int[] adaptive, Tensor? weight_norms) -> Tensor");             \
  m.def("restore(Tensor(a!)[] weights, Tensor[] saved) -> ()");                                                      \
  m.def(                                                                                                             \
      "sgd_step(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] averages, "        \
      "Tensor(d!)[] out, float[] weight_decay, float lr, Tensor? lr_tensor, float momentum, bool nesterov, "         \
      "Tensor? grad_scale, Tensor? found_inf, Tensor? grad_norm, float? max_norm, float average_weight, "            \
      "Tensor? average_weight_tensor) -> Tensor");                                                                   \
  m.def("total_norm(Tensor[] tensors) -> Tensor");                                                                   \
  m.def(                                                                                                             \
      "pgd_init(Tensor(a!) x_adv, Tensor x, Tensor sample_ids, float epsilon, float radius, int norm, int seed) -> " \
      "()");                                                                                                         \
  m.def(                                                                                                             \
      "pgd_step(Tensor(a!) x_adv, Tensor grad, Tensor x, Tensor? mask, float step_size, float epsilon, "             \
      "float radius, int norm, float low, float high) -> ()");                                                       \
  m.def(                                                                                                             \
      "bn_act_train(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "            \
      "Tensor(b!)? running_var, float momentum, float eps, int activation, Tensor(c!)? z, Tensor(d!)? y, "           \
      "Tensor(e!) table, Tensor(f!)? statistics) -> ()");                                                            \
  m.def(                                                                                                             \
      "bn_act_eval(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "                  \
      "Tensor running_var, float eps, int activation, Tensor(a!)? z, Tensor(b!) y, Tensor(c!) table, "               \
      "Tensor(d!)? mask) -> ()");                                                                                    \
  m.def(                                                                                                             \
      "bn_act_backward(Tensor grad, Tensor? grad_z, Tensor? z, Tensor table, Tensor? mask, int activation, "         \
      "bool train, Tensor? coefficients, Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias) -> ()")

STABLE_TORCH_LIBRARY(awp_cpp, m) {
  AWP_DEFINE_OPERATIONS(m);
  m.def("instruction_set() -> str");
  m.def("bn_act_available() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(awp_cpp, CPU, m) {
  m.impl("perturb", TORCH_BOX(&perturb<Cpu>));
  m.impl("restore", TORCH_BOX(&restore<Cpu>));
  m.impl("sgd_step", TORCH_BOX(&sgd_step<Cpu>));
  m.impl("total_norm", TORCH_BOX(&total_norm<Cpu>));
  m.impl("pgd_init", TORCH_BOX(&pgd_init<Cpu>));
  m.impl("pgd_step", TORCH_BOX(&pgd_step<Cpu>));
  m.impl("bn_act_train", TORCH_BOX(&bn_act_train<Cpu>));
  m.impl("bn_act_eval", TORCH_BOX(&bn_act_eval<Cpu>));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(awp_cpp, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("bn_act_available", TORCH_BOX(&bn_act_available));
}

#if defined(AWP_WITH_CUDA)
STABLE_TORCH_LIBRARY(awp_cuda, m) {
  AWP_DEFINE_OPERATIONS(m);
  m.def(
      "pgd_step_normalize(Tensor mean, Tensor std, Tensor(a!) out, Tensor(b!) x_adv, Tensor grad, Tensor x, "
      "Tensor? mask, float step_size, float epsilon, float radius, int norm, float low, float high) -> ()");
  m.def("stream_bound() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(awp_cuda, CompositeExplicitAutograd, m) { m.impl("stream_bound", TORCH_BOX(&stream_bound)); }

STABLE_TORCH_LIBRARY_IMPL(awp_cuda, CUDA, m) {
  m.impl("perturb", TORCH_BOX(&perturb<Cuda>));
  m.impl("restore", TORCH_BOX(&restore<Cuda>));
  m.impl("sgd_step", TORCH_BOX(&sgd_step<Cuda>));
  m.impl("total_norm", TORCH_BOX(&total_norm<Cuda>));
  m.impl("pgd_init", TORCH_BOX(&pgd_init<Cuda>));
  m.impl("pgd_step", TORCH_BOX(&pgd_step<Cuda>));
  m.impl("pgd_step_normalize", TORCH_BOX(&pgd_step_normalize));
  m.impl("bn_act_train", TORCH_BOX(&bn_act_train<Cuda>));
  m.impl("bn_act_eval", TORCH_BOX(&bn_act_eval<Cuda>));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward<Cuda>));
}
#endif
