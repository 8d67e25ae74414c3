"""TRADES, MART and their AWP steps written out in plain PyTorch, for the tests to compare with.

Formulas as in the papers: probabilities and logarithms spelled out, one perturbed copy of the weights, plain SGD.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def log_probabilities(logits: Tensor) -> Tensor:
    return logits - logits.exp().sum(1, keepdim=True).log()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """[N]"""
    return -log_probabilities(logits)[torch.arange(len(y)), y]


def kl(logits_adv: Tensor, logits_clean: Tensor) -> Tensor:
    """KL(p_clean || p_adv), [N]."""
    adv, clean = log_probabilities(logits_adv), log_probabilities(logits_clean)
    return (clean.exp() * (clean - adv)).sum(1)


def trades_loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, beta: float) -> Tensor:
    logits_adv, logits = model(x_adv), model(x)
    return cross_entropy(logits, y).sum() / len(y) + beta * kl(logits_adv, logits).sum() / len(y)


def mart_loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, beta: float) -> Tensor:
    logits_adv, logits = model(x_adv), model(x)
    total = torch.zeros((), dtype=x.dtype)
    for n in range(len(y)):
        p_adv, p = log_probabilities(logits_adv[n : n + 1])[0].exp(), log_probabilities(logits[n : n + 1])[0].exp()
        wrong = max(p_adv[k] for k in range(len(p_adv)) if k != y[n])
        boosted = -p_adv[y[n]].log() - (1.0001 - wrong + 1e-12).log()
        divergence = (p * (p.log() - p_adv.log())).sum()
        total = total + boosted + beta * divergence * (1.0000001 - p[y[n]])
    return total / len(y)


def attack(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, kind: str, epsilon: float, step_size: float, steps: int
) -> list[Tensor]:
    """Iterates of the Linf attack in eval mode; the clean logits are computed anew in each, as the public code does."""
    training = model.training
    model.eval()
    x_adv, iterates = start.clone(), [start.clone()]
    for _ in range(steps):
        x_adv.requires_grad_()
        logits = model(x_adv)
        loss = kl(logits, model(x)).sum() if kind == "trades" else cross_entropy(logits, y).mean()
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + step_size * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp(0, 1)
        iterates.append(x_adv.clone())
    model.train(training)
    return iterates


def awp_step(
    model: nn.Module,
    momentum: dict[str, Tensor],
    x_adv: Tensor,
    x: Tensor,
    y: Tensor,
    *,
    kind: str | Callable[..., Tensor],
    beta: float,
    gamma: float,
    lr: float,
    mu: float,
    weight_decay: float,
) -> None:
    """One whole step: gradient at w on a copy, gradient at w + gamma v, SGD with decay at w.

    kind: trades, mart, or a loss with the arguments of `trades_loss`.
    """
    loss = {"trades": trades_loss, "mart": mart_loss}[kind] if isinstance(kind, str) else kind
    climber = copy.deepcopy(model).train()
    loss(climber, x_adv, x, y, beta).backward()
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, ascent in climber.named_parameters():
            if ascent.ndim > 1 and "weight" in name:
                w, g = originals[name], ascent.grad
                v = w.pow(2).sum().sqrt() / (g.pow(2).sum().sqrt() + 1e-20) * g
                model.get_parameter(name).add_(gamma * v)
    model.train().zero_grad()
    loss(model, x_adv, x, y, beta).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gradient = parameter.grad + weight_decay * originals[name]
            momentum[name] = mu * momentum[name] + gradient if name in momentum else gradient
            parameter.copy_(originals[name] - lr * momentum[name])
