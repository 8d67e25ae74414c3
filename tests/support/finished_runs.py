"""Run directories as `awp train` and `awp evaluate` leave them, without the training."""

import json
from pathlib import Path
from typing import Any

from awp_engine.config import AwpConfig, Config, EvaluationConfig, ModelConfig, config_hash, to_json
from awp_engine.files.digest import sha256_of

IMAGES_SHA256 = "ab" * 32


def config(run_dir: Path, *, gamma: float = 0.0, seed: int = 0, **changed: Any) -> Config:
    return Config(
        run_dir=run_dir,
        seed=seed,
        epochs=4,
        awp=AwpConfig(gamma=gamma),
        **{"model": ModelConfig(width=8), "evaluation": EvaluationConfig(steps=20), **changed},
    )


def write_unfinished(run_dir: Path, epochs: int = 2, **settings: Any) -> Config:
    run_dir.mkdir(parents=True)
    written = config(run_dir, **settings)
    (run_dir / "config.json").write_text(to_json(written))
    lines = [
        {
            "epoch": epoch,
            "loss": 2.0 / epoch + written.seed,
            "lr": 0.1 / epoch,
            "train_pgd_accuracy": 0.1 * epoch + written.awp.gamma,
            "held_out_pgd_accuracy": 0.09 * epoch + written.awp.gamma,
        }
        for epoch in range(1, epochs + 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return written


def write_finished(
    run_dir: Path,
    *,
    clean: float = 0.9,
    robust: float = 0.5,
    last: float = 0.4,
    images: int = 200,
    sha256: str | None = IMAGES_SHA256,
    data: str = "cd" * 32,
    made_by: dict[str, str] | None = None,
    **settings: Any,
) -> Path:
    """A run of 4 epochs with these accuracies on the test split; 0.8 under attack on training images at its end."""
    written = write_unfinished(run_dir, 4, **settings)
    name = f"pgd{written.evaluation.steps}_accuracy"
    fields = {
        "clean_accuracy": clean,
        name: robust,
        "pgd20_accuracy": robust,
        "train_pgd_accuracy": 0.6,
        "last": {"clean_accuracy": clean, name: last, "train_pgd_accuracy": 0.8},
        "test_images": images,
        "selected_epoch": 3,
        "epochs": 4,
        "seconds": 10.0,
        "device": "cpu",
        "data": {"name": written.data.name, "data_fingerprint": data, "extra_fingerprint": None},
        "config_hash": config_hash(written),
    }
    if made_by is not None:
        fields["made_by"] = made_by
    if sha256 is not None:
        fields["data"]["test_sha256"] = sha256
    (run_dir / "model.safetensors").write_bytes(str(run_dir).encode())
    (run_dir / "report.json").write_text(json.dumps(fields))
    return run_dir


def write_evaluation(
    run_dir: Path,
    right: dict[str, int],
    *,
    images: int = 200,
    sha256: str = IMAGES_SHA256,
    epsilon: str = "1/5",
    doubts: tuple[str, ...] = (),
    precision: str | None = None,
    name: str = "one",
    weights: str = "best",
    **parameters: Any,
) -> Path:
    """An evaluation of a run's selected weights: attack -> images that are right."""
    checkpoint = {"name": weights, "file": "model.safetensors", "sha256": sha256_of(run_dir / "model.safetensors")}
    folder = run_dir / ("evaluation" if weights == "best" else "evaluation-last")
    return _written(folder, name, checkpoint, right, images, sha256, epsilon, doubts, precision, parameters)


def write_measured(
    folder: Path,
    right: dict[str, int],
    *,
    images: int = 200,
    sha256: str = IMAGES_SHA256,
    epsilon: str = "1/5",
    doubts: tuple[str, ...] = (),
    precision: str | None = None,
    name: str = "one",
    weights: str = "34" * 32,
) -> Path:
    """An evaluation of weights from elsewhere."""
    checkpoint = {"name": "FILE", "file": "FILE.pt", "sha256": weights, "architecture": "wrn-28-10"}
    return _written(folder, name, checkpoint, right, images, sha256, epsilon, doubts, precision, {})


def _written(
    folder: Path,
    name: str,
    checkpoint: dict[str, str],
    right: dict[str, int],
    images: int,
    sha256: str,
    epsilon: str,
    doubts: tuple[str, ...],
    precision: str | None,
    parameters: dict[str, Any],
) -> Path:
    data = {"name": "digits", "images": images, "sha256_of_these_images": sha256}
    report = {
        "finished": True,
        "receipt": {"checkpoint": checkpoint, "data": data, "norm": "linf", "epsilon": epsilon},
        "doubts": list(doubts),
        "attacks": [
            {"attack": attack, "right": count, "parameters": {"version": "standard", "seed": 1, **parameters}}
            for attack, count in right.items()
        ],
    }
    # reports of earlier versions say nothing of it
    if precision is not None:
        report["receipt"]["precision"] = {"computes_in": precision}
    folder.mkdir(exist_ok=True)
    path = folder / f"evaluation-{name}.json"
    # as the newest one is
    for file in (path, folder / "evaluation.json"):
        file.write_text(json.dumps(report))
    return path
