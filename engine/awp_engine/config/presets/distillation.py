"""Training that learns from the average of its own weights: ADR and ReBAT.

- Wu, Wang, Chen: Annealing Self-Distillation Rectification Improves Adversarial Training, ICLR 2024, and its public
  code (yuyuwu5/ADR at 515da0e).
- Wang, Li, Yang, Lin, Wang: Balance, Imbalance, and Rebalance: Understanding Robust Overfitting from a Minimax Game
  Perspective, NeurIPS 2023, and its public code (PKU-ML/ReBAT at 632084e).

What differs from their code stands in docs/recipes.md.
"""

import dataclasses
import functools

from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import TITLES, Preset, short
from awp_engine.config.settings import AverageConfig, AwpConfig, Config, OptimizerConfig

_Ends = tuple[float, float]
# tau and lambda, each from start to end, of the public code's configurations
_ADR: dict[tuple[str, str], tuple[_Ends, _Ends]] = {
    ("cifar10", "adr"): ((2.5, 2.0), (0.7, 0.95)),
    ("cifar100", "adr"): ((1.5, 1.0), (0.7, 0.95)),
    ("tiny-imagenet", "adr"): ((2.0, 1.5), (0.5, 0.9)),
    ("cifar10", "adr-awp"): ((2.5, 1.5), (0.7, 0.85)),
    ("cifar100", "adr-awp"): ((2.0, 1.0), (0.7, 0.85)),
    ("tiny-imagenet", "adr-awp"): ((2.0, 1.5), (0.3, 0.9)),
    ("cifar10", "adr-trades-awp"): ((2.5, 1.5), (0.7, 0.85)),
    ("cifar100", "adr-trades-awp"): ((1.5, 1.0), (0.7, 0.95)),
}


def adr(data: str, model: str, variant: str) -> Config:
    """ADR, alone or with AWP over all parameters; the average that teaches is what is measured.

    [?]: beta of TRADES, and the crop's padding on Tiny-ImageNet.

    Args:
        data: "cifar10", "cifar100" or "tiny-imagenet".
        model: as `--model.name`.
        variant: "adr", "adr-awp" or "adr-trades-awp".
    """
    (tau, lam), awp, tiny = _ADR[data, variant], variant.endswith("-awp"), data == "tiny-imagenet"
    base = paper(data, model, "at", awp=False)
    return dataclasses.replace(
        base,
        method=variant.removesuffix("-awp"),
        method_args=("tau={},{}".format(*tau), "lam={},{}".format(*lam)),
        attack=dataclasses.replace(base.attack, start="normal" if "trades" in variant else "uniform"),
        awp=AwpConfig(gamma=0.001 if tiny else 0.005, layers=("*",)) if awp else AwpConfig(gamma=0.0),
        # Nesterov's momentum but where the weights are perturbed; x0.1 after half and three quarters
        optimizer=dataclasses.replace(base.optimizer, nesterov=not awp),
        average=AverageConfig(kind="ema", decay=0.995, ramp=False, statistics="averaged"),
        epochs=80 if tiny else 200,
    )


def rebat(data: str, model: str, *, stronger: bool = False) -> Config:
    """ReBAT: rates that fall less, and a pull to the average from the epoch of index 105 on.

    ReBAT++ attacks in a larger ball from epoch index 100 on. The wide network has CutMix in every batch. [?]: all
    values on CIFAR-100, for which the README has no command.

    Args:
        data: "cifar10" or "cifar100".
        model: "preact-resnet-18" or "wrn-34-10".
        stronger: ReBAT++.
    """
    base, wide = paper(data, model, "at", awp=False), model.startswith("wrn")
    later = {"stronger_after": 100, "stronger_epsilon": "10/255", "stronger_steps": 12} if stronger else {}
    return dataclasses.replace(
        base,
        method="rebat",
        beta=2.0 if wide else 1.0,
        data=dataclasses.replace(base.data, cutmix=1.0 if wide else 0.0),
        attack=dataclasses.replace(base.attack, **later),
        optimizer=OptimizerConfig(
            lr=0.1, weight_decay=5e-4, milestones=(100.0, 150.0), drop=1 / (4 if wide else 1.7 if stronger else 1.5)
        ),
        average=AverageConfig(kind="ema", decay=0.999, ramp=False, warmup=105.0, statistics="averaged"),
    )


def _presets() -> dict[str, Preset]:
    presets: dict[str, Preset] = {}
    for data, variant in _ADR:
        for model in ("preact-resnet-18", "wrn-34-10"):
            if model == "preact-resnet-18" or (data != "tiny-imagenet" and "trades" not in variant):
                summary = f"{variant.upper()} on {TITLES[data]}, Linf."
                presets[f"{data}-{short(model)}-{variant}"] = (summary, functools.partial(adr, data, model, variant))
    presets["cifar10-preact-resnet18-rebat"] = (
        "ReBAT on CIFAR-10, Linf.",
        functools.partial(rebat, "cifar10", "preact-resnet-18"),
    )
    presets["cifar10-wrn-34-10-rebat"] = (
        "ReBAT with CutMix on CIFAR-10, Linf.",
        functools.partial(rebat, "cifar10", "wrn-34-10"),
    )
    for data in ("cifar10", "cifar100"):
        presets[f"{data}-preact-resnet18-rebat-pp"] = (
            f"ReBAT++ on {TITLES[data]}, Linf.",
            functools.partial(rebat, data, "preact-resnet-18", stronger=True),
        )
    return presets


PRESETS: dict[str, Preset] = _presets()
