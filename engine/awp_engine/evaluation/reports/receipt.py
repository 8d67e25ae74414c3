"""What a measured accuracy depends on, written down beside it."""

import hashlib
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from awp_engine.data import Dataset, Split, StreamedSplit
from awp_engine.evaluation.attacks.named import Threat
from awp_engine.observe.report import source_commit, versions


def data_papers(dataset: Dataset, limit: int | None, class_names: str, folder: str | None) -> dict[str, Any]:
    """What a receipt says of the images.

    Args:
        dataset: whose test split is measured.
        limit: how many of its images, evenly spread; None for all.
        class_names: how they compare with the model's.
        folder: the last name of its directory, which two data sets of photographs are told apart by.
    """
    return {
        "name": dataset.name,
        "folder": folder,
        "split": "test",
        "images_in_split": len(dataset.test),
        "sha256_of_split": split_hash(dataset.test),
        "limit": limit,
        "chosen": "all" if limit is None else "evenly spread",
        "class_names": class_names,
    }


def split_hash(split: Split | StreamedSplit) -> str:
    """SHA-256, hexadecimal, of the shape, images, labels and ids of a split, in its order.

    Of images that are not in memory, the store's own digest and the rows stand for the images.
    """
    digest = hashlib.sha256(repr((len(split), *split.shape)).encode())
    if isinstance(split, Split):
        digest.update(split.images.cpu().contiguous().numpy().data)
    else:
        digest.update(split.store.digest().encode() + split.rows.numpy().astype("<i8").tobytes())
    for numbers in (split.labels, split.ids):
        digest.update(numbers.cpu().contiguous().numpy().astype("<i8").data)
    return digest.hexdigest()


def percent(count: int, total: int, digits: int = 2) -> str:
    """`count / total` in percent, rounded once from the exact fraction."""
    hundredths = round(Fraction(count, total) * 100 * 10**digits)
    return f"{hundredths // 10**digits}.{hundredths % 10**digits:0{digits}d}"


def _normalisation(model: nn.Module) -> dict[str, Any]:
    buffers = dict(model.named_buffers(recurse=False))
    if not {"mean", "std"} <= buffers.keys():
        return {"where": "unknown: the model has no buffers mean and std"}
    return {"where": "inside the model"} | {name: buffers[name].flatten().tolist() for name in ("mean", "std")}


def _precision(model: nn.Module, computes_in: str) -> dict[str, Any]:
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return {
        "weights": sorted(kinds),
        "images": "float32",
        "computes_in": computes_in,
        "matmul": torch.backends.cuda.matmul.fp32_precision,
        # torch makes this attribute at run time
        "convolution": torch.backends.cudnn.conv.fp32_precision,  # pyright: ignore[reportAttributeAccessIssue]
    }


def make_receipt(
    model: nn.Module,
    split: Split,
    *,
    checkpoint: Mapping[str, Any],
    data: Mapping[str, Any],
    seed: int,
    batch_size: int,
    threat: Threat | None = None,
    step_size: Fraction = Fraction(0),
    ranks: int = 1,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Everything but the attacks' own parameters, as JSON holds it.

    Args:
        model: what is measured.
        split: on which images.
        checkpoint: where the weights came from, with their SHA-256.
        data: name of the data, and hash and size of the whole test split.
        seed: of all noise.
        batch_size: images a batch.
        threat: the ball of the attacks; None without attacks.
        step_size: of pgd and cw.
        ranks: that share the images.
        precision: what the model computes in.
    """
    device, ball = split.device, {}
    if threat is not None:
        ball = {
            "epsilon": str(threat.epsilon),
            "epsilon_as_float": float(threat.epsilon),
            "norm": threat.norm,
            "step_size": str(step_size),
        }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": dict(checkpoint),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": {**data, "images": len(split), "sha256_of_these_images": split_hash(split)},
        **ball,
        "normalisation": _normalisation(model),
        "batch_norm": "eval: running statistics",
        "precision": _precision(model, precision),
        "seed": seed,
        "batch_size": batch_size,
        "ranks": ranks,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": versions("pyautoattack", "safetensors"),
        "commit": source_commit(),
    }
