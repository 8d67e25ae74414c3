"""Time: of one call, and of a step by its parts."""

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from awp_engine.observe.regions import listening

# about 5 ms, while the host queues what is timed
HEAD_START_CYCLES = 10_000_000


# seconds on the host's clock, or an event
Instant = float | torch.cuda.Event
# a part's name, whether it begins or ends, and when
Mark = tuple[str, bool, Instant]


class Timing(NamedTuple):
    """Seconds of one step and of its parts, where those are known; what lies between the parts is in none of them."""

    seconds: float
    components: dict[str, float] | None


def seconds(call: Callable[[], object], device: str, head_start: int = HEAD_START_CYCLES) -> float:
    """Time of one call: on the device alone for CUDA, else on the clock."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(head_start)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3


class StepClock:
    """Times steps and their parts, which name themselves by `awp_engine.observe.regions`.

    On CUDA by events: a step lasts until the next one begins on the device, as it does in training, so that time in
    which the device waits for the host is in it. The parts of a step that is replayed from a CUDA graph are timed by
    events inside the graph, which is why the clock must run already when the graph is captured.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: list[Mark] = []
        self._captured: list[Mark] = []
        self._captured_in, self._step = -1, 0

    def run(self, step: Callable[[], object]) -> float:
        """One step that is not to be timed by parts; seconds until its result is there."""
        begin = time.perf_counter()
        with listening(self._mark):
            self._make(step)
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def time(self, step: Callable[[], object], count: int) -> list[Timing]:
        """Times `count` steps, one after the other; on CUDA one more goes before, without a pause in between."""
        with listening(self._mark):
            if self._cuda:
                self._make(step)
            starts, marks = [], []
            for _ in range(count):
                starts.append(self._now())
                marks.append(self._make(step))
            starts.append(self._now())
        if self._cuda:
            torch.cuda.synchronize()
        seconds_of = [_between(*pair) for pair in pairwise(starts)]
        if not self._captured:
            return [Timing(*pair) for pair in zip(seconds_of, map(_by_name, marks), strict=True)]
        # the events inside a graph hold the times of its last replay
        try:
            last = _by_name([*marks[-1], *self._captured])
        except RuntimeError:
            # no driver's fault is worth the step's own time
            last = None
        return [*(Timing(taken, None) for taken in seconds_of[:-1]), Timing(seconds_of[-1], last)]

    def _make(self, step: Callable[[], object]) -> "list[Mark]":
        self._marks = []
        step()
        self._step += 1
        return self._marks

    def _now(self, *, in_graph: bool = False) -> Instant:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=in_graph)
        event.record()
        return event

    def _mark(self, name: str, begins: bool) -> None:
        if not (self._cuda and torch.cuda.is_current_stream_capturing()):
            self._marks.append((name, begins, self._now()))
            return
        # a step that is captured anew replaces what was captured before
        if self._captured_in != self._step:
            self._captured, self._captured_in = [], self._step
        self._captured.append((name, begins, self._now(in_graph=True)))


def _between(begin: Instant, end: Instant) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) * 1e-3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin


def _by_name(marks: list[Mark]) -> dict[str, float]:
    components: defaultdict[str, float] = defaultdict(float)
    begun: dict[str, Instant] = {}
    for name, begins, instant in marks:
        if begins:
            begun[name] = instant
        else:
            components[name] += _between(begun.pop(name), instant)
    return dict(components)
