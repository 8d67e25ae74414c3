"""Run a function on several gloo ranks, in processes of their own, from a test."""

import faulthandler
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import forked

# seconds; pytest ends a test after 300, without the stacks of its processes
_LONGEST = 270


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any, timeout: float = 60) -> list[Any]:
    """Call `function(rank, world, *arguments)` on every rank, and return what the ranks returned.

    Each rank is a process with one torch thread and the default gloo process group over the loopback device.

    Args:
        function: of a module that can be imported; it and its arguments are pickled.
        world: number of ranks.
        arguments: the same for all ranks.
        timeout: seconds until all ranks are killed, 270 at most.

    Raises:
        AssertionError: a rank raised (with its traceback: the first one's, as others may fail for want of it), died, or
            is not done in time (with the stacks of all that are not: each may wait for another one).
    """
    assert timeout <= _LONGEST, f"timeout: expected at most {_LONGEST} s, got {timeout:g}"
    processes_of = forked.context()
    payload = pickle.dumps((function, arguments, dict(os.environ)))
    with tempfile.TemporaryDirectory() as directory:
        pipes, processes = [], []
        try:
            for rank in range(world):
                ours, theirs = processes_of.Pipe()
                pipes.append(ours)
                process = processes_of.Process(
                    target=_child, args=(rank, world, directory, payload, theirs, timeout), daemon=True
                )
                process.start()
                theirs.close()
                processes.append(process)
            return _collect(function.__name__, pipes, processes, Path(directory), timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()


def _collect(name: str, pipes: list, processes: list, directory: Path, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting: dict[Any, int] = {pipes[rank]: rank for rank in range(len(pipes)) if rank not in results}
        ready = connection.wait(list(waiting), max(deadline - time.monotonic(), 0))
        if not ready:
            stacks = "\n".join(f"rank {rank}: {_stack(directory, rank)}" for rank in waiting.values())
            raise AssertionError(f"{name}: not done after {timeout:g} s\n{stacks}")
        for pipe in [pipe for pipe in waiting if pipe in ready]:
            rank = waiting[pipe]
            try:
                done, value = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                processes[rank].join()
                raise AssertionError(f"{name}: rank {rank} died, exit code {processes[rank].exitcode}") from None
            if not done:
                raise AssertionError(f"{name}: rank {rank} of {len(pipes)} raised\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _stack(directory: Path, rank: int) -> str:
    """What a rank that is late writes by itself."""
    path = directory / f"stack{rank}"
    for _ in range(20):
        time.sleep(0.5)
        if path.exists() and (stack := path.read_text()):
            return stack
    return "writes no stack, so it is stopped"


def _child(rank: int, world: int, directory: str, payload: bytes, pipe: Any, timeout: float) -> None:
    with (Path(directory) / f"stack{rank}").open("w") as stack:
        # a rank that ended would break the connections of those that wait for it
        faulthandler.dump_traceback_later(timeout, file=stack)
        try:
            message = True, _call(rank, world, directory, payload, timeout)
        except BaseException:
            message = False, traceback.format_exc()
        faulthandler.cancel_dump_traceback_later()
    # plain pickle: multiprocessing's would share a tensor's memory, which ends with this process
    pipe.send_bytes(pickle.dumps(message))
    sys.stdout.flush()
    # a rank that ended would break the connections of those that wait for it, and hide that they hang
    connection.wait([pipe])
    os._exit(0)


def _call(rank: int, world: int, directory: str, payload: bytes, timeout: float) -> Any:
    import torch
    from torch import distributed

    function, arguments, environment = pickle.loads(payload)
    os.environ.update(environment)
    # the host's own name may resolve to nothing
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    # longer than the ranks live: a hang is reported by its stack
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{directory}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=2 * timeout),
    )
    return function(rank, world, *arguments)
