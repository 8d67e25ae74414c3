"""A ball that grows with the epoch, `--attack.ramp linear`."""

import dataclasses
from pathlib import Path

import plain_methods
import pytest
import torch
from samples import images
from torch import nn

from awp_engine.attack import starting_point
from awp_engine.config import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
)
from awp_engine.config.identity import config_hash, require_same_run
from awp_engine.evaluation import evaluation_attack
from awp_engine.models import build_model
from awp_engine.step.cuda_graph import GraphedStep
from awp_engine.train import setup
from awp_engine.train.results import throughput
from awp_engine.train.schedule import Schedule
from awp_engine.train.trainer import Trainer

SETTINGS = Config(
    device="cpu",
    epochs=4,
    global_batch_size=50,
    data=DataConfig(train_limit=100),
    model=ModelConfig(width=2),
    attack=AttackConfig(epsilon="8/255", step_size="4/255", steps=5, bn_mode="eval", start="normal", ramp="linear"),
    average=AverageConfig(kind="ema", bn_images=10),
    precision=PrecisionConfig(attack="fp32"),
    evaluation=EvaluationConfig(steps=1, step_size="2/255", held_out_limit=8, test_limit=8),
)


def test_iterates_are_those_of_the_epochs_ball(tmp_path):
    """DAJAT's `eps * epoch / epochs`, epochs from 1; steps in proportion."""
    trainer = Trainer(dataclasses.replace(SETTINGS, run_dir=tmp_path / "run"))
    torch.manual_seed(0)
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).double().train()
    x, y, ids = images((6, 1, 8, 8), torch.float64), torch.arange(6), torch.arange(6)
    for epoch in range(1, 5):
        attack = trainer.schedule(epoch, 1).attack
        start = starting_point(x, "normal", epsilon=1.0, norm="linf", sample_ids=ids, seed=5)
        radius, step = 8 / 255 * epoch / 4, 4 / 255 * epoch / 4
        expected = plain_methods.attack(model, x, y, start, kind="at", epsilon=radius, step_size=step, steps=5)[-1]
        found = attack(model, x, y, sample_ids=ids, seed=5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
        assert float((found - x).abs().max()) == pytest.approx(radius)
    assert attack == trainer.schedule.attack
    assert evaluation_attack(trainer.config).epsilon == 8 / 255


def test_an_averages_statistics_are_of_the_epochs_ball(tmp_path):
    trainer = Trainer(dataclasses.replace(SETTINGS, run_dir=tmp_path / "run"))
    moved = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        moved.append(inputs[0].detach().clone())

    trainer.average.before_step()
    trainer.average.model.register_forward_pre_hook(look)
    trainer.selection.measured_model(1)
    # the clean images are where the attack began, but for its noise of 0.001
    assert 0.5 * 2 / 255 < float((moved[-1] - moved[0]).abs().max()) < 2 / 255 + 0.006


def test_what_cannot_grow_is_refused():
    for wrong in ({"kind": "none"}, {"epsilon": "0"}, {"fast": "n-fgsm"}):
        with pytest.raises(ConfigError, match=r"--attack\.ramp: expected none with"):
            AttackConfig(ramp="linear", **wrong)
    saved = dataclasses.replace(SETTINGS, optimizer=OptimizerConfig(schedule="constant"))
    with pytest.raises(ConfigError, match=r"--epochs: .*its epsilon grows over all epochs \(--attack\.ramp linear\)"):
        require_same_run(saved, dataclasses.replace(saved, epochs=5), Path("run"))


def test_a_stronger_attack_takes_over_after_so_many_epochs(tmp_path):
    """In training alone; its cost is that of its own steps. A run says which accuracies are of which ball."""
    attack = dataclasses.replace(
        SETTINGS.attack, ramp="none", stronger_after=2, stronger_epsilon="10/255", stronger_steps=7
    )
    config = dataclasses.replace(SETTINGS, attack=attack, awp=AwpConfig(gamma=0.0), run_dir=tmp_path / "run")
    trainer = Trainer(config)
    attacks = [trainer.schedule(epoch, 1).attack for epoch in range(1, 5)]
    assert [(a.epsilon, a.step_size, a.steps) for a in attacks] == 2 * [(8 / 255, 4 / 255, 5)] + 2 * [
        (10 / 255, 4 / 255, 7)
    ]
    assert evaluation_attack(trainer.config).epsilon == 8 / 255
    spent = [throughput(trainer, 1.0, epoch)["tflops"] for epoch in (2, 3)]
    assert spent[1] / spent[0] == pytest.approx((2 * 7 + 3) / (2 * 5 + 3))
    assert (
        "from epoch 3 on training attacks in epsilon 10/255 by 7 steps; accuracies under attack in training are of "
        "that ball then, all others of epsilon 8/255"
    ) in trainer.messages
    late = dataclasses.replace(config, epochs=2, run_dir=tmp_path / "late")
    assert "--attack.stronger-after 2 leaves none of 2 epochs for it" in Trainer(late).messages
    # larger than all images of that size
    l2 = dataclasses.replace(attack, norm="l2", epsilon="1", step_size="1", stronger_epsilon="10")
    measured = dataclasses.replace(config.evaluation, step_size=None)
    with pytest.raises(ConfigError, match=r"^--attack\.stronger-epsilon: "):
        Trainer(dataclasses.replace(config, attack=l2, evaluation=measured, run_dir=tmp_path / "l2"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stronger_steps": None}, "after: expected epochs, --attack.stronger-epsilon and --attack.stronger-steps"),
        ({"stronger_after": None}, "after: expected epochs, --attack.stronger-epsilon and --attack.stronger-steps"),
        ({"ramp": "linear"}, "after: expected none with --attack.ramp or --attack.step-warmup"),
        ({"step_warmup": 1}, "after: expected none with --attack.ramp or --attack.step-warmup"),
        ({"stronger_epsilon": "7/255"}, "epsilon: expected at least --attack.epsilon 8/255"),
        ({"stronger_epsilon": "10"}, "epsilon: .*at most 1 for linf, got '10'"),
        ({"kind": "none"}, "after: expected none with --attack.fast or --attack.also, or where training does not"),
        ({"fast": "free"}, "after: expected none with --attack.fast or --attack.also"),
    ],
)
def test_a_stronger_attack_that_means_nothing_is_refused(wrong, message):
    given = {"epsilon": "8/255", "stronger_after": 2, "stronger_epsilon": "10/255", "stronger_steps": 12}
    with pytest.raises(ConfigError, match=rf"^--attack\.stronger-{message}[^\n]*$"):
        AttackConfig(**given | wrong)


def test_a_stronger_attack_reaches_its_ball_and_is_part_of_the_run():
    given = {"epsilon": "8/255", "step_size": "2/255", "stronger_after": 2, "stronger_epsilon": "100/255"}
    with pytest.raises(
        ConfigError, match=r"--attack\.step-size: expected .* than a tenth of --attack\.stronger-epsilon"
    ):
        Config(attack=AttackConfig(**given, stronger_steps=4))
    hashes = [
        config_hash(Config(attack=AttackConfig(**given | {"stronger_epsilon": text}, stronger_steps=steps)))
        for text, steps in (("10/255", 12), ("20/510", 12), ("10/255", 11), ("11/255", 12))
    ]
    assert hashes[0] == hashes[1]
    assert len({*hashes}) == 3


def test_graphs_that_were_not_used_for_longest_are_dropped():
    graphed = GraphedStep.__new__(GraphedStep)  # what it keeps alone: to capture takes a GPU
    graphed._graphs, graphed._taken = {}, {}
    for kind in range(11):
        graphed._graphs[kind], graphed._taken[kind] = ("graph", kind), 4
        assert graphed._used(kind) == ("graph", kind)
        assert graphed._used(0) == ("graph", 0)
    assert set(graphed._graphs) == set(graphed._taken) == {0, *range(4, 11)}


def test_steps_that_grow_reach_their_length_after_so_many_epochs():
    """ARES: min(epoch, 5) / 5 of the step, epochs from 0; the first one has nothing but the random start."""
    settings = AttackConfig(epsilon="4/255", step_size="8/765", steps=3, bn_mode="eval", step_warmup=5)
    config, attack = Config(epochs=9, attack=settings), setup.training_attack(settings)
    schedule = Schedule(config=config, steps=2, attack=attack, cheap=attack)
    torch.manual_seed(0)
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).double().train()
    x, y, ids = images((6, 1, 8, 8), torch.float64), torch.arange(6), torch.arange(6)
    start = starting_point(x, "uniform", epsilon=4 / 255, norm="linf", sample_ids=ids, seed=5)
    for epoch in (1, 3, 6, 9):
        step = 8 / 3 / 255 * min(epoch - 1, 5) / 5
        expected = plain_methods.attack(model, x, y, start, kind="at", epsilon=4 / 255, step_size=step, steps=3)[-1]
        found = schedule(epoch, 1).attack(model, x, y, sample_ids=ids, seed=5)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for wrong in ({"kind": "apgd"}, {"epsilon": "0"}, {"fast": "n-fgsm"}):
        with pytest.raises(ConfigError, match=r"--attack\.step-warmup: expected 0, unless training attacks by"):
            AttackConfig(step_warmup=1, **wrong)


def test_steps_grow_in_every_ball():
    """Of MSD; what grows from 0 in one ball alone would leave the images to the others."""
    settings = AttackConfig(epsilon="0.1", step_size="0.02", start="none", also=("l2=0.4,0.1", "l1=2"), step_warmup=4)
    attack = setup.training_attack(settings)
    schedule = Schedule(config=Config(method="msd", attack=settings), steps=2, attack=attack, cheap=attack)
    for epoch, part in ((1, 0.0), (3, 0.5), (5, 1.0)):
        found = schedule(epoch, 0).attack
        assert [(b.norm, b.epsilon) for b in found.balls] == [("linf", 0.1), ("l2", 0.4), ("l1", 2.0)]
        assert [b.step_size for b in found.balls] == pytest.approx([0.02 * part, 0.1 * part, 0.4 * part])
