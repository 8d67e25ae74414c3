"""Devices that are neither a CPU nor CUDA: what is chosen for one without having one."""

import pytest
import torch

from awp_engine.config import Config, ConfigError, PrecisionConfig
from awp_engine.device import choose_device, device_name
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
