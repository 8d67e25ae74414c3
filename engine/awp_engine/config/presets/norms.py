"""Adversarial training in the L1 ball, and against several balls at once."""

import dataclasses

from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import Preset
from awp_engine.config.settings import AttackConfig, Config, EvaluationConfig, ModelConfig, OptimizerConfig


def l1() -> Config:
    """AT in the L1 ball of radius 12, by 10 steps of Auto-PGD for L1 from the image.

    The attack is that of training in Croce, Hein: Adversarial Robustness against Multiple and Single l_p-Threat Models
    via Quick Fine-Tuning of Robust Classifiers, ICML 2022 (fra31/robust-finetuning at 0201a49). [?] Rate, epochs and
    batch size: they are the AWP paper's for AT.
    """
    attack = AttackConfig(kind="apgd", norm="l1", epsilon="12", step_size="12", steps=10, bn_mode="eval", start="none")
    base = paper("cifar10", "preact-resnet-18", "at", awp=False)
    return dataclasses.replace(base, attack=attack, evaluation=EvaluationConfig(steps=40))


def e_at() -> Config:
    """E-AT: three epochs from the weights of a network that is robust in one norm (--model.pretrained).

    Source: Croce, Hein, ICML 2022, and its public code (fra31/robust-finetuning at 0201a49). What differs:

    - Their own networks have softplus, here ReLU, and take images as they are, here normalised unless the weights to
      start from say otherwise. Running statistics move in the descent's pass, as there.
    - The rate, 0.05, 0.005 and 0.0005, falls one step before an epoch ends there. 1,000 training images are held out
      and choose the epoch; there the last one is kept.
    - [?] The rate: 0.05 is the paper's for CIFAR-10, the code's default is 0.01.
    """
    return dataclasses.replace(
        l1(),
        method="e-at",
        attack=AttackConfig(
            kind="apgd", epsilon="8/255", step_size="2/255", steps=10, bn_mode="eval", start="none", also=("l1=12",)
        ),
        optimizer=OptimizerConfig(lr=0.05, weight_decay=5e-4, schedule="piecewise", milestones=(1 / 3, 2 / 3)),
        epochs=3,
    )


def msd() -> Config:
    """MSD: 50 steps in the union of Linf 0.03, L2 0.5 and L1 12.

    Source: Maini, Wong, Kolter: Adversarial Robustness Against the Union of Multiple Perturbation Models, ICML 2020,
    and its public code (locuslab/robust_union). What differs:

    - There the L1 step is projected on the ball, then clipped; here on the nearest point of both. It leaves out all
      values at 0 and 1 there; here those that it would take to an end of [0, 1].
    - The rate rises to 0.1 over 40% of the epochs and falls to 0, there to 0.005 at epoch 40 of 50 first. Crops are
      padded with zeros, there by reflection. Passes are in fp16 there.
    - The attack's passes, in train mode as here, move running statistics there.
    - [?] The radius in L2: 0.5 is the paper's, the training call has 0.3.
    """
    return dataclasses.replace(
        l1(),
        method="msd",
        model=ModelConfig(name="preact-resnet-18", normalize="none"),
        attack=AttackConfig(
            epsilon="0.03",
            step_size="0.003",
            steps=50,
            bn_mode="train",
            start="none",
            also=("l2=0.5,0.05", "l1=12,1"),
        ),
        optimizer=OptimizerConfig(lr=0.1, weight_decay=5e-4, schedule="one-cycle"),
        epochs=50,
    )


PRESETS: dict[str, Preset] = {
    "cifar10-preact-resnet18-at-l1": ("AT on CIFAR-10, L1 12.", l1),
    "cifar10-preact-resnet18-e-at": ("E-AT on CIFAR-10: Linf and L1.", e_at),
    "cifar10-preact-resnet18-msd": ("MSD on CIFAR-10: Linf, L2 and L1.", msd),
}
