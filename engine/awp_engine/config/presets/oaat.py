"""OA-AT: TRADES-AWP in a ball that grows to twice the usual radius.

Source: Addepalli, Jain, Sriramanan, Babu: Scaling Adversarial Training to Large Perturbation Bounds, ECCV 2022, and its
public code, val-iisc/OAAT at 4e6e344, whose five sets of defaults these are. Not run here.
"""

import dataclasses
import functools

from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import TITLES, Preset, short
from awp_engine.config.settings import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)

# beta at the beginning and at the end, share of far answers, far radius in epsilons, weight of the looks; weight decay
_WEIGHTS = {
    "cifar10-preact-resnet-18": (1.5, 3, 0.2, 1.5, 1, 5e-4),
    "cifar10-wrn-34-10": (2.0, 3, 0.45, 1, 1, 3e-4),
    "cifar100-wrn-34-10": (2.0, 4, 0.2, 1.5, 2, 3e-4),
    "cifar100-preact-resnet-18": (2.0, 3, 0.25, 1.5, 3, 3e-4),
    "svhn-preact-resnet-18": (4.0, 4, 0.25, 1, 3, 5e-4),
}


def oaat(data: str, model: str) -> Config:
    """OA-AT of a network on a data set; what differs from the public code stands in docs/methods.md.

    Args:
        data: "cifar10", "cifar100" or "svhn".
        model: as `--model.name`.
    """
    beta, beta_end, mixing, far, lpips, weight_decay = _WEIGHTS[f"{data}-{model}"]
    base, hundred, svhn = paper(data, model, "trades", awp=True), data == "cifar100", data == "svhn"
    long = f"{data}-{model}" in ("cifar10-wrn-34-10", "cifar100-preact-resnet-18")
    arguments = [f"beta_end={beta_end}", f"mixing={mixing}", f"far={far}", f"lpips_weight={lpips}"]
    arguments += ["climbs=kl", "first=1/3"] if svhn else []
    # on CIFAR-100 each image has the policy by even odds, with ResNet-18 on CIFAR-10 none does
    policy = "none" if data == "cifar10" and not long else f"autoaugment-{'svhn' if svhn else 'cifar10'}"
    epochs = 200 if long else 110
    return dataclasses.replace(
        base,
        method="oaat",
        beta=beta,
        # 0.1 on the 99 wrong classes
        label_smoothing=10 / 99 if hundred else 0.0,
        method_args=tuple(arguments),
        data=dataclasses.replace(base.data, policy=policy, policy_part=0.5 if hundred else 1.0),  # pyright: ignore[reportArgumentType]
        model=ModelConfig(name=model, normalize="none"),
        attack=AttackConfig(
            epsilon="12/255" if svhn else "16/255", step_size="3/255" if svhn else "4/255", steps=10, bn_mode="train"
        ),
        # from epoch 10 on, counted from 1
        awp=AwpConfig(gamma=0.005, warmup=9),
        optimizer=OptimizerConfig(
            lr=0.05 if svhn else 0.2,
            momentum=0.9,
            weight_decay=weight_decay,
            schedule="cosine",
            per_epoch=True,
            warmup=10 if hundred else 0,
            warmup_lr=0.02 if hundred else 0.0,
        ),
        average=AverageConfig(
            kind="ema", decay=0.9996, ramp=False, warmup=float(3 * epochs // 4 + 1), statistics="averaged"
        ),
        evaluation=EvaluationConfig(steps=20),
        epochs=epochs,
    )


PRESETS: dict[str, Preset] = {
    f"{data}-{short(model)}-oaat": (
        f"OA-AT on {TITLES[data]}, Linf {12 if data == 'svhn' else 16}/255.",
        functools.partial(oaat, data, model),
    )
    for data, _, model in (key.partition("-") for key in _WEIGHTS)
}
