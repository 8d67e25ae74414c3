"""A plain and an adversarial autoencoder for vectors in [0, 1], trained on images that have weights.

Networks as Beggel, Pfeiffer, Bischl (2019) have them: encoder, decoder and discriminator with two layers of 1000 ReLU
units, batch normalisation in the encoder, a linear code, and a sigmoid at the decoder's end. The adversarial game, and
batches of 100, are those of Makhzani et al., Adversarial Autoencoders (2016). Theirs is SGD whose rate falls after a
number of epochs; ours is Adam, 1e-3, which suits any number: its first beta is 0.9, and 0.5 on both sides of the game.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from awp_kernels.philox import mix_seed

HIDDEN = 1000
BATCH_SIZE = 100
LR, GAME_BETAS = 1e-3, (0.5, 0.999)
# images whose scores are computed at once
_CHUNK = 1000
_LOG_2PI = 1.8378770664093453


def network(
    inputs: int,
    outputs: int,
    *,
    hidden: int,
    batch_norm: bool,
    generator: torch.Generator,
    end: nn.Module | None = None,
) -> nn.Sequential:
    """Two hidden layers of ReLU units; weights as torch's own layers draw them, but from `generator`; biases 0."""
    layers: list[nn.Module] = []
    sizes = inputs, hidden, hidden, outputs
    for number, (first, last) in enumerate(itertools.pairwise(sizes)):
        normalised = batch_norm and number < 2
        # batch normalisation takes a bias away, and Adam would follow the rounding errors of its gradient
        linear: Any = nn.utils.skip_init(nn.Linear, first, last, bias=not normalised)
        nn.init.kaiming_uniform_(linear.weight, a=5**0.5, generator=generator)
        if not normalised:
            nn.init.zeros_(linear.bias)
        layers += [linear, *([nn.BatchNorm1d(last)] if normalised else []), nn.ReLU()]
    return nn.Sequential(*layers[:-1], *([] if end is None else [end]))


def reconstruction_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of every image, [n], of two [n, values]."""
    return (x - y).square().mean(1)


def weighted_loss(errors: Tensor, weights: Tensor) -> Tensor:
    """What the autoencoder descends: sum of weight * error, a batch's mean; a negative weight unlearns an image."""
    return (weights * errors).mean()


def discriminator_loss(prior: Tensor, codes: Tensor) -> Tensor:
    """Binary cross-entropy of logits: of draws from the prior, which are 1, and of codes, which are 0."""
    return (softplus(-prior) + softplus(codes)).mean()


def generator_loss(codes: Tensor) -> Tensor:
    """Binary cross-entropy of the discriminator's logits of codes that should be taken for the prior's."""
    return softplus(-codes).mean()


def log_density(codes: Tensor) -> Tensor:
    """Logarithm of the density of N(0, I) at codes [n, dimensions], [n]."""
    return -0.5 * (codes.square().sum(1) + codes.shape[1] * _LOG_2PI)


class Scores(NamedTuple):
    """Of images: their codes [n, dimensions] and reconstruction errors [n]."""

    codes: Tensor
    errors: Tensor


class Autoencoder:
    """Encoder, decoder and, where `adversarial`, a discriminator that drives codes towards N(0, I).

    Args:
        values: of an image.
        code: dimensions of the code.
        adversarial: whether there is a prior.
        seed: of weights, order of images and draws from the prior.
        device: where to compute.
        hidden: units a layer.
    """

    def __init__(
        self,
        values: int,
        *,
        code: int,
        adversarial: bool,
        seed: int,
        device: torch.device | str = "cpu",
        hidden: int = HIDDEN,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def build(
            inputs: int, outputs: int, *, batch_norm: bool = False, end: nn.Module | None = None
        ) -> nn.Sequential:
            shape = {"hidden": hidden, "batch_norm": batch_norm, "generator": generator, "end": end}
            return network(inputs, outputs, **shape).to(device)

        self.encoder = build(values, code, batch_norm=True)
        self.decoder = build(code, values, end=nn.Sigmoid())
        self.discriminator = build(code, 1) if adversarial else None
        self._code, self._seed, self._epoch = code, seed, 0
        # one pass over memory instead of many: a third of a step's time else
        coders = [*self.encoder.parameters(), *self.decoder.parameters()]
        self._reconstruct = torch.optim.Adam(coders, LR, fused=True)
        if self.discriminator is not None:
            game = {"lr": LR, "betas": GAME_BETAS, "fused": True}
            self._discriminate = torch.optim.Adam(self.discriminator.parameters(), **game)
            self._deceive = torch.optim.Adam(self.encoder.parameters(), **game)

    def train(self, x: Tensor, weights: Tensor, epochs: int, advance: Callable[[int], None] = lambda _: None) -> None:
        """Goes on for some epochs over the images whose weight is not 0; those below 0 take no part in the game.

        Args:
            x: images, fp32 [n, values] in [0, 1].
            weights: [n], at least two of which are not 0.
            epochs: how many.
            advance: is told 1 after every epoch.
        """
        counts = weights != 0
        x, weights = x[counts], weights[counts].to(x.dtype)
        self.encoder.train()
        for _ in range(epochs):
            for batch, prior in self._batches(len(x)):
                rows = batch.to(x.device)
                self._step(x[rows], weights[rows], prior.to(x))
            self._epoch += 1
            advance(1)
        self.encoder.eval()

    def _batches(self, images: int) -> Iterator[tuple[Tensor, Tensor]]:
        # of this epoch alone, so that nothing but its number has to be remembered
        generator = torch.Generator().manual_seed(mix_seed(self._seed, self._epoch))
        order = torch.randperm(images, generator=generator)
        # equal parts: one image alone has no batch statistics
        for rows in order.tensor_split(-(-images // BATCH_SIZE)):
            yield rows, torch.randn(len(rows), self._code, generator=generator)

    def _step(self, x: Tensor, weights: Tensor, prior: Tensor) -> None:
        self._reconstruct.zero_grad()
        weighted_loss(reconstruction_error(x, self.decoder(self.encoder(x))), weights).backward()
        self._reconstruct.step()
        if self.discriminator is None or not (normal := weights > 0).any():
            return
        codes = self.encoder(x)[normal]
        self._discriminate.zero_grad()
        discriminator_loss(self.discriminator(prior[normal]), self.discriminator(codes.detach())).backward()
        self._discriminate.step()
        self._deceive.zero_grad()
        self.discriminator.requires_grad_(False)
        generator_loss(self.discriminator(codes)).backward()
        self.discriminator.requires_grad_(True)
        self._deceive.step()

    @torch.no_grad()
    def score(self, x: Tensor) -> Scores:
        """Codes and errors of images [n, values], by the running statistics of batch normalisation."""
        found = []
        for part in x.split(_CHUNK):
            codes = self.encoder(part)
            found.append((codes, reconstruction_error(part, self.decoder(codes))))
        codes, errors = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Scores(codes, errors)
