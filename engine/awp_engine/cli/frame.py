"""What commands share: flags that mean the same in all of them, kinds of numbers, and one end. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from awp_engine.cli.command_line import fail
from awp_engine.config import ConfigError
from awp_engine.config.errors import UserError
from awp_engine.distributed.signals import interrupted_code, interrupts
from awp_engine.files.text import printable

# far beyond use, within what torch counts with
_MOST = 2**31 - 1


def whole_number(least: int = 1, most: int = _MOST) -> Callable[[str], int]:
    """`type=` of a flag that takes a whole number in a range."""
    expected = "a whole number >= 0, below 2^63" if most >= 2**63 - 1 else f"a whole number from {least} to {most}"

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text[:80]!r}")

    return read


def share(text: str) -> float:
    """`type=` of a flag that takes a part of something: more than 0, at most 1."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number more than 0 and at most 1, got {text[:80]!r}")


def say(line: str) -> None:
    """Prints a line at once, with escapes for what is not printable."""
    print(printable(line), flush=True)


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default not in (None, False, "", [])
        return super()._get_help_string(action) if said else action.help


_FLAGS: dict[str, dict[str, Any]] = {
    "checkpoint": {"default": "best", "metavar": "NAME", "help": "of a run: best, last, or a name or path"},
    "data.name": {"metavar": "NAME", "help": "data set, where it is not the run's own"},
    "data.root": {"type": Path, "metavar": "DIR", "help": "its directory; the test part is enough"},
    "limit": {"type": whole_number(), "metavar": "N", "help": "so many images, evenly spread over the split"},
    "seed": {
        "type": whole_number(0, 2**63 - 1),
        "metavar": "N",
        "help": "of all noise; the one of the run's own evaluation if not given",
    },
    "batch-size": {"type": whole_number(), "metavar": "N", "help": "images a batch"},
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "auto takes a GPU if there is one"},
    # the system starts as many as it is told, until it has no room for another
    "threads": {"type": whole_number(1, 1024), "metavar": "N", "help": "CPU threads"},
    "output": {"type": Path, "metavar": "DIR", "help": "for reports; RUN/evaluation if not given"},
}


def add_shared(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    """Adds flags that mean the same in every command, in that order; `changes` are of all of them."""
    for name in names:
        dest = name.replace(".", "_").replace("-", "_")
        given: dict[str, Any] = {"dest": dest} | _FLAGS[name] | changes
        parser.add_argument(f"--{name}", **given)


def add_alias(parser: argparse.ArgumentParser, old: str, dest: str) -> None:
    """Adds an earlier name of a flag, which help does not show."""
    kind: Any = next(action.type for action in parser._actions if action.dest == dest)
    # the default is that of the flag itself
    parser.add_argument(old, dest=dest, type=kind, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def prepare(threads: int | None) -> None:
    """Has torch compute with so many threads, and on GPUs in full fp32, as a measurement should."""
    import torch

    from awp_engine.device import full_precision

    if threads is not None:
        torch.set_num_threads(threads)
    full_precision()


@contextlib.contextmanager
def ending(
    prog: str,
    *,
    interrupted: str = "interrupted",
    unusable: int = 2,
    failed: int = 1,
    place: object = None,
    needs_torch: bool = True,
) -> Iterator[None]:
    """A command's work: what ends it becomes one line on stderr and an exit code.

    Args:
        prog: what messages call the command.
        interrupted: what to say after a signal, before the notes that its exception carries; the signal's number goes
            into the code.
        unusable: exit code where something given cannot be used; 2 wherever that is a setting.
        failed: exit code where the machine failed.
        place: what to name where an error of the system names no file.
        needs_torch: whether the work imports torch.

    Raises:
        SystemExit: with that code.
    """
    if needs_torch:
        # before signals raise: what interrupts this import may come out as any error
        importlib.import_module("torch")
    try:
        with interrupts():
            yield
    except UserError as error:
        fail(str(error), code=2 if isinstance(error, ConfigError) else unusable, prog=prog)
    except OSError as error:
        where = place if error.filename is None else error.filename
        named = "" if where is None else f"{os.fsdecode(where) if isinstance(where, (bytes, os.PathLike)) else where}: "
        fail(f"{named}{error.strerror or error}", code=failed, prog=prog)
    except RuntimeError as error:
        # torch's, which not all commands import
        if type(error).__name__ != "OutOfMemoryError":
            raise
        fail("the device has too little memory for such batches: give a smaller --batch-size", code=failed, prog=prog)
    except KeyboardInterrupt as interrupt:
        told = "; ".join([interrupted, *getattr(interrupt, "__notes__", ())])
        fail(told, code=interrupted_code(interrupt), prog=prog)
