"""Several views of each image in a batch."""

import dataclasses

import pytest
import torch

from awp_engine.data import Augmentation, Batches, Split, train_batches
from awp_kernels.philox import mix_seed

BASE = Augmentation(pad=2, flip=True)
POLICY = dataclasses.replace(BASE, policy="autoaugment-cifar10", policy_first=True)
SEED, EPOCH = 5, 2


def whole_split() -> Split:
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(images=images, labels=torch.arange(23) % 10, ids=torch.arange(23) + 100)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_views_are_the_same_images_by_draws_of_their_own(order):
    """The first is what it is alone; the others' policy comes first; from any batch on, on any number of ranks."""
    split = whole_split()
    common = {"global_batch_size": 10, "seed": SEED, "views": [POLICY, POLICY], "memory_format": order}
    made = list(Batches(split, BASE, **common).epoch(EPOCH))
    alone = list(train_batches(split, BASE, batch_size=10, seed=SEED, epoch=EPOCH))
    raw = split.images.float() / 255
    for batch, first in zip(made, alone, strict=True):
        assert batch.images.is_contiguous(memory_format=order)
        views = batch.images.split(3, 1)
        assert torch.equal(views[0], first.images)
        assert torch.equal(batch.labels, first.labels)
        assert torch.equal(batch.ids, first.ids)
        for number in (1, 2):
            drawn = {"seed": mix_seed(SEED, number, 6), "epoch": EPOCH}
            assert torch.equal(views[number], POLICY.change(raw[batch.ids - 100], batch.ids, **drawn))
        assert not any(torch.equal(a, b) for a, b in zip(views[1], views[2], strict=True))
    (later,) = Batches(split, BASE, **common).epoch(EPOCH, first=2)
    assert torch.equal(later.images, made[2].images)
    ranks = [Batches(split, BASE, rank=rank, ranks=2, **common).epoch(EPOCH) for rank in range(2)]
    for batch, *parts in zip(made, *ranks, strict=True):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
