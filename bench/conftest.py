"""Options of the benchmarks, and what is written about the machine."""

from typing import Any

import pytest
import torch

from bench.machine import describe_machine


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `pytest bench`."""
    group = parser.getgroup("awp", "benchmarks of awp_kernels")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--sizes", help="lists of so many elements beside the models': 1e5,1e7 (all from 1e3 to what fits)")
    group.addoption("--passes", type=int, default=3, help="how often all implementations take turns")
    group.addoption("--rounds", type=int, default=15, help="timed calls of each implementation in a pass")
    group.addoption("--seconds", type=float, help="skip what has not begun after so many seconds")
    group.addoption("--trim-heap", action="store_true", help="give free memory back before each call")
    group.addoption("--with-compile", action="store_true", help="time torch.compile too (compiling takes minutes)")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the numbers depend on."""
    machine_info["awp"] = describe_machine(config.option.device)
