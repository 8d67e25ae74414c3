"""What an evaluation leaves of single images: attacked images, and every attack's answers."""

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from awp_engine.checkpoint import CheckpointError, export_model
from awp_engine.evaluation.accuracy import evenly
from awp_engine.evaluation.attacks.named import EvaluationError, Trial
from awp_engine.evaluation.reports.results import PerImage
from awp_engine.files.atomic import naming, replace_file
from awp_engine.files.text import json_text

Form = Literal["npz", "parquet"]


class ImageSaver:
    """Writes an attack's images at once, as images-NAME-ATTACK.safetensors.

    In the file, for `count` images, or all for 0: `x` and `x_adv`, fp32 [N, C, H, W] in [0, 1]; `labels`, `ids` and
    `predictions`, of x_adv, int64 [N].

    Args:
        trial: whose images they are.
        directory: that exists.
        name: of the evaluation.
        count: images of every attack.
    """

    def __init__(self, trial: Trial, directory: Path, name: str, count: int) -> None:
        self._trial, self._directory, self._name, self._count = trial, directory, name, count

    def rows(self, right: Tensor) -> Tensor:
        """The places of the images to save, int64 [N]: evenly spread over those that are right without an attack.

        Others are no attack's work, and fill up where these are too few; `right` is bool, of all images.
        """
        places = torch.arange(len(right), device=right.device)
        if not 0 < self._count < len(right):
            return places
        own, others = places[right], places[~right]
        chosen = evenly(own, self._count)
        return torch.cat([chosen, evenly(others, self._count - len(chosen))]).sort().values

    def path(self, attack: str) -> Path:
        """Of an attack's images; a step of 2/255 may be part of its name."""
        return self._directory / f"images-{self._name}-{attack.replace('/', '_')}.safetensors"

    def save(self, attack: str, rows: Tensor, x_adv: Tensor, predictions: Tensor) -> None:
        """Writes attacked images of `rows`, fp32 [N, C, H, W], and their predicted classes."""
        trial = self._trial
        x, y, ids, _ = replace(trial, split=trial.split.select(rows)).whole
        columns = {"x": x, "x_adv": x_adv.float(), "labels": y, "ids": ids, "predictions": predictions}
        tensors = {key: column.cpu().contiguous() for key, column in columns.items()}
        facts = {"attack": attack, "epsilon": str(trial.threat.epsilon), "norm": trial.threat.norm}
        try:
            export_model(self.path(attack), tensors, {"images": json_text(facts)})
        except CheckpointError as error:
            trial.say(f"{attack}: its images could not be saved, measuring goes on: {error}")


def save_per_image(path: Path, found: PerImage, facts: Mapping[str, Any]) -> None:
    """Writes `PerImage.arrays` as .npz or .parquet, with `facts` as JSON: the array `receipt`, or the file's metadata.

    Raises:
        EvaluationError: a suffix that is neither.
        OSError: the file cannot be written.
    """
    arrays, told, buffer = found.arrays(), json_text(facts), io.BytesIO()
    if path.suffix == ".npz":
        np.savez_compressed(buffer, **arrays, attacks=np.array(list(found.attacks)), receipt=np.array(told))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({re.sub("/", "_", key): column for key, column in arrays.items()})
        told_of = {"attacks": json_text(list(found.attacks)), "receipt": told}
        pyarrow.parquet.write_table(table.replace_schema_metadata(told_of), buffer)
    else:
        raise EvaluationError(f"{path}: expected a name that ends in .npz or .parquet")
    with naming(path):
        replace_file(path, buffer.getvalue())
