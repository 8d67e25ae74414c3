"""Averages of the weights over training.

Source: Izmailov et al.: Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018 (SWA); Gowal et
al.: Uncovering the Limits of Adversarial Training, 2020 (EMA in adversarial training).
"""

import copy

import torch
from torch import Tensor, nn

from awp_engine.config import AverageConfig
from awp_engine.models.batch_norm import other_buffers, share_memory
from awp_engine.optim.optimizer import Optimizer


class WeightAverage:
    """A second model that holds the average of the first one's parameters; the two share no memory.

    Its batch-normalisation statistics are those of no model that ever ran, unless they follow the model's in every step
    (`config.statistics`): `recompute_statistics` of `models.batch_norm` has to compute them anew before it is used.

    Args:
        model: the model in training.
        config: kind, decay and start.
        epochs: of the whole run.
        steps: of an epoch.
        twin: another model like it, to hold the average; by default a copy is made, which shards do not allow.

    Attributes:
        model: the average, in eval mode.
        count: how many sets of weights are in it.
        statistics: its running statistics and other buffers, where they follow the model's in every step; else empty.
    """

    def __init__(
        self, model: nn.Module, config: AverageConfig, epochs: int, *, steps: int = 1, twin: nn.Module | None = None
    ) -> None:
        self.config, self.epochs = config, epochs
        self.model = (copy.deepcopy(model) if twin is None else twin).eval().requires_grad_(False)
        self.count = 0
        # 1e-9: as for milestones
        self._copies = int(config.warmup * steps + 1e-9)
        self._source = model
        self._live: list[Tensor] = list(model.parameters())
        # on the device, where a captured step reads it
        self._weight = torch.ones((), dtype=torch.float64, device=self._live[0].device)
        self._averaged = share_memory(self.model) if self.keeps_statistics else []
        others = [buffer for _, _, buffer in other_buffers(self.model)] if self.keeps_statistics else []
        self.statistics: list[Tensor] = [*self._averaged, *others]
        self.restart_()

    @property
    def started(self) -> bool:
        """Whether there is an average to use."""
        return self.count > 0

    @property
    def keeps_statistics(self) -> bool:
        """Whether its statistics follow the model's in every step."""
        return self.config.statistics in ("averaged", "live")

    @torch.no_grad()
    def restart_(self) -> None:
        """Become a copy of the model as it is, which counts as no step's."""
        # one by one: torch copies no list of shards
        pairs = zip(self.model.state_dict().values(), self._source.state_dict().values(), strict=True)
        for averaged, live in pairs:
            averaged.copy_(live)

    def follow(self, optimizer: Optimizer) -> None:
        """Have every step of `optimizer`, over the live model, take the weights in (EMA); see `before_step`."""
        if self.config.kind == "ema":
            optimizer.averages = dict(zip(self._live, self.model.parameters(), strict=True))
            optimizer.average_weight = self._weight

    def before_step(self) -> None:
        """Say how much the weights of the step to come are to count (EMA)."""
        if self.config.kind == "ema":
            self._weight.fill_(self._share(self.count - self._copies))
            self.count += 1

    def _share(self, averaged: int) -> float:
        """Of the weights of a step before which so many were averaged; below 0: they were copied."""
        if averaged < 0 or (self.count == 0 and self.config.ramp):
            return 1.0
        # the usual warm-up: an average of few steps must not remember the random start
        ramp = (1 + averaged) / (10 + averaged) if self.config.ramp else 1.0
        return 1 - min(self.config.decay, ramp)

    @torch.no_grad()
    def take_statistics_(self, live: list[Tensor]) -> None:
        """Take in, or over, the running statistics of the model, and over its other buffers, at the end of a step.

        Args:
            live: `WorkingModels.statistics`; as `statistics` is laid out.
        """
        if not self.keeps_statistics:
            return
        for index, (ours, current) in enumerate(zip(self.statistics, live, strict=True)):
            of_batch_norm = index < len(self._averaged) and ours.is_floating_point()
            if self.config.statistics == "averaged" and of_batch_norm:
                ours.lerp_(current, self._weight.to(ours.dtype))
            else:
                ours.copy_(current)

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> None:
        """Take the weights in after an epoch, counted from 1 (SWA)."""
        if self.config.kind != "swa" or epoch <= self.config.start * self.epochs:
            return
        if self.count == 0:
            self.restart_()
        else:
            averages: list[Tensor] = list(self.model.parameters())
            torch._foreach_lerp_(averages, self._live, 1 / (self.count + 1))  # pyright: ignore[reportPrivateImportUsage]
        self.count += 1

    def state(self) -> dict[str, Tensor]:
        """The averaged parameters, and buffers where they follow the model's; to be written back in place, and `count`
        set.
        """
        if self.keeps_statistics:
            return self.model.state_dict()
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}
