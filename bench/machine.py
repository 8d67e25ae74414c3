"""What a number depends on: the machine, the versions, the sources."""

import hashlib
import os
import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from awp_engine.observe.report import source_commit

ROOT = Path(__file__).resolve().parent.parent


def cpu_name() -> str:
    """The processor as Linux names it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def describe_machine(device: str) -> dict[str, Any]:
    """Machine, versions and load."""
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "triton": __import__("triton").__version__ if find_spec("triton") else None,
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def commit() -> str | None:
    """What is measured: the variable COMMIT where there is no git checkout, else git's, "-dirty" where changed."""
    return os.environ.get("COMMIT") or source_commit()


def sources_digest() -> str:
    """SHA-256 over what was measured, so that a result from a changed checkout can be told apart."""
    digest = hashlib.sha256()
    patterns = ("csrc/**/*", "kernels/**/*.py", "engine/**/*.py", "bench/**/*.py")
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
