"""What a checkpoint holds, written and read by one loop over all that has a state."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError
from awp_engine.distributed.replicas import check_replicas
from awp_engine.distributed.sharding import gather, is_sharded, scatter_
from awp_engine.files.run_places import CHECKPOINTS
from awp_engine.models.views import auxiliary_set, base_set
from awp_engine.optim.optimizer import allocate_optimizer_tensors, optimizer_tensors
from awp_engine.train.progress import Progress
from awp_engine.train.setup import Setup

# groups that a checkpoint may lack; SGD without momentum has an empty one, which is there
_OPTIONAL = ("average", "loss_scale", "method", "awp", "auxiliary", "partner")
Tensors = Mapping[str, Tensor]


class Stateful(Protocol):
    """What goes on from a checkpoint."""

    def state(self) -> Mapping[str, Tensor]:
        """Tensors by name, as they are now; all ranks call it."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, whole and on the CPU."""
        ...


class TensorState:
    """Tensors that are written back in place, shards too.

    Args:
        read: gives them by name, as they are now.
        allocate: gives those to be written into, by the names that a checkpoint has; `read` does if not given.
    """

    def __init__(self, read: Callable[[], Tensors], allocate: Callable[[Tensors], Tensors] | None = None) -> None:
        self.state, self._allocate = read, allocate or (lambda _: read())

    def load(self, state: Mapping[str, Tensor]) -> None:
        """In place."""
        scatter_(self._allocate(state), state)


class RunState:
    """Where a run stands, and its checkpoints.

    The first rank writes and reads them, and tells the others.

    Args:
        setup: of the run.
        sums: of the epoch's metrics.
        best: the weights that were selected.

    Attributes:
        progress: how far the run is.
    """

    def __init__(self, setup: Setup, sums: Stateful, best: Stateful) -> None:
        held, average = (setup.model, setup.optimizer), setup.average
        self._setup, self._ranks, self._average = setup, setup.ranks, average
        loss_scale = setup.awp_step.passes.loss_scale
        # without second sets of batch normalisation: files of weights have the names of the plain model
        model = TensorState(lambda: base_set(setup.model.state_dict()))
        optimizer = TensorState(partial(optimizer_tensors, *held), partial(allocate_optimizer_tensors, *held))
        averaged: list[Stateful] = []
        if average is not None:
            # nothing before it has begun
            averaged = [
                TensorState(
                    lambda: base_set(average.state()) if average.started else {}, lambda _: base_set(average.state())
                )
            ]
        second = TensorState(self._second_sets)
        partner = TensorState(self._partner, self._partner)
        limit = setup.awp_step.rise_limit
        method = TensorState(setup.awp_step.passes.objective.state)
        # what each group of tensors in a checkpoint is made of
        self._groups: dict[str, list[Stateful]] = {
            "model": [model],
            "optimizer": [optimizer],
            "best_model": [best],
            "epoch": [sums, *([] if setup.free is None else [setup.free])],
            "average": averaged,
            "loss_scale": [] if loss_scale is None else [loss_scale],
            "method": [method] if method.state() else [],
            "awp": [] if limit is None else [TensorState(limit.state)],
            "auxiliary": [second] if second.state() else [],
            "partner": [partner] if partner.state() else [],
        }
        # what must be equal to the bit on all ranks
        self._replicated = [("", model), ("momentum of ", optimizer), *(("average of ", part) for part in averaged)]
        self._replicated += [("method's ", method), ("", second), ("partner's ", partner)]
        self.progress = Progress()
        self._directory = setup.run_dir / CHECKPOINTS
        self.writer = checkpoint.Writer(self._directory)
        self._identity = {"config_hash": setup.config_hash, **setup.fingerprints}
        self._saved: tuple[int, int] | None = None
        self._clock = time.monotonic()

    def _second_sets(self) -> Tensors:
        """Those of model and average, where they have any."""
        held = {"model": self._setup.model.state_dict(), "average": {}}
        if self._average is not None:
            held["average"] = self._average.state()
        return {f"{whose}.{name}": t for whose, all_ in held.items() for name, t in auxiliary_set(all_).items()}

    def _partner(self, saved: Tensors | None = None) -> Tensors:
        """The network that a method trains beside the model, and its part of the optimizer's state; or nothing.

        `saved`: has the names of a state that is to be allocated.
        """
        partner, optimizer = self._setup.awp_step.passes.objective.partner, self._setup.optimizer
        if partner is None:
            return {}
        if saved is None:
            moments = optimizer_tensors(partner, optimizer)
        else:
            begins = "optimizer."
            names = {name.removeprefix(begins): t for name, t in saved.items() if name.startswith(begins)}
            moments = allocate_optimizer_tensors(partner, optimizer, names)
        held = {"model": partner.state_dict(), "optimizer": moments}
        return {f"{part}.{name}": tensor for part, tensors in held.items() for name, tensor in tensors.items()}

    def start_clock(self) -> None:
        """Count seconds from now on."""
        self._clock = time.monotonic()

    def tick(self) -> None:
        """Bring the run's seconds up to date."""
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = now

    def check_replicas(self, when: str) -> None:
        """Compare what has to be the same on all ranks, to the bit.

        Raises:
            DivergenceError: naming what differs.
        """
        tensors = {f"{what}{name}": t for what, part in self._replicated for name, t in part.state().items()}
        check_replicas(self._ranks, {name: t for name, t in tensors.items() if not is_sharded(t)}, when)

    def save(self, *, wait: bool = False) -> str | None:
        """Write a checkpoint of where the run stands, unless there is one, in the background unless `wait`.

        Returns:
            Where it is, on the first rank; None on others and in the background.
        """
        config, progress = self._setup.config, self.progress
        if self._saved != (progress.epoch, progress.step):
            self.tick()
            self.check_replicas(f"epoch {progress.epoch}, step {progress.step}")
            progress.averaged = 0 if self._average is None else self._average.count
            tensors: dict[str, Tensors] = {}
            for group, parts in self._groups.items():
                tensors[group] = {name: tensor for part in parts for name, tensor in part.state().items()}
                if self._setup.sharded:
                    tensors[group] = gather(tensors[group])
            if self._ranks.is_first:
                state = {
                    **dataclasses.asdict(progress),
                    "ranks": self._ranks.world,
                    **self._identity,
                    "made_by": self._setup.made_by,
                    **self._setup.description.to_metadata(),
                }
                best = checkpoint.checkpoint_name(progress.best_epoch) if progress.best_epoch else None
                name = checkpoint.checkpoint_name(progress.epoch, progress.step)
                held = {group: members for group, members in tensors.items() if members or group not in _OPTIONAL}
                kept = checkpoint.Retention(last=config.keep_checkpoints, every_epochs=config.keep_every, best=best)
                self.writer.save(name, held, state, kept)
            self._saved = (progress.epoch, progress.step)
        path = self.writer.wait() if wait else None
        return None if path is None else str(path)

    def resume(self) -> list[str]:
        """Go on from the checkpoint that was found, if one was; returns what to tell the user.

        Raises:
            CheckpointError: it lacks what this run needs.
        """
        found, self._setup.found = self._setup.found, None
        if found is None:
            return []
        tensors = self._ranks.broadcast_groups(found.tensors, self._setup.device)
        try:
            self._load(found.state, tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{found.path}: lacks what this run needs, or has it in another shape: {error}"
            ) from error
        messages = [f"skipped a checkpoint: {line}" for line in found.skipped]
        messages.append(f"going on after {self.progress}, from {found.path}")
        if found.state["ranks"] != self._ranks.world:
            messages.append(
                f"{found.state['ranks']} ranks before, {self._ranks.world} now: images and noise are the same; sums "
                "differ by rounding, and without --distributed.sync-batch-norm every rank normalises by another part "
                "of the batch"
            )
        return messages

    def _load(self, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """What `save` wrote."""
        self.progress = Progress.read(state)
        for group, parts in self._groups.items():
            # an average that has not begun has none; a loss scale that is new here begins anew
            may_lack = {"average": not self.progress.averaged, "loss_scale": True}
            if group in tensors or not may_lack.get(group, False):
                for part in parts:
                    part.load(tensors[group])
        if self._average is not None:
            self._average.count = self.progress.averaged
            if not self._average.started:
                self._average.restart_()
        self._saved = (self.progress.epoch, self.progress.step)
