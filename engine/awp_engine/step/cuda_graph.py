"""A whole training step in one CUDA graph."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from awp_engine.attack import Attack
from awp_engine.distributed.batch import Batch
from awp_engine.files.text import first_line
from awp_engine.step.awp_step import AwpStep
from awp_engine.step.values import Phase, StepResult


class CaptureError(RuntimeError):
    """A step that a CUDA graph cannot hold; the message is one line that says why and what to do."""


# steps of each kind that are taken one by one first: libraries choose their algorithms and allocate in them
_WARM_UP = 3
_Kind = tuple[bool, Attack, Hashable]
# those of four attacks, as E-AT may draw, each with and without weight perturbation
_KEPT = 8


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    result: StepResult
    momentum: float | None


class GraphedStep:
    """Takes the steps of an `AwpStep`, captured in CUDA graphs: one launch in place of thousands.

    A graph is captured for each kind of step (with and without weight perturbation, by attack, by the method's stage)
    after a few plain ones, which train like any other; the newest four are kept. Batches of another size than the first
    run plainly, and so does nothing else; both ways compute the same. Rates, scales and averages are read from device
    tensors at every replay, and the attack's start, which depends on the seed, is drawn outside. A momentum that
    changes has a step captured anew.

    Args:
        step: `capturable`, on a CUDA device.

    Raises:
        ValueError: the step cannot be captured.
    """

    def __init__(self, step: AwpStep) -> None:
        device = next(step.models.model.parameters()).device
        if device.type != "cuda" or not step.capturable:
            raise ValueError(
                f"step: expected one on a CUDA device, without c_min, whose launches never change; got one on {device}"
            )
        self.step = step
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: tuple[Tensor, ...] | None = None
        self._taken: dict[_Kind, int] = {}
        self._graphs: dict[_Kind, _Captured] = {}

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def __call__(self, batch: Batch, phase: Phase) -> StepResult:
        """Train on one batch: see `AwpStep`; of one rank, which has the whole batch.

        Raises:
            ValueError: the batch has more images.
            CaptureError: the step cannot be captured after all, for want of memory or as it waits for the device.
        """
        if batch.whole_size != len(batch.images):
            raise ValueError(
                f"whole_size: expected the {len(batch.images)} images of the batch, as graphs serve one rank, got "
                f"{batch.whole_size}"
            )
        start = self.step.prepare(batch, phase)
        kind = (phase.perturb and self.step.awp is not None, phase.attack, self.step.passes.objective.stage)
        given = (batch.images, batch.labels, batch.ids, start)
        # a graph would replay one noise
        if phase.noise is not None or self.step.passes.largest_batch not in (None, len(batch.images)):
            return self._plainly(given, phase)
        if self._inputs is None:
            self._inputs = tuple(torch.empty_like(tensor) for tensor in given)
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(given, self._inputs, strict=True)):
            return self._plainly(given, phase)
        for static, tensor in zip(self._inputs, given, strict=True):
            static.copy_(tensor)
        self._taken[kind] = self._taken.get(kind, 0) + 1
        if self._taken[kind] <= _WARM_UP:
            return self._plainly(self._inputs, phase)
        # momentum is a number in its launches
        if kind not in self._graphs or self._graphs[kind].momentum != phase.momentum:
            self._graphs[kind] = self._capture(self._inputs, phase)
        captured = self._used(kind)
        captured.graph.replay()
        # the next replay writes over the graph's own
        return StepResult(*(tensor.clone() for tensor in captured.result))

    def _used(self, kind: _Kind) -> _Captured:
        """A kind's graph, which is there; the one that was not used for longest goes where there are too many.

        After a capture: the pool of memory ends with the last of its graphs, and takes no other after that.
        """
        self._graphs[kind] = captured = self._graphs.pop(kind)
        while len(self._graphs) > _KEPT:
            oldest = next(iter(self._graphs))
            del self._graphs[oldest], self._taken[oldest]
        return captured

    def _take(self, inputs: tuple[Tensor, ...], phase: Phase) -> StepResult:
        images, labels, ids, start = inputs
        return self.step(Batch(images, labels, ids, len(images)), phase, start)

    def _plainly(self, inputs: tuple[Tensor, ...], phase: Phase) -> StepResult:
        """A step on the stream that captures: libraries keep a workspace for each stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self._take(inputs, phase)
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(self, inputs: tuple[Tensor, ...], phase: Phase) -> _Captured:
        """Capturing computes nothing; gradients of the steps before would be kept alive by the graph."""
        self.step.passes.clear_gradients()
        try:
            graph = torch.cuda.CUDAGraph()
            # threads that load and pin batches meanwhile are not in it, and may allocate
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = self._take(inputs, phase)
        except RuntimeError as error:
            raise CaptureError(
                f"a step cannot be captured ({first_line(error)}); start again with --no-cuda-graphs"
            ) from error
        return _Captured(graph, result, phase.momentum)
