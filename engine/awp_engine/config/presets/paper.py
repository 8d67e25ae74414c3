"""The recipes of the AWP paper.

They are those of Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, its appendix
and its public code.
"""

import functools

from awp_engine.config.presets.preset import TITLES, Preset, short
from awp_engine.config.settings import (
    AttackConfig,
    AwpConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)


def paper(data: str, model: str, method: str, *, awp: bool, norm: str = "linf") -> Config:
    """A recipe of the AWP paper.

    Args:
        data: "cifar10", "cifar100" or "svhn".
        model: as `--model.name`.
        method: "at", "trades", "mart" or "rst".
        awp: with weight perturbation.
        norm: "linf" (8/255) or "l2" (128/255).
    """
    at, rst, svhn = method == "at", method == "rst", data == "svhn"
    if norm == "l2":
        epsilon, step_size = "128/255", "15/255"
    else:
        epsilon, step_size = "8/255", "1/255" if svhn else "2/255"
    gamma, warmup = (0.01, 5 if svhn and norm == "linf" else 0) if at else (0.005, 10)
    if rst:
        optimizer = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, schedule="cosine")
    else:
        optimizer = OptimizerConfig(
            lr=0.01 if svhn else 0.1, momentum=0.9, weight_decay=5e-4, schedule="piecewise", milestones=(0.5, 0.75)
        )
    return Config(
        method=method,  # pyright: ignore[reportArgumentType]
        data=DataConfig(
            name=data,  # pyright: ignore[reportArgumentType]
            # 1,000 of CIFAR's images, as Rice, Wong, Kolter 2020 hold out
            held_out_fraction=0.02,
            pad=0 if svhn else 4,
            flip=not svhn,
            # for RST pseudo-labelled images (--data.extra): 500,000 of 80 Million Tiny Images in the paper
            extra_fraction=0.5,
        ),
        model=ModelConfig(name=model),
        attack=AttackConfig(
            norm=norm,  # pyright: ignore[reportArgumentType]
            epsilon=epsilon,
            step_size=step_size,
            steps=10,
            bn_mode="train" if at else "eval",
            start="uniform" if at else "normal",
        ),
        awp=AwpConfig(gamma=gamma if awp else 0.0, warmup=warmup if awp else 0),
        optimizer=optimizer,
        evaluation=EvaluationConfig(steps=20, step_size=step_size),
        epochs=200,
        global_batch_size=256 if rst else 128,
        log_interval=30.0,
    )


def _grid() -> dict[str, Preset]:
    """Every data set, model, method and norm that the paper reports, with and without AWP."""
    norms, methods = ("linf", "l2"), ("at", "trades", "mart")
    grid = [("cifar10", "preact-resnet-18", method, norm) for method in methods for norm in norms]
    grid += [(data, "preact-resnet-18", "at", norm) for data in ("cifar100", "svhn") for norm in norms]
    grid += [("cifar10", "wrn-34-10", method, "linf") for method in methods]
    grid += [("cifar10", "wrn-28-10", "rst", "linf")]
    presets = {}
    for data, model, method, norm in grid:
        for awp in (False, True):
            parts = [data, short(model), method, *["awp"] * awp, *["l2"] * (norm == "l2")]
            ball = "L2 128/255" if norm == "l2" else "Linf 8/255"
            summary = f"{method.upper()}{'-AWP' if awp else ''} on {TITLES[data]}, {ball}."
            presets["-".join(parts)] = (summary, functools.partial(paper, data, model, method, awp=awp, norm=norm))
    return presets


PRESETS: dict[str, Preset] = _grid()
