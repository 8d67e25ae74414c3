import os
import time

import pytest
import torch
from ranks import run_ranks
from torch import distributed


def _sum(rank, world, offset):
    value = torch.full((3,), float(rank) + offset)
    distributed.all_reduce(value)
    return rank, world, torch.get_num_threads(), value


def _one_fails(rank, world):
    if rank == 1:
        raise ValueError("the one that failed")
    distributed.barrier()


def _one_dies(rank, world):
    if rank == 1:
        os._exit(7)
    time.sleep(60)


def _one_is_missing(rank, world):
    if rank == 0:
        distributed.barrier()


def _each_waits_for_the_other(rank, world):
    if rank == 0:
        distributed.barrier()
    else:
        distributed.recv(torch.zeros(1), 0)


def test_ranks_compute_together_and_return():
    results = run_ranks(_sum, 2, 0.5)
    assert [result[:3] for result in results] == [(0, 2, 1), (1, 2, 1)]
    assert all(torch.equal(result[3], torch.full((3,), 2.0)) for result in results)


@pytest.mark.parametrize(
    ("function", "timeout", "message"),
    [
        (_one_fails, 60, r"(?s)rank 1 of 2 raised.*the one that failed"),
        (_one_dies, 60, "rank 1 died, exit code 7"),
        (_one_is_missing, 6, r"(?s)not done after 6 s\nrank 0: .* in barrier"),
        (_each_waits_for_the_other, 6, r"(?s)not done after 6 s\nrank 0: .* in barrier.*rank 1: .* in recv"),
    ],
    ids=["raises", "dies", "hangs", "deadlock"],
)
def test_what_goes_wrong_on_a_rank_is_reported(function, timeout, message):
    with pytest.raises(AssertionError, match=message):
        run_ranks(function, 2, timeout=timeout)
