"""`awp export RUN_OR_CHECKPOINT --hub DIR`, `--onnx FILE`: a trained model for others."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser, fail, side
from awp_engine.config import ConfigError
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.evaluation.subject import Subject


def write_onnx_file(path: Path, subject: "Subject", image_size: int | None) -> None:
    """Writes the model for images as its run had them, with what identifies it as properties of the file."""
    import awp_engine
    from awp_engine.evaluation.predict import find_intake
    from awp_engine.models.class_names import to_json
    from awp_engine.models.onnx_file import write_onnx

    intake, names = find_intake(subject, image_size=image_size), subject.model.class_names
    metadata = {"awp_engine": awp_engine.__version__, "weights_sha256": subject.sha256}
    metadata |= {} if names is None else {"class_names": to_json(names)}
    shape = intake.channels, intake.height, intake.width
    write_onnx(subject.model, shape, path, metadata=metadata, say=lambda line: print(printable(line), flush=True))
    print(f"it takes images, fp32 [batch, {', '.join(map(str, shape))}] in [0, 1], and gives logits")


def main(argv: Sequence[str] | None = None, prog: str = "awp export") -> None:
    """Parse, load, write.

    Raises:
        SystemExit: 2 and 1 after one line on stderr for what is wrong, 130 or 143 after a signal.
    """
    parser = OneLineParser(
        prog=prog,
        description="Writes a trained model for others. `awp checkpoint export` writes other weights of a checkpoint.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run directory, a checkpoint or a .safetensors file")
    add("--checkpoint", default="best", metavar="best|last|NAME", help="which weights of a run directory")
    add(
        "--hub",
        type=Path,
        metavar="DIR",
        help="a new folder for the Hugging Face Hub: weights, settings, and a model card with the accuracies of the "
        "run's newest evaluation; huggingface_hub's upload_folder, or `hf upload OWNER/NAME DIR`, takes it",
    )
    add("--repository", default="OWNER/NAME", help="where it will be on the Hub, for the model card")
    add(
        "--state-dict",
        type=Path,
        metavar="FILE.pt",
        help="a state dict for torch.load, by the names of the public code; images must be normalised before it",
    )
    add("--onnx", type=Path, metavar="FILE.onnx", help="an ONNX file, which takes images in [0, 1], and gives logits")
    add("--image-size", type=side, metavar="N", help="of the ONNX file's images, NxN; as the run's if not given")
    arguments = parser.parse_args(argv)
    files = {"--state-dict": arguments.state_dict, "--onnx": arguments.onnx}
    if arguments.hub is None and not any(files.values()):
        parser.error("--hub, --state-dict or --onnx: expected one of them, for what is to be written")
    for flag, path in files.items():
        if path is not None and os.path.lexists(path):
            parser.error(f"{flag}: {path} is there already; choose another name")

    import torch

    from awp_engine.checkpoint import CheckpointError
    from awp_engine.distributed.signals import interrupted_code, interrupts
    from awp_engine.evaluation.attacks import EvaluationError
    from awp_engine.evaluation.hub_folder import export_folder
    from awp_engine.evaluation.subject import load_subject
    from awp_engine.files.atomic import replace_file
    from awp_engine.models.onnx_file import require_onnx

    written: list[Path] = []
    try:
        if arguments.onnx is not None:
            require_onnx()
        with interrupts():
            if arguments.hub is not None:
                written += export_folder(
                    arguments.path,
                    arguments.hub,
                    which=arguments.checkpoint,
                    repository=arguments.repository,
                    say=lambda line: print(printable(line)),
                )
            if arguments.state_dict is not None:
                subject = load_subject(arguments.path, which=arguments.checkpoint)
                mean, std = (buffer.flatten().tolist() for buffer in (subject.model.mean, subject.model.std))
                torch.save(subject.model.state_dict(), content := io.BytesIO())
                replace_file(arguments.state_dict, content.getvalue())
                print(f"the state dict's network takes images normalised by mean {mean} and std {std}")
                written.append(arguments.state_dict)
            if arguments.onnx is not None:
                subject = load_subject(arguments.path, which=arguments.checkpoint)
                write_onnx_file(arguments.onnx, subject, arguments.image_size)
                written.append(arguments.onnx)
    except (ConfigError, EvaluationError) as error:
        fail(str(error), prog=prog)
    except CheckpointError as error:
        fail(str(error), code=1, prog=prog)
    except OSError as error:
        fail(f"{error.filename or arguments.path}: cannot be written: {error.strerror}", code=1, prog=prog)
    except KeyboardInterrupt as interrupt:
        fail("interrupted", code=interrupted_code(interrupt), prog=prog)
    print("\n".join(f"wrote {printable(str(path))}" for path in written))
    if arguments.hub is not None:
        print(f"upload it: hf upload {arguments.repository} {printable(str(arguments.hub))}")
