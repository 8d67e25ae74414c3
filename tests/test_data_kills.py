"""Runs that DALI feeds are killed in mid-epoch, and go on with exactly the images that were not seen."""

import random
from pathlib import Path

import pytest
from data_kills import IMAGES, kill_once, undisturbed
from image_folders import write_images

pytest.importorskip("nvidia.dali", reason="the extra `dali` is for Linux")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ranks", "kills"), [(1, 1), (2, 1)])
def test_killed_in_mid_epoch(tmp_path: Path, ranks: int, kills: int) -> None:
    """A few moments; `python tests/data_kills.py --kills 20` takes more, and its results are in bench/results."""
    write_images(tmp_path / "data", IMAGES, (10, 10))
    whole, generator = undisturbed(tmp_path / "whole", tmp_path / "data", ranks), random.Random(ranks)
    moments = [kill_once(tmp_path / str(number), tmp_path / "data", ranks, generator, whole) for number in range(kills)]
    assert all(moment["taken_before"] > 0 for moment in moments)
