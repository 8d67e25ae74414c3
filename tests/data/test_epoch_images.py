"""Epochs of a number of images, own and extra ones together, against their plain description."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awp_engine.config import Config, ConfigError, DataConfig, ModelConfig
from awp_engine.data import Augmentation, Batch, Batches, Split, train_batches
from awp_engine.distributed.ranks import Ranks
from awp_engine.train.setup import Setup

FIRST_EXTRA = 1000


def split(count: int, first_id: int = 0) -> Split:
    images = torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1).repeat(1, 1, 2, 2)
    return Split(images=images, labels=torch.arange(count) % 3, ids=torch.arange(first_id, first_id + count))


def epoch_of(own: int, more: int, epoch: int, **given) -> list[Batch]:
    given = {"batch_size": 10, "seed": 0, "extra": split(more, FIRST_EXTRA)} | given
    return list(train_batches(split(own), Augmentation(), epoch=epoch, **given))


@given(
    own=st.integers(1, 30),
    more=st.integers(1, 40),
    batch_size=st.integers(2, 12),
    fraction=st.floats(0.01, 1),
    images=st.integers(1, 60),
    seed=st.integers(0, 1000),
    replacement=st.booleans(),
)
def test_the_composition_of_batches(own, more, batch_size, fraction, images, seed, replacement) -> None:
    """Every batch is full; chunks of shuffled passes over the own images, the last of a pass filled up."""
    given = {"batch_size": batch_size, "extra_fraction": fraction, "epoch_images": images, "seed": seed}
    batches = epoch_of(own, more, 1, extra_replacement=replacement, **given)
    assert len(batches) == -(-images // batch_size)
    assert all(len(batch.images) == batch.whole_size == batch_size for batch in batches)
    chunk = batch_size - int(batch_size * fraction + 1e-9)
    chunks = [len(rows) for rows in torch.arange(own).split(chunk)] if chunk else [0]
    passes: list[list[int]] = []
    for index, batch in enumerate(batches):
        found = [number for number in batch.ids.tolist() if number < FIRST_EXTRA]
        assert len(found) == chunks[index % len(chunks)]
        if index % len(chunks) == 0:
            passes.append([])
        passes[-1] += found
        extra = batch.ids >= FIRST_EXTRA
        assert (batch.ids[extra] < FIRST_EXTRA + more).all()
        # images and labels are those of the ids
        assert torch.equal(batch.images[:, 0, 0, 0] * 255, (batch.ids - FIRST_EXTRA * extra).float())
        assert torch.equal(batch.labels, (batch.ids - FIRST_EXTRA * extra) % 3)
    for number, found in enumerate(passes):
        assert len(set(found)) == len(found)
        assert number == len(passes) - 1 or sorted(found) == list(range(own)) or chunk == 0


def test_the_numbers_of_wang_2023() -> None:
    """98 batches of 154 own and 358 generated images, no own one twice in an epoch."""
    given = {"batch_size": 512, "extra_fraction": 0.7, "epoch_images": 50_000, "extra_replacement": True}
    own = Split(images=torch.zeros(48_976, 1, 1, 1).byte(), labels=torch.zeros(48_976).long(), ids=torch.arange(48_976))
    extra = Split(images=own.images, labels=own.labels, ids=own.ids + 10**6)
    batches = [batch.ids for batch in train_batches(own, Augmentation(), extra=extra, epoch=1, seed=0, **given)]
    assert [int((ids < 10**6).sum()) for ids in batches] == [154] * 98
    seen = torch.cat(batches)
    assert len(seen[seen < 10**6].unique()) == 98 * 154
    # 98 * 358 draws of 48,976: as many are left out as draws with replacement leave out
    assert len(seen[seen >= 10**6].unique()) == pytest.approx(48_976 * (1 - (1 - 1 / 48_976) ** (98 * 358)), rel=0.01)


def test_extra_images_alone_at_first() -> None:
    """Without replacement each comes once before any comes again, over epochs of both kinds."""
    given = {"extra_fraction": 0.6, "epoch_images": 25, "extra_alone": 2}
    epochs = [epoch_of(12, 35, epoch, **given) for epoch in range(1, 6)]
    own = [[int((batch.ids < FIRST_EXTRA).sum()) for batch in batches] for batches in epochs]
    assert own == [[0] * 3] * 2 + [[4] * 3] * 3
    seen = Counter(dict.fromkeys(range(FIRST_EXTRA, FIRST_EXTRA + 35), 0))
    for batches, count in zip(epochs, (30, 60, 78, 96, 114), strict=True):
        seen.update(number for batch in batches for number in batch.ids.tolist() if number >= FIRST_EXTRA)
        assert seen.total() == count
        assert max(seen.values()) - min(seen.values()) <= 1


def test_draws_with_replacement_are_even_and_new_in_every_epoch() -> None:
    given = {"extra_fraction": 1.0, "epoch_images": 4000, "extra_replacement": True, "batch_size": 100}
    first, again, second = (torch.cat([b.ids for b in epoch_of(3, 20, epoch, **given)]) for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    counts = torch.bincount(first - FIRST_EXTRA, minlength=20)
    # 200 each; the sum is chi-square of 19 degrees, above 50 once in 7,000
    assert ((counts - 200) ** 2 / 200).sum() < 50
    other = torch.cat([b.ids for b in epoch_of(3, 20, 1, **given | {"seed": 1})])
    assert not torch.equal(first, other)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("alone", [0, 2])
def test_ranks_and_places_to_go_on_from(replacement, alone) -> None:
    """Any number of ranks has the same batches, and an epoch that is gone on with the rest of them."""
    given = {"extra_fraction": 0.45, "epoch_images": 43, "extra_replacement": replacement, "extra_alone": alone}
    for epoch in (1, 3):
        whole = epoch_of(9, 14, epoch, **given)
        for ranks in (2, 3):
            parts = [epoch_of(9, 14, epoch, rank=rank, ranks=ranks, **given) for rank in range(ranks)]
            for batch, *shares in zip(whole, *parts, strict=True):
                assert torch.equal(torch.cat([share.ids for share in shares]), batch.ids)
                assert torch.equal(torch.cat([share.images for share in shares]), batch.images)
                assert {share.whole_size for share in shares} == {10}
        rest = epoch_of(9, 14, epoch, first=3, **given)
        pairs = itertools.zip_longest(rest, whole[3:])
        assert all(torch.equal(a.ids, b.ids) and torch.equal(a.images, b.images) for a, b in pairs)
    batches = Batches(split(9), Augmentation(), global_batch_size=10, seed=0, extra=split(14, FIRST_EXTRA), **given)
    assert batches.sizes == [10] * 5
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(batches.epoch(3), whole, strict=True))


def test_what_does_not_go_together_is_refused() -> None:
    for told, named in (
        ({"epoch_images": 0}, "epoch_images"),
        ({"epoch_images": 20, "extra": None}, "epoch_images"),
        ({"epoch_images": 20, "extra_fraction": 1.1}, "epoch_images"),
        ({"extra_alone": 1}, "extra_alone"),
        ({"epoch_images": 20, "extra_alone": -1}, "extra_alone"),
    ):
        with pytest.raises(ValueError, match=rf"^{named}: .*expected"):
            epoch_of(9, 14, 1, **told)
    for told in ({"extra_alone": 3}, {"extra_fraction": 1.0}, {"epoch_images": 0}):
        (key,) = told
        with pytest.raises(ConfigError, match=rf"^--data\.{key.replace('_', '-')}: expected"):
            DataConfig(**told)
    for told in ({"epoch_images": 50}, {"extra_replacement": True}, {"epoch_images": 50, "extra_alone": 1}):
        with pytest.raises(ConfigError, match=r"^--data\.extra: expected an \.npz.* for --data\.e.*, got nothing"):
            Config(data=DataConfig(**told)).require_files()


def test_images_that_are_read_as_they_come_are_the_same(tmp_path) -> None:
    """Drawn anew from a file, by a loader that keeps none of them; some of an epoch's come more than once."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "extra.npz", image=pixels, label=np.arange(12) % 10)
    found = []
    for loader in ("resident", "torch"):
        data = DataConfig(
            loader=loader,
            workers=0,
            pad=1,
            train_limit=20,
            extra=tmp_path / "extra.npz",
            extra_fraction=0.7,
            extra_replacement=True,
            extra_alone=1,
            epoch_images=40,
        )
        model = ModelConfig(name="preact-resnet-digits", width=2)
        config = Config(device="cpu", run_dir=tmp_path / loader, global_batch_size=10, data=data, model=model)
        batches = Setup(config, Ranks()).batches
        found.append([batch for epoch in (1, 2) for batch in batches.epoch(epoch)])
    assert len(found[0]) == len(found[1]) == 8
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    ids = torch.cat([batch.ids for batch in found[0]])
    assert len(ids.unique()) < len(ids)
