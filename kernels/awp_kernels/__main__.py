"""`python -m awp_kernels`: what works when it is called, and which implementation serves which operation."""

import signal
import sys

import torch

from awp_kernels import (
    _backend,
    bn_act_available,
    conv3x3_available,
    perturb_into_,
    pooled_linear_available,
    stem3x3_available,
    use_backend,
)
from awp_kernels.bn_act import serving


def call(backend: str, device: str) -> str | None:
    """Perturb a few weights with an implementation; what is wrong with the result, None if nothing is."""
    weights = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    grads, expected = weights.square() - 0.3, torch.empty_like(weights)
    with use_backend("reference"):
        perturb_into_([expected], [weights], [grads], 0.5)
    out, weight, grad = (torch.full_like(t, torch.nan).float().to(device) for t in (weights, weights, grads))
    weight.copy_(weights)
    grad.copy_(grads)
    try:
        with use_backend(backend):
            perturb_into_([out], [weight], [grad], 0.5)
        error = float((out.double().cpu() - expected).abs().max())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    # this way round, as NaN is wrong
    return None if error <= 1e-6 else f"a result is wrong by {error:.2g}"


def main() -> int:
    """Print the table; 1 if an implementation fails that ought to work here."""
    print(f"awp_kernels with torch {torch.__version__}, CUDA devices: {torch.cuda.device_count()}")
    failed = False
    for backend in _backend.BACKENDS:
        own_device = {"cuda": "cuda", "triton": "cuda" if torch.cuda.is_available() else "cpu"}.get(backend, "cpu")
        answer = _backend.problem(backend, own_device)
        if answer is None:
            wrong = call(backend, own_device)
            failed |= wrong is not None
            answer = "available: called, and right" if wrong is None else f"FAILS when called: {wrong}"
        elif backend in ("cuda", "triton") and not torch.cuda.is_available():
            answer = f"not needed, as torch finds no GPU ({answer})"
        print(f"  {backend:<10} {answer}", flush=True)
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
                try:
                    backend = _backend.backend_for(device, {dtype}, operation=operation)
                except ValueError as error:
                    backend = f"refused: {error}"
                print(f"{public[operation]:<28} {tensors:<34} {backend}")
    images, weights = torch.zeros(2, 1, 1, 1), torch.zeros(16, 1, 3, 3)
    for operation, served in (
        ("conv3x3", conv3x3_available(images, weights)),
        ("stem3x3", stem3x3_available(images, weights)),
        ("bn_act, add_bn_act", bn_act_available(images)),
    ):
        print(f"{operation:<28} {'cpu float32, bfloat16':<34} {'cpp' if served else 'torch'}")
    if torch.cuda.is_available():
        served = serving(torch.zeros(2, 8, 1, 1, device="cuda"))
        print(f"{'bn_act, add_bn_act':<28} {'cuda float32, float16, bfloat16':<34} {served or 'torch'}")
        x = torch.zeros(2, 8, 1, 1, device="cuda")
        served = "triton" if pooled_linear_available(x, x.flatten(1), x.new_zeros(2)) else "torch"
        print(f"{'pooled_linear':<28} {'cuda float32, float16, bfloat16':<34} {served}")
    return int(failed)


if __name__ == "__main__":
    # where a reader such as `head` has had enough
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
