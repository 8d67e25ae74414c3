// The operations on the current CUDA device, enqueued on a stream. Nothing here knows of torch, allocates or waits, so
// every call can be captured in a graph. Arrays of tensors lie on the host and are free to go when a call returns.
#pragma once

#include <cuda_runtime_api.h>

#include "awp/bn_act.h"
#include "awp/types.h"

namespace awp::cuda {

// Bytes of device memory, 16-byte aligned, that perturb needs until it has run: 0 for Scope::kFilter, else about 16 KB.
int64_t perturb_workspace_bytes(const Perturb& arguments);

// Two launches for every 144 tensors; one for Scope::kFilter.
cudaError_t perturb(const Perturb& arguments, void* workspace, cudaStream_t stream);

// One launch for every 256 tensors.
cudaError_t restore(const CopyTensor* tensors, int64_t count, cudaStream_t stream);

// Bytes of device memory, 16-byte aligned, that sgd_step and total_norm need until they have run: about 8 KB.
int64_t sgd_step_workspace_bytes(const SgdStep& arguments);
int64_t total_norm_workspace_bytes(const TotalNorm& arguments);

// One launch for every 224 tensors, and a small one that finishes their norms. All numbers are read on the device.
cudaError_t sgd_step(const SgdStep& arguments, void* workspace, cudaStream_t stream);

// One launch for every 304 tensors, of whatever dtypes, and a small one.
cudaError_t total_norm(const TotalNorm& arguments, void* workspace, cudaStream_t stream);

// One launch. A sample holds at most 2^30 elements.
cudaError_t pgd_init(const PgdInit& arguments, cudaStream_t stream);

// One launch.
cudaError_t pgd_step(const PgdStep& arguments, cudaStream_t stream);

// One launch; fp32 images. A sample of `out` holds less than 2^31 elements.
cudaError_t pgd_step_normalize(const PgdStepNormalize& arguments, cudaStream_t stream);

// Bytes of device memory, 16-byte aligned, that bn_act_train and bn_act_backward need until they have run.
int64_t bn_act_workspace_bytes(const BnAct& arguments);

// Three launches: sums over blocks of rows, their sum, the result.
cudaError_t bn_act_train(const BnAct& arguments, const BnParameters& parameters, void* y, void* workspace,
                         cudaStream_t stream);

// One launch. `mask`, for ReLU and channels in eights, as on the CPU.
cudaError_t bn_act_eval(const BnAct& arguments, const BnParameters& parameters, void* y, uint8_t* mask,
                        cudaStream_t stream);

// Three launches; one where nothing is summed.
cudaError_t bn_act_backward(const BnAct& arguments, const BnGradients& gradients, void* workspace, cudaStream_t stream);

}  // namespace awp::cuda
