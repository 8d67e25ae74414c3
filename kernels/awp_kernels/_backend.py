"""Which implementation serves which call."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("reference", "cpp", "cuda", "triton")
OPERATIONS = ("perturb", "restore", "sgd_step", "total_norm", "pgd_init", "pgd_step", "pgd_step_normalize", "augment")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
# operations that compiled code does not have, and who serves them there
_WITHOUT = {"cuda": {"augment": "triton"}, "cpp": {"pgd_step_normalize": "reference"}}
_LIBRARY = Path(__file__).parent / "libawp_kernels.so"


def _build_report() -> dict[str, str | None]:
    """What the installation left out, and why (setup.py writes it)."""
    path = Path(__file__).parent / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _load_library() -> str | None:
    """Load the compiled library; return why not, or None."""
    if not _LIBRARY.exists():
        return _build_report().get("cpp") or f"{_LIBRARY.name} was not built: install the package, see README"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load with torch {torch.__version__} ({error}): install again"
    return None


def _forced_by_environment() -> str | None:
    name = os.environ.get("AWP_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"AWP_BACKEND: expected one of {', '.join(BACKENDS)}, got '{name}'")
    return name


_library_problem = _load_library()
_forced = _forced_by_environment()


def _triton_problem(device: str) -> str | None:
    try:
        import_module("triton")
    except ImportError:
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs TRITON_INTERPRET=1 for CPU tensors"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return None


@functools.cache
def problem(backend: str, device: str, operation: str | None = None) -> str | None:
    """Why `backend` cannot serve tensors on `device` ("cpu", ...) with `operation`, or with any; None if it can."""
    if operation is not None and (other := _WITHOUT.get(backend, {}).get(operation)) is not None:
        where = "CUDA C++ kernel, {} serves it on GPUs" if backend == "cuda" else "C++ kernel, {} serves it on CPUs"
        return f"{operation} has no {where.format(other)}"
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton_problem(device)
    own_device = "cpu" if backend == "cpp" else "cuda"
    if device != own_device:
        return f"serves {own_device} tensors"
    if _library_problem is not None:
        return _library_problem
    return _cuda_problem() if backend == "cuda" else None


def _cuda_problem() -> str | None:
    if not hasattr(torch.ops.awp_cuda, "stream_bound"):
        return _build_report().get("cuda") or "built without nvcc, or by an older version: install again"
    if not torch.ops.awp_cuda.stream_bound():
        return f"torch {torch.__version__} tells no CUDA stream: expected a CUDA build of torch >= 2.11"
    return None if torch.cuda.is_available() else "bound to torch's CUDA stream; no CUDA device"


def implementation(backend: str, operation: str) -> Callable[..., Any]:
    """The function of one backend for one operation, with the internal signature of docs/areas/kernels.md."""
    if backend in ("cpp", "cuda"):
        compiled = getattr(getattr(torch.ops, f"awp_{backend}"), operation).default
        around = getattr(import_module("awp_kernels._compiled"), operation, None)
        return compiled if around is None else functools.partial(around, compiled)
    return getattr(import_module(f"awp_kernels.{operation}.{backend}"), operation)


_cache: dict[tuple[str, str], Callable[..., Any]] = {}


def backend_for(
    device: str, dtypes: set[torch.dtype], unserved: str | None = None, operation: str | None = None
) -> str:
    """The backend that serves tensors of these dtypes on this device.

    Args:
        device: "cpu", "cuda", ...
        dtypes: of all tensors.
        unserved: what else of the call the reference alone serves, such as "torch.float16 for weights".
        operation: which one, where not every backend has it.

    Raises:
        ValueError: a backend was forced that cannot serve them.
    """
    if _forced is not None:
        alone = sorted(str(dtype) for dtype in dtypes.difference(DTYPES)) + ([unserved] if unserved else [])
        served = _forced == "reference" or not alone
        why = problem(_forced, device, operation) if served else f"{alone[0]} is served by the reference alone"
        if why is not None:
            raise ValueError(f"backend '{_forced}' was forced but cannot serve {device} tensors here: {why}")
        return _forced
    if unserved or not dtypes.issubset(DTYPES):
        return "reference"
    names = _PREFERENCE.get(device, ("reference",))
    return next(name for name in names if problem(name, device, operation) is None)


def select(
    operation: str, device: torch.device, dtypes: set[torch.dtype], *, unserved: str | None = None
) -> Callable[..., Any]:
    """The implementation of `operation` for tensors of these dtypes on this device; `unserved` as for `backend_for`."""
    key = (backend_for(device.type, dtypes, unserved, operation), operation)
    if key not in _cache:
        _cache[key] = implementation(*key)
    return _cache[key]


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one implementation inside a `with` block, as AWP_BACKEND does for a process.

    Args:
        name: "reference", "cpp", "cuda" or "triton"; None chooses by device.

    Raises:
        ValueError: on an unknown name; inside the block, from an operation that the backend cannot serve.
    """
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(f"use_backend: expected one of {', '.join(BACKENDS)}, got '{name}'")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
