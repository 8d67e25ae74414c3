"""engine/train.py, which also leaves the ids of every batch that a rank takes, in RUN_IDS.RANK: a line of JSON each."""

import json
import os
import runpy
from collections.abc import Generator
from pathlib import Path

from awp_engine.data import Batch, Batches

_epoch = Batches.epoch


def _logged(self: Batches, epoch: int, *, first: int = 0) -> Generator[Batch, None, None]:
    with Path(f"{os.environ['RUN_IDS']}.{os.environ.get('RANK', '0')}").open("a", buffering=1) as log:
        for index, batch in enumerate(_epoch(self, epoch, first=first), first):
            log.write(json.dumps({"epoch": epoch, "index": index, "ids": batch.ids.tolist()}) + "\n")
            yield batch


if __name__ == "__main__":
    Batches.epoch = _logged
    runpy.run_path(str(Path(__file__).parents[2] / "engine" / "train.py"), run_name="__main__")
