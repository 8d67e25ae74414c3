"""The first thing to run on a GPU: what works there, and what does not.

    python -m bench.first_contact --seconds 70 --json first-contact.json

Each check has a process of its own and a limit: one that crashes or hangs costs itself alone. Every operation of every
implementation is called on fresh random arguments, outputs filled with NaN, and compared with plain PyTorch and fp64;
then whole steps are taken, plainly and in CUDA graphs, by the first implementation without a fault. Results are written
after each check. Exit code 1 if a check did not hold.
"""

import argparse
import math
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_PROG = "first_contact.py"
# part of the time in which the operations are checked; the rest is for whole steps
_OPERATIONS_SHARE = 0.55
# a check of an operation begins no further case after so many seconds: Triton compiles one for each dtype
_CASES_SECONDS = {"cpu": 2.0, "cuda": 15.0}
_STEPS = {"cpu": 3, "cuda": 8}
# by device, most wanted first; the plain one is what the others are compared with
_BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}

# processes of checks
_running: set[int] = set()


@dataclass(kw_only=True)
class Check:
    """One row of the table.

    Attributes:
        name: "machine", "plain step", "step in a graph", or implementation and operation.
        outcome: "held", "failed", "crashed", "hung", or, where the time of all was over, "cut short" or "not reached".
        seconds: that it took.
        told: what it found, in a line.
    """

    name: str
    outcome: str = "not reached"
    seconds: float = 0.0
    told: str = ""


# ---- what a check does, in its own process; it returns what it found, and raises where that is wrong


def machine(device: str) -> str:
    import platform

    import torch

    told = [f"python {platform.python_version()}", f"torch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    if device == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        told += [torch.cuda.get_device_name(), f"capability {capability}", f"cuDNN {torch.backends.cudnn.version()}"]
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,memory.total,clocks.sm,ecc.errors.uncorrected.volatile.total",
        ]
        told.append(subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip())
    for name in ("triton", "setuptools", "hypothesis", "xdist"):
        try:
            told.append(f"{name} {getattr(__import__(name), '__version__', '')}".strip())
        except ImportError:
            told.append(f"no {name}")
    return ", ".join(told)


def operations_of(backend: str) -> list[str]:
    """The operations that an implementation has kernels of, but for those on images that are the CPU's alone."""
    names = ["perturb_", "perturb_into_", "restore_", "sgd_step_", "total_norm", "pgd_init_", "pgd_init_normal_"]
    names += ["pgd_step_", *(["augment"] if backend != "cuda" else [])]
    names += ["pooled_linear"] if backend == "triton" else []
    # forced, the C++ refuses the table's fp16, and has no other step
    return [*names, *(["bn_act", "pgd_step_normalize_"] if backend != "cpp" else [])]


def operation(name: str, device: str, seed: int) -> str:
    """All variants, samples and dtypes of one operation, as far as the time goes."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import torch
    from operations import OPERATIONS, Arguments, cases, excess, mapped, run

    from awp_kernels import use_backend

    backend, operation_name = name.split()
    # what is not written shows
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    torch.use_deterministic_algorithms(True)
    checked, worst, end = 0, 0.0, time.monotonic() + _CASES_SECONDS[device]
    # variants in turn, so that each has been called when the time is over
    own = [case for case in cases() if case[0] == operation_name]
    own.sort(key=lambda case: (list(OPERATIONS[operation_name].samples)[::-1].index(case[2]), str(case[3])))
    for case in own:
        if checked and time.monotonic() > end:
            break
        found = OPERATIONS[operation_name]
        arguments: Arguments = found.build(found.samples[case[2]], case[3], seed + checked, **found.variants[case[1]])
        with use_backend(backend):
            results = run(found, mapped(arguments, lambda t: t.clone().to(device)))
        ratio, where = excess(found, results, arguments)
        if not ratio <= 1:
            raise AssertionError(f"{case[1:]}: {where} has {ratio:.3g} times the error that is allowed, seed {seed}")
        checked, worst = checked + 1, max(worst, ratio)
    return f"{checked} of {len(own)} cases, at most {worst:.2f} of the error that is allowed"


def step(name: str, device: str, seed: int) -> str:
    """Whole training steps of AT-AWP, PGD-10, in the precision that the device has by default."""
    import torch

    from awp_engine.step.cuda_graph import GraphedStep
    from bench.step.arms import Settings
    from bench.step.arms.engine import engine_arm
    from bench.step.turns import random_batches

    graphs, large = name == "step in a graph", device == "cuda"
    settings = Settings(
        model="preact-resnet-18" if large else "preact-resnet-digits",
        method="at-awp",
        batch_size=128 if large else 16,
        device=device,
        engine={"cuda_graphs": graphs and large},
    )
    torch.manual_seed(seed)
    arm = engine_arm(settings, settings.build_model())
    before = [parameter.detach().clone() for parameter in arm.model.parameters()]
    results, seconds = [], 0.0
    for index, batch in zip(range(_STEPS[device]), random_batches(settings), strict=False):
        begin = time.perf_counter()
        x = batch.images.contiguous(memory_format=arm.memory_format)
        results.append(arm.step(batch._replace(images=x), index))
        if large:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    losses = [float(result.loss) for result in results if not result.skipped]
    scale = arm.plain_step.passes.loss_scale
    told = (
        f"{settings.model}, losses {min(losses, default=0):.3f} to {max(losses, default=0):.3f}, "
        f"{len(results) - len(losses)} of {len(results)} steps skipped, "
        f"loss scale {'none' if scale is None else float(scale.value)}, the last step {seconds * 1e3:.1f} ms"
    )
    tensors = list(arm.model.state_dict().values())
    if not all(bool(tensor.isfinite().all()) for tensor in tensors) or not all(map(math.isfinite, losses)):
        raise AssertionError(f"weights, statistics or losses are not finite: {told}")
    if 2 * len(losses) <= len(results):
        raise AssertionError(f"too many steps are skipped: {told}")
    if any(torch.equal(a, b) for a, b in zip(before, arm.model.parameters(), strict=True) if a.ndim > 1):
        raise AssertionError(f"some weights did not move: {told}")
    if graphs and large and not (isinstance(arm.taken_step, GraphedStep) and arm.taken_step.captured):
        raise AssertionError(f"nothing was captured: {told}")
    return told + ("; no graphs on the CPU" if graphs and not large else "")


def crash(*_: object) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "survived"


def hang(*_: object) -> str:
    time.sleep(1e6)
    return "woke up"


def body(name: str) -> Callable[..., str]:
    """What the check of a name does."""
    own = {"crash": crash, "hang": hang, "plain step": step, "step in a graph": step}
    return (lambda _, device, __: machine(device)) if name == "machine" else own.get(name, operation)


# ---- the processes


def conduct(check: Check, arguments: argparse.Namespace, end: float, backend: str | None = None) -> Check:
    """Run one check in a process of its own, until `end` at most."""
    begin = time.monotonic()
    # less would not even import torch
    if end - begin < 2:
        return check
    limit = min(arguments.hangs, end - begin)
    environment = os.environ | ({"AWP_BACKEND": backend} if backend else {})
    words = [sys.executable, "-m", "bench.first_contact", "--device", arguments.device, "--seed", str(arguments.seed)]
    process = subprocess.Popen(
        [*words, "--check", check.name],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    _running.add(process.pid)
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # what it started too
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        check.outcome = "hung" if limit == arguments.hangs else "cut short"
    _running.discard(process.pid)
    check.seconds = time.monotonic() - begin
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "nothing")
    if check.outcome in ("hung", "cut short"):
        check.told = f"no end after {check.seconds:.0f} s; last it said: {last}"
    elif process.returncode < 0:
        signalled = signal.Signals(-process.returncode).name
        check.outcome, check.told = "crashed", f"ended by {signalled}; last it said: {last}"
    else:
        check.outcome, check.told = ("held" if process.returncode == 0 else "failed"), last
    return check


def check_all(arguments: argparse.Namespace, checks: Sequence[Check]) -> Iterator[Check]:
    """The checks as they end: first the operations, several at once, then whole steps by what held."""
    begin = time.monotonic()
    steps = [check for check in checks if "step" in check.name.split()]
    others = [check for check in checks if check not in steps]
    share = _OPERATIONS_SHARE if steps else 1.0
    workers = max(2, min(14, (os.cpu_count() or 1) - 2))
    yield from _conducted(others, workers, arguments, begin + share * arguments.seconds)
    # at once on a GPU: one waits for cuDNN's trials while the other does
    workers = 2 if arguments.device == "cuda" else 1
    yield from _conducted(steps, workers, arguments, begin + arguments.seconds, serving(arguments.device, checks))


def _conducted(
    checks: Sequence[Check], workers: int, arguments: argparse.Namespace, end: float, backend: str | None = None
) -> Iterator[Check]:
    pool = ThreadPoolExecutor(workers)
    try:
        for done in as_completed([pool.submit(conduct, check, arguments, end, backend) for check in checks]):
            yield done.result()
    finally:
        # an interrupt leaves none behind
        pool.shutdown(wait=False, cancel_futures=True)
        for pid in list(_running):
            os.killpg(pid, signal.SIGKILL)


def serving(device: str, checks: Sequence[Check]) -> str | None:
    """The first implementation without a fault, as AWP_BACKEND names it; None where the most wanted one has none."""
    for backend in _BACKENDS[device]:
        own = [check for check in checks if check.name.split()[0] == backend]
        if not any(check.outcome in ("failed", "crashed", "hung") for check in own):
            return None if backend == _BACKENDS[device][0] else backend
    return "reference"


def table(checks: Sequence[Check]) -> str:
    """What held, as Markdown."""
    rows = [f"| {c.name} | {c.outcome} | {c.seconds:.1f} | {c.told} |" for c in checks]
    return "\n".join(["| check | outcome | s | found |", "|---|---|---|---|", *rows])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, print, write."""
    from awp_engine.cli.command_line import OneLineParser
    from awp_engine.files.text import json_text

    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=70.0, help="for all of it")
    parser.add_argument("--hangs", type=float, default=30.0, help="seconds after which a check hangs")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of arguments and weights")
    parser.add_argument("--only", nargs="+", help="names of checks, such as 'cuda perturb_'; none means all")
    parser.add_argument("--rehearse", action="store_true", help="add a check that crashes and one that hangs")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.check:
        try:
            print(body(arguments.check)(arguments.check, arguments.device, arguments.seed))
        except Exception as error:
            print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return 1
        return 0
    names = ["machine", *(["crash", "hang"] if arguments.rehearse else [])]
    names += [f"{backend} {name}" for backend in _BACKENDS[arguments.device] for name in operations_of(backend)]
    checks = [Check(name=name) for name in [*names, "plain step", "step in a graph"]]
    if arguments.only:
        checks = [check for check in checks if check.name in arguments.only]
    for check in check_all(arguments, checks):
        print(f"{check.outcome:>11} {check.seconds:5.1f} s  {check.name}: {check.told}", flush=True)
        if arguments.json:
            result = {"kind": "first_contact", "device": arguments.device, "seed": arguments.seed}
            result |= {"go_on_with": serving(arguments.device, checks), "checks": [asdict(c) for c in checks]}
            arguments.json.write_text(json_text(result, indent=1))
    print(table(checks))
    if backend := serving(arguments.device, checks):
        print(f"{_BACKENDS[arguments.device][0]} has a fault: go on with AWP_BACKEND={backend}")
    return int(any(check.outcome != "held" for check in checks))


if __name__ == "__main__":
    sys.exit(main())
