"""Certified accuracy of a trained model, from a checkpoint to its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from awp_engine.checkpoint.journal import Journal
from awp_engine.config.data_sets import own_title
from awp_engine.data import eval_batches
from awp_engine.device import choose_device, in_full_precision
from awp_engine.evaluation.accuracy import count_right
from awp_engine.evaluation.asked import Asked
from awp_engine.evaluation.attacks.named import measuring
from awp_engine.evaluation.prepare import prepare
from awp_engine.evaluation.reports.files import Reported, Reports
from awp_engine.evaluation.smoothing import Certificate, Smoothing, certify
from awp_engine.files.locking import locked
from awp_engine.files.text import json_text
from awp_engine.observe.bars import MakeBar, NoBar
from awp_engine.observe.report import prepare_output, versions

JSON = "certification.json"
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


def summary(certificates: Sequence[Certificate], radii: Iterable[float] = RADII) -> dict[str, Any]:
    """The figures of a certification; accuracies are fractions of all images.

    An image counts at a radius if its certified class is the label and its certified radius is as large at least. The
    average radius counts 0 for an image that is abstained from or wrong.
    """
    images = len(certificates)
    right = [found.radius for found in certificates if found.prediction == found.label]
    return {
        "images": images,
        "certified_accuracy": [
            {"radius": radius, "right": (count := sum(own >= radius for own in right)), "accuracy": count / images}
            for radius in radii
        ],
        "average_certified_radius": sum(right) / images,
        "smoothed_accuracy": sum(found.majority == found.label for found in certificates) / images,
        "abstained": sum(found.prediction is None for found in certificates),
        "answers_not_finite": sum(found.not_finite for found in certificates),
    }


@in_full_precision()
def certify_checkpoint(
    path: Path | str | None,
    smoothing: Smoothing,
    *,
    limit: int | None = 100,
    say: Callable[[str], None] = lambda _: None,
    bar: MakeBar = NoBar,
    tell: Callable[[Reported], None] = lambda _: None,
    **asked: Any,
) -> Reported:
    """Certifies images of the test split, and writes certification.json, also under a name of its own.

    Every image is saved when it is done, so that the same call goes on after a kill, to the same report.

    Args:
        path: a run directory, one of its checkpoints, a .safetensors file, or hf://OWNER/NAME; None with `external`.
        smoothing: how.
        limit: images, evenly spread; None for all.
        say: is told what a user should know, a line at a time.
        bar: makes what shows how many of the noisy copies were classified.
        tell: is given the result before anything is written.
        asked: the other fields of `Asked`, such as external, data_name and output; a batch is of noisy copies.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
        OSError: the report cannot be written.
    """
    ask = Asked(path=path, limit=limit, **asked)
    place = choose_device(ask.device)
    target = prepare(ask, ask.load(place), place, say)
    loaded, split = target.loaded, target.split
    if loaded.config is not None and loaded.config.attack.noise not in (0, smoothing.sigma):
        trained = f"{loaded.config.attack.noise:g}"
        say(f"trained under noise of {trained}, certified by another, {smoothing.sigma:g}: best is --sigma {trained}")
    receipt = target.receipt(split)
    receipt["versions"] |= versions("scipy")
    receipt |= {"smoothing": asdict(smoothing), "largest_radius": smoothing.largest_radius}
    question = target.identity(receipt) | {"smoothing": asdict(smoothing)}
    prepare_output(target.output)
    parts = own_title(target.dataset.name), len(split), f"sigma{smoothing.sigma:g}"
    reports = Reports(target.output, parts, question)
    with locked(target.output), measuring(loaded.model):
        saved = Journal(target.output, "certify", question, say)
        certificates = [Certificate(**answer) for answer in saved.load()]
        if certificates:
            receipt["resumed"] = {"images": len(certificates)}
            finished = len(certificates) == len(split)
            say("all images were certified before" if finished else f"going on after image {len(certificates)}")
        rest = split.select(torch.arange(len(certificates), len(split)))
        with bar("noisy copies", len(rest) * (smoothing.n0 + smoothing.n)) as counted:
            for image, label, ids, _ in eval_batches(rest, 1):
                found = certify(
                    loaded.model,
                    image[0],
                    int(label),
                    smoothing,
                    sample_id=int(ids),
                    seed=target.seed,
                    batch_size=target.batch_size,
                    advance=counted.advance,
                )
                saved.add(len(certificates), asdict(found))
                certificates.append(found)
        clean = count_right(loaded.model, split, place, target.batch_size)
        report = {
            "receipt": receipt,
            "means": "the smoothed classifier's answer cannot change within the radius, in L2 on pixels in [0, 1]; "
            f"each certificate holds with probability {1 - smoothing.alpha:g}",
            "clean_accuracy": clean / len(split),
            **summary(certificates),
            "images_certified": [asdict(found) for found in certificates],
        }
        title = f"{target.dataset.name} test split, {len(split)} images, sigma {smoothing.sigma:g}, n {smoothing.n:,}"
        result = Reported(report=report, output=target.output, title=f"{title}, alpha {smoothing.alpha:g}")
        tell(result)
        reports.put(JSON, json_text(report, indent=2))
        return result
