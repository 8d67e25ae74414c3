"""`awp predict RUN_OR_CHECKPOINT FILE_OR_FOLDER...`: classifies image files by a trained model."""

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import Defaults, add_shared, ending, prepare, say, share, whole_number
from awp_engine.cli.model_flags import (
    PLACE,
    add_described,
    add_model,
    described,
    is_model,
    named_model,
    place,
    require_model,
)
from awp_engine.files.text import json_text, printable

if TYPE_CHECKING:
    from awp_engine.evaluation.predict import Prediction

# of reasons why files cannot be used
_SHOWN = 10


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".csv", ".jsonl"):
        raise argparse.ArgumentTypeError(f"expected a name that ends in .csv or .jsonl, got {text[-80:]!r}")
    if os.path.lexists(path):
        raise argparse.ArgumentTypeError(f"{printable(text)} is there already; remove it or choose another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{printable(str(path.parent))} is no folder that can be written to")
    return path


def parse(argv: Sequence[str] | None = None, prog: str = "predict.py") -> argparse.Namespace:
    """The command line's settings.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr.
    """
    parser = OneLineParser(
        prog=prog,
        example="runs/photos new-photos --out classes.csv",
        description="Classifies image files by a trained model. Images are read, cut and resized as those that it was "
        "trained on, by the config.json of its run.",
        epilog="Exit code 0: all files were classified; 1: some cannot be used, and are named with the reason; 2: none "
        "was classified.",
        formatter_class=Defaults,
        common=("places", "out", "top", "checkpoint", "model_name", "model_weights", "image_size", "device"),
        usage="%(prog)s RUN_OR_CHECKPOINT FILE_OR_FOLDER ... [flags]",
    )
    add = parser.add_argument
    text = f"{PLACE}; then images, or folders with images in and below"
    add("places", type=place, nargs="+", metavar="RUN_OR_CHECKPOINT FILE_OR_FOLDER", help=text)
    add("--out", type=_output, metavar="FILE", help="write to this .csv or .jsonl file; else a table is printed")
    add("--top", type=whole_number(), default=1, metavar="N", help="the N most probable classes")
    add_model(parser)
    add_described(parser)
    add("--center-crop", type=share, metavar="X", help="resize the central square of this part of the shorter side")
    add_shared(parser, "batch-size", default=64)
    add_shared(parser, "device", "threads")
    arguments = parser.parse_args(argv)
    first, *rest = arguments.places
    if arguments.model_name is None or (arguments.model_weights is None and is_model(first)):
        arguments.path, arguments.places = first, rest
    else:
        arguments.path = None
    require_model(parser, arguments, arguments.path)
    if not arguments.places:
        parser.error("FILE_OR_FOLDER: expected images, or folders of images, behind the model; got none")
    arguments.places = [Path(file) for file in arguments.places]
    return arguments


def _rows(found: "Sequence[Prediction]", names: Sequence[str], top: int) -> list[dict[str, str]]:
    """A row a file: class and probability, class 2 and so on, and what is wrong with the file."""
    rows = []
    for prediction in found:
        row = {"file": prediction.file}
        for rank in range(top):
            known = rank < len(prediction.classes)
            end = "" if rank == 0 else f" {rank + 1}"
            row[f"class{end}"] = names[prediction.classes[rank]] if known else ""
            row[f"probability{end}"] = f"{prediction.probabilities[rank]:.6f}" if known else ""
        rows.append(row | {"error": printable(prediction.error)})
    return rows


def _csv(rows: Sequence[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(name.replace(" ", "_") for name in rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def _jsonl(found: "Sequence[Prediction]", names: Sequence[str]) -> str:
    lines = []
    for prediction in found:
        top = [
            {"class": names[number], "number": number, "probability": round(probability, 6)}
            for number, probability in zip(prediction.classes, prediction.probabilities, strict=True)
        ]
        error = {"error": prediction.error} if prediction.error else {}
        lines.append(json_text({"file": prediction.file, "classes": top, **error}))
    return "".join(lines)


def _predict(arguments: argparse.Namespace, prog: str) -> "list[Prediction]":
    """Classifies, and writes or prints what was found."""
    from awp_engine.device import choose_device
    from awp_engine.evaluation.attacks.named import EvaluationError
    from awp_engine.evaluation.model.opened import open_model
    from awp_engine.evaluation.predict import find_images, find_intake, predict_files
    from awp_engine.files.atomic import atomic_write_text
    from awp_engine.observe.bars import Bar
    from awp_engine.observe.report import print_table

    files = find_images(arguments.places)
    device = choose_device(arguments.device)
    loaded = open_model(
        **named_model(vars(arguments), arguments.path),
        **described(vars(arguments)),
        device=device,
        say=say,
    )
    classes = loaded.model.num_classes
    if arguments.top > classes:
        raise EvaluationError(f"--top: expected at most {classes}, the classes of the model, got {arguments.top}")
    names = loaded.model.class_names or tuple(map(str, range(classes)))
    intake = find_intake(loaded, image_size=arguments.image_size, center_crop=arguments.center_crop)
    if intake.note:
        print(f"note: {intake.note}", flush=True)
    given = {"top": arguments.top, "batch_size": arguments.batch_size, "device": device}
    found = list(predict_files(loaded.model, files, intake, bar=Bar, **given))
    if arguments.out is not None:
        text = _jsonl(found, names) if arguments.out.suffix == ".jsonl" else _csv(_rows(found, names, arguments.top))
        atomic_write_text(arguments.out, text)
    elif rows := _rows([prediction for prediction in found if not prediction.error], names, arguments.top):
        print_table([{key: text for key, text in row.items() if key != "error"} for row in rows])
    wrong = [prediction for prediction in found if prediction.error]
    print(f"{len(found) - len(wrong):,} of {len(found):,} files classified; {intake.words}")
    if arguments.out is not None:
        print(f"wrote {printable(str(arguments.out))}")
    sys.stdout.flush()
    where = "--out FILE names them" if arguments.out is None else f"in {arguments.out}"
    for line in _complaints(wrong, where):
        print(f"{prog}: not classified: {printable(line)}", file=sys.stderr)
    return found


def _complaints(wrong: "Sequence[Prediction]", where: str) -> list[str]:
    """A line for every reason, with the first file and the number of the others; `where` those are named."""
    alike: dict[str, list[str]] = {}
    for prediction in wrong:
        alike.setdefault(prediction.error.removeprefix(prediction.file), []).append(prediction.error)
    lines = [
        first + (f"; likewise {len(others):,} more files, {where}" if others else "")
        for first, *others in alike.values()
    ]
    left = sum(map(len, list(alike.values())[_SHOWN:]))
    return lines[:_SHOWN] + ([f"{left:,} more, {where}"] if left else [])


def main(argv: Sequence[str] | None = None, prog: str = "predict.py") -> None:
    """Parse, build, run, close."""
    arguments = parse(argv, prog)
    prepare(arguments.threads)
    place = arguments.out or arguments.path
    # 1 says that some files cannot be used, and nothing else
    with ending(prog, interrupted="interrupted; nothing was written", failed=2, place=place):
        found = _predict(arguments, prog)
    if any(prediction.error for prediction in found):
        raise SystemExit(1)


if __name__ == "__main__":
    from awp_engine.cli import run

    run("predict", "python -m awp_engine.cli.predict")
