"""Every preset, but for its images, their number and the attack's length: it builds and trains two steps."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from awp_engine.config import Config, EvaluationConfig
from awp_engine.presets import PRESETS, build_preset
from awp_engine.run_log import RunLog
from awp_engine.trainer import Trainer


@pytest.fixture(scope="module")
def colour_images(tmp_path_factory) -> Path:
    """Ten classes of 32x32 PNGs, and further ones as .npz."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 1)):
        for label in range(10):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    pixels = generator.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    np.savez(root / "extra.npz", image=pixels, label=np.arange(30) % 10)
    return root


def tiny(config: Config, root: Path, run_dir: Path) -> Config:
    """Two steps an epoch; the weight perturbation and every stage of the attack begin at once."""
    data = dataclasses.replace(config.data, held_out_fraction=0.3, train_limit=10)
    if config.data.name != "digits":
        data = dataclasses.replace(data, name="folder", root=root)
    if config.method == "rst":
        data = dataclasses.replace(data, extra=root / "extra.npz")
    return dataclasses.replace(
        config,
        data=data,
        attack=dataclasses.replace(config.attack, steps=1, replays=2),
        awp=dataclasses.replace(config.awp, warmup=0, ascent_steps=min(config.awp.ascent_steps, 2)),
        evaluation=EvaluationConfig(steps=1),
        epochs=1,
        global_batch_size=5 if config.method != "rst" else 10,
        run_dir=run_dir,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_two_steps(name, colour_images, tmp_path):
    whole = build_preset(name)
    config = tiny(whole, colour_images, tmp_path / "run")
    if config.model.name.startswith("wrn"):
        # one image at a time: a forward pass of WRN-34-10 alone takes 13 GFLOP
        extra = 2 if config.method == "rst" else 1
        config = dataclasses.replace(config, global_batch_size=extra, data=dataclasses.replace(config.data, pad=0))
    trainer = Trainer(config)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    results = []
    with RunLog(trainer.run_dir, config, 1, 60.0):
        for index, batch in zip(range(2), trainer.batches.epoch(1), strict=False):
            for group in trainer.optimizer.param_groups:
                group["lr"] = config.optimizer.lr
            results += trainer._steps(batch, 1, index)
    assert len(results) == (2 * config.attack.replays if config.attack.fast == "free" else 2)
    for result in results:
        assert torch.isfinite(result.loss)
        assert not result.skipped
    moved = [key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])]
    assert set(moved) >= {key for key, p in trainer.model.named_parameters() if p.ndim > 1}
    assert (trainer.step.awp is not None) == (whole.awp.gamma > 0)
    assert trainer.step.clip_norm == whole.optimizer.clip_norm


def test_presets_cover_what_the_paper_reports():
    for method in ("at", "trades", "mart"):
        for suffix in ("", "-awp", "-l2", "-awp-l2"):
            assert f"cifar10-preact-resnet18-{method}{suffix}" in PRESETS
        assert f"cifar10-wrn-34-10-{method}-awp" in PRESETS
    for data in ("cifar100", "svhn"):
        assert {f"{data}-preact-resnet18-at{suffix}" for suffix in ("", "-awp", "-l2", "-awp-l2")} <= set(PRESETS)
    assert {"cifar10-wrn-28-10-rst", "cifar10-wrn-28-10-rst-awp"} <= set(PRESETS)
    assert all(summary.endswith(".") for summary in PRESETS.values())
