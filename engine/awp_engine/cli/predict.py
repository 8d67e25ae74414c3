"""`awp predict RUN_OR_CHECKPOINT FILE_OR_FOLDER...`: classifies image files by a trained model."""

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser, fail, share, side, thread_count, whole_number
from awp_engine.config import ConfigError
from awp_engine.files.text import json_text, printable

if TYPE_CHECKING:
    from awp_engine.evaluation.predict import Prediction

# of files that cannot be used, by name where all of them stand in the output
_SHOWN = 10


def _positive(text: str) -> int:
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {number}")
    return number


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
        description="Classifies image files by a trained model. Images are read, cut and resized as those that it was "
        "trained on, by the config.json of its run.",
        epilog="Exit code 0: all files were classified; 1: some cannot be used, and are named with the reason; 2: none "
        "was classified.",
        allow_abbrev=False,
        common=("path", "places", "out", "top", "checkpoint", "image_size", "device"),
    )
    add = parser.add_argument
    add("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="run directory, checkpoint or .safetensors file")
    add("places", type=Path, nargs="+", metavar="FILE_OR_FOLDER", help="images, or folders with images in and below")
    add("--out", type=_output, metavar="FILE", help="write to this .csv or .jsonl file; else a table is printed")
    add("--top", type=_positive, default=1, metavar="N", help="the N most probable classes (1)")
    add("--checkpoint", default="best", metavar="NAME", help="of a run: best, last, or a name or path")
    add("--image-size", type=side, metavar="N", help="resize images to NxN; as the run did if not given")
    add("--center-crop", type=share, metavar="X", help="resize the central square of this part of the shorter side")
    add("--batch-size", type=_positive, default=64, help="images at a time (64)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    add("--threads", type=thread_count, help="CPU threads")
    return parser.parse_args(argv)


def _rows(found: "Sequence[Prediction]", names: Sequence[str], top: int) -> list[dict[str, str]]:
    """A row a file: class and probability, class 2 and so on, and what is wrong with the file."""
    rows = []
    for prediction in found:
        row = {"file": prediction.file}
        for place in range(top):
            known = place < len(prediction.classes)
            end = "" if place == 0 else f" {place + 1}"
            row[f"class{end}"] = names[prediction.classes[place]] if known else ""
            row[f"probability{end}"] = f"{prediction.probabilities[place]:.6f}" if known else ""
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
    from awp_engine.evaluation.attacks import EvaluationError
    from awp_engine.evaluation.predict import find_images, find_intake, predict_files
    from awp_engine.evaluation.subject import load_subject
    from awp_engine.files.atomic import atomic_write_text
    from awp_engine.observe.bars import Bar
    from awp_engine.observe.report import print_table

    files = find_images(arguments.places)
    device = choose_device(arguments.device)
    subject = load_subject(arguments.path, which=arguments.checkpoint, device=device)
    classes = subject.model.num_classes
    if arguments.top > classes:
        raise EvaluationError(f"--top: expected at most {classes}, the classes of the model, got {arguments.top}")
    names = subject.model.class_names or tuple(map(str, range(classes)))
    intake = find_intake(subject, image_size=arguments.image_size, center_crop=arguments.center_crop)
    if intake.note:
        print(f"note: {intake.note}", flush=True)
    with Bar("images", len(files)) as bar:
        found = list(
            predict_files(
                subject.model,
                files,
                intake,
                top=arguments.top,
                batch_size=arguments.batch_size,
                device=device,
                advance=bar.advance,
            )
        )
    if arguments.out is not None:
        text = _jsonl(found, names) if arguments.out.suffix == ".jsonl" else _csv(_rows(found, names, arguments.top))
        atomic_write_text(arguments.out, text)
    elif rows := _rows([prediction for prediction in found if not prediction.error], names, arguments.top):
        print_table([{key: text for key, text in row.items() if key != "error"} for row in rows])
    wrong = [prediction.error for prediction in found if prediction.error]
    print(f"{len(found) - len(wrong):,} of {len(found):,} files classified; {intake.words}")
    if arguments.out is not None:
        print(f"wrote {printable(str(arguments.out))}")
    sys.stdout.flush()
    shown = wrong if arguments.out is None else wrong[:_SHOWN]
    for error in shown:
        print(f"{prog}: not classified: {printable(error)}", file=sys.stderr)
    if len(shown) < len(wrong):
        print(f"{prog}: not classified: {len(wrong) - len(shown):,} more, in {arguments.out}", file=sys.stderr)
    return found


def main(argv: Sequence[str] | None = None, prog: str = "predict.py") -> None:
    """Parse, build, run, close."""
    arguments = parse(argv, prog)

    import torch

    from awp_engine.checkpoint import CheckpointError
    from awp_engine.data import DataError
    from awp_engine.device import full_precision
    from awp_engine.distributed.signals import interrupted_code, interrupts
    from awp_engine.evaluation.attacks import EvaluationError

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    full_precision()
    try:
        with interrupts():
            found = _predict(arguments, prog)
    except (ConfigError, DataError, CheckpointError, EvaluationError) as error:
        fail(str(error), prog=prog)
    except torch.OutOfMemoryError:
        fail("the device has too little memory for such batches: give a smaller --batch-size", prog=prog)
    except OSError as error:
        fail(f"{error.filename or arguments.out or arguments.path}: {error.strerror or error}", prog=prog)
    except KeyboardInterrupt as interrupt:
        fail("interrupted; nothing was written", code=interrupted_code(interrupt), prog=prog)
    if any(prediction.error for prediction in found):
        raise SystemExit(1)


if __name__ == "__main__":
    from awp_engine.cli import run

    run("predict", "python -m awp_engine.cli.predict")
