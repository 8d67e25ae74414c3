"""Traces of a few training steps, by torch.profiler."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_SKIPPED = 5


class StepProfiler:
    """Records `steps` steps after the first five and writes them as a trace for chrome://tracing or perfetto.

        profiler = StepProfiler(20, run_dir / "trace.json")
        for batch in batches:
            ...
            profiler.step()
        profiler.close()

    Args:
        steps: how many; 0 records nothing.
        path: of the trace, JSON.
    """

    def __init__(self, steps: int, path: Path) -> None:
        self.path, self._steps, self._seen = path, steps, 0
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        # torch 2.11 warns of what a second cycle would lose, in the first and only one too
        self._profile = profile(activities=activities, acc_events=True) if steps else None

    def step(self) -> str | None:
        """Count a step; returns what to tell the user when the trace was written."""
        self._seen += 1
        if self._profile is None:
            return None
        if self._seen == _SKIPPED:
            self._profile.start()
        elif self._seen == _SKIPPED + self._steps:
            return self._stop()
        return None

    def _stop(self) -> str:
        assert self._profile is not None
        self._profile.stop()
        recorded, self._profile = self._profile, None
        try:
            self.path.unlink(missing_ok=True)
            recorded.export_chrome_trace(str(self.path))
            # torch only prints when it cannot write
            written = self.path.exists()
        except OSError:
            written = False
        if not written:
            return f"warning: {self.path} cannot be written: the trace is lost, training goes on"
        return f"trace of {self._seen - _SKIPPED} steps in {self.path}"

    def close(self) -> str | None:
        """Write what a run that ended early has recorded; returns what to tell the user."""
        return None if self._profile is None or self._seen < _SKIPPED else self._stop()
