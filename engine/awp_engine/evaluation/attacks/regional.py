"""Attacks on a part of the image.

Source: Ozbulak, Peck, De Neve, Goossens, Saeys, Van Messem: Regional Image Perturbations Reduce Lp Norms of
Adversarial Examples While Maintaining Model-to-model Transferability, ICML workshop on uncertainty, 2020.
"""

import math
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awp_engine.data import eval_batches
from awp_engine.evaluation.attacks.named import (
    EvaluationError,
    NamedAttack,
    Outcome,
    Shape,
    Trial,
    folded,
    perturbation_norms,
)
from awp_engine.models.answers import predicted
from awp_kernels import pgd_step_
from awp_kernels.philox import STREAM_UNIFORM, mix_seed, sample_words

# one grey level of an 8-bit image: small steps, as the attack stops when the prediction flips
STEP = Fraction(1, 255)
STEPS = 255
_MASK_NOISE = 11
_BOXES_AT_FIRST = 64


def _rectangle(height: int, width: int, share: float) -> Tensor:
    """Centred rectangle of the image's own proportions, bool [H, W]."""
    rows, columns = round(height * math.sqrt(share)), round(width * math.sqrt(share))
    inside = torch.zeros(height, width, dtype=torch.bool)
    top, left = (height - rows) // 2, (width - columns) // 2
    inside[top : top + rows, left : left + columns] = True
    return inside


def _first_covered(corners: Tensor, side: int, height: int, width: int) -> Tensor:
    """For every pixel the number of the first square over it, their count where there is none: int64 [N, H * W]."""
    rows, columns = torch.arange(height, device=corners.device), torch.arange(width, device=corners.device)
    samples, count = corners.shape[:2]
    first = torch.full((samples, height, width), count, device=corners.device)
    for number in reversed(range(count)):
        top, left = corners[:, number, 0, None], corners[:, number, 1, None]
        covers = ((rows >= top) & (rows < top + side)).unsqueeze(2) & (
            (columns >= left) & (columns < left + side)
        ).unsqueeze(1)  # [N, H, W]
        first.masked_fill_(covers, number)
    return first.flatten(1)


def _box_ranks(sample_ids: Tensor, pixels: int, height: int, width: int, seed: int) -> Tensor:
    """Sort keys, int64 [N, H * W]: pixels in the order in which random boxes cover them."""
    side = max(1, min(height, width) // 4)
    count = _BOXES_AT_FIRST
    while True:
        words = sample_words(sample_ids, 2 * count, seed=seed, stream=STREAM_UNIFORM).view(-1, count, 2)
        # boxes may hang over the edge, so that border pixels are hit as often as others
        spans = torch.tensor([height + side - 1, width + side - 1], device=words.device)
        first = _first_covered((words * spans >> 32) - (side - 1), side, height, width)
        if bool(((first < count).sum(1) >= pixels).all()):
            return first * (height * width) + torch.arange(height * width, device=first.device)
        count *= 2


def region_mask(shape: Shape, percent: int, height: int, width: int, *, sample_ids: Tensor, seed: int) -> Tensor:
    """Where a regional attack may change an image.

    Args:
        shape: "square", a centred rectangle of the image's proportions; "frame", what such a rectangle leaves free;
            "boxes", random squares of a quarter of the shorter side, the last one cut to measure; "pixels", random
            ones.
        percent: share of the area; exact to half a pixel for boxes and pixels, to half a row and half a column for the
            others, so that a frame may be thicker at the bottom and on the right.
        height: of the image.
        width: of the image.
        sample_ids: int64 [N]; random regions are keyed by seed and id.
        seed: in [0, 2^63).

    Returns:
        bool [N, 1, H, W].

    Raises:
        EvaluationError: the share is less than a pixel of such an image.
    """
    share = percent / 100
    pixels = math.floor(share * height * width + 0.5)
    noise = mix_seed(seed, _MASK_NOISE)
    if shape in ("square", "frame"):
        one = _rectangle(height, width, share) if shape == "square" else ~_rectangle(height, width, 1 - share)
        mask = one.to(sample_ids.device).expand(len(sample_ids), 1, height, width)
    else:
        if shape == "pixels":
            ranks = sample_words(sample_ids, height * width, seed=noise, stream=STREAM_UNIFORM)
        else:
            ranks = _box_ranks(sample_ids, pixels, height, width, noise)
        chosen = torch.argsort(ranks, dim=1, stable=True)[:, :pixels]
        mask = torch.zeros_like(ranks, dtype=torch.bool).scatter(1, chosen, True).view(-1, 1, height, width)
    if not bool(mask.flatten(1).any(1).all()):
        raise EvaluationError(f"--attacks: {percent}% of a {height}x{width} image is less than a pixel")
    return mask


def regional_attack(trial: Trial, attack: NamedAttack, *, step_size: Fraction = STEP, steps: int = STEPS) -> Outcome:
    """Step by step x <- clip(x - step * sign(d CE(f(x), target) / dx) * mask), until the prediction is not the label.

    The target is the wrong class with the largest logit on the clean image. Images that the model gets wrong clean are
    left alone. Concluded, `details` hold how many were flipped and, over those, the mean L0, L2 and Linf and number of
    steps.

    Args:
        trial: what is attacked; its ball bounds nothing here.
        attack: of the regional family.
        step_size: length of a step.
        steps: after how many to give up.

    Raises:
        EvaluationError: the region is less than a pixel.
    """
    if attack.shape is None:
        raise ValueError(f"attack: expected a regional one, got {attack.name}")
    model = trial.model
    done, norms, taken = [], [], []
    height, width = trial.split.images.shape[2:]
    batches = -(-len(trial.split) // trial.batch_size)
    with trial.bar(attack.name, batches * steps) as bar:
        for x, y, ids, _ in eval_batches(trial.split, trial.batch_size):
            mask = region_mask(attack.shape, attack.percent, height, width, sample_ids=ids, seed=trial.seed)
            with torch.no_grad():
                logits = folded(model(x), trial.classes)
            right = predicted(logits) == y
            target = logits.scatter(1, y.unsqueeze(1), -torch.inf).argmax(1)
            x_adv, active = x.clone(), torch.nonzero(right).squeeze(1)
            count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            nonfinite = torch.zeros(len(x), dtype=torch.bool, device=x.device)
            for _ in range(steps):
                if not len(active):
                    break
                current = x_adv[active].requires_grad_()
                with torch.enable_grad():
                    loss = F.cross_entropy(model(current), target[active], reduction="sum")
                    (gradient,) = torch.autograd.grad(loss, current)
                nonfinite[active] |= ~gradient.isfinite().flatten(1).all(1)
                moved = current.detach()
                # epsilon 1 bounds nothing on [0, 1]
                length, region = -float(step_size), mask[active]
                pgd_step_(moved, gradient, x[active], step_size=length, epsilon=1.0, norm="linf", mask=region)
                x_adv[active] = moved
                count[active] += 1
                with torch.no_grad():
                    active = active[trial.decided(model(moved)) == y[active]]
                bar.advance()
            holds = torch.zeros_like(right).index_fill(0, active, True)
            flipped = right & ~holds
            norms.append({name: value[flipped] for name, value in perturbation_norms(x_adv, x).items()})
            taken.append(count[flipped])
            done.append((x_adv, holds, nonfinite))
            bar.set(len(done) * steps, batches * steps)
    flipped_steps = torch.cat(taken)
    details: dict[str, Any] = {"flipped": len(flipped_steps), "steps": flipped_steps.double().sum().item()}
    details |= {name: torch.cat([part[name] for part in norms]).sum().item() for name in ("L0", "L2", "Linf")}

    def means(sums: dict[str, Any]) -> dict[str, Any]:
        flipped = sums["flipped"]
        if not flipped:
            return {"flipped": 0}
        found = {name: sums[name] / flipped for name in ("L0", "L2", "Linf", "steps")}
        return {"flipped": flipped, **found, "L0_share": found["L0"] / (height * width)}

    parameters = {
        "region": attack.shape,
        "percent": attack.percent,
        "step_size": str(step_size),
        "most_steps": steps,
        "target": "wrong class with the largest clean logit",
        "bound": "the region and [0, 1] alone, no epsilon",
    }
    return Outcome.of_batches(done, parameters=parameters, details=details, concluded=means)
