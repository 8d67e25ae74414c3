"""The commands of engine/, run in the tests' own process."""

import sys
from importlib import import_module

import pytest
import torch


def run_command(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `NAME.py` with these arguments."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    # which the command sets for itself
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    flags = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags]
    try:
        import_module(f"awp_engine.cli.{name}").main(prog=f"{name}.py")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        for flag, precision in zip(flags, before, strict=True):
            flag.fp32_precision = precision
    return 0
