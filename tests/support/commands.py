"""The commands of engine/, run in the tests' own process."""

import sys
from importlib import import_module

import pytest

from awp_engine.device import in_full_precision


def run_command(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `NAME.py` with these arguments."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    # which the command sets for itself
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with in_full_precision():
        try:
            import_module(f"awp_engine.cli.{name}").main(prog=f"{name}.py")
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0
