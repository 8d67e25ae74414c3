"""Small digits classifiers trained on the spot, and run directories made of them."""

import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from awp_engine import checkpoint
from awp_engine.attack import pgd
from awp_engine.config import AttackConfig, Config, EvaluationConfig, ModelConfig, to_json
from awp_engine.data import Augmentation, Dataset, load_dataset, train_batches
from awp_engine.models.trained import CHECKPOINTS, MODEL_FILE, ModelDescription

WIDTH = 6


@functools.cache
def digits() -> Dataset:
    return load_dataset("digits", root=None, held_out_fraction=0.0, seed=0)


def description() -> ModelDescription:
    data = digits()
    return ModelDescription(
        name="preact-resnet-digits",
        num_classes=10,
        mean=data.mean,
        std=data.std,
        width=WIDTH,
        activation="relu",
        class_names=data.class_names,
    )


@functools.cache
def trained(epsilon: float, epochs: int) -> nn.Module:
    """Adversarially trained for some seconds by a plain loop; cleanly for epsilon 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = description().build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=12 * epochs)
    for epoch in range(epochs):
        for x, y, ids, _ in train_batches(digits().train, Augmentation(), batch_size=128, seed=0, epoch=epoch):
            x_adv = x
            if epsilon:
                x_adv = pgd(
                    model,
                    x,
                    y,
                    epsilon=epsilon,
                    step_size=epsilon / 2,
                    steps=3,
                    bn_mode="train",
                    sample_ids=ids,
                    seed=epoch,
                )
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            optimizer.step()
            decay.step()
    return model.eval()


def robust_model() -> nn.Module:
    return trained(0.2, 6)


def clean_model() -> nn.Module:
    return trained(0.0, 3)


def write_run(run_dir: Path, best: nn.Module | None = None, last: nn.Module | None = None) -> Path:
    """A run directory whose selected weights are the robust model's, and the newest checkpoint's the clean one's.

    Unless others are given.
    """
    config = Config(
        run_dir=run_dir,
        model=ModelConfig(width=WIDTH),
        attack=AttackConfig(epsilon="0.2", step_size="0.05"),
        evaluation=EvaluationConfig(steps=20, batch_size=100),
        epochs=2,
    )
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(to_json(config))
    best, last = best or robust_model(), last or clean_model()
    metadata = description().to_metadata()
    checkpoint.export_model(run_dir / MODEL_FILE, best.state_dict(), metadata)
    tensors = {"model": last.state_dict(), "best_model": best.state_dict()}
    checkpoint.save(run_dir / CHECKPOINTS, "epoch-2", tensors, {**metadata}, checkpoint.Retention(last=2))
    lines = [
        {"epoch": epoch, "loss": 2.0 / epoch, "lr": 0.1, "train_pgd_accuracy": 0.3, "held_out_pgd_accuracy": 0.2}
        for epoch in (1, 2)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir
