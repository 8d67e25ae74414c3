"""IKL-AT and GKL-AT: the divergence of TRADES taken apart into a squared error and a cross-entropy.

Source: Cui et al.: Decoupled Kullback-Leibler Divergence Loss, NeurIPS 2024 (IKL); Cui et al.: Generalized
Kullback-Leibler Divergence Loss, TPAMI 2026 (GKL); and their public code, jiequancui/DKL.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import DivergenceFrom, Loss
from awp_engine.attack.losses import log_probabilities
from awp_engine.distributed.batch import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.step.objectives.objective import Objective, at_least_fp32, by_view, counted_part, require_number


def weighted_squared_error(logits: Tensor, logits_adv: Tensor, weights: Tensor) -> Tensor:
    """1/4 sum over i, j of s_i s_j ((n_i - n_j) - (a_i - a_j))^2 of every sample, [N]: the wMSE of both papers.

    With u = n - a it is half of (sum s) times the weighted sum of squares of u about its weighted mean, which takes
    O(classes) a sample and no matrix.

    Args:
        logits: n, [N, classes], of clean images.
        logits_adv: a, likewise, of attacked ones.
        weights: s, likewise; at least one of a sample is > 0.
    """
    total, moved = weights.sum(1, keepdim=True), logits - logits_adv
    mean = (weights * moved).sum(1, keepdim=True) / total
    return 0.5 * (total * weights * (moved - mean).square()).sum(1)


def soft_cross_entropy(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """Cross-entropy of attacked answers with the clean ones, which get no gradient: the sCE of both papers, [N]."""
    return -(log_probabilities(logits.detach()).exp() * log_probabilities(logits_adv)).sum(1)


class ImprovedKL(Objective):
    """Cross-entropy on clean images, beta * wMSE and alpha * sCE between clean and attacked ones.

    wMSE is weighted by what the network answered on average in the epoch before, to clean images of the same class. In
    the first epoch all weights are equal. A class without an image in an epoch keeps those that it had.

    With `aug_weight` each image has two views, which pass together, with common batch statistics. Cross-entropy is the
    mean of both; wMSE and sCE of the second are added to those of the first by that weight. The first alone is
    averaged.

    Args:
        beta: weight of wMSE.
        num_classes: of the images.
        device: of the logits.
        alpha: weight of sCE.
        temperature: of the answers that are averaged.
        attack_beta: weight of wMSE in what the attack climbs beside sCE: 0 for CIFAR-10 and 1 for CIFAR-100 there.
        aug_weight: weight of wMSE and sCE of a second view, by AutoAugment; None: there is one view.

    Attributes:
        means: fp64 [classes, classes], the weights; row y is the mean of softmax(logits / temperature) of class y.
        sums: fp64 [classes, classes + 1], of the epoch so far, over all ranks; the last column counts images.

    Raises:
        ConfigError: a weight that is no number >= 0, or a temperature that is none > 0.
    """

    joint_views = True

    def __init__(
        self,
        beta: float,
        num_classes: int,
        device: torch.device,
        alpha: float = 4.0,
        temperature: float = 4.0,
        attack_beta: float = 0.0,
        aug_weight: float | None = None,
    ) -> None:
        if aug_weight is not None:
            require_number("aug_weight", aug_weight)
            self.views = 2
        self.aug_weight = aug_weight
        require_number("alpha", alpha)
        require_number("attack_beta", attack_beta)
        require_number("temperature", temperature, positive=True)
        self.beta, self.alpha, self.temperature, self.attack_beta = beta, alpha, temperature, attack_beta
        self.means = torch.full((num_classes, num_classes), 1 / num_classes, dtype=torch.float64, device=device)
        self.sums = torch.zeros((num_classes, num_classes + 1), dtype=torch.float64, device=device)
        self._gathered, self._part = torch.zeros_like(self.sums), 1.0

    def begin_step(self, done: float, epoch: int, step: int) -> None:
        """The first step of an epoch goes by the answers of the one before."""
        if step == 0:
            count = self.sums[:, -1:]
            self.means.copy_(torch.where(count > 0, self.sums[:, :-1] / count, self.means))
            self.sums.zero_()

    def begin_batch(self, batch: Batch, share: float, ranks: Ranks) -> None:
        """Nothing is gathered yet; of a batch that every rank computes whole, each counts for a part of it."""
        self._gathered.zero_()
        self._part = counted_part(batch, share)

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        """Summed sCE + attack_beta * wMSE; the clean logits do not depend on x' and are computed once."""
        clean = by_view(at_least_fp32(model(x)), self.views)
        if self.attack_beta == 0:
            # sCE but for a constant
            soft = DivergenceFrom(clean)
            return soft if self.views == 1 else lambda logits, labels: soft(by_view(logits, self.views), labels)
        weights = self.means[y.repeat_interleave(self.views)].to(clean.dtype)

        def climbed(logits: Tensor, labels: Tensor) -> Tensor:
            logits = by_view(at_least_fp32(logits), self.views)
            squared = weighted_squared_error(clean, logits, weights)
            return (soft_cross_entropy(clean, logits) + self.attack_beta * squared).sum()

        return climbed

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """CE(f(x), y) + beta * wMSE, with gradients through both images, + alpha * sCE, through the attacked one.

        The logits are those of the first view.
        """
        logits_adv = model(x_adv)
        clean, adv = (by_view(at_least_fp32(logits), self.views) for logits in (model(x), logits_adv))
        if self.descending:
            self.gather(clean.detach()[:: self.views], y)
        labels = y.repeat_interleave(self.views)
        natural = F.cross_entropy(clean, labels, reduction="none")
        squared = weighted_squared_error(clean, adv, self.weights(labels).to(clean.dtype))
        apart = self.beta * squared + self.alpha * soft_cross_entropy(clean, adv)
        if self.aug_weight is not None:
            natural, apart = natural.view(-1, 2).mean(1), apart[::2] + self.aug_weight * apart[1::2]
        return natural + apart, logits_adv[:, : clean.shape[1]]

    def weights(self, y: Tensor) -> Tensor:
        """Of wMSE, fp64 [N, classes], for labels [N]."""
        return self.means[y]

    @torch.no_grad()
    def gather(self, logits: Tensor, y: Tensor) -> None:
        """Take in the answers to clean images [N, classes]: a product of matrices, which sums in one order always."""
        answers = F.pad((logits / self.temperature).softmax(1).double(), (0, 1), value=1.0)
        of_class = y == torch.arange(len(self.means), device=y.device).unsqueeze(1)
        self._gathered += of_class.to(answers.dtype) @ answers

    def after_step(self, ranks: Ranks) -> None:
        """Add the answers to this step's images, of all ranks, to those of the epoch."""
        self._gathered *= self._part
        ranks.sum_([self._gathered])
        self.sums += self._gathered

    def state(self) -> dict[str, Tensor]:
        """The weights, and the sums of the epoch so far."""
        return {"class_means": self.means, "class_sums": self.sums}


class GeneralizedKL(ImprovedKL):
    """IKL with weights raised to a power, and wMSE divided by the sum of a batch's s_i s_j in place of its size.

    Args:
        beta: weight of wMSE.
        num_classes: of the images.
        device: of the logits.
        alpha: weight of sCE.
        temperature: of the answers that are averaged.
        attack_beta: weight of wMSE in what the attack climbs, at the power 1 there.
        aug_weight: as there.
        gamma: the power; at 1 it is IKL, but for rounding.

    Raises:
        ConfigError: as `ImprovedKL`, and a power that is no number >= 0.
    """

    def __init__(
        self,
        beta: float,
        num_classes: int,
        device: torch.device,
        alpha: float = 4.0,
        temperature: float = 4.0,
        attack_beta: float = 0.0,
        aug_weight: float | None = None,
        gamma: float = 1.0,
    ) -> None:
        super().__init__(beta, num_classes, device, alpha, temperature, attack_beta, aug_weight)
        require_number("gamma", gamma)
        self.gamma = gamma
        self._scale = torch.ones((), dtype=torch.float64, device=device)

    def begin_batch(self, batch: Batch, share: float, ranks: Ranks) -> None:
        """The batch's mean of (sum s)^2, by which its wMSE is divided: it hangs on labels alone, of all ranks.

        So neither ranks nor micro-batches change it.
        """
        super().begin_batch(batch, share, ranks)
        mean = self.means[batch.labels].pow(self.gamma).sum(1).square().mean() * share
        ranks.sum_([mean])
        # wMSE is of the second order in the weights
        self._scale.copy_(mean.rsqrt())

    def weights(self, y: Tensor) -> Tensor:
        """Of wMSE, with the batch's divisor in them."""
        return self.means[y].pow(self.gamma) * self._scale
