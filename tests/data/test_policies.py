"""IDBH, AutoAugment and rotations: what is done, against Pillow an image at a time; and what is drawn."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from augmented import augment
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from awp_engine.config import ConfigError
from awp_engine.config.settings import DataConfig
from awp_engine.data import Augmentation, Split, train_batches
from awp_engine.data.augment import auto_augment, color_shape
from awp_engine.data.augment.crop_shift import draw_crop_shift
from awp_engine.data.augment.erase import draw_erase
from awp_engine.data.augment.image_operations import autocontrast
from awp_engine.data.augment.policy import POLICIES
from awp_engine.data.augment.rotation import draw_rotation, random_rotation
from awp_kernels.philox import mix_seed, sample_words

SEED, EPOCH = 3, 2
IDS = torch.arange(8000) * 5 + 1
GRAY = (128, 128, 128)


def pictures(count: int, height: int = 18, width: int = 23, channels: int = 3) -> torch.Tensor:
    """uint8 [count, C, H, W]: ramps with noise, of many levels or of few."""
    rng = np.random.default_rng(count)
    ramp = np.linspace(10, 230, width) + np.linspace(-40, 40, height)[:, None]
    values = ramp + rng.normal(0, 25, (count, channels, height, width)) + rng.integers(-60, 60, (count, channels, 1, 1))
    values[::3] = values[::3] // 40 * 40
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))


def to_pillow(image: torch.Tensor) -> Image.Image:
    values = image.byte().permute(1, 2, 0).numpy()
    return Image.fromarray(values if values.shape[2] == 3 else values[..., 0])


def from_pillow(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.atleast_3d(np.asarray(image)).astype(np.int32)).permute(2, 0, 1)


def words_of(sample_id: int, count: int, stream: int) -> list[int]:
    words = sample_words(torch.tensor([sample_id]), count, seed=mix_seed(SEED, EPOCH), stream=stream)
    return [int(word) for word in words[0]]


# -- the operations, as torchvision (for IDBH) and DAJAT's file ask Pillow for them


def shear(image: Image.Image, tangent: float, *, along_x: bool) -> Image.Image:
    """About the middle: columns move with the distance of their row from it, or rows with that of their column."""
    width, height = image.size
    x, y = (tangent, 0) if along_x else (0, tangent)
    matrix = (1, x, -x * height / 2, y, 1, -y * width / 2)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0)


def turn(image: Image.Image, degrees: float, fill: int) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.NEAREST, fillcolor=(fill,) * 3 if image.mode == "RGB" else fill)


COLOR_SHAPE: list[Callable[[Image.Image, float], Image.Image]] = [
    lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    lambda image, _: ImageOps.autocontrast(image),
    lambda image, _: ImageOps.equalize(image),
    lambda image, tangent: shear(image, tangent, along_x=True),
    lambda image, tangent: shear(image, tangent, along_x=False),
    lambda image, degrees: turn(image, degrees, 0),
]
AMOUNTS = [[0.1, 0.63, 1.0, 1.37, 1.9]] * 4 + [[0.0]] * 2 + [[-0.365, -0.05, 0.07, 0.1511, 0.365]] * 2
AMOUNTS += [[*range(-30, 31)]]


NAMES = [
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
    "rotate",
    "color",
    "contrast",
    "sharpness",
    "brightness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
    "invert",
]


def policy_operation(name: str, image: Image.Image, bin_of_ten: int, side: int) -> Image.Image:
    """An operation of an AutoAugment policy at a bin of its range, to the side 1 or -1."""
    part, (width, height) = bin_of_ten / 9, image.size
    fill = GRAY if image.mode == "RGB" else 128

    def affine(*matrix: float, resample: Image.Resampling) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)

    cubic, nearest = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
    sheared, moved, factor = side * 0.3 * part, side * 150 / 331 * part, 1 + side * 0.9 * part
    return {
        "shear-x": lambda: affine(1, sheared, 0, 0, 1, 0, resample=cubic),
        "shear-y": lambda: affine(1, 0, 0, sheared, 1, 0, resample=cubic),
        "translate-x": lambda: affine(1, 0, moved * width, 0, 1, 0, resample=nearest),
        "translate-y": lambda: affine(1, 0, 0, 0, 1, moved * height, resample=nearest),
        "rotate": lambda: turn(image, 30 * part, 128),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "posterize": lambda: ImageOps.posterize(image, int(np.round(8 - 4 * part))),
        "solarize": lambda: ImageOps.solarize(image, 256 - 256 * part),  # pyright: ignore[reportArgumentType]
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
    }[name]()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(len(COLOR_SHAPE)))
def test_every_operation_of_color_shape_is_pillows(number, channels):
    for shape in ((18, 23), (64, 64), (7, 1)):
        images = pictures(6, *shape, channels)
        for amount in AMOUNTS[number]:
            levels = images.int()
            given = torch.full((6, 1), float(amount), dtype=torch.float64)
            color_shape.color_shape(levels, torch.full((6, 1), number), given)
            for found, image in zip(levels, images, strict=True):
                assert torch.equal(found, from_pillow(COLOR_SHAPE[number](to_pillow(image), amount))), amount


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_of_auto_augment_is_pillows(name, channels):
    """At every bin, to both sides: by a policy that does this alone."""
    for magnitude in range(10):
        pairs = (((name, 1.0, magnitude), (name, 0.0, 0)),)
        for shape in ((32, 32), (3, 5)):
            images = pictures(5, *shape, channels)
            levels = images.int()
            choice, amount = auto_augment.draw_auto_augment(IDS[:5], pairs, seed=SEED, epoch=EPOCH)
            auto_augment.auto_augment(levels, choice, amount)
            for found, image, sample_id in zip(levels, images, IDS.tolist(), strict=False):
                side = -1 if words_of(sample_id, 3, 16)[2] & 1 else 1
                expected = from_pillow(policy_operation(name, to_pillow(image), magnitude, side))
                assert torch.equal(found, expected), (magnitude, side)


def test_autocontrast_rounds_as_pillow_does_for_every_range():
    """255 * (1 / 249) * 83 is less than 85, and 255 / 249 * 83 is not."""
    spread = [torch.arange(low, 256) for low in range(0, 256, 5)] + [torch.arange(0, high) for high in range(2, 256)]
    for levels in spread:
        image = levels.byte().view(1, 1, -1)
        assert torch.equal(autocontrast(image[None].int())[0], from_pillow(ImageOps.autocontrast(to_pillow(image))))


# -- whole policies, a sample at a time


def plain_crop_shift(image: torch.Tensor, sample_id: int, most: int) -> torch.Tensor:
    """Crop, pad with black, crop again."""
    words, (_, height, width) = words_of(sample_id, 6, 14), image.shape
    strength = words[0] * (most + 1) >> 32
    across = words[1] * (strength + 1) >> 32
    down = strength - across
    left, top, to_left, to_top = (
        word * (lost + 1) >> 32 for word, lost in zip(words[2:], [across, down] * 2, strict=True)
    )
    kept = image[:, top : top + height - down, left : left + width - across]
    padded = torch.nn.functional.pad(kept, (across, across, down, down))
    # how far the part comes down is how much later the second crop would begin if it were moved, and not the part
    return padded[:, down - to_top : down - to_top + height, across - to_left : across - to_left + width]


def plain_idbh(image: torch.Tensor, sample_id: int, policy: str) -> torch.Tensor:
    """int [C, H, W] after mirroring."""
    svhn = policy == "idbh-svhn"
    image = plain_crop_shift(image, sample_id, 8 if svhn else 10)
    word, share, sign = words_of(sample_id, 3, 15)
    odds = [0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.15, 0.15, 0.3] if svhn else [0.125] * 6 + [0.0625, 0.0625, 0.125]
    place, number = (word * 10_000 >> 32) / 10_000, 0
    while number < 8 and place + 1e-9 >= sum(odds[: number + 1]):
        number += 1
    share, sign = share / 2**32, -1 if sign & 1 else 1
    if number < 4:
        low = (0.1, 0.5, 0.5, 0.1)[number]
        amount = low + (1.9 - low) * share
    elif number < 8:
        amount = sign * math.tan(0.05 + (0.3 if svhn else 0.1) * share)
    else:
        amount = sign * (1 + int(share * (30 if svhn else 10)))
    image = from_pillow(COLOR_SHAPE[number](to_pillow(image), amount))
    probability, area = {"idbh-weak": (0.5, 0.33), "idbh-strong": (1.0, 0.33), "idbh-svhn": (1.0, 0.5)}[policy]
    _, height, width = image.shape
    words = words_of(sample_id, 41, 11)
    for attempt in range(10 if words[0] < probability * 2**32 else 0):
        size, shape, row, column = words[1 + 4 * attempt : 5 + 4 * attempt]
        pixels = (0.02 + (area - 0.02) * size / 2**32) * height * width
        ratio = 0.3 * (3.3 / 0.3) ** (((shape >> 20) + 0.5) / 4096)
        tall, wide = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if tall < height and wide < width:
            top, left = row * (height - tall + 1) >> 32, column * (width - wide + 1) >> 32
            image[:, top : top + tall, left : left + wide] = 0
            break
    return image


def plain_auto_augment(image: torch.Tensor, sample_id: int, policy: str) -> torch.Tensor:
    pairs = auto_augment.SVHN if policy == "autoaugment-svhn" else auto_augment.CIFAR10
    words, picture = words_of(sample_id, 5, 16), to_pillow(image)
    for place, (name, probability, magnitude) in enumerate(pairs[words[0] * 25 >> 32]):
        done, sign = words[1 + 2 * place : 3 + 2 * place]
        if done < probability * 2**32:
            picture = policy_operation(name, picture, magnitude, -1 if sign & 1 else 1)
    return from_pillow(picture)


def split_of(images: torch.Tensor) -> Split:
    ids = IDS[: len(images)]
    return Split(images=images, labels=torch.zeros(len(images), dtype=torch.int64), ids=ids)


def samples(images: torch.Tensor, augmentation: Augmentation, **options: Any) -> torch.Tensor:
    """Of every image in its place what an epoch makes of it, int [N, C, H, W]."""
    batches = list(train_batches(split_of(images), augmentation, seed=SEED, epoch=EPOCH, **options))
    made, ids = torch.cat([batch.images for batch in batches]), torch.cat([batch.ids for batch in batches])
    levels = (made * 255).round()
    assert torch.equal(made, levels / made.new_full((), 255))
    return levels.int()[torch.argsort(ids)]


@pytest.mark.parametrize("policy", ["idbh-weak", "idbh-strong", "idbh-svhn"])
def test_idbh_does_to_each_sample_what_the_paper_says(policy):
    images = pictures(160)
    found = samples(images, Augmentation(flip=True, policy=policy), batch_size=64)
    flipped = augment(images, IDS[:160], seed=SEED, epoch=EPOCH, pad=0, flip=True)
    for sample_id, image, one in zip(IDS.tolist(), (flipped * 255).round().int(), found, strict=False):
        assert torch.equal(one, plain_idbh(image, sample_id, policy)), sample_id


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("policy", ["autoaugment-cifar10", "autoaugment-svhn"])
def test_auto_augment_comes_after_crops_or_before_them(policy, first):
    images, ids = pictures(160, 17, 17), IDS[:160]
    found = samples(images, Augmentation(pad=3, flip=True, policy=policy, policy_first=first), batch_size=64)

    def cropped(given: torch.Tensor) -> torch.Tensor:
        return (augment(given.byte(), ids, seed=SEED, epoch=EPOCH, pad=3, flip=True) * 255).round().int()

    def by_policy(given: torch.Tensor) -> torch.Tensor:
        return torch.stack([plain_auto_augment(image, int(i), policy) for image, i in zip(given, ids, strict=True)])

    expected = cropped(by_policy(images)) if first else by_policy(cropped(images))
    assert torch.equal(found, expected)
    assert not torch.equal(found, by_policy(cropped(images)) if first else cropped(by_policy(images)))


def test_the_pairs_are_the_papers():
    """As torchvision has them, counted: how often an operation stands in a table, and the sums of odds and bins."""
    svhn = "invert " * 12 + "shear-y " * 8 + "shear-x equalize " * 6 + "solarize " * 5 + "rotate translate-y " * 4
    svhn += "autocontrast " * 3 + "contrast translate-x"
    cifar = "equalize " * 9 + "autocontrast " * 7 + "sharpness translate-y color " * 5 + "brightness solarize " * 4
    cifar += "invert " * 3 + "contrast translate-x shear-y " * 2 + "rotate posterize"
    for pairs, names, odds, bins in ((auto_augment.CIFAR10, cifar, 26.5, 187), (auto_augment.SVHN, svhn, 32.9, 143)):
        flat = [operation for pair in pairs for operation in pair]
        assert sorted(name for name, _, _ in flat) == sorted(names.split())
        assert sum(probability for _, probability, _ in flat) == pytest.approx(odds)
        assert sum(magnitude for _, _, magnitude in flat) == bins


def test_a_rotation_follows_crop_and_mirroring():
    images = pictures(60, 32, 32)
    found = samples(images, Augmentation(pad=4, flip=True, rotate=15), batch_size=60)
    cropped = augment(images, IDS[:60], seed=SEED, epoch=EPOCH, pad=4, flip=True)
    for sample_id, image, one in zip(IDS.tolist(), cropped * 255, found, strict=False):
        degrees = 15 * (words_of(sample_id, 1, 17)[0] / 2**31 - 1)
        assert torch.equal(one, from_pillow(turn(to_pillow(image.round()), degrees, 0)))
    # Cutout's square is not turned: it comes last
    cut = samples(images, Augmentation(pad=4, flip=True, rotate=15, cutout=6, fill=(1.0, 0.0, 1.0)), batch_size=60)
    for sample_id, image, one in zip(IDS.tolist(), found, cut, strict=False):
        top, left = (max((word * 32 >> 32) - 3, 0) for word in words_of(sample_id, 2, 6))
        bottom, right = ((word * 32 >> 32) + 3 for word in words_of(sample_id, 2, 6))
        image[:, top:bottom, left:right] = torch.tensor([255, 0, 255], dtype=torch.int32).view(3, 1, 1)
        assert torch.equal(one, image)


@pytest.mark.parametrize("policy", POLICIES)
def test_samples_are_keyed(policy):
    """By (seed, epoch, id): not by batch, place or rank; in another epoch they differ."""
    images, augmentation = pictures(40), Augmentation(flip=True, policy=policy)
    whole = samples(images, augmentation, batch_size=40)
    assert torch.equal(whole, samples(images, augmentation, batch_size=7))
    ranks = [
        list(train_batches(split_of(images), augmentation, batch_size=16, seed=SEED, epoch=EPOCH, rank=rank, ranks=2))
        for rank in range(2)
    ]
    for batch in (batch for batches in ranks for batch in batches):
        assert torch.equal((batch.images * 255).round().int(), whole[(batch.ids - 1) // 5])
    later = next(train_batches(split_of(images), augmentation, batch_size=40, seed=SEED, epoch=EPOCH + 1))
    levels = (later.images * 255).round().int()[torch.argsort(later.ids)]
    assert (levels != whole).flatten(1).any(1).float().mean() > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_on_the_gpu_are_those_on_the_cpu(policy):
    split, augmentation = split_of(pictures(500, 32, 32)), Augmentation(flip=True, policy=policy)
    on_cpu, on_gpu = (
        next(train_batches(split.to(device), augmentation, batch_size=500, seed=SEED, epoch=EPOCH))
        for device in ("cpu", "cuda")
    )
    assert torch.equal(on_cpu.images, on_gpu.images.cpu())


# -- what is drawn


def uniform(numbers: torch.Tensor, count: int) -> bool:
    found = torch.bincount(numbers, minlength=count).numpy()
    return len(found) == count and (count == 1 or stats.chisquare(found).pvalue > 1e-3)


@pytest.mark.parametrize("most", [8, 10])
def test_crop_shift_is_spread(most):
    shifts = draw_crop_shift(IDS, seed=SEED, epoch=EPOCH, most=most)
    strength = shifts.rows + shifts.columns
    assert uniform(strength, most + 1)
    for value in range(most + 1):
        assert uniform(shifts.columns[strength == value], value + 1)
    for lost, *places in ((shifts.columns, shifts.left, shifts.right), (shifts.rows, shifts.top, shifts.down)):
        for place in places:
            assert (place <= lost).all()
            for value in range(4):
                assert uniform(place[lost == value], value + 1)


@pytest.mark.parametrize(
    ("space", "odds", "shear", "degrees"),
    [
        (color_shape.COLOR, [0.125] * 6 + [0.0625] * 2 + [0.125], (0.05, 0.15), 10),
        (color_shape.SHAPE, [0.08, 0.08, 0.04, 0.08, 0.04, 0.08, 0.15, 0.15, 0.3], (0.05, 0.35), 30),
    ],
)
def test_color_shape_is_spread(space, odds, shear, degrees):
    choice, amount = (drawn.squeeze(1) for drawn in color_shape.draw_color_shape(IDS, space, seed=SEED, epoch=EPOCH))
    words = sample_words(IDS, 1, seed=mix_seed(SEED, EPOCH), stream=15)
    limits = (10_000 * torch.tensor(odds, dtype=torch.float64)).round().cumsum(0)
    assert torch.equal(choice, ((words * 10_000 >> 32) >= limits).sum(1))
    counts = torch.bincount(choice, minlength=9).numpy()
    assert stats.chisquare(counts, 8000 * np.array(odds)).pvalue > 1e-3
    for number, (low, high) in enumerate([(0.1, 1.9), (0.5, 1.9), (0.5, 1.9), (0.1, 1.9)]):
        assert stats.kstest(amount[choice == number].numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3
    for number in (6, 7):
        angle = amount[choice == number].atan()
        assert stats.kstest(angle.abs().numpy(), stats.uniform(shear[0], shear[1] - shear[0]).cdf).pvalue > 1e-3
        assert stats.binomtest(int((angle > 0).sum()), len(angle)).pvalue > 1e-3
    turned = amount[choice == 8].long()
    assert uniform(turned[turned > 0] - 1, degrees)
    assert uniform(-turned[turned < 0] - 1, degrees)
    assert stats.binomtest(int((turned > 0).sum()), len(turned)).pvalue > 1e-3


@pytest.mark.parametrize("pairs", [auto_augment.CIFAR10, auto_augment.SVHN])
def test_auto_augment_is_spread(pairs):
    choice, amount = auto_augment.draw_auto_augment(IDS, pairs, seed=SEED, epoch=EPOCH)
    chosen = torch.tensor([words * 25 >> 32 for words in sample_words(IDS, 1, seed=mix_seed(SEED, EPOCH), stream=16)])
    assert uniform(chosen, 25)
    for number, pair in enumerate(pairs):
        for place, (_, probability, _) in enumerate(pair):
            done = choice[chosen == number, place] >= 0
            assert stats.binomtest(int(done.sum()), len(done), probability).pvalue > 1e-4
    both = amount[:, 0].sign()
    assert both.min() == -1 or pairs is auto_augment.CIFAR10
    assert both.max() == 1


def test_rotations_and_boxes_are_spread():
    degrees = draw_rotation(IDS, seed=SEED, epoch=EPOCH, degrees=15)
    assert stats.kstest(degrees.numpy(), stats.uniform(-15, 30).cdf).pvalue > 1e-3
    none = torch.zeros(3, 1, 4, 4, dtype=torch.int32)
    assert torch.equal(random_rotation(none, IDS[:3], seed=SEED, epoch=EPOCH, degrees=15), none)
    drawn: dict[str, Any] = {"seed": SEED, "epoch": EPOCH, "height": 200, "width": 200, "ratio": (0.3, 3.3)}
    boxes = draw_erase(IDS, probability=0.5, area=(0.02, 0.33), **drawn)
    tall, wide = (boxes.bottom - boxes.top).double(), (boxes.right - boxes.left).double()
    erased = tall > 0
    assert stats.binomtest(int(erased.sum()), len(IDS), 0.5).pvalue > 1e-3
    ratio = (tall / wide)[erased].log().numpy()
    assert stats.kstest(ratio, stats.uniform(math.log(0.3), math.log(11)).cdf).statistic < 0.05


# -- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "idbh"}, r"--data\.policy: did you mean idbh-weak or idbh-svhn\?"),
        ({"policy": "idbh-weak"}, r"--data\.flip: expected true with --data\.policy idbh-weak, which begins by"),
        ({"policy": "idbh-weak", "flip": True, "pad": 4}, r"--data\.pad: expected 0 with --data\.policy idbh-weak"),
        ({"policy": "idbh-svhn", "flip": True, "erase": 0.5}, r"--data\.erase: expected 0 with"),
        ({"policy": "idbh-svhn", "flip": True, "cutout": 4}, r"--data\.cutout: expected 0 with"),
        (
            {"policy": "autoaugment-svhn", "rand_augment": 9.0},
            r"--data\.rand-augment: expected none with --data\.policy autoaugment-svhn: one",
        ),
        ({"policy": "autoaugment-svhn", "rotate": 9.0}, r"--data\.rotate: expected 0 with --data\.policy"),
        ({"rand_augment": 9.0, "rotate": 9.0}, r"--data\.rotate: expected 0 with --data\.rand-augment"),
        ({"policy_first": True, "pad": 4}, r"--data\.policy-first: expected false, unless"),
        ({"policy_first": True, "policy": "autoaugment-svhn"}, r"--data\.policy-first: expected false, unless"),
        ({"rotate": 181.0}, r"--data\.rotate: expected degrees, 0 to 180"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**given)


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"policy: 'idbh'; expected none, idbh-weak"):
        Augmentation(policy="idbh")
    with pytest.raises(ValueError, match=r"rotate: 9; expected 0 with a policy"):
        Augmentation(policy="idbh-weak", rotate=9)
    augmentation = Augmentation(flip=True, policy="idbh-weak")
    with pytest.raises(
        ValueError, match=r"policy idbh-weak: expected images of at least 11x11 pixels, gray or RGB, got"
    ):
        augmentation.require_fit(split_of(pictures(2, 10, 12)), "split")
    augmentation.require_fit(split_of(pictures(2, 11, 12, 1)), "split")
    with pytest.raises(
        ValueError, match=r"rotate: expected images of at least 1x1 pixels, gray or RGB, got \[C, H, W\]"
    ):
        Augmentation(rotate=5).require_fit(split_of(pictures(2, 9, 9, 2)), "split")
