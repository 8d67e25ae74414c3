"""IKL and GKL written out in plain PyTorch, with all pairs of classes, for the tests to compare with."""

from collections.abc import Callable

import torch
from plain_methods import cross_entropy, log_probabilities
from torch import Tensor, nn


def pair_weights(means: Tensor, y: Tensor, gamma: float = 1.0) -> Tensor:
    """s s^T of every sample, [N, C, C]; s is the row of its class, raised to gamma."""
    s = torch.stack([means[label] for label in y]) ** gamma
    return s.unsqueeze(2) * s.unsqueeze(1)


def squared(n: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """1/4 sum_ij v_ij ((n_i - n_j) - (a_i - a_j))^2 of every sample, [N]."""
    total = torch.zeros(len(n), dtype=n.dtype)
    for i in range(n.shape[1]):
        for j in range(n.shape[1]):
            total = total + v[:, i, j] * ((n[:, i] - n[:, j]) - (a[:, i] - a[:, j])) ** 2
    return total / 4


def soft(n: Tensor, a: Tensor) -> Tensor:
    """Cross-entropy of a with the answers n, which are held still, [N]."""
    return -(log_probabilities(n).exp().detach() * log_probabilities(a)).sum(1)


def ikl_loss(n: Tensor, a: Tensor, y: Tensor, means: Tensor, *, alpha: float, beta: float) -> Tensor:
    wmse = squared(n, a, pair_weights(means, y)).sum() / len(y)
    return cross_entropy(n, y).mean() + beta * wmse + alpha * soft(n, a).mean()


def gkl_loss(n: Tensor, a: Tensor, y: Tensor, means: Tensor, *, alpha: float, beta: float, gamma: float) -> Tensor:
    v = pair_weights(means, y, gamma)
    return cross_entropy(n, y).mean() + beta * squared(n, a, v).sum() / v.sum() + alpha * soft(n, a).mean()


def of_two_views(loss: Callable[..., Tensor], n: Tensor, a: Tensor, y: Tensor, weight: float) -> Tensor:
    """Of a batch whose first half are the images and whose second half is augmented more: CE over both halves; what
    `loss` has beside CE of the first, and of the second with a weight."""
    total, size = cross_entropy(n, torch.cat((y, y))).mean(), len(y)
    for half, counted in ((slice(0, size), 1.0), (slice(size, 2 * size), weight)):
        total = total + counted * (loss(n[half], a[half], y) - cross_entropy(n[half], y).mean())
    return total


def iterates(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    means: Tensor,
    *,
    attack_beta: float,
    epsilon: float,
    step_size: float,
    steps: int,
) -> list[Tensor]:
    """Of the Linf attack in eval mode, clean logits computed anew in each."""
    training = model.training
    model.eval()
    x_adv, found = start.clone(), []
    for _ in range(steps):
        x_adv.requires_grad_()
        n, a = model(x), model(x_adv)
        loss = (soft(n, a) + attack_beta * squared(n, a, pair_weights(means, y))).mean()
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
        found.append(x_adv.clone())
    model.train(training)
    return found


class ClassMeans:
    """W and what an epoch adds up, one image after the other."""

    def __init__(self, classes: int, temperature: float) -> None:
        self.means, self.temperature = torch.full((classes, classes), 1 / classes, dtype=torch.float64), temperature
        self.answers: dict[int, list[Tensor]] = {}

    def add(self, logits: Tensor, y: Tensor) -> None:
        for row, label in zip(log_probabilities(logits / self.temperature).exp().detach(), y.tolist(), strict=True):
            self.answers.setdefault(label, []).append(row)

    def end_epoch(self) -> None:
        for label, rows in self.answers.items():
            self.means[label] = torch.stack(rows).mean(0)
        self.answers = {}
