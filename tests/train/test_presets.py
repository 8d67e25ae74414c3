"""Every preset, but for its images, their number and the attack's length: it builds and trains two steps."""

import dataclasses
import json
import math
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from image_folders import write_images
from PIL import Image
from places import ROOT, TRAIN
from teachers import write_teacher

from awp_engine.config import Config, ConfigError, EvaluationConfig, TeacherConfig, own_images
from awp_engine.config.presets import PRESETS, build_preset
from awp_engine.config.rules import TAUGHT
from awp_engine.config.schema import parse_arguments
from awp_engine.models import build_model
from awp_engine.observe.run_log import RunLog
from awp_engine.optim.learning_rate import learning_rate
from awp_engine.train.setup import training_attack
from awp_engine.train.trainer import Trainer


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
    write_teacher(root / "teacher.safetensors", channels=3)
    return root


def takes_extra(config: Config) -> bool:
    return config.method == "rst" or config.data.epoch_images is not None


def tiny(config: Config, root: Path, run_dir: Path) -> Config:
    """Two steps an epoch; the weight perturbation, the average and every stage of the attack begin at once."""
    data = dataclasses.replace(config.data, held_out_fraction=0.3, train_limit=10)
    if config.data.name != "digits":
        data = dataclasses.replace(data, name="folder", root=root, image_size=data.image_size and 32, workers=1)
    extra = takes_extra(config)
    if extra:
        data = dataclasses.replace(data, extra=root / "extra.npz", epoch_images=data.epoch_images and 20)
    return dataclasses.replace(
        config,
        data=data,
        teacher=TeacherConfig(weights=str(root / "teacher.safetensors") if config.method in TAUGHT else None),
        # a step in a further ball has to go a tenth of epsilon
        attack=dataclasses.replace(config.attack, steps=2 if config.attack.also else 1, replays=2),
        awp=dataclasses.replace(config.awp, warmup=0, ascent_steps=min(config.awp.ascent_steps, 2)),
        average=dataclasses.replace(config.average, warmup=0.0),
        evaluation=EvaluationConfig(steps=1),
        epochs=1,
        global_batch_size=10 if extra else 5,
        run_dir=run_dir,
    )


# one preset for each network for CIFAR, at its depth; in the others it is a small one of its kind
DEEP = ("cifar10-preact-resnet18-trades-awp", "cifar10-wrn-34-10-trades-awp", "cifar10-wrn-28-10-rst-awp")


def test_every_network_is_trained_in_one_preset():
    networks = {name: build_preset(name).model.name for name in PRESETS}
    large = {network for network in networks.values() if network.startswith(("wrn", "preact-resnet-18"))}
    assert sorted(large) == sorted(networks[name] for name in DEEP)


@pytest.mark.parametrize("name", PRESETS)
def test_two_steps(name, colour_images, tmp_path):
    whole = build_preset(name)
    config = tiny(whole, colour_images, tmp_path / "run")
    if "wrn-" in config.model.name:
        kind, _, size = config.model.name.partition("wrn-")
        network = f"{kind}wrn-{size.partition('-')[0] if name in DEEP else 10}-1"
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=network))
    elif config.model.source == "timm":
        kind = config.model.name.removeprefix("timm:").partition("_")[0]
        small = dataclasses.replace(config.model, name=f"{ROOT / 'tests' / 'support' / 'small_timm.py'}:{kind}")
        config = dataclasses.replace(config, model=small)
    elif name.startswith("imagenet") or (config.model.name == "preact-resnet-18" and name not in DEEP):
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, width=16))
    if config.method == "lbgat":
        config = dataclasses.replace(config, method_args=("partner=preact-resnet-digits",))
    trainer = Trainer(config)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    results = []
    with RunLog(trainer.run_dir, "{}", 1, 60.0):
        for index, batch in zip(range(2), trainer.batches.epoch(1), strict=False):
            phase = dataclasses.replace(trainer.schedule(1, index), lr=config.optimizer.lr)
            results.append(trainer.step(batch, phase))
    for result in results:
        assert result.loss.numel() == (config.attack.replays if config.attack.fast == "free" else 1)
        assert torch.isfinite(result.loss).all()
        assert not result.skipped.any()
    assert 0 < trainer.selection.guessing_loss < math.inf
    moved = [key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])]
    assert set(moved) >= {key for key, p in trainer.model.named_parameters() if p.ndim > 1}
    assert (trainer.awp_step.awp is not None) == (whole.awp.gamma > 0)
    assert trainer.awp_step.update.clip_norm == whole.optimizer.clip_norm


def test_the_recipes_for_larger_images_and_generated_ones():
    for name in ("imagenet-convnext-t-at", "imagenet-resnet50-at"):
        plain, awp = build_preset(name), build_preset(f"{name}-awp")
        assert dataclasses.replace(awp, awp=plain.awp, preset=name) == plain
        attack, optimizer = plain.attack, plain.optimizer
        assert (attack.kind, attack.steps, attack.epsilon, attack.bn_mode) == ("apgd", 2, "4/255", "eval")
        assert (optimizer.kind, optimizer.lr, optimizer.momentum, optimizer.beta2) == ("adamw", 1e-3, 0.9, 0.95)
        assert (optimizer.weight_decay, optimizer.decay_all, plain.label_smoothing) == (0.05, False, 0.1)
    for kind in ("swin", "convnext", "vit"):
        config = build_preset(f"imagenet-{kind}-b-at")
        attack, optimizer, average = config.attack, config.optimizer, config.average
        assert (attack.epsilon, attack.step_size, attack.steps, attack.start) == ("4/255", "8/765", 3, "uniform")
        assert (attack.bn_mode, attack.step_warmup, config.precision.attack) == ("eval", 5, "fp32")
        rates = (optimizer.lr * 512 / config.global_batch_size, optimizer.warmup_lr, optimizer.min_lr, optimizer.warmup)
        assert rates == (5e-4, 1e-6, 1e-5, 5)
        assert (optimizer.momentum, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.999, 0.05)
        assert (average.decay, average.ramp, average.statistics, config.epochs) == (0.9998, False, "averaged", 300)
        assert (config.label_smoothing, config.data.mixup, config.data.cutmix) == (0.1, 0.5, 0.5)
    vit = build_preset("imagenet-vit-s-at")
    assert vit.attack == build_preset("imagenet-convnext-t-at").attack
    assert (vit.optimizer.warmup_lr, vit.optimizer.min_lr, vit.optimizer.lr) == (1e-7, 5e-6, 1e-3)
    plain = build_preset("cifar10-wrn-28-10-silu-trades-edm")
    awp = build_preset("cifar10-wrn-28-10-silu-trades-awp-edm")
    assert dataclasses.replace(awp, awp=plain.awp, preset=plain.preset) == plain
    assert (plain.beta, plain.data.extra_fraction, plain.average.decay, awp.awp.gamma) == (5.0, 0.7, 0.995, 0.005)
    data, optimizer = plain.data, plain.optimizer
    assert (data.epoch_images, plain.global_batch_size, plain.epochs, optimizer.warmup) == (50_000, 512, 400, 10)
    assert own_images(512, data.extra_fraction, filled=True) == 154
    # of all images one in 50,000 / 1,024 is held out
    assert round(data.held_out_fraction * 50_000) == 1024
    large = build_preset("cifar10-wrn-94-16-trades-scaled")
    assert (large.epochs * large.data.epoch_images, large.data.extra_alone) == (500_000_000, 6000)
    assert own_images(large.global_batch_size, large.data.extra_fraction, filled=True) == 256
    with pytest.raises(ConfigError, match=r"--data\.extra: expected an \.npz"):
        dataclasses.replace(plain, data=dataclasses.replace(plain.data, root=Path())).require_files()


def test_networks_of_timm_need_it(monkeypatch):
    """In one line that says what to install; the preset itself does not."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    name = build_preset("imagenet-swin-b-at").model.name
    expected = r"^--model\.name: this model needs the package timm, which is not installed: pip install timm [^\n]*$"
    with pytest.raises(ConfigError, match=expected):
        build_model(name, 10, (0.5,) * 3, (0.25,) * 3, image_size=(224, 224))


def test_presets_cover_what_the_paper_reports():
    for method in ("at", "trades", "mart"):
        for suffix in ("", "-awp", "-l2", "-awp-l2"):
            assert f"cifar10-preact-resnet18-{method}{suffix}" in PRESETS
        assert f"cifar10-wrn-34-10-{method}-awp" in PRESETS
    for data in ("cifar100", "svhn"):
        assert {f"{data}-preact-resnet18-at{suffix}" for suffix in ("", "-awp", "-l2", "-awp-l2")} <= set(PRESETS)
    assert {"cifar10-wrn-28-10-rst", "cifar10-wrn-28-10-rst-awp"} <= set(PRESETS)
    for suffix in ("", "-awp"):
        assert {f"imagenet-{model}-at{suffix}" for model in ("convnext-t", "resnet50")} <= set(PRESETS)
        assert f"cifar10-wrn-28-10-silu-trades{suffix}-edm" in PRESETS
    assert all(summary.endswith(".") for summary in PRESETS.values())


@pytest.mark.parametrize("model", ["convnext-t", "resnet50"])
def test_a_small_run_of_a_recipe_for_larger_images(model, tmp_path):
    """The command itself, by DALI: images of any size, random-resized crops, all that the recipe does to them."""
    pytest.importorskip("nvidia.dali", reason="the extra `dali` is for Linux")
    write_images(tmp_path / "data", 24, None)
    flags = (
        f"imagenet-{model}-at-awp --data.name folder --data.root {tmp_path / 'data'} --data.image-size 32 "
        "--data.loader dali --data.workers 1 --data.held-out-fraction 0.2 --model.width 16 --epochs 1 "
        "--global-batch-size 8 --micro-batch-size 4 --optimizer.warmup 0 --average.bn-images 8 --evaluation.steps 1 "
        f"--run-dir {tmp_path / 'run'}"
    ).split()
    done = forked.run(TRAIN, *flags, timeout=280)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["attack"]["epsilon"] == "4/255"
    assert 0 <= report["pgd1_accuracy"] <= report["clean_accuracy"] <= 1


def test_the_recipes_with_a_growing_ball():
    names = [f"{data}-wrn-34-10-{method}-awp" for data in ("cifar10", "cifar100") for method in ("ikl", "gkl")]
    names += [name for name in PRESETS if "kl-autoaugment" in name]
    names += [f"{data}-{model}-acat" for data in ("cifar10", "cifar100") for model in ("preact-resnet18", "wrn-34-10")]
    names += [name for name in PRESETS if name.endswith("-dajat")]
    for name in names:
        config = build_preset(name)
        attack, optimizer = config.attack, config.optimizer
        assert (attack.ramp, attack.epsilon, attack.bn_mode, attack.start) == ("linear", "8/255", "eval", "normal")
        assert (optimizer.lr, optimizer.schedule, optimizer.per_epoch) == (0.2, "cosine", True)
        assert not optimizer.nesterov
        # the public codes count epochs from 1 and perturb from 10 on
        assert (config.awp.gamma, config.awp.warmup, config.model.normalize) == (0.005, 9, "none")
        acat, dajat = name.endswith("acat"), name.endswith("dajat")
        assert (attack.steps, attack.step_size) == ((2, "8/255") if acat else (5, "4/255"))
        average = config.average
        expected = ("ema", 0.9996, False, 82 if acat else 150) if acat or dajat else ("epochs", 0.9, True, 0)
        assert (average.kind, average.decay, average.ramp, average.warmup) == expected
        assert average.statistics == "averaged"
        assert config.epochs == (110 if acat else 200)
        wrong = config.label_smoothing * 99 / 100
        assert wrong == pytest.approx(0.1 if (acat or dajat) and "cifar100" in name else 0.0)
        policy = "autoaugment-cifar10" if dajat or "autoaugment" in name else "none"
        # DAJAT's comes before crop and mirror, IKL's after
        assert (config.data.policy, config.data.policy_first) == (policy, dajat)
    # beta and the weight between views
    of_views = {name: (build_preset(name).beta, *build_preset(name).method_args) for name in names if "dajat" in name}
    assert of_views == {
        "cifar10-preact-resnet18-dajat": (11, "js_weight=2", "views=3"),
        "cifar10-wrn-34-10-dajat": (10, "js_weight=3", "views=3"),
        "cifar100-preact-resnet18-dajat": (9, "js_weight=2", "views=3"),
    }
    assert build_preset(names[0]).method_args == ("alpha=3", "temperature=4", "attack_beta=0")
    assert build_preset(names[3]).method_args == ("alpha=4", "temperature=1", "attack_beta=1", "gamma=0.4")
    auto = {name: build_preset(name).method_args for name in names if "autoaugment" in name}
    common = ("alpha=4", "temperature=4")
    assert auto == {
        "cifar10-wrn-34-10-gkl-autoaugment-awp": (*common, "attack_beta=0", "gamma=1", "aug_weight=0.5"),
        "cifar100-wrn-34-10-gkl-autoaugment-awp": (*common, "attack_beta=1", "gamma=1", "aug_weight=0.5"),
        "cifar100-wrn-34-10-ikl-autoaugment-awp": (*common, "attack_beta=1", "aug_weight=0.3"),
    }


def test_the_recipes_of_rebat():
    """The two commands of its README for PreActResNet-18, and that for the wide network."""
    drops = {"preact-resnet18-rebat": 1.5, "preact-resnet18-rebat-pp": 1.7, "wrn-34-10-rebat": 4.0}
    for name, drop in drops.items():
        config, wide = build_preset(f"cifar10-{name}"), name.startswith("wrn")
        attack, average = config.attack, config.average
        assert (attack.epsilon, attack.step_size, attack.steps, attack.start) == ("8/255", "2/255", 10, "uniform")
        assert attack.stronger == ((100, 10 / 255, 12) if name.endswith("pp") else None)
        assert (config.beta, config.data.cutmix, config.awp.gamma) == ((2, 1, 0) if wide else (1, 0, 0))
        assert (average.decay, average.ramp, average.warmup, average.statistics) == (0.999, False, 105, "averaged")
        assert config.optimizer.weight_decay == 5e-4
        rates = [learning_rate(config.optimizer, 200, place) for place in (0, 99.99, 100, 149.99, 150, 199)]
        assert rates == pytest.approx([0.1, 0.1, *[0.1 / drop] * 2, *[0.1 / drop**2] * 2])
        assert (config.epochs, config.global_batch_size) == (200, 128)
    ten, hundred = (build_preset(f"{data}-preact-resnet18-rebat-pp") for data in ("cifar10", "cifar100"))
    assert dataclasses.replace(hundred, data=ten.data, preset=ten.preset) == ten


def test_the_recipes_of_idbh():
    strong, weak = build_preset("cifar10-preact-resnet18-at-awp-idbh"), build_preset("cifar10-wrn-34-10-at-idbh")
    for config in (strong, weak):
        data, attack, optimizer, average = config.data, config.attack, config.optimizer, config.average
        assert (data.flip, data.pad, data.cutout, data.erase, config.model.normalize) == (True, 0, 0, 0, "none")
        assert (attack.epsilon, attack.step_size, attack.steps, attack.start) == ("8/255", "2/255", 10, "none")
        assert (optimizer.lr, optimizer.weight_decay, optimizer.milestone_epochs(200)) == (0.1, 5e-4, [100, 150])
        assert (config.epochs, config.global_batch_size, optimizer.nesterov) == (200, 128, False)
        assert (average.kind, average.decay, average.ramp, average.statistics) == ("ema", 0.999, False, "clean")
    assert (strong.data.policy, strong.awp.gamma) == ("idbh-strong", 0.01)
    assert (weak.data.policy, weak.awp.gamma) == ("idbh-weak", 0)
    assert build_preset("svhn-preact-resnet18-at-awp-idbh").data.policy == "idbh-svhn"


def test_the_recipes_of_lbgat():
    for data, beta in (("cifar10", 0), ("cifar100", 6)):
        plain, awp = build_preset(f"{data}-wrn-34-10-lbgat"), build_preset(f"{data}-wrn-34-10-lbgat-awp")
        assert dataclasses.replace(awp, awp=plain.awp, preset=plain.preset) == plain
        assert (plain.awp.gamma, awp.awp.gamma, awp.awp.warmup) == (0, 0.005, 10)
        attack, optimizer = plain.attack, plain.optimizer
        assert (attack.epsilon, attack.step_size, attack.steps, attack.start) == ("8/255", "2/255", 10, "normal")
        assert (attack.bn_mode, plain.beta, plain.method, plain.model.normalize) == ("eval", beta, "lbgat", "none")
        assert (optimizer.momentum, optimizer.nesterov, optimizer.weight_decay) == (0.9, False, 2e-4)
        assert (plain.epochs, plain.global_batch_size, plain.data.pad, plain.data.flip) == (100, 128, 4, True)
        # by epoch, counted from 1, in its first and its last steps
        rates = {1: 0.02, 2: 0.1, 75: 0.1, 76: 0.01, 90: 0.01, 91: 0.001, 100: 0.001}
        for epoch, rate in rates.items():
            for done in (0.0, 0.99):
                assert learning_rate(optimizer, 100, epoch - 1 + done) == pytest.approx(rate)


def test_the_recipes_of_oaat():
    """The public code's five sets of defaults: the ball, weights, rates and averages, part by part."""
    table = {
        "cifar10-preact-resnet18": (110, 16, 1.5, 3, 0.2, 24, 1, "none", 1, 5e-4),
        "cifar10-wrn-34-10": (200, 16, 2, 3, 0.45, 16, 1, "autoaugment-cifar10", 1, 3e-4),
        "cifar100-wrn-34-10": (110, 16, 2, 4, 0.2, 24, 2, "autoaugment-cifar10", 0.5, 3e-4),
        "cifar100-preact-resnet18": (200, 16, 2, 3, 0.25, 24, 3, "autoaugment-cifar10", 0.5, 3e-4),
        "svhn-preact-resnet18": (110, 12, 4, 4, 0.25, 12, 3, "autoaugment-svhn", 1, 5e-4),
    }
    for name, (epochs, radius, beta, end, mixing, far, looks, policy, part, decay) in table.items():
        config = build_preset(f"{name}-oaat")
        hundred, svhn, rate = name.startswith("cifar100"), name.startswith("svhn"), config.optimizer
        arguments = parse_arguments(config.method_args)
        assert arguments is not None
        assert (config.epochs, config.beta, config.global_batch_size) == (epochs, beta, 128)
        assert arguments["beta_end"] == end
        assert (arguments["mixing"], arguments["lpips_weight"]) == (mixing, looks)
        assert arguments["far"] * radius == far
        assert radius * arguments.get("first", 0.25) == pytest.approx(4)
        assert arguments.get("climbs", "ce") == ("kl" if svhn else "ce")
        attack = training_attack(config.attack)
        assert (attack.epsilon, attack.step_size, attack.steps) == (radius / 255, radius / 4 / 255, 10)
        assert (attack.start, attack.bn_mode, config.model.normalize) == ("uniform", "train", "none")
        assert (config.data.policy, config.data.policy_part, config.data.policy_first) == (policy, part, False)
        assert (config.data.pad, config.data.flip) == ((0, False) if svhn else (4, True))
        # on the right class what the code's 0.9 is
        assert 1 - config.label_smoothing * 99 / 100 == pytest.approx(0.9 if hundred else 1)
        assert (config.awp.gamma, config.awp.warmup, rate.weight_decay, rate.momentum) == (0.005, 9, decay, 0.9)
        average = config.average
        assert (average.kind, average.decay, average.ramp, average.statistics) == ("ema", 0.9996, False, "averaged")
        assert average.warmup == int(3 * epochs / 4) + 1
        top, begun = (0.05 if svhn else 0.2), 10 if hundred else 0
        for epoch in (begun + 1, epochs // 2, epochs):
            expected = top * 0.5 * (1 + math.cos((epoch - begun - 1) / (epochs - begun) * math.pi))
            assert learning_rate(rate, epochs, epoch - 1 + 0.99) == pytest.approx(expected)
        if hundred:
            assert learning_rate(rate, epochs, 0.5) == pytest.approx(0.02)
