"""A whole training step in one CUDA graph."""

import dataclasses

import torch
from torch import Tensor

from awp_engine.step.training_step import StepResult, TrainingStep

# steps of each kind that are taken one by one first: libraries choose their algorithms and allocate in them
_WARM_UP = 3


class GraphedStep:
    """Takes the steps of a `TrainingStep`, captured in CUDA graphs: one launch in place of thousands.

    A graph is captured for each kind of step (with and without weight perturbation, cheap attack or full one) after a
    few plain ones, which train like any other. Batches of another size than the first run plainly, and so does nothing
    else; both ways compute the same. Rates, scales and averages are read from device tensors at every replay, and the
    attack's start, which depends on the seed, is drawn outside.

    Args:
        step: `capturable`, on a CUDA device.

    Raises:
        ValueError: the step cannot be captured.
    """

    def __init__(self, step: TrainingStep) -> None:
        device = next(step.model.parameters()).device
        if device.type != "cuda" or not step.capturable:
            raise ValueError(
                "step: expected one on a CUDA device, without c_min and public_code, whose launches never change; "
                f"got one on {device}"
            )
        self.step = step
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._taken: dict[tuple[bool, bool], int] = {}
        self._graphs: dict[tuple[bool, bool], tuple[torch.cuda.CUDAGraph, StepResult]] = {}

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._graphs)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        sample_ids: Tensor,
        seed: int,
        perturb: bool = True,
        fast: bool = False,
        of: int | None = None,
    ) -> StepResult:
        """Train on one batch: see `TrainingStep.__call__`; of one rank, which has the whole batch.

        Raises:
            ValueError: the batch has more images.
        """
        if of not in (None, len(x)):
            raise ValueError(f"of: expected the {len(x)} images of x, as graphs serve one rank, got {of}")
        start = self.step.start(x, sample_ids, seed, fast=fast)
        kind = (perturb and self.step.awp is not None, fast)
        if self._inputs is None:
            self._inputs = (torch.empty_like(x), torch.empty_like(y), torch.empty_like(start))
        given = (x, y, start)
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in zip(given, self._inputs, strict=True)):
            return self._plainly(given, kind)
        for static, tensor in zip(self._inputs, given, strict=True):
            static.copy_(tensor)
        self._taken[kind] = self._taken.get(kind, 0) + 1
        if self._taken[kind] <= _WARM_UP:
            return self._plainly(self._inputs, kind)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(self._inputs, kind)
        graph, result = self._graphs[kind]
        graph.replay()
        # the next replay writes over the graph's own
        return StepResult(*(getattr(result, field.name).clone() for field in dataclasses.fields(result)))

    def _plainly(self, inputs: tuple[Tensor, Tensor, Tensor], kind: tuple[bool, bool]) -> StepResult:
        """A step on the stream that captures: libraries keep a workspace for each stream."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = self.step.from_start(*inputs, perturb=kind[0], fast=kind[1])
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def _capture(
        self, inputs: tuple[Tensor, Tensor, Tensor], kind: tuple[bool, bool]
    ) -> tuple[torch.cuda.CUDAGraph, StepResult]:
        """Capturing computes nothing; gradients of the steps before would be kept alive by the graph."""
        self.step.clear_gradients()
        graph = torch.cuda.CUDAGraph()
        # threads that load and pin batches meanwhile are not in it, and may allocate
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
            result = self.step.from_start(*inputs, perturb=kind[0], fast=kind[1])
        return graph, result
