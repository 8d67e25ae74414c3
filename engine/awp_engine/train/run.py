"""A run, from its settings to its report."""

import contextlib
from collections.abc import Iterator

import torch

from awp_engine.config import Config
from awp_engine.device import choose_device
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.signals import StopRequest
from awp_engine.files.locking import locked
from awp_engine.train.run_dir import finished_report
from awp_engine.train.trainer import Trainer

# the method, the fields of report.json, and whether the run had ended before
Trained = tuple[str, dict, bool]


def train(config: Config, ranks: Ranks, stop: StopRequest) -> Trained:
    """Train in a run directory that no other process trains in; of a run that has ended only read the report."""
    one_process = locked(config.resolved_run_dir) if ranks.is_first else contextlib.nullcontext()
    with one_process, _cpu_threads(config.threads):
        report = finished_report(config) if ranks.is_first else None
        report = ranks.broadcast_json(report, choose_device(config.device, ranks.local_rank))
        return config.title, report or Trainer(config, ranks, stop).run(), report is not None


@contextlib.contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    """A block in which torch computes with so many threads; it may be inside of a user's program."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
