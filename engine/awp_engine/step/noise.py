"""Training under Gaussian noise, for classifiers that randomised smoothing certifies.

Sources: Cohen, Rosenfeld, Kolter: Certified Adversarial Robustness via Randomized Smoothing, ICML 2019 (training on
noisy images); Salman et al.: Provably Robust Deep Learning via Adversarially Trained Smoothed Classifiers, NeurIPS 2019
(SmoothAdv: attacked ones).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awp_engine.attack.losses import log_probabilities
from awp_kernels import pgd_init_normal_
from awp_kernels.philox import mix_seed


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Noise that depends on the seed, the sample's id and the number of the copy alone.

    Attributes:
        sigma: standard deviation, on pixels in [0, 1].
        copies: noisy copies of an image, >= 1.
        seed: in [0, 2^63).
    """

    sigma: float
    copies: int
    seed: int

    def added(self, x: Tensor, ids: Tensor, number: int) -> Tensor:
        """Copy `number` of images x, [N, C, H, W], of samples int64 [N]: x + sigma N(0, 1), not clipped.

        The normal numbers are `awp_kernels.philox.normals` of the seed mix_seed(seed, number).
        """
        noisy = torch.empty_like(x)
        pgd_init_normal_(noisy, x, std=self.sigma, sample_ids=ids, seed=mix_seed(self.seed, number))
        return noisy


class Smoothed(nn.Module):
    """Logarithms of a model's probabilities, averaged over noisy copies of the images, as logits.

    Their cross-entropy is SmoothAdv's loss, -log(mean of p_i[y]), where p_i are the probabilities for x + noise_i.

    Args:
        model: maps images to logits.
        noise: what is added.
        ids: int64 [N], of the images that it will be called with.
    """

    def __init__(self, model: nn.Module, noise: Noise, ids: Tensor) -> None:
        super().__init__()
        self.model, self._noise, self._ids, self._added = model, noise, ids, list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, classes]."""
        if not self._added:
            zeros = torch.zeros_like(x.detach())
            self._added = [self._noise.added(zeros, self._ids, number) for number in range(self._noise.copies)]
        told = torch.stack([log_probabilities(self.model(x + added)) for added in self._added])
        return told.logsumexp(0) - math.log(len(told))
