"""Cutout, CutMix and extra data in the batches, against plain definitions of one sample at a time."""

import dataclasses
import itertools
import math
from collections.abc import Generator
from fractions import Fraction
from typing import Any

import pytest
import torch
from augmented import augment
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from awp_engine.data import Augmentation, Batch, Batches, Split, batch_sizes, train_batches
from awp_engine.data.order import shuffled
from awp_engine.distributed.share import rank_share
from awp_kernels.philox import mix_seed, sample_words

_CLASSES = 4
_FIRST_EXTRA = 1 << 40


def _split(count: int, shape: tuple[int, int, int] = (2, 5, 7), first_id: int = 1 << 33) -> Split:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, _CLASSES, (count,), generator=generator)
    ids = torch.randperm(10 * count, generator=generator)[:count] + first_id
    return Split(images=images, labels=labels, ids=ids)


def _words(sample_id: int, count: int, *, seed: int, epoch: int, stream: int) -> list[int]:
    words = sample_words(torch.tensor([sample_id]), count, seed=mix_seed(seed, epoch), stream=stream)
    return [int(word) for word in words[0]]


def _box(row: int, column: int, rows: int, columns: int, height: int, width: int) -> list[tuple[int, int]]:
    """The pixels of a box of `rows` and `columns` around a centre that lie inside the image."""
    top, left = row - rows // 2, column - columns // 2
    area = itertools.product(range(top, top + rows), range(left, left + columns))
    return [(r, c) for r, c in area if 0 <= r < height and 0 <= c < width]


def _look_one(split: Split, row: int, *, seed: int, epoch: int, pad: int, flip: bool, cutout: int, fill: Any) -> Tensor:
    """One image after its crop, mirroring and Cutout."""
    one = split.select(torch.tensor([row]))
    image = augment(one.images, one.ids, seed=seed, epoch=epoch, pad=pad, flip=flip)[0]
    height, width = image.shape[1:]
    if cutout:
        words = _words(int(one.ids), 2, seed=seed, epoch=epoch, stream=6)
        for r, c in _box(words[0] * height >> 32, words[1] * width >> 32, cutout, cutout, height, width):
            for channel, value in enumerate(fill):
                image[channel, r, c] = value
    return image


def _sample_one(split: Split, row: int, *, cutmix: float, **look: Any) -> tuple[Tensor, Tensor, int]:
    """One image and its label shares after CutMix, and the number of pixels that are its partner's."""
    image = _look_one(split, row, **look)
    height, width = image.shape[1:]
    shares = torch.zeros(_CLASSES)
    words = _words(int(split.ids[row]), 5, seed=look["seed"], epoch=look["epoch"], stream=7)
    pixels: list[tuple[int, int]] = []
    if words[0] < cutmix * 2**32:
        others = [other for other in sorted(range(len(split)), key=lambda n: int(split.ids[n])) if other != row]
        partner = others[words[1] * len(others) >> 32]
        root = math.sqrt(words[2] / 2**32)
        rows, columns = int(height * root), int(width * root)
        pixels = _box(words[3] * height >> 32, words[4] * width >> 32, rows, columns, height, width)
        partner_image = _look_one(split, partner, **look)
        for r, c in pixels:
            image[:, r, c] = partner_image[:, r, c]
        shares[split.labels[partner]] += float(Fraction(len(pixels), height * width))
    shares[split.labels[row]] += float(1 - Fraction(len(pixels), height * width))
    return image, shares, len(pixels)


def _given(options: dict[str, Any]) -> tuple[Augmentation, dict[str, Any]]:
    """What of these options is said of the images, and the others."""
    keys = {field.name for field in dataclasses.fields(Augmentation)}
    augmentation = Augmentation(**{key: value for key, value in options.items() if key in keys})
    return augmentation, {key: value for key, value in options.items() if key not in keys}


def _train_batches(split: Split, **options: Any) -> Generator[Batch, None, None]:
    augmentation, others = _given(options)
    return train_batches(split, augmentation, **others)


def _all(batches: Any) -> dict[int, tuple[Tensor, Tensor]]:
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        for image, label, sample_id in zip(*batch[:3], strict=True):
            found[int(sample_id)] = image, label
    return found


_OPTIONS: dict[str, Any] = {"seed": 5, "epoch": 2, "pad": 1, "flip": True}
_FILL = (0.25, 0.7)


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(2, 8),
    shape=st.tuples(st.just(2), st.integers(1, 9), st.integers(1, 9)),
    pad=st.integers(0, 3),
    flip=st.booleans(),
    cutout=st.integers(0, 12),
    cutmix=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**62),
    epoch=st.integers(0, 300),
)
def test_samples_equal_their_plain_definition(
    count: int, shape: tuple[int, int, int], pad: int, flip: bool, cutout: int, cutmix: float, seed: int, epoch: int
) -> None:
    split = _split(count, shape)
    look: dict[str, Any] = {"seed": seed, "epoch": epoch, "pad": pad, "flip": flip, "cutout": cutout, "fill": _FILL}
    found = _all(_train_batches(split, batch_size=3, cutmix=cutmix, num_classes=_CLASSES, **look))
    assert len(found) == count
    for row in range(count):
        image, shares, pixels = _sample_one(split, row, cutmix=cutmix, **look)
        found_image, found_label = found[int(split.ids[row])]
        assert torch.equal(found_image, image)
        if cutmix == 0:
            assert found_label.dtype == torch.int64
            assert found_label == split.labels[row]
            continue
        assert found_label.dtype == torch.float32
        assert found_label.sum() == 1
        assert torch.allclose(found_label, shares, rtol=0, atol=2**-24)
        own = Fraction(shape[1] * shape[2] - pixels, shape[1] * shape[2])
        if shares.max() < 1 and own > 0:
            assert found_label[split.labels[row]] == torch.tensor(float(own), dtype=torch.float32)


@settings(deadline=None, max_examples=30)
@given(
    order=st.permutations(range(9)),
    batch_size=st.integers(2, 12),
    cutmix=st.sampled_from([0.0, 0.5, 1.0]),
    with_extra=st.booleans(),
)
def test_a_sample_does_not_depend_on_its_batch(
    order: list[int], batch_size: int, cutmix: float, with_extra: bool
) -> None:
    options: dict[str, Any] = {**_OPTIONS, "cutout": 3, "fill": _FILL, "cutmix": cutmix, "num_classes": _CLASSES}
    split, extra = _split(9), _split(30, first_id=_FIRST_EXTRA)
    reference = _all(_train_batches(split, batch_size=9, **options))
    shuffled = split.select(torch.tensor(order))
    extra_options: dict[str, Any] = {"extra": extra, "extra_fraction": 0.5} if with_extra else {}
    found = _all(_train_batches(shuffled, batch_size=batch_size, **extra_options, **options))
    alone = _all(_train_batches(extra, batch_size=30, **options))
    assert set(reference) == {sample_id for sample_id in found if sample_id < _FIRST_EXTRA}
    assert with_extra == any(sample_id >= _FIRST_EXTRA for sample_id in found)
    for sample_id, (image, label) in found.items():
        expected_image, expected_label = (reference if sample_id < _FIRST_EXTRA else alone)[sample_id]
        assert torch.equal(image, expected_image)
        assert torch.equal(label, expected_label)


def _changed(cutout: int, shape: tuple[int, int, int] = (1, 8, 10), count: int = 4000) -> Tensor:
    """Which pixels Cutout fills, bool [N, H, W]."""
    split = Split(
        images=torch.zeros(count, *shape, dtype=torch.uint8),
        labels=torch.zeros(count, dtype=torch.int64),
        ids=torch.arange(count),
    )
    options: dict[str, Any] = {"seed": 0, "epoch": 0}
    (batch,) = _train_batches(split, batch_size=count, cutout=cutout, fill=(1.0,), **options)
    return (batch.images == 1).all(1)


def test_cutout_fills_a_square_around_every_pixel() -> None:
    changed = _changed(4)
    areas = changed.sum((1, 2))
    # A centre may lie on every pixel: rows 2 to 6 and columns 2 to 8 leave the square whole.
    assert areas.max() == 16
    assert areas.min() == 4
    assert (areas == 16).float().mean().item() == pytest.approx(5 * 7 / 80, abs=0.03)
    for rows in (changed.any(2), changed.any(1)):
        assert int(rows.sum(1).max()) == 4
        assert int((rows[:, 1:] & ~rows[:, :-1]).sum(1).max()) <= 1
    assert torch.equal(areas, changed.any(1).sum(1) * changed.any(2).sum(1))
    assert torch.unique(changed, dim=0).shape[0] == 80
    assert _changed(100).all()
    assert (_changed(1).sum((1, 2)) == 1).all()
    assert _changed(1).float().mean(0).min() > 0.5 / 80


def test_cutmix_mixes_as_often_and_as_much_as_asked() -> None:
    split = _split(4000, (1, 16, 16))
    images = torch.arange(4000, dtype=torch.int64) % 256
    split = Split(
        images=images.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 16, 16), labels=split.labels, ids=split.ids
    )
    options: dict[str, Any] = {"seed": 1, "epoch": 0, "num_classes": _CLASSES}
    for probability, lowest, highest in ((0.25, 0.19, 0.26), (1.0, 0.9, 1.0)):
        (batch,) = _train_batches(split, batch_size=4000, cutmix=probability, **options)
        rows = {int(i): n for n, i in enumerate(split.ids)}
        own = images[[rows[int(i)] for i in batch.ids]].view(-1, 1, 1, 1) / 255
        taken = (batch.images != own).float().mean((1, 2, 3))
        assert lowest < (taken > 0).float().mean() < highest
        # Boxes around all pixels lose a part of their area at the border, so it is less than half of the image.
        assert 0.25 * probability < taken.mean() < 0.45 * probability
        assert taken.max() > 0.8
        assert torch.equal(batch.labels.sum(1), torch.ones(4000))


def test_cutmix_partners_are_others_and_all_of_them() -> None:
    split = Split(
        images=torch.tensor([0, 100, 200], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 8, 8),
        labels=torch.tensor([0, 1, 2]),
        ids=torch.tensor([70, 10, 40]),
    )
    pairs: dict[tuple[int, int], int] = dict.fromkeys(itertools.permutations(range(3), 2), 0)
    for epoch in range(120):
        for batch in _train_batches(split, batch_size=2, seed=0, epoch=epoch, cutmix=1.0, num_classes=3):
            for shares, sample_id in zip(batch.labels, batch.ids, strict=True):
                row = split.ids.tolist().index(int(sample_id))
                for partner in set(torch.nonzero(shares).flatten().tolist()) - {row}:
                    pairs[row, partner] += 1
    assert min(pairs.values()) > 30


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 50),
    extra_count=st.integers(1, 60),
    batch_size=st.integers(2, 40),
    extra_fraction=st.floats(0.05, 0.95),
    drop_last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_extra_images_keep_their_ratio_and_their_turn(
    count: int, extra_count: int, batch_size: int, extra_fraction: float, drop_last: bool, seed: int
) -> None:
    split, extra = _split(count, (1, 2, 2)), _split(extra_count, (1, 2, 2), _FIRST_EXTRA)
    own_size = math.floor(batch_size * (1 - extra_fraction) + 0.5)

    def epoch_of(epoch: int) -> list[Batch]:
        return list(
            _train_batches(
                split,
                batch_size=batch_size,
                seed=seed,
                epoch=epoch,
                drop_last=drop_last,
                extra=extra,
                extra_fraction=extra_fraction,
            )
        )

    if own_size in (0, batch_size):
        with pytest.raises(ValueError, match="extra_fraction"):
            epoch_of(0)
        return
    turns = dict.fromkeys(extra.ids.tolist(), 0)
    for epoch in range(1, 4):
        batches = epoch_of(epoch)
        sizes = [len(batch.ids) for batch in batches]
        promised = batch_sizes(count, batch_size, extra_fraction)
        assert sizes == (promised[: count // own_size] if drop_last else promised)
        own: list[int] = []
        for number, batch in enumerate(batches):
            is_extra = batch.ids >= _FIRST_EXTRA
            here = int((~is_extra).sum())
            assert here == own_size or (number == len(batches) - 1 and not drop_last and here < own_size)
            assert abs(int(is_extra.sum()) - here * (batch_size - own_size) / own_size) <= 0.5
            own += batch.ids[~is_extra].tolist()
            for sample_id in batch.ids[is_extra].tolist():
                turns[sample_id] += 1
            assert max(turns.values()) - min(turns.values()) <= 1
            for part, chosen in ((split, ~is_extra), (extra, is_extra)):
                rows = [part.ids.tolist().index(i) for i in batch.ids[chosen].tolist()]
                assert torch.equal(batch.labels[chosen], part.labels[rows])
                assert torch.equal(batch.images[chosen], part.images[rows].float() / 255)
        assert len(own) == len(set(own))
        assert len(own) == (count - count % own_size if drop_last else count)


def test_extra_images_are_reshuffled_every_pass_and_depend_on_seed_and_epoch_alone() -> None:
    split, extra = _split(64, (1, 2, 2)), _split(64, (1, 2, 2), _FIRST_EXTRA)

    def ids(seed: int, epoch: int) -> list[int]:
        options: dict[str, Any] = {"extra": extra, "extra_fraction": 0.5}
        return torch.cat(
            [batch.ids for batch in _train_batches(split, batch_size=16, seed=seed, epoch=epoch, **options)]
        ).tolist()

    orders = [ids(0, 0), ids(0, 1), ids(1, 0)]
    assert ids(0, 1) == orders[1]
    extras = [[sample_id for sample_id in order if sample_id >= _FIRST_EXTRA] for order in orders]
    assert all(sorted(order) == sorted(extra.ids.tolist()) for order in extras)
    assert len({tuple(order) for order in extras}) == 3
    # Both kinds stand all over a batch.
    first_half = [
        sample_id for order in orders for start in range(0, 128, 16) for sample_id in order[start : start + 8]
    ]
    assert 64 < sum(sample_id >= _FIRST_EXTRA for sample_id in first_half) < 128


def test_every_pass_over_the_extra_images_has_an_order_of_its_own() -> None:
    split, extra = _split(8, (1, 2, 2)), _split(16, (1, 2, 2), _FIRST_EXTRA)
    options: dict[str, Any] = {"batch_size": 16, "extra": extra}
    # Two epochs of 8 are a pass, so its first half is what one epoch takes.
    halves = []
    for epoch in range(1, 13, 2):
        (batch,) = _train_batches(split, seed=0, epoch=epoch, **options)
        halves.append(frozenset(batch.ids[batch.ids >= _FIRST_EXTRA].tolist()))
    assert len(set(halves)) == 6


def test_extra_images_do_not_move_the_order_of_the_others() -> None:
    split, extra = _split(40), _split(50, first_id=_FIRST_EXTRA)
    plain = _train_batches(split, batch_size=8, **_OPTIONS)
    both = _train_batches(split, batch_size=16, extra=extra, **_OPTIONS)
    for alone, batch in zip(plain, both, strict=True):
        assert set(alone.ids.tolist()) == {i for i in batch.ids.tolist() if i < _FIRST_EXTRA}
        assert len(batch.ids) == 16


def test_the_end_of_one_pass_and_the_start_of_the_next_share_an_epoch() -> None:
    split, extra = _split(10, (1, 2, 2)), _split(7, (1, 2, 2), _FIRST_EXTRA)
    used: list[int] = []
    for epoch in range(1, 8):
        (batch,) = _train_batches(split, batch_size=20, seed=0, epoch=epoch, extra=extra)
        here = [i for i in batch.ids.tolist() if i >= _FIRST_EXTRA]
        used += here
        turns = [used.count(i) for i in extra.ids.tolist()]
        assert sum(turns) == 10 * epoch
        assert max(turns) - min(turns) <= 1
    assert all(used.count(i) == 10 for i in extra.ids.tolist())


@pytest.mark.parametrize(
    ("size", "batch_size", "extra_fraction", "steps"),
    [(50_000, 128, None, 391), (50_000, 128, 0.5, 782), (50_000, 1024, 0.7, 163), (0, 4, None, 0)],
)
def test_batch_sizes(size: int, batch_size: int, extra_fraction: float | None, steps: int) -> None:
    sizes = batch_sizes(size, batch_size, extra_fraction)
    assert len(sizes) == steps
    assert all(found == batch_size for found in sizes[:-1])


@given(
    count=st.integers(1, 40),
    batch_size=st.integers(2, 20),
    ranks=st.integers(1, 7),
    first=st.integers(0, 3),
    extra_count=st.sampled_from([0, 9]),
    cutmix=st.sampled_from([0.0, 0.5]),
)
def test_ranks_share_batches_without_overlap_or_loss(
    count: int, batch_size: int, ranks: int, first: int, extra_count: int, cutmix: float
) -> None:
    """Side by side the ranks' parts are the batch; batches smaller than the number of ranks are computed by all."""
    cutmix = cutmix if count > 1 else 0.0
    options: dict[str, Any] = {**_OPTIONS, "cutmix": cutmix, "num_classes": _CLASSES, "batch_size": batch_size}
    options["extra"] = _split(extra_count, first_id=_FIRST_EXTRA) if extra_count else None
    whole = list(_train_batches(_split(count), **options))
    sizes = batch_sizes(count, batch_size, 0.5 if extra_count else None)
    parts = [list(_train_batches(_split(count), **options, first=first, rank=r, ranks=ranks)) for r in range(ranks)]
    assert all(len(part) == max(len(whole) - first, 0) for part in parts)
    for number, pieces in enumerate(zip(*parts, strict=True), start=first):
        shares = [rank_share(sizes[number], rank, ranks)[1] for rank in range(ranks)]
        assert sum(shares) == pytest.approx(1)
        for field in range(3):
            found = [piece[field] for piece in pieces]
            if sizes[number] < ranks:
                assert all(torch.equal(piece, whole[number][field]) for piece in found)
                assert set(shares) == {1 / ranks}
            else:
                assert torch.equal(torch.cat(found), whole[number][field])
                assert [len(piece) / sizes[number] for piece in found] == shares
                assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": -1}, r"pad: -1; expected at least 0 pixels"),
        ({"cutout": -1}, r"cutout: -1; expected at least 0"),
        ({"cutout": 2}, r"fill: None; expected 2 values in \[0, 1\], one a channel, for cutout"),
        ({"cutout": 2, "fill": (0.5,)}, r"fill: \(0.5,\); expected 2 values"),
        ({"cutout": 2, "fill": (0.5, 1.5)}, r"fill: \(0.5, 1.5\); expected 2 values"),
        ({"cutout": 2, "fill": (0.5, math.nan)}, r"fill: \(0.5, nan\); expected 2 values"),
        ({"cutmix": -0.1, "num_classes": 4}, r"cutmix: -0.1; expected a probability"),
        ({"cutmix": 1.1, "num_classes": 4}, r"cutmix: 1.1; expected a probability"),
        ({"cutmix": math.nan, "num_classes": 4}, r"cutmix: nan; expected a probability"),
        ({"cutmix": 0.5}, r"num_classes: None; expected at least 4 for mixed labels, those of split"),
        ({"cutmix": 0.5, "num_classes": 3}, r"num_classes: 3; expected at least 4"),
        ({"extra_fraction": 0.0}, r"extra_fraction: 0.0; expected a number more than 0 and less than 1"),
        ({"extra_fraction": 1.0}, r"extra_fraction: 1.0; expected"),
        ({"extra_fraction": math.nan}, r"extra_fraction: nan; expected"),
        ({"extra_fraction": 0.01}, r"extra_fraction: 0.01 of a batch of 4 leaves 4 images of the data set and 0 extra"),
        ({"extra_fraction": 0.99}, r"extra_fraction: 0.99 of a batch of 4 leaves 0 images of the data set and 4 extra"),
        ({"extra": _split(3, (2, 7, 5))}, r"extra: images \[2, 7, 5\] on cpu; expected \[2, 5, 7\] on cpu"),
        ({"extra": _split(3).to("meta")}, r"extra: images \[2, 5, 7\] on meta; expected \[2, 5, 7\] on cpu"),
        ({"rank": 2, "ranks": 2}, r"rank: 2; expected 0 to 1, of 2 ranks"),
        ({"rank": -1}, r"rank: -1; expected 0 to 0"),
        ({"extra": _split(0)}, r"extra: no images; expected at least 1"),
        ({"extra": _split(1), "cutmix": 0.5, "num_classes": 4}, r"extra: 1 images; expected at least 2 for cutmix"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _train_batches(
            _split(20),
            **{"batch_size": 4, "extra": _split(9) if "extra_fraction" in options else None, **_OPTIONS, **options},
        )


def test_one_image_cannot_be_mixed() -> None:
    with pytest.raises(ValueError, match="split: 1 images; expected at least 2 for cutmix"):
        _train_batches(_split(1), batch_size=4, cutmix=1.0, num_classes=4, **_OPTIONS)
    with pytest.raises(ValueError, match="batch_size: 0"):
        batch_sizes(10, 0)
    with pytest.raises(ValueError, match="extra_fraction: 2"):
        batch_sizes(10, 4, 2)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    "options",
    [
        {"rand_augment": 9.0},
        {"policy": "autoaugment-svhn", "policy_first": True},
        {"erase": 1.0, "fill": (0.5,) * 3, "erase_std": (0.2,) * 3},
        {"cutmix": 0.5, "mixup": 0.5, "num_classes": _CLASSES},
        {"extra": _split(9, (3, 5, 7), _FIRST_EXTRA), "extra_fraction": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_images_have_the_memory_format_asked_for(options: dict[str, Any], memory_format: torch.memory_format) -> None:
    split = _split(10, (3, 5, 7))
    for batch in _train_batches(split, batch_size=4, memory_format=memory_format, **_OPTIONS, **options):
        assert batch.images.is_contiguous(memory_format=memory_format)


@pytest.mark.gpu
def test_mixed_batches_on_the_gpu_equal_those_on_the_cpu() -> None:
    split, extra = _split(200, (3, 32, 32)), _split(500, (3, 32, 32), _FIRST_EXTRA)
    options: dict[str, Any] = {"cutout": 9, "fill": (0.1, 0.2, 0.3), "cutmix": 0.7, "num_classes": _CLASSES}
    batches = [
        _train_batches(split.to(device), extra=extra.to(device), batch_size=64, **_OPTIONS, **options)
        for device in ("cpu", "cuda")
    ]
    for on_cpu, on_gpu in zip(*batches, strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu[:3], on_gpu[:3], strict=True))


class _Recorded(Split):
    """A split that keeps the requests which batches are made from."""

    def augmented(self, requests, args, memory_format):
        sizes = [len(request.rows) for request in requests.make()]
        assert max(sizes) <= requests.largest
        _SEEN.extend(sizes)
        return super().augmented(requests, args, memory_format)


_SEEN: list[int] = []


def test_no_request_is_larger_than_it_says() -> None:
    """A pipeline makes room for so many images at once: a batch's own, and another one mixed into each."""
    split = _split(64)
    recorded = _Recorded(images=split.images, labels=split.labels, ids=split.ids)
    _SEEN.clear()
    for batch in _train_batches(recorded, batch_size=16, cutmix=0.5, mixup=0.5, num_classes=_CLASSES, **_OPTIONS):
        assert len(batch.ids) == 16
    assert max(_SEEN) > 24


def _batches(count: int = 100, **options) -> Batches:
    split = Split(
        images=torch.zeros(count, 1, 2, 2, dtype=torch.uint8),
        labels=torch.zeros(count, dtype=torch.int64),
        ids=torch.arange(count),
    )
    return Batches(split, Augmentation(), **{"global_batch_size": 50, "seed": 2, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 2}, "batches 2; expected 50"),
        # as many batches, of other samples
        ({"global_batch_size": 60}, "global_batch_size 50; expected 60"),
        ({"count": 99}, "images 100; expected 99"),
        ({"seed": 3}, "seed 2; expected 3"),
    ],
)
def test_a_state_of_other_batches_is_refused(options, message: str) -> None:
    state = _batches().state_dict()
    with pytest.raises(ValueError, match=f"state_dict: {message}: the state of the same data"):
        _batches(**options).load_state_dict(state)
    with pytest.raises(ValueError, match="state_dict: batch 3; expected 0 to 2"):
        _batches().load_state_dict({**state, "batch": 3})


def test_a_loaded_epoch_is_gone_on_with_and_every_other_one_begins_anew() -> None:
    """In the loop that sets each epoch, too: the one of the state once, and again from its beginning."""
    batches = _batches(global_batch_size=30)
    batches.set_epoch(4)
    seen = next(iter(batches)).ids.tolist()
    later = _batches(global_batch_size=30)
    later.load_state_dict(batches.state_dict())
    later.set_epoch(4)
    assert sorted(seen + [number for batch in later for number in batch.ids.tolist()]) == list(range(100))
    for epoch in (4, 4, 5):
        later.set_epoch(epoch)
        assert sum(len(batch.ids) for batch in later) == 100
    later.load_state_dict(batches.state_dict())
    later.set_epoch(5)
    assert len(list(later)) == 4
    # the end of an epoch is a place too
    done = later.state_dict()
    later.load_state_dict(done)
    assert len(list(later)) == 0
    # gone on with at once, and then set
    later.load_state_dict(batches.state_dict())
    assert len(list(later)) == 3
    later.set_epoch(4)
    assert len(list(later)) == 4


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
@settings(max_examples=60)
def test_shuffled_is_a_permutation(size: int, seed: int) -> None:
    rows = shuffled(torch.arange(size), size, seed=seed)
    assert torch.equal(rows.sort().values, torch.arange(size))
    some = torch.randint(0, size, (7,), generator=torch.Generator().manual_seed(seed % 1000))
    assert torch.equal(shuffled(some, size, seed=seed), rows[some])


def test_shuffled_looks_random_and_takes_any_size() -> None:
    """Correlation of neighbours and of place and row; and half a billion rows without a table of them."""
    size = 20_000
    rows = shuffled(torch.arange(size), size, seed=3).double()
    centred = rows - rows.mean()
    for other in (centred.roll(1), torch.arange(size) - (size - 1) / 2):
        assert abs((centred * other).mean() / centred.square().mean()) < 4 / math.sqrt(size)
    assert not torch.equal(rows, shuffled(torch.arange(size), size, seed=4).double())
    places = torch.arange(0, 500_000_000, 5_000_011)
    found = shuffled(places, 500_000_000, seed=1)
    assert len(found.unique()) == len(places)
    assert 0 <= found.min() <= found.max() < 500_000_000


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("extra", [None, 30])
def test_sizes_are_those_of_the_batches(drop_last: bool, extra: int | None) -> None:
    options = {"extra": _split(extra, first_id=_FIRST_EXTRA), "extra_fraction": 0.3} if extra else {}
    batches = Batches(_split(35), Augmentation(), global_batch_size=10, drop_last=drop_last, seed=0, **options)
    assert batches.sizes == [len(batch.ids) for batch in batches] == [batch.whole_size for batch in batches.epoch(1)]
    assert len(batches) == len(batches.sizes)


def test_the_order_is_by_words_of_seed_epoch_and_id() -> None:
    """Philox words of stream 3, so that a run goes on in the order that it began with, whatever the version."""
    split = _split(40)
    found = torch.cat([batch.ids for batch in _train_batches(split, batch_size=7, **_OPTIONS)]).tolist()
    words = {i: _words(i, 2, seed=_OPTIONS["seed"], epoch=_OPTIONS["epoch"], stream=3) for i in split.ids.tolist()}
    assert found == sorted(words, key=lambda i: (words[i][0], words[i][1] >> 1))
