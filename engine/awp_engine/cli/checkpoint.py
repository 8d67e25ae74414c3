"""`awp checkpoint verify|list|export DIR`: a run directory, its checkpoints or one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import ending
from awp_engine.files.locking import LOCK, locked
from awp_engine.files.run_places import CHECKPOINTS
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from torch import Tensor

    from awp_engine.checkpoint import Checkpoint


def _found(place: Path) -> list[Path]:
    """The checkpoints that `place` means, oldest first."""
    from awp_engine.checkpoint import CheckpointError, names, position
    from awp_engine.checkpoint.layout import MANIFEST

    try:
        if (place / MANIFEST).exists() or (position(place.name) is not None and place.is_dir()):
            return [place]
        directory = place / CHECKPOINTS if (place / CHECKPOINTS).is_dir() else place
        found = [directory / name for name in names(directory)]
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be read: {error.strerror}") from None
    found = [path for path in found if position(path.name) is not None or (path / MANIFEST).exists()]
    if not found:
        raise CheckpointError(f"{place}: expected a run directory, its checkpoints or one of them; found none there")
    return found


def _problems(path: Path) -> tuple[list[str], dict[str, Any]]:
    """What is wrong with a checkpoint, and its state where nothing is."""
    from awp_engine.checkpoint import CheckpointError, damage, load

    problems = damage(path)
    try:
        return problems, {} if problems else load(path).state
    except CheckpointError as error:
        return [str(error)], {}


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file() and not file.is_symlink())


def _verify(place: Path) -> int:
    damaged = 0
    found = _found(place)
    for path in found:
        problems, _ = _problems(path)
        damaged += bool(problems)
        print("\n".join(f"damaged: {printable(line)}" for line in problems) or f"sound: {printable(str(path))}")
    if len(found) > 1:
        print(f"{len(found) - damaged} of {len(found)} checkpoints are sound")
    return 1 if damaged else 0


def _percent(value: object) -> str:
    return f"{value:.2%}" if isinstance(value, (int, float)) and 0 <= value <= 1 else "-"


def _list(place: Path) -> int:
    from awp_engine.checkpoint import CheckpointError, Position, position
    from awp_engine.checkpoint.layout import LATEST
    from awp_engine.checkpoint.read import latest_name
    from awp_engine.observe.report import print_table

    found = _found(place)
    try:
        latest = latest_name(found[0].parent)
    except CheckpointError:
        latest = None
    rows = []
    for path in found:
        problems, state = _problems(path)
        at = position(path.name) or Position(state.get("epoch", 0), state.get("step", 0), 0)
        row = {
            "checkpoint": path.name,
            "epoch": str(at.epoch),
            "step": str(at.step),
            "bytes": f"{_bytes(path):,}",
            "sound": "no" if problems else "yes",
            "date": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime)),
            LATEST: LATEST if path.name == latest else "",
            "held-out PGD": _percent(state.get("held_out_pgd_accuracy")),
            "best so far": _percent(state.get("best_robust")),
        }
        rows.append(row)
    # A column that says nothing is left out.
    empty = [column for column in rows[0] if all(row[column] == "-" for row in rows)]
    print_table([{column: text for column, text in row.items() if column not in empty} for row in rows])
    return 0


def _chosen(place: Path) -> Checkpoint:
    from awp_engine.checkpoint import load, load_latest

    found = _found(place)
    if found == [place]:
        return load(place)
    loaded = load_latest(found[0].parent)
    # `_found` has seen one there.
    assert loaded is not None
    return loaded


def _weights(loaded: Checkpoint, which: str) -> dict[str, Tensor]:
    from awp_engine.checkpoint import CheckpointError

    weights = loaded.tensors.get(which)
    if not weights:
        held = ", ".join(group for group in ("best_model", "model", "average") if loaded.tensors.get(group))
        raise CheckpointError(f"{loaded.path}: holds no weights {which!r}; --weights can be one of {held or 'none'}")
    if which != "average":
        return weights
    # An average has parameters alone: its statistics are computed before each use, and not kept.
    missing = [name for name in loaded.tensors.get("model", {}) if name not in weights]
    if missing:
        print(f"{missing[0]} and {len(missing) - 1} more are not averaged: taken from the model in training")
    return {name: weights.get(name, tensor) for name, tensor in loaded.tensors.get("model", weights).items()}


def _export(place: Path, output: Path, which: str) -> int:
    from awp_engine.checkpoint import CheckpointError, export_model

    if os.path.lexists(output):
        raise CheckpointError(f"{output}: is there already; remove it or choose another name")
    loaded = _chosen(place)
    weights = _weights(loaded, which)
    described = {key: loaded.state[key] for key in ("model", "class_names") if isinstance(loaded.state.get(key), str)}
    metadata = {"weights": which, "checkpoint": loaded.path.name, **described}
    export_model(output, weights, metadata)
    for line in loaded.skipped:
        print(f"skipped a checkpoint: {printable(line)}")
    print(printable(f"{output}: {which} of {loaded.path}, {len(weights)} tensors"))
    return 0


def main(argv: Sequence[str] | None = None, prog: str = "awp checkpoint") -> int:
    """Runs one command.

    Returns:
        0; 1 where `verify` found damage.

    Raises:
        SystemExit: 2 for bad arguments and an OUT that another process writes, 1 for what cannot be done, 130 or 143
            after a signal; after one line on stderr.
    """
    parser = OneLineParser(prog=prog, description="Looks after the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="verify|list|export")
    helps = {
        "verify": "compare every file with its SHA-256; exit code 1 if one is damaged",
        "list": "a table of the checkpoints",
        "export": "write weights as plain safetensors, by the model's names (of a run: from its latest sound one)",
    }
    for name, text in helps.items():
        example = f"runs/cifar{' weights.safetensors' if name == 'export' else ''}"
        command = commands.add_parser(name, help=text, description=text, example=example)
        command.add_argument("place", type=Path, metavar="DIR", help="run directory, its checkpoints or one of them")
        if name == "export":
            command.add_argument("output", type=Path, metavar="OUT.safetensors", help="the file to write")
            text = "of the best epoch, of the latest, or their average (default: best_model)"
            which = ("best_model", "model", "average")
            command.add_argument("--weights", choices=which, default="best_model", help=text)
    arguments = parser.parse_args(argv)
    if arguments.command == "export" and arguments.output.suffix != ".safetensors":
        parser.error(f"OUT.safetensors: expected a name that ends so, got {str(arguments.output)!r}")

    interrupted = f"{arguments.command} was interrupted"
    with ending(prog, interrupted=interrupted, unusable=1, place=arguments.place):
        if arguments.command == "verify":
            return _verify(arguments.place)
        if arguments.command == "list":
            return _list(arguments.place)
        # of that one file: the directory may be anyone's
        with locked(arguments.output.parent, f"{LOCK}-{arguments.output.name}"):
            return _export(arguments.place, arguments.output, arguments.weights)
