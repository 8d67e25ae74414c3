"""What a defender who has the original weights can see of an edit, beside what harmless edits look like."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from awp_engine.audit.weights.budget import BatchNorm, Budget, budgeted
from awp_engine.data import Split, eval_batches
from awp_engine.models.answers import predicted
from awp_engine.models.batch_norm import layer_modes
from awp_engine.models.wrapped import last_layers
from awp_kernels import AdversarialWeightPerturbation
from awp_kernels.philox import mix_seed

PERCENTILES = (0, 25, 50, 75, 90, 100)
STATISTICS = {
    "flatness": "rise of the loss at weights moved by gamma along its gradient, minus that of the original",
    "activations": "mean L2 change of the last layer's input, relative to that input's mean norm",
    "logits": "mean L2 change of the logits, relative to their mean norm",
}
_HARMLESS = 2


def size_of(original: nn.Module, edited: nn.Module, batch_norm: BatchNorm) -> dict[str, Any]:
    """L1, L2 and Linf of what moved, and percentiles of |dw| / |w| over all weights that are not 0, in fp64."""
    before, after = budgeted(original, batch_norm), budgeted(edited, batch_norm)
    start = torch.cat([before[name].double().flatten() for name in after]).cpu()
    moves = torch.cat([after[name].double().flatten() for name in after]).cpu() - start
    nonzero = start != 0
    ratios = (moves[nonzero] / start[nonzero]).abs().numpy()
    return {
        "weights": len(start),
        "moved": int((moves != 0).sum()),
        "l1": moves.abs().sum().item(),
        "l2": moves.norm().item(),
        "linf": moves.abs().max().item(),
        "relative_percentiles": dict(
            zip(map(str, PERCENTILES), np.percentile(ratios, PERCENTILES).tolist(), strict=True)
        )
        if len(ratios)
        else {},
        "weights_of_0": int((~nonzero).sum()),
    }


def harmless(original: nn.Module, edited: nn.Module, budget: Budget, batch_norm: BatchNorm, seed: int) -> nn.Module:
    """A random edit of the same size: every tensor's moves, shuffled among its weights, with random signs.

    Of a relative budget what is shuffled is dw / w. So L1, L2 and Linf, or the percentiles, are the edit's own, but for
    what the budget then cuts off.
    """
    model = copy.deepcopy(edited)
    before, after = budgeted(original, batch_norm), budgeted(model, batch_norm)
    for number, (name, weight) in enumerate(after.items()):
        start = before[name]
        unit = torch.where(start == 0, 1.0, start) if budget.kind == "relative" else torch.ones_like(start)
        generator = torch.Generator().manual_seed(mix_seed(seed, _HARMLESS, number))
        order = torch.randperm(weight.numel(), generator=generator)
        signs = torch.randint(2, (weight.numel(),), generator=generator) * 2.0 - 1
        moves = ((weight - start) / unit).flatten()[order.to(weight.device)] * signs.to(weight)
        weight.copy_(start + moves.view_as(weight) * unit)
        if name.endswith("running_var"):
            weight.clamp_(min=0)
    budget.project_(after, before)
    return model


@dataclass(frozen=True)
class Answers:
    """What a model makes of clean images: the last layer's input [N, D], if that is known, and logits [N, K]."""

    features: Tensor | None
    logits: Tensor


@torch.no_grad()
def look(model: nn.Module, split: Split, batch_size: int, classes: int) -> Answers:
    """Passes images through; feature maps are averaged over their pixels."""
    names = last_layers(model, classes)
    seen: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(given[0].flatten(2).mean(2) if given[0].ndim > 2 else given[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep) for name in names[:1] if name]
    try:
        with layer_modes(model, "eval", update_statistics=False):
            logits = torch.cat([model(batch.images) for batch in eval_batches(split, batch_size)])
    finally:
        for hook in hooks:
            hook.remove()
    return Answers(torch.cat(seen) if seen else None, logits)


def shift(now: Tensor | None, before: Tensor | None) -> float | None:
    """Mean distance of rows of [N, D], relative to the mean norm before."""
    if now is None or before is None:
        return None
    return ((now.double() - before.double()).norm(dim=1).mean() / before.double().norm(dim=1).mean()).item()


def sharpness(model: nn.Module, split: Split, batch_size: int, gamma: float) -> float:
    """Mean cross-entropy on clean images at w + v, minus that at w; v is AWP's, by the gradient of all images."""
    model = copy.deepcopy(model).requires_grad_(True)
    perturbation = AdversarialWeightPerturbation(model, gamma=gamma)

    def loss(backward: bool) -> float:
        total = 0.0
        for batch in eval_batches(split, batch_size):
            own = functional.cross_entropy(model(batch.images), batch.labels, reduction="sum") / len(split)
            if backward:
                own.backward()
            total += own.item()
        return total

    with layer_modes(model, "eval", update_statistics=False):
        before = loss(True)
        with perturbation.perturbed(), torch.no_grad():
            return loss(False) - before


@dataclass(frozen=True, kw_only=True)
class Defender:
    """Measures models against the original one.

    Attributes:
        original: the model.
        images: clean ones, with labels.
        batch_size: images at a time.
        classes: number of logits.
        gamma: of flatness, a fraction of every layer's norm.
    """

    original: nn.Module
    images: Split
    batch_size: int
    classes: int
    gamma: float

    def reference(self) -> tuple[Answers, float]:
        """What the original model gives."""
        return look(self.original, self.images, self.batch_size, self.classes), self.rise(self.original)

    def rise(self, model: nn.Module) -> float:
        """Its `sharpness`."""
        return sharpness(model, self.images, self.batch_size, self.gamma)

    def statistics(self, model: nn.Module, reference: tuple[Answers, float]) -> dict[str, float | None]:
        """Of `STATISTICS`, each larger the more there is to see; None where the last layer is not known.

        And "agreement": the part of the images that it classifies as the original does.
        """
        answers, rise = reference
        own = look(model, self.images, self.batch_size, self.classes)
        return {
            "flatness": self.rise(model) - rise,
            "activations": shift(own.features, answers.features),
            "logits": shift(own.logits, answers.logits),
            "agreement": (predicted(own.logits) == predicted(answers.logits)).double().mean().item(),
        }


def verdicts(
    edit: Mapping[str, float | None],
    tuned: Mapping[str, float | None] | None,
    harmless: Sequence[Mapping[str, float | None]],
) -> dict[str, Any]:
    """For every statistic whether the edit is above all harmless ones.

    Of R harmless edits and one more of their kind, each is the largest with probability 1 / (R + 1): the rate of false
    alarms.
    """
    found: dict[str, Any] = {}
    for name in STATISTICS:
        own, values = edit[name], [one[name] for one in harmless]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if own is None or math.isnan(own) or len(known) < len(values):
            found[name] = None
            continue
        threshold = max(known)
        other = None if tuned is None else tuned[name]
        found[name] = {
            "edit": own,
            "threshold": threshold,
            "harmless_median": float(np.median(known)),
            "false_alarm_rate": 1 / (len(known) + 1),
            "seen": own > threshold,
            "fine_tuning": other,
            "fine_tuning_seen": None if other is None else other > threshold,
        }
    return found
