"""Devices that are neither a CPU nor CUDA: what is chosen for one without having one."""

import pytest
import torch
from torch import nn

from awp_engine.config import Config, ConfigError, PrecisionConfig
from awp_engine.device import choose_device, device_name, fast_memory_format
from awp_engine.step.precision import Precision
from awp_engine.train.banner import operations_on
from awp_engine.train.setup import choose_precision

XPU = torch.device("xpu", 0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_device_that_is_not_there_is_refused_in_one_line(kind):
    with pytest.raises(ConfigError, match=rf"^--device: expected .* for '{kind}', found none; use --device cpu$"):
        choose_device(kind)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_auto_is_the_cpu_where_there_is_nothing_else():
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_another_device_computes_in_fp32_by_plain_pytorch_and_says_so():
    """Whatever this machine's processor is good at, and GPUs of CUDA are."""
    assert choose_precision(Config(), XPU) == Precision()
    with pytest.raises(ConfigError, match=r"^--precision\.ascent: expected fp32 or bf16 on xpu, got 'fp16'"):
        choose_precision(Config(precision=PrecisionConfig(ascent="fp16")), XPU)
    by, warning = operations_on("xpu")
    assert by == "plain PyTorch"
    assert warning is not None
    assert warning.startswith("device xpu: the project has never run on one")
    assert device_name(XPU) == "xpu"


def shortcut(channels: int) -> nn.Module:
    """Narrowing, as a shortcut does."""
    return nn.Sequential(nn.Conv2d(channels, 16, 1, stride=2), nn.Flatten(), nn.LazyLinear(3))


@pytest.mark.parametrize("channels", [8, 15])
def test_narrow_shortcuts_compute_where_torch_writes_nothing_past_the_end(channels):
    """In channels_last this ended by a segmentation fault, or a double free, within a few passes on two threads."""
    device = torch.device("cpu")
    assert fast_memory_format(shortcut(channels), device) == torch.contiguous_format
    assert fast_memory_format(shortcut(16), device) == torch.channels_last
