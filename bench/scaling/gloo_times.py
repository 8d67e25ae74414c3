"""Times gloo's all-reduce between processes of this machine, one thread each."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

# flags and norms, statistics of batch normalisation, layers, buckets
SIZES = (*(4**k for k in range(3, 13)), 25 << 20)


def measure(rank: int, ranks: int, store: str, repeats: int, sizes: Sequence[int]) -> list[tuple[int, float]]:
    """(bytes, median seconds) as this rank sees them, with the slowest rank's time of every call."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    tensors = [torch.zeros(count // 4) for count in sizes]
    rounds = []
    # all sizes in turn, so that a busy moment does not fall on one of them
    for _ in range(repeats + 2):
        times = []
        for values in tensors:
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            times.append(time.perf_counter() - began)
        rounds.append(times)
    # the last to finish decides when the step goes on
    slowest = torch.tensor(rounds[2:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    medians = [statistics.median(times) for times in slowest.T.tolist()]
    dist.destroy_process_group()
    return list(zip(sizes, medians, strict=True))


def all_reduce_times(ranks: int, sizes: Sequence[int] = SIZES, repeats: int = 30) -> list[tuple[int, float]]:
    """(bytes, median seconds) of fp32 all-reduces between `ranks` processes.

    Raises:
        RuntimeError: a process failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        rest = [str(ranks), f"{folder}/store", str(repeats), *map(str, sizes)]
        processes = [
            subprocess.Popen([sys.executable, __file__, str(rank), *rest], stdout=subprocess.PIPE, env=environment)
            for rank in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"gloo between {ranks} processes failed; see above")
    return [(count, seconds) for count, seconds in json.loads(outputs[0])]


if __name__ == "__main__":
    given = sys.argv[1:]
    times = measure(int(given[0]), int(given[1]), given[2], int(given[3]), [int(n) for n in given[4:]])
    print(json.dumps(times, allow_nan=False))
