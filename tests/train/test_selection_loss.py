"""Which loss chooses the epoch, and which one the report is by."""

import dataclasses
from pathlib import Path

from awp_engine.attack import pgd, summed_cross_entropy, summed_margin
from awp_engine.config import (
    AttackConfig,
    AwpConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)
from awp_engine.data import eval_batches
from awp_engine.evaluation import evaluation_seed
from awp_engine.models.answers import predicted
from awp_engine.train.trainer import Trainer

EPSILON, STEP, STEPS = 0.1, 0.05, 3


def robust(model, split, loss) -> float:
    """By the definition: right before and after PGD from a uniform start."""
    (batch,) = eval_batches(split, len(split))
    x, y, seed = batch.images, batch.labels, evaluation_seed(0)
    ball = {"epsilon": EPSILON, "step_size": STEP, "steps": STEPS}
    x_adv = pgd(model, x, y, loss=loss, sample_ids=batch.ids, seed=seed, mode="eval", **ball)
    model.eval()
    return float(((predicted(model(x)) == y) & (predicted(model(x_adv)) == y)).double().mean())


def test_the_margin_chooses_and_cross_entropy_is_reported(tmp_path: Path) -> None:
    config = Config(
        device="cpu",
        data=DataConfig(held_out_fraction=0.6),
        model=ModelConfig(width=4),
        attack=AttackConfig(epsilon=str(EPSILON), step_size=str(EPSILON), steps=1),
        awp=AwpConfig(gamma=0.0),
        optimizer=OptimizerConfig(schedule="constant"),
        epochs=2,
        global_batch_size=32,
    )
    found = {}
    for loss in ("ce", "margin"):
        evaluation = EvaluationConfig(steps=STEPS, step_size=str(STEP), loss=loss)
        run = Trainer(dataclasses.replace(config, run_dir=tmp_path / loss, evaluation=evaluation))
        report = run.run()
        margin, entropy = (
            robust(run.model, run.data.held_out, climbed) for climbed in (summed_margin, summed_cross_entropy)
        )
        assert margin != entropy
        assert report["held_out_pgd_accuracy"] == (margin if loss == "margin" else entropy)
        found[loss] = report["pgd3_accuracy"]
    assert found["ce"] == found["margin"]
