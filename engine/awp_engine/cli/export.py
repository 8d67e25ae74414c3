"""`awp export RUN_OR_CHECKPOINT --hub DIR`, `--onnx FILE`: a trained model for others."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awp_engine.cli.command_line import OneLineParser, other_command
from awp_engine.cli.frame import ending, say
from awp_engine.cli.model_flags import PLACE, add_described, add_model, described, named_model, place, require_model
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.evaluation.model.loaded_model import LoadedModel


def write_state_dict(path: Path, loaded: LoadedModel, prog: str) -> None:
    """Writes the network's weights as `torch.save` does, and says what they are to be measured with elsewhere."""
    import numpy as np
    import torch

    from awp_engine.files.atomic import replace_file
    from awp_engine.models.trained import read_trained

    model, description = loaded.model, loaded.description
    if description is None:
        assert loaded.source is not None
        description = read_trained(loaded.source)[2]
    torch.save(model.state_dict(), content := io.BytesIO())
    replace_file(path, content.getvalue())
    again: list[Any] = ["--model.name", description.name, "--weights", path]
    if description.width is not None:
        again += ["--model.width", description.width]
    if description.activation != "relu":
        again += ["--model.activation", description.activation]
    for name, buffer in (("mean", model.mean), ("std", model.std)):
        # as few digits as give the same number in fp32
        again += [f"--model.{name}", *buffer.flatten().cpu().numpy().astype(np.float32)]
    config = loaded.config
    again += ["--data.name", "NAME" if config is None else config.data.name]
    if config is None or config.data.name != "digits":
        again += ["--data.root", "DIR"]
    again += ["--norm", "linf" if config is None else config.attack.norm]
    again += ["--epsilon", "8/255" if config is None else config.attack.epsilon]
    print("its network takes images normalised by that mean and deviation:")
    print("  " + printable(other_command(prog, "evaluate", *again)))


def write_onnx_file(path: Path, loaded: LoadedModel, image_size: int | None) -> None:
    """Writes the model for images as its run had them, with what identifies it as properties of the file."""
    import awp_engine
    from awp_engine.evaluation.predict import find_intake
    from awp_engine.models.class_names import to_json
    from awp_engine.models.onnx_file import write_onnx

    intake, names = find_intake(loaded, image_size=image_size), loaded.model.class_names
    metadata = {"awp_engine": awp_engine.__version__, "weights_sha256": loaded.sha256}
    metadata |= {} if names is None else {"class_names": to_json(names)}
    shape = intake.channels, intake.height, intake.width
    write_onnx(loaded.model, shape, path, metadata=metadata, say=say)
    print(f"it takes images, fp32 [batch, {', '.join(map(str, shape))}] in [0, 1], and gives logits")


def main(argv: Sequence[str] | None = None, prog: str = "awp export") -> None:
    """Parse, load, write.

    Raises:
        SystemExit: 2 and 1 after one line on stderr for what is wrong, 130 or 143 after a signal.
    """
    parser = OneLineParser(
        prog=prog,
        example="runs/cifar --onnx model.onnx",
        description="Writes a trained model for others. `awp checkpoint export` writes other weights of a checkpoint.",
        common=("path", "checkpoint", "hub", "state_dict", "onnx", "model_name", "model_weights"),
    )
    add = parser.add_argument
    add("path", type=place, nargs="?", metavar="RUN_OR_CHECKPOINT", help=PLACE)
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
    add_model(parser)
    add_described(parser)
    arguments = parser.parse_args(argv)
    require_model(parser, arguments, arguments.path)
    files = {"--state-dict": arguments.state_dict, "--onnx": arguments.onnx}
    if arguments.hub is None and not any(files.values()):
        parser.error("--hub, --state-dict or --onnx: expected one of them, for what is to be written")
    for flag, path in files.items():
        if path is not None and os.path.lexists(path):
            parser.error(f"{flag}: {path} is there already; choose another name")
    if arguments.model_name is None and arguments.onnx is None and arguments.image_size is not None:
        parser.error("--image-size: goes with --model.name or --onnx; a run says how large its images were")

    from awp_engine.evaluation.model.opened import open_model
    from awp_engine.evaluation.reports.hub_folder import export_folder
    from awp_engine.models.onnx_file import require_onnx

    written: list[Path] = []
    with ending(prog, place=arguments.hub or arguments.state_dict or arguments.onnx):
        if arguments.onnx is not None:
            require_onnx()
        asked = named_model(vars(arguments), arguments.path) | described(vars(arguments))
        loaded = open_model(**asked, say=say)
        if arguments.hub is not None:
            written += export_folder(loaded, arguments.hub, repository=arguments.repository, say=say)
        if arguments.state_dict is not None:
            write_state_dict(arguments.state_dict, loaded, prog)
            written.append(arguments.state_dict)
        if arguments.onnx is not None:
            write_onnx_file(arguments.onnx, loaded, arguments.image_size)
            written.append(arguments.onnx)
    print("\n".join(f"wrote {printable(str(path))}" for path in written))
    if arguments.hub is not None:
        print(f"upload it: hf upload {arguments.repository} {printable(str(arguments.hub))}")
