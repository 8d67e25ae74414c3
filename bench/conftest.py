"""Options of the benchmarks, and what is written about the machine."""

import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `pytest bench`."""
    group = parser.getgroup("awp", "benchmarks of awp_kernels")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--passes", type=int, default=3, help="how often all implementations take turns")
    group.addoption("--rounds", type=int, default=15, help="timed calls of each implementation in a pass")
    group.addoption("--trim-heap", action="store_true", help="give free memory back before each call")
    group.addoption("--with-compile", action="store_true", help="time torch.compile too (compiling takes minutes)")


def cpu_name() -> str:
    """The processor as Linux names it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the numbers depend on."""
    device = config.getoption("device")
    machine_info["awp"] = {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": __import__("triton").__version__ if find_spec("triton") else None,
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }
