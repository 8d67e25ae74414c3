"""Averages of the weights over training.

Source: Izmailov et al.: Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018 (SWA); Gowal et
al.: Uncovering the Limits of Adversarial Training, 2020 (EMA in adversarial training).
"""

import copy

import torch
from torch import Tensor, nn

from awp_engine.config import AverageConfig
from awp_engine.optim.optimizer import Optimizer


class WeightAverage:
    """A second model that holds the average of the first one's parameters; the two share no memory.

    Its batch-normalisation statistics are those of no model that ever ran: `recompute_statistics` of
    `models.batch_norm` has to compute them anew before the average is used.

    Args:
        model: the model in training.
        config: kind, decay and start.
        epochs: of the whole run.
        twin: another model like it, to hold the average; by default a copy is made, which shards do not allow.

    Attributes:
        model: the average, in eval mode.
        count: how many sets of weights are in it.
    """

    def __init__(self, model: nn.Module, config: AverageConfig, epochs: int, *, twin: nn.Module | None = None) -> None:
        self.config, self.epochs = config, epochs
        self.model = (copy.deepcopy(model) if twin is None else twin).eval().requires_grad_(False)
        self.count = 0
        self._live: list[Tensor] = list(model.parameters())
        # on the device, where a captured step reads it
        self._weight = torch.ones((), dtype=torch.float64, device=self._live[0].device)

    @property
    def started(self) -> bool:
        """Whether there is an average to use."""
        return self.count > 0

    def follow(self, optimizer: Optimizer) -> None:
        """Have every step of `optimizer`, over the live model, take the weights in (EMA); see `before_step`."""
        if self.config.kind == "ema":
            optimizer.averages = dict(zip(self._live, self.model.parameters(), strict=True))
            optimizer.average_weight = self._weight

    def before_step(self) -> None:
        """Say how much the weights of the step to come are to count (EMA)."""
        if self.config.kind == "ema":
            # the usual warm-up: an average of few steps must not remember the random start
            share = 1 - min(self.config.decay, (1 + self.count) / (10 + self.count)) if self.count else 1.0
            self._weight.fill_(share)
            self.count += 1

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> None:
        """Take the weights in after an epoch, counted from 1 (SWA)."""
        if self.config.kind != "swa" or epoch <= self.config.start * self.epochs:
            return
        averages: list[Tensor] = list(self.model.parameters())
        if self.count == 0:
            torch._foreach_copy_(averages, self._live)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(averages, self._live, 1 / (self.count + 1))  # pyright: ignore[reportPrivateImportUsage]
        self.count += 1

    def state(self) -> dict[str, Tensor]:
        """The averaged parameters; to be written back in place, and `count` set."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}
