"""`python -m awp_kernels`: what was found, and which implementation serves which operation."""

import torch

from awp_kernels import _backend, bn_relu_available, conv3x3_available


def main() -> None:
    """Print the table."""
    print(f"awp_kernels with torch {torch.__version__}, CUDA devices: {torch.cuda.device_count()}")
    for backend in _backend.BACKENDS:
        own_device = {"cuda": "cuda", "triton": "cuda" if torch.cuda.is_available() else "cpu"}.get(backend, "cpu")
        print(f"  {backend:<10} {_backend.problem(backend, own_device) or 'available'}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    dtypes = {"float32, float16, bfloat16": torch.float32, "float64": torch.float64}
    # weights, which the compiled implementations hold in float32; the other lists may be of any of the three
    step_dtypes = {"float32 weights": torch.float32, "other weights": torch.float64}
    by_operation = {"sgd_step": step_dtypes, "augment": {"uint8": torch.float32}}
    print(f"{'operation':<28} {'tensors':<34} implementation")
    public = {name: f"{name}_" for name in _backend.OPERATIONS}
    public |= {
        "perturb": "perturb_, perturb_into_",
        "pgd_init": "pgd_init_, pgd_init_normal_",
        "total_norm": "total_norm",
        "augment": "augment",
    }
    for operation in _backend.OPERATIONS:
        for device in devices:
            for label, dtype in by_operation.get(operation, dtypes).items():
                tensors = f"{device} {label}"
                backend = _backend.backend_for(device, {dtype}, operation=operation)
                print(f"{public[operation]:<28} {tensors:<34} {backend}")
    images = torch.zeros(2, 1, 1, 1)
    for operation, served in (
        ("conv3x3", conv3x3_available(images, torch.zeros(1, 1, 3, 3))),
        ("bn_relu", bn_relu_available(images)),
    ):
        print(f"{operation:<28} {'cpu float32, bfloat16':<34} {'cpp' if served else 'torch'}")


if __name__ == "__main__":
    main()
