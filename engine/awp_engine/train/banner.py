"""What a run's first lines say: what is trained, and on what."""

import torch

from awp_engine.device import device_name
from awp_engine.files.text import path_end, printable
from awp_engine.models.views import base_set
from awp_engine.train.setup import Setup
from awp_kernels._backend import backend_for, problem

COLUMNS = 80


def banner(setup: Setup) -> list[str]:
    """Two lines of at most 80 columns; more for names and a run directory that do not fit, and for what was not built.

    Of a path that does not fit the beginning is left out, of other names nothing.
    """
    config = setup.config
    # a second set of batch normalisation is part of training alone
    parameters = f"{sum(p.numel() for p in base_set(dict(setup.model.named_parameters())).values()):,}"
    ball = config.attack.balls
    method, about = f"{config.title} of ", f" ({parameters} parameters)"
    model = method + path_end(config.model.name, COLUMNS - len(method) - len(about)) + about
    data = f"on {path_end(config.data.name, COLUMNS - len(f'on , {ball}'))}, {ball}"
    operations, why = operations_on(setup.device.type)
    device = f"{_device(setup)}, {_precision(setup)}, {operations}"
    lines = [*_together(model, " ", data), *_together(device, "; ", f"run directory {setup.run_dir}")]
    return [printable(line) for line in (*lines, *([] if why is None else [why]))]


def _together(first: str, between: str, second: str) -> list[str]:
    """In one line, where it fits."""
    line = first + between + second
    return [line] if len(line) <= COLUMNS else [first, second]


def _device(setup: Setup) -> str:
    ranks = setup.ranks.world
    if setup.device.type != "cpu":
        name = device_name(setup.device)
        return name if ranks == 1 else f"{ranks} x {name}"
    threads = torch.get_num_threads()
    each = f"{threads} thread{'s' * (threads > 1)}"
    return f"CPU, {each}" if ranks == 1 else f"CPU, {ranks} ranks of {each}"


def _precision(setup: Setup) -> str:
    names = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    precision = setup.precision
    attack, ascent, descent = (names[part] for part in (precision.attack, precision.ascent, precision.descent))
    if not setup.config.awp.enabled:
        ascent = descent
    if ascent != descent:
        return f"attack {attack}, ascent {ascent}, descent {descent}"
    return attack if attack == descent else f"{descent}, attack {attack}"


def operations_on(device: str) -> tuple[str, str | None]:
    """Which operations serve the step, and why those made for this device do not."""
    names = {"cpp": "C++", "cuda": "CUDA", "triton": "Triton"}
    backend = backend_for(device, {torch.float32}, operation="perturb")
    if backend != "reference":
        return f"{names[backend]} operations", None
    own = "cuda" if device == "cuda" else "cpp"
    why = problem(own, device)
    if device not in ("cpu", "cuda"):
        return "plain PyTorch", f"device {device}: the project has never run on one; compare with --device cpu first"
    if why is None:
        return "plain PyTorch, as AWP_BACKEND says", None
    return f"plain PyTorch: the {names[own]} library was not built", f"slower than it could be: {why}"
