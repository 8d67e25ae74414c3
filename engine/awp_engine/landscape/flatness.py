"""Average-case and worst-case flatness of the robust loss.

Source: Stutz, Hein, Schiele: Relating Adversarially Robust Generalization to Flat Minima, ICCV 2021, and its public
code, from which the sampling of the weights, the order of the steps and their lengths are taken. Its attack starts at
noise whose norm is uniform; ours starts uniformly in the ball.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awp_engine.attack import summed_cross_entropy
from awp_engine.landscape.bootstrap import Interval, mean_interval
from awp_engine.landscape.directions import gaussian_like, name_key, random_direction, weights_and_biases
from awp_engine.landscape.moving import WorkingCopy
from awp_engine.landscape.robust_loss import RobustLoss, cross_entropies, restart_seed
from awp_kernels import pgd_init_, pgd_step_
from awp_kernels.philox import mix_seed, uniform_integers

Select = Callable[[nn.Module], Sequence[str]]

# what a seed is mixed with, so that starting points of weights and of images are independent
_WEIGHT_START, _IMAGE_START = 1, 2


@dataclass(frozen=True, kw_only=True)
class AverageFlatness:
    """E_v[max_delta L(f(x + delta; w + v))] - max_delta L(f(x + delta; w)), image by image.

    Attributes:
        xi: radius of the ball, relative to every tensor's norm.
        reference: fp64 [N], robust loss at w.
        losses: fp64 [V, N], robust loss at each w + v.
    """

    xi: float
    reference: Tensor
    losses: Tensor

    def interval(self, seed: int) -> Interval:
        """The flatness with its 95 % interval over images and over v."""
        return mean_interval(self.losses - self.reference, seed=seed)


@dataclass(frozen=True, kw_only=True)
class WorstFlatness:
    """max_v [max_delta L(f(x + delta; w + v))] - max_delta L(f(x + delta; w)), as far as the ascent found it.

    Attributes:
        xi: radius of the ball, relative to every tensor's norm.
        reference: fp64 [N], robust loss at w.
        losses: fp64 [attempts, N], robust loss at each attempt's w + v, by the same attack as the reference.
        joint: fp64 [attempts, N], loss on the images that the joint ascent ended with, which the public code takes. It
            is also larger where the ascent attacks an image better than the reference's attack does.
        largest: fp64 [attempts], largest ||v_l|| / ||w_l|| of the weights that the losses are of.
    """

    xi: float
    reference: Tensor
    losses: Tensor
    joint: Tensor
    largest: Tensor

    @property
    def attempt(self) -> int:
        """The attempt with the largest mean loss."""
        return int(self.losses.mean(1).argmax())

    def interval(self, seed: int) -> Interval:
        """The flatness with its 95 % interval over images, for the attempt found best on all of them."""
        return mean_interval(self.losses[self.attempt] - self.reference, seed=seed)

    def joint_interval(self, seed: int) -> Interval:
        """The same for the joint ascent's images."""
        best = int(self.joint.mean(1).argmax())
        return mean_interval(self.joint[best] - self.reference, seed=seed)


def _require(name: str, value: float, minimum: float) -> None:
    if not minimum <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number >= {minimum:g}, got {value}")


def average_flatness(
    model: nn.Module,
    loss: RobustLoss,
    *,
    xi: float = 0.5,
    count: int = 10,
    seed: int = 0,
    select: Select = weights_and_biases,
    reference: Tensor | None = None,
) -> AverageFlatness:
    """How much the robust loss rises on average when weights move by xi of their norm in a random direction.

    v_l is uniform on the sphere ||v_l|| = xi ||w_l|| of every tensor l, as in the public code; in the dimensions of a
    layer nearly all of the ball's volume lies there. The attack is recomputed for every v.

    Args:
        model: left as it is, bit for bit.
        loss: the images, and how they are attacked.
        xi: relative radius, >= 0.
        count: number of v.
        seed: of the v.
        select: gives the names of the parameters that move.
        reference: fp64 [N], the robust loss at w if it is known already.

    Raises:
        ValueError: xi or count out of range.
    """
    _require("xi", xi, 0)
    _require("count", count, 1)
    copy = WorkingCopy(model)
    if reference is None:
        reference = loss(copy.model)
    losses = []
    for index in range(count):
        copy.move_(random_direction(model, seed=seed, index=index, scope="layer", select=select), xi)
        losses.append(loss(copy.model))
    return AverageFlatness(xi=xi, reference=reference, losses=torch.stack(losses))


@torch.no_grad()
def project_relative_(displacement: dict[str, Tensor], xi: float) -> None:
    """Shrink every r_l with ||r_l|| > xi to that length, in place; norms in fp64.

    ||r_l|| <= xi then holds to the rounding of r_l's entries: within xi 2^-23 for fp32. Adding ||w_l|| r_l to w_l
    rounds once more, so that the weights' own distance is within 2^-23 of xi.
    """
    for tensor in displacement.values():
        norm = tensor.double().norm()
        if norm > xi:
            tensor.copy_(tensor.double() * (xi / norm))


@torch.no_grad()
def _starting_displacement(model: nn.Module, names: Sequence[str], xi: float, seed: int) -> dict[str, Tensor]:
    """r_l of uniform direction and of length uniform in [0, xi]."""
    parameters = dict(model.named_parameters())
    start = {}
    for name in names:
        weight = parameters[name].detach()
        noise = gaussian_like(weight, name, seed=seed, index=0)
        key = torch.zeros(1, dtype=torch.int64)
        length = abs(uniform_integers(key, 1, seed=mix_seed(seed, 1, name_key(name))).item()) * 2.0**-24
        start[name] = noise * (xi * length / (noise.double().norm().item() + 1e-20))
    return start


def _joint_ascent(
    copy: WorkingCopy,
    displacement: dict[str, Tensor],
    loss: RobustLoss,
    *,
    xi: float,
    epochs: int,
    weight_step: float,
    seed: int,
) -> Tensor:
    """Move images and weights uphill together, a step of both a batch; leaves the copy at its end.

    Returns:
        fp64 [N], the loss of every image at the end.
    """
    batches, attack = loss.batches, loss.attack
    if attack.step_size is None:
        raise ValueError("attack: expected kind pgd, whose steps have one length, got apgd")
    attacked = []
    for x, _, ids, _ in batches:
        x_adv = x.clone()
        pgd_init_(x_adv, x, epsilon=attack.epsilon, norm=attack.norm, sample_ids=ids, seed=seed)
        attacked.append(x_adv)
    copy.move_relative_(displacement)
    moving = copy.parameters(displacement)
    for _ in range(epochs):
        for x_adv, (x, y, *_) in zip(attacked, batches, strict=True):
            x_adv.requires_grad_()
            with torch.enable_grad():
                total = summed_cross_entropy(copy.model(x_adv), y)
                image_gradient, *gradients = torch.autograd.grad(total, [x_adv, *moving])
            x_adv.requires_grad_(False)
            pgd_step_(x_adv, image_gradient, x, step_size=attack.step_size, epsilon=attack.epsilon, norm=attack.norm)
            for tensor, gradient in zip(displacement.values(), gradients, strict=True):
                tensor += gradient * (weight_step / (gradient.double().norm() + 1e-20)).to(tensor.dtype)
            project_relative_(displacement, xi)
            copy.move_relative_(displacement)
            loss.report(len(x))
    losses = [cross_entropies(copy.model, x_adv, batch.labels) for x_adv, batch in zip(attacked, batches, strict=True)]
    return torch.cat(losses).cpu()


def worst_flatness(
    model: nn.Module,
    loss: RobustLoss,
    *,
    xi: float = 0.003,
    epochs: int = 20,
    attempts: int = 10,
    weight_step: float = 0.01,
    seed: int = 0,
    select: Select = weights_and_biases,
    reference: Tensor | None = None,
) -> WorstFlatness:
    """How much the robust loss rises when weights move by at most xi of their norm in the worst direction found.

    Weights and images climb together. For every batch: x by the attack's step size (sign, or normalised for L2),
    projected as in PGD; v_l by weight_step ||w_l|| g_l / ||g_l||, projected onto ||v_l|| <= xi ||w_l||. Both start at
    random, v_l uniformly in direction and length. At the end the images are attacked anew at w + v as they were at w,
    so that the rise is due to the weights alone and vanishes with xi.

    Args:
        model: left as it is, bit for bit.
        loss: the batches, of which the weights take a step for each, so that their size matters; the images' ball, step
            and norm; and the attack for the reference and for the end.
        xi: relative radius, >= 0; the paper uses 0.00075 to 0.005.
        epochs: passes over the batches.
        attempts: random starts, of which the one with the largest mean loss counts.
        weight_step: relative length of a weight's step, > 0.
        seed: of the starts.
        select: gives the names of the parameters that move.
        reference: fp64 [N], the robust loss at w if it is known already.

    Raises:
        ValueError: xi, epochs, attempts or weight_step out of range; an attack of kind apgd.
    """
    _require("xi", xi, 0)
    _require("weight_step", weight_step, 0)
    for name, number in (("epochs", epochs), ("attempts", attempts)):
        _require(name, number, 1)
    copy = WorkingCopy(model)
    if reference is None:
        reference = loss(copy.model)
    names = select(model)
    joint, losses, largest = [], [], []
    for attempt in range(attempts):
        displacement = _starting_displacement(model, names, xi, mix_seed(seed, _WEIGHT_START, attempt))
        joint.append(
            _joint_ascent(
                copy,
                displacement,
                loss,
                xi=xi,
                epochs=epochs,
                weight_step=weight_step,
                seed=restart_seed(mix_seed(seed, _IMAGE_START), attempt),
            )
        )
        losses.append(loss(copy.model))
        largest.append(copy.largest_move())
    return WorstFlatness(
        xi=xi,
        reference=reference,
        losses=torch.stack(losses),
        joint=torch.stack(joint),
        largest=torch.tensor(largest, dtype=torch.float64),
    )
