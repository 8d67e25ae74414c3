"""What one group of settings demands of another, and what `auto` stands for on a machine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from awp_engine.config.model_names import TIMM_MODELS, is_code
from awp_engine.config.schema import ConfigError, flag, parse_amount

if TYPE_CHECKING:
    from awp_engine.config.settings import Config

TAUGHT = ("ard", "rslad", "adaad", "hat")
"""Methods that learn from a frozen network."""
# whose attack climbs something else
_NOT_CROSS_ENTROPY = (
    *("trades", "rst", "ikl", "gkl", "adr-trades", "score", "score-trades", "adaad", "hat", "lbgat", "oaat"),
)
# adversarial training against several balls
_SEVERAL_NORMS = ("e-at", "msd")


def own_images(batch_size: int, extra_fraction: float, *, filled: bool = False) -> int:
    """How many images of a full batch are the data set's own, the others being extra ones.

    Rounded half up; where batches are filled up with extra images (`data.epoch_images`) these are rounded down, as
    Wang 2023's public code does.
    """
    if filled:
        # 1e-9: 0.29 of 100 is 29
        return batch_size - math.floor(batch_size * extra_fraction + 1e-9)
    return math.floor(batch_size * (1 - extra_fraction) + 0.5)


def require_combinations(config: Config) -> None:
    """Refuse settings that do not go together, by a `ConfigError` that names the flag."""
    _require_attack(config)
    _require_step(config)
    taught = config.method in TAUGHT or is_code(config.method)
    useful = taught or config.teacher.weights is None
    config.require(useful, "teacher.weights", f"none with --method {config.method}, which learns from no other network")
    if config.distributed.strategy == "fsdp":
        reason = "with --distributed.strategy fsdp, where no rank has a whole model"
        for key, value in (("distributed.ascent_sync", "global"), ("awp.ascent", "exact")):
            config.require_value(key, value, reason)
        config.require(config.compile is not True, "compile", f"auto or false {reason}")
        config.require(not config.optimizer.by_name, "optimizer.kind", f"sgd or adamw {reason}")
        built_in = config.model.source == "built-in"
        config.require(built_in, "model.name", "a built-in model with --distributed.strategy fsdp; ddp takes any")
    if config.awp.enabled:
        _require_precision(config)
    precision = config.precision
    same = config.awp.ascent_steps == 1 or precision.ascent == precision.descent
    like = f"{precision.descent} like --precision.descent with --awp.ascent-steps > 1"
    config.require(same, "precision.ascent", like)
    _require_fast(config)
    useful = not config.compare_without_awp or config.awp.enabled
    config.require(useful, "compare_without_awp", "--awp.gamma > 0, or there is nothing to compare with")


class Speed(NamedTuple):
    """How the launches of a step are made fewer.

    Attributes:
        cuda_graphs: whether the whole step is captured.
        compile: whether its passes are compiled.
        message: what was chosen and why, in one line; None on a CPU where nothing was asked for.
    """

    cuda_graphs: bool
    compile: bool
    message: str | None


def choose_speed(config: Config, *, cuda: bool, ranks: int) -> Speed:
    """What `--cuda-graphs` and `--compile` ask for, and where they say auto, what serves the device and the ranks.

    Raises:
        ConfigError: graphs are asked for, and there can be none.
    """
    hindrances = {
        "no CUDA device": not cuda,
        "several ranks": ranks > 1,
        f"--optimizer.kind {config.optimizer.kind}": config.optimizer.kind != "sgd",
        # a graph holds one momentum
        "--optimizer.cycle-momentum at every step": config.optimizer.cycle_momentum and not config.optimizer.per_epoch,
        # the losses decide how many passes are made
        "--awp.c-min": config.awp.c_min is not None,
        # nor is it known what another's forward pass does
        f"--model.name {config.model.name}": config.model.source != "built-in",
        # whose steps in l1 differ in how many values they change
        f"--method {config.method}": is_code(config.method) or config.method == "msd",
        # its replays are not captured, and no other step is taken
        "--attack.fast free": config.attack.fast == "free" and _always_fast(config),
        # a graph would replay one noise
        "--attack.noise": config.attack.noise > 0,
        "--model.checkpoint-activations": config.model.checkpoint_activations,
    }
    hindrance = next((name for name, holds in hindrances.items() if holds), None)
    if config.cuda_graphs is True and hindrance is not None:
        raise ConfigError(f"--cuda-graphs: expected a step that can be captured, got {hindrance}; leave the flag out")
    graphs = hindrance is None if config.cuda_graphs == "auto" else config.cuda_graphs
    # auto: no GPU has shown yet that compiling wins back its minutes
    compiles = config.compile is True
    told = (
        ("CUDA graphs", config.cuda_graphs, graphs, hindrance or "one rank"),
        ("torch.compile", config.compile, compiles, "not measured yet"),
    )
    parts = [
        f"{name} {'on' if on else 'off'} ({f'auto: {why}' if asked == 'auto' else 'as told'})"
        for name, asked, on, why in told
        if cuda or asked != "auto"
    ]
    return Speed(graphs, compiles, ", ".join(parts) or None)


def require_average(config: Config) -> None:
    """Refuse an average that no loss can use in every step: its method does."""
    config.require_value("average.kind", "ema", f"with --method {config.method}, whose loss uses the average")
    fits = config.average.statistics in ("averaged", "live")
    like = f"averaged or live with --method {config.method}, whose loss uses the average in every step"
    config.require(fits, "average.statistics", like)


def _require_unmixed(config: Config, reason: str) -> None:
    for key in ("data.cutmix", "data.mixup"):
        config.require_value(key, 0, reason)


def _require_kept_statistics(config: Config, reason: str) -> None:
    """Refuse an average whose statistics are computed anew."""
    kept = config.average.kind == "none" or config.average.statistics in ("averaged", "live")
    config.require(kept, "average.statistics", f"averaged or live {reason}")


def require_views(config: Config) -> None:
    """Refuse what does not go with a method that has several views of each image."""
    reason = f"with --method {config.method}, whose loss has several views of an image"
    _require_unmixed(config, reason)
    for key, value in (
        ("attack.kind", "pgd"),
        # a norm would be that of all views together
        ("attack.norm", "linf"),
        ("attack.noise", 0),
        ("awp.ascent", "exact"),
        ("model.checkpoint_activations", False),
        ("distributed.strategy", "ddp"),
    ):
        config.require_value(key, value, reason)
    like = f"one of AutoAugment, autoaugment-cifar10 or -svhn, {reason}: that of all but the first"
    config.require(config.data.policy.startswith("autoaugment"), "data.policy", like)
    config.require(config.model.source == "built-in", "model.name", f"a built-in model {reason}")
    config.require(config.compile is not True, "compile", f"auto or false {reason}")
    _require_kept_statistics(config, reason)


def require_partner(config: Config) -> None:
    """Refuse what does not go with a method that trains a second network beside the model."""
    reason = f"with --method {config.method}, which trains a second network"
    config.require_value("distributed.strategy", "ddp", reason)
    config.require(not config.optimizer.by_name, "optimizer.kind", f"sgd or adamw {reason}")
    # layers and names are the model's
    config.require_value("optimizer.layer_decay", 1, reason)
    config.require(not config.optimizer.no_decay, "optimizer.no_decay", f"nothing {reason}")
    config.require(config.model.bn_momentum is None, "model.bn_momentum", f"none {reason}")
    config.require(config.compile is not True, "compile", f"auto or false {reason}")


def require_growing(config: Config) -> None:
    """Refuse what does not go with OA-AT, which chooses radius and steps itself."""
    reason, attack = f"with --method {config.method}", config.attack
    by = "which attacks by Linf PGD from uniform noise, in a ball of its own each epoch"
    for key, value in (
        ("attack.kind", "pgd"),
        ("attack.norm", "linf"),
        ("attack.start", "uniform"),
        ("attack.ramp", "none"),
        ("attack.step_warmup", 0),
    ):
        config.require_value(key, value, f"{reason}, {by}")
    config.require(attack.stronger_after is None, "attack.stronger_after", f"none {reason}, {by}")
    config.require(attack.epsilon_value > 0, "attack.epsilon", f"more than 0 {reason}")
    fits = parse_amount(attack.step_size) <= parse_amount(attack.epsilon)
    config.require(fits, "attack.step_size", f"at most epsilon {reason}, whose first steps are twice as long")
    config.require_value("awp.every", 1, f"{reason}, whose batches take turns")
    _require_kept_statistics(config, f"{reason}, whose batches take turns")
    stages = config.model.source == "built-in" and config.model.name not in TIMM_MODELS
    config.require(stages, "model.name", f"preact-resnet or wrn {reason}, which compares features of their stages")


def _always_fast(config: Config) -> bool:
    """Whether every epoch has the cheap attack."""
    attack = config.attack
    return attack.fast != "none" and (attack.fast_epochs is None or attack.fast_epochs >= config.epochs)


def _require_attack(config: Config) -> None:
    attack, evaluation = config.attack, config.evaluation
    several, reason = config.method in _SEVERAL_NORMS, f"with --method {config.method}"
    like = f"further balls {reason}, such as l1=12" if several else "none without --method e-at or msd"
    config.require(bool(attack.also) == several, "attack.also", like)
    if several:
        config.require_value("attack.kind", "apgd" if config.method == "e-at" else "pgd", reason)
        config.require(attack.epsilon_value > 0, "attack.epsilon", f"more than 0 {reason}")
    if config.method == "e-at":
        own = all("," not in word for word in attack.also)
        config.require(own, "attack.also", f"NORM=EPSILON {reason}, whose attack chooses its own steps")
    elif several:
        config.require_value("attack.start", "none", f"{reason}, which begins at the image")
        config.require_value("awp.ascent", "exact", f"{reason}, whose last pass has no gradient")
        far = all(10 * attack.steps * ball.step_size >= ball.epsilon for ball in attack.further)
        config.require(far, "attack.also", f"steps that go farther, {attack.steps} of them, than a tenth of epsilon")
    else:
        fits = attack.kind != "pgd" or attack.norm != "l1"
        like = "linf or l2 with --attack.kind pgd; apgd, of methods whose attack climbs cross-entropy, knows l1"
        config.require(fits, "attack.norm", like)
    if attack.has_l1:
        config.require_value("evaluation.loss", "ce", "with an attack in l1, which climbs cross-entropy")
    if attack.norm == "l1":
        like = "none with --attack.norm l1, whose steps are chosen by Auto-PGD"
        config.require(evaluation.step_size is None, "evaluation.step_size", like)
    if attack.kind == "pgd" and not _always_fast(config):
        _require_reach(config, "attack.step_size", attack.step_size, attack.steps)
        if attack.stronger_steps is not None:
            _require_reach(config, "attack.step_size", attack.step_size, attack.stronger_steps, "stronger_epsilon")
    if evaluation.step_size is not None:
        _require_reach(config, "evaluation.step_size", evaluation.step_size, evaluation.steps)


def _require_reach(config: Config, key: str, step_size: str, steps: int, ball: str = "epsilon") -> None:
    """Refuse steps that no attack in the ball can want: most were meant in 255ths, or were left from another."""
    text = getattr(config.attack, ball)
    step, radius, epsilon = parse_amount(step_size), parse_amount(text), f"{flag(f'attack.{ball}')} {text}"
    expected = f"at most twice {epsilon}, as a longer step leaves the ball from wherever it begins"
    config.require(step <= 2 * radius or radius == 0, key, expected)
    expected = f"steps that go farther, {steps} of them, than a tenth of {epsilon}"
    config.require(10 * steps * step >= radius, key, expected)


def _require_step(config: Config) -> None:
    if config.method in ("mart", "ikl", "gkl", "adr", "adr-trades"):
        reason = f"with --method {config.method}, whose loss needs one right class"
        config.require_value("label_smoothing", 0, reason)
        _require_unmixed(config, reason)
    if config.method in ("adr", "adr-trades", "rebat"):
        require_average(config)
    if config.method == "dajat":
        require_views(config)
        like = "none with --method dajat, whose ascent climbs another loss than the descent"
        config.require(config.awp.max_rise is None, "awp.max_rise", like)
    if config.method == "lbgat":
        require_partner(config)
    if config.method == "oaat":
        require_growing(config)
    if config.method == "liet":
        for key, value in (("attack.kind", "pgd"), ("attack.norm", "linf"), ("attack.start", "uniform")):
            config.require_value(key, value, "with --method liet, whose attack begins at signs and uniform noise")
        _require_unmixed(config, "with --method liet, whose attack begins by one right class")
    if config.data.class_weights != "none":
        _require_unmixed(config, "with --data.class-weights: an image of two classes has no one weight")
        config.require_value(
            "awp.ascent", "exact", "with --data.class-weights, as the attack's last pass knows no weights"
        )
    size, data = config.global_batch_size, config.data
    own = own_images(size, data.extra_fraction, filled=data.epoch_images is not None)
    both = data.extra is None or data.extra_fraction == 1 or 0 < own < size
    config.require(both, "data.extra_fraction", f"a part that gives a batch of {size} images of both kinds")
    if config.attack.kind == "none" or config.attack.noise:
        like = "at, or a class of your own, with --attack.kind none or --attack.noise"
        config.require(config.method == "at" or is_code(config.method), "method", like)
    if config.attack.kind == "apgd":
        if config.method in _NOT_CROSS_ENTROPY:
            config.require_value("attack.kind", "pgd", f"with --method {config.method}: apgd climbs cross-entropy")
        if config.awp.enabled:
            config.require_value("awp.ascent", "exact", "with --attack.kind apgd, whose last pass has no gradient")
    if config.model.checkpoint_activations:
        reason = "with --model.checkpoint-activations"
        config.require(config.compile is not True, "compile", f"auto or false {reason}")
        config.require_value("distributed.strategy", "ddp", reason)
        config.require_value("distributed.sync_batch_norm", False, f"{reason}: ranks would exchange them twice")
    if config.optimizer.kind != "sgd":
        like = f"auto or false with --optimizer.kind {config.optimizer.kind}"
        config.require(config.cuda_graphs is not True, "cuda_graphs", like)


def _require_precision(config: Config) -> None:
    awp, precision = config.awp, config.precision
    for part in ("ascent", "descent"):
        key, kind = f"precision.{part}", getattr(precision, part)
        # the perturbation is a few thousandths of a weight, and bfloat16 keeps 8 bits
        blurred = "fp32 or fp16: bf16 would blur the weight perturbation by a quarter or more"
        config.require(kind != "bf16", key, blurred)
        whole = f"fp32 with --awp.scale {awp.scale}, whose norm is taken over all parameters"
        config.require(awp.scale == "relative" or kind != "fp16", key, whole)
    if awp.ascent == "shared":
        config.require_value("precision.attack", precision.ascent, "like --precision.ascent with --awp.ascent shared")


def _require_fast(config: Config) -> None:
    attack, awp = config.attack, config.awp
    if config.method != "at":
        config.require_value("attack.fast", "none", f"with --method {config.method}")
    if attack.fast == "free":
        config.require_value("average.warmup", 0.0, "with --attack.fast free, whose replays are steps of their own")
    until = config.epochs if attack.fast_epochs is None else attack.fast_epochs
    expected = f"another, or --awp.warmup {until}: one pass for image and weights leaves none for the ascent"
    config.require(attack.fast != "free" or not awp.enabled or awp.warmup >= until, "attack.fast", expected)
