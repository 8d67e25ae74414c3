"""pooled_linear where torch computes it, and its launches on a GPU; the kernels are in test_triton_interpreter.py."""

import pytest
import torch
from samples import randn
from torch.nn import functional

from awp_engine.models.layers import Head
from awp_kernels import pooled_linear, pooled_linear_available

X = randn((3, 5, 4, 2)).contiguous(memory_format=torch.channels_last)
WEIGHT, BIAS = randn((7, 5), seed=1), randn((7,), seed=2)

MISUSE = {
    "x: expected a batch": {"x": randn((3, 5))},
    "x: expected a height and a width of at least 1": {"x": torch.zeros(3, 5, 0, 2)},
    "x: expected a floating-point tensor": {"x": torch.ones(3, 5, 4, 2, dtype=torch.uint8)},
    r"weight: expected shape \[K, 5\]": {"weight": randn((7, 6))},
    "bias: expected 7 values, one a row of weight": {"bias": randn((6,))},
    "bias: expected device": {"bias": torch.zeros(7, device="meta")},
}


@pytest.mark.parametrize("message", list(MISUSE))
def test_misuse_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        pooled_linear(**({"x": X, "weight": WEIGHT, "bias": BIAS} | MISUSE[message]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_head_on_the_cpu_has_the_bits_of_torchs_operations(dtype):
    """Weights in 16 bits are those of a working copy, whose bias is not."""
    wide = torch.promote_types(dtype, torch.float32)
    head = Head(5, 7).to(wide)
    head.load_state_dict({"weight": WEIGHT.to(dtype), "bias": BIAS})
    head.weight.data = WEIGHT.to(dtype)
    x = X.to(dtype)
    assert not pooled_linear_available(x, head.weight, head.bias)
    expected = functional.linear(functional.avg_pool2d(x.to(wide), (4, 2)).flatten(1), head.weight.to(wide), head.bias)
    assert torch.equal(head(x), expected)
    assert torch.equal(pooled_linear(x, head.weight, head.bias), expected)


@pytest.mark.gpu
def test_two_launches_a_pass():
    head = Head(512, 10).cuda().requires_grad_(False)
    head.weight.data = head.weight.data.half()
    x = torch.randn(128, 512, 4, 4, device="cuda").half().contiguous(memory_format=torch.channels_last)
    grad = torch.randn(128, 10, device="cuda")

    def attack_pass() -> None:
        torch.autograd.grad(head(x.requires_grad_()), x, grad)

    attack_pass()  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        attack_pass()
        torch.cuda.synchronize()
    launched = [event.name for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert launched == ["pooled_linear_kernel", "pooled_linear_gradient_kernel"]
