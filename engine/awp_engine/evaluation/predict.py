"""Classes of image files, which are read, cut and resized as the images that the model was trained on."""

import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from awp_engine.config import DataConfig
from awp_engine.data import DataError, Framing, shown, source_names
from awp_engine.data.loaders.choose import default_workers, shape_of
from awp_engine.data.loaders.torch_loader import framed
from awp_engine.data.sets.files import SUFFIXES, read_regular
from awp_engine.data.sets.inspect import check, decode
from awp_engine.data.sets.sources import open_source
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.model.loaded_model import LoadedModel
from awp_engine.files.text import first_line
from awp_engine.observe.bars import MakeBar, NoBar

_SIDES = {"digits": 8, "mnist": 28, "fashion-mnist": 28, "cifar10": 32, "cifar100": 32, "svhn": 32}
_DOT = b"."


@dataclass(frozen=True, kw_only=True)
class Intake:
    """What a file's image has to be, and what becomes of it.

    Attributes:
        channels: 3 for colour, 1 for grey.
        height, width: of what the model is given, in pixels.
        framing: how images of another size become that; without a size they are refused.
        note: what a user should know, in a line; empty for nothing.
    """

    channels: int
    height: int
    width: int
    framing: Framing
    note: str = ""

    @property
    def words(self) -> str:
        """For people."""
        kind = f"{self.width}x{self.height}, {'colour' if self.channels == 3 else 'grey'}"
        if self.framing.size is None:
            return f"images of {kind}, taken as they are"
        part = "" if self.framing.central == 1 else f" of {self.framing.central:.4g} of its shorter side"
        return f"the central square of every image{part}, resized to {kind}"

    def read(self, path: bytes) -> NDArray[np.uint8]:
        """The pixels of a file, uint8 [height, width, channels].

        Raises:
            DataError: naming the file, if it is no image that can be used.
        """
        name = shown(path)
        content, _ = read_regular(path)
        header = check(content, name)
        size = self.framing.size
        if size is None and (header.height, header.width) != (self.height, self.width):
            resize = f", or have it resized by --image-size {self.width}" if self.height == self.width else ""
            raise DataError(
                f"{name} is {header.width}x{header.height}; expected {self.width}x{self.height}, as the model was "
                f"trained on: resize it{resize}"
            )
        if header.mode == "RGB" and self.channels == 1:
            raise DataError(f"{name} is in colour (RGB); expected grey (L), as the model was trained on: convert it")
        # training makes grey images colour where it resizes them, and nowhere else
        if header.mode == "L" and self.channels == 3 and size is None:
            raise DataError(f"{name} is grey (L); expected colour (RGB), as the model was trained on: convert it")
        window = self.framing.window(header.height, header.width, None)
        return framed(decode(content, name), self.channels, self.framing, window)


class Prediction(NamedTuple):
    """A file's most probable classes, or why there are none.

    Attributes:
        file: its path, with what is not printable escaped.
        classes: numbers of classes, the most probable first.
        probabilities: theirs, by softmax.
        error: empty, or one line.
    """

    file: str
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str = ""


def find_intake(loaded: LoadedModel, *, image_size: int | None = None, center_crop: float | None = None) -> Intake:
    """How a model's images were taken in training, for evaluation, unless it is given.

    Args:
        loaded: the model, and the settings of its run.
        image_size: side in pixels of what images are resized to.
        center_crop: side of the central square that is resized, as a part of the image's shorter side.

    Raises:
        EvaluationError: no config.json says it and nothing is given.
    """
    channels = loaded.model.mean.numel()
    data = None if loaded.config is None else loaded.config.data
    size = image_size or (None if data is None else data.image_size)
    if size is not None:
        framing = Framing(size=size, central=center_crop or (1.0 if data is None else data.center_crop))
        own = None if data is None else data.image_size or _SIDES.get(data.name)
        note = f"the model was trained on images of {own}x{own}, and may be wrong at {size}x{size}"
        note = note if own not in (None, size) else ""
        return Intake(channels=channels, height=size, width=size, framing=framing, note=note)
    if center_crop is not None:
        raise EvaluationError("--center-crop: goes with --image-size, or with a run that resized its images")
    # models of somebody's own code, and their data, may say it themselves
    made_for = getattr(loaded.model, "image_size", None) or loaded.image_size
    if made_for is not None:
        height, width = made_for
    elif data is not None:
        height, width = _sides(data)
    else:
        raise EvaluationError(
            f"{loaded.weights}: belongs to no run whose config.json could say how large its images were: give "
            "--image-size"
        )
    return Intake(channels=channels, height=height, width=width, framing=Framing())


def _sides(data: DataConfig) -> tuple[int, int]:
    """Height and width of a data set's images, which were taken as they are."""
    if data.name in _SIDES:
        return _SIDES[data.name], _SIDES[data.name]
    if data.name not in source_names or data.root is None:
        raise EvaluationError(f"how large the run's images of {data.name} were is not known: give --image-size")
    try:
        source = open_source(data.name, data.root)
        _, height, width = shape_of(source.train or source.test, Framing())
    except DataError as error:
        raise EvaluationError(
            f"how large the run's images were is not known, as they cannot be looked at ({error}): give --image-size"
        ) from None
    return height, width


def find_images(places: Iterable[Path]) -> list[bytes]:
    """The files that are given, and all images in the folders that are given and below them, each once.

    Folders are in the order of their paths' bytes; links to folders are not followed, and names that begin with a dot
    are left alone.

    Raises:
        EvaluationError: no path is there, or a folder is without images.
        OSError: a folder cannot be listed.
    """
    found: dict[bytes, None] = {}
    paths = [(place, os.fsencode(place)) for place in places]
    if not any(os.path.lexists(path) for _, path in paths):
        raise EvaluationError(f"{shown(paths[0][1])}: is not there; expected an image or a folder of images")
    for place, path in paths:
        if not place.is_dir():
            # that one is not there is said when it is read
            found[path] = None
            continue
        inside = sorted(_walk(path))
        if not inside:
            endings = ", ".join(f"*{suffix.decode()}" for suffix in SUFFIXES)
            raise EvaluationError(f"{shown(path)}: has no image in it or below; expected {endings}")
        found |= dict.fromkeys(inside)
    return list(found)


def _walk(folder: bytes) -> Generator[bytes, None, None]:
    def fail(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(_DOT)]
        yield from (
            os.path.join(place, name)  # noqa: PTH118
            for name in files
            if name.lower().endswith(SUFFIXES) and not name.startswith(_DOT)
        )


@torch.no_grad()
def predict_files(
    model: nn.Module,
    files: Sequence[bytes],
    intake: Intake,
    *,
    top: int = 1,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    bar: MakeBar = NoBar,
) -> Generator[Prediction, None, None]:
    """Classifies files, in their order; one that cannot be used says why, and the others are classified all the same.

    Args:
        model: in eval mode, on the device; maps images in [0, 1] to logits.
        files: paths.
        intake: how images are taken.
        top: classes a file.
        batch_size: images at a time; changes nothing beyond rounding.
        device: where to compute.
        bar: makes what shows how many files were done.

    Raises:
        EvaluationError: the model does not take such images.
    """

    def read(path: bytes) -> NDArray[np.uint8] | str:
        try:
            return intake.read(path)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(default_workers()) as pool, bar("images", len(files)) as counted:
        for first in range(0, len(files), batch_size):
            names = [shown(path) for path in files[first : first + batch_size]]
            images = list(pool.map(read, files[first : first + batch_size]))
            usable = [torch.from_numpy(image) for image in images if not isinstance(image, str)]
            answers = iter(_classify(model, torch.stack(usable).to(device), top) if usable else [])
            for name, image in zip(names, images, strict=True):
                if isinstance(image, str):
                    yield Prediction(name, error=image)
                    continue
                classes, probabilities = next(answers)
                error = "" if classes else f"{name}: the model's answer is not finite"
                yield Prediction(name, classes, probabilities, error)
            counted.advance(len(names))


def _classify(model: nn.Module, pixels: torch.Tensor, top: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """The `top` classes of images uint8 [N, H, W, C] and their probabilities; none where a logit is not finite."""
    # by a tensor, as training does: a GPU multiplies by 1 / 255 otherwise
    images = pixels.permute(0, 3, 1, 2).contiguous().float() / torch.full((), 255.0, device=pixels.device)
    try:
        logits = model(images)
    except RuntimeError as error:
        shape = "x".join(map(str, images.shape[1:]))
        raise EvaluationError(f"the model cannot classify {shape} images: {first_line(error)}") from None
    # in fp64, and stable: classes that tie come in their order
    probabilities = logits.double().softmax(1).cpu()
    sorted_, classes = probabilities.sort(dim=1, descending=True, stable=True)
    finite = logits.isfinite().all(1).tolist()
    return [
        (tuple(own[:top]), tuple(values[:top])) if sound else ((), ())
        for own, values, sound in zip(classes.tolist(), sorted_.tolist(), finite, strict=True)
    ]
