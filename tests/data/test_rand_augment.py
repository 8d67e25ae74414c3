"""RandAugment against Pillow, random erasing, MixUp: what is drawn, and what is done."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from awp_engine.data.augment.erase import draw_erase, erase
from awp_engine.data.augment.mixing import draw_cutmix, mixed_labels, replace_boxes
from awp_engine.data.augment.mixup import beta_quantiles, blend_images, draw_mixture, draw_mixup
from awp_engine.data.augment.rand_augment import (
    OPERATIONS,
    Operations,
    apply_rand_augment,
    draw_rand_augment,
    operate,
    rand_augment,
)

FILL = (124, 116, 104)
IDS = torch.arange(4000) * 7 + 3


def pixels(seed: int, height: int = 23, width: int = 30, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C]: smooth colours with noise, one channel of few levels, or one of a single level."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 200, width)[None, :, None] + np.linspace(-20, 50, height)[:, None, None]
    values = np.clip(ramp + rng.normal(0, 15 * (seed % 3), (height, width, channels)), 0, 255).astype(np.uint8)
    if seed % 4 == 1:
        values[..., 0] = rng.choice([17, 90, 91], (height, width))
    if seed % 4 == 2:
        values[..., -1] = 200
    return values


def by_pillow(name: str, image: Image.Image, level: float, sign: float, increasing: bool) -> Image.Image:
    """What timm's tables ask of Pillow, bilinear and filled with FILL."""
    signed, size = sign * level / 10, image.size
    fill = FILL if image.mode == "RGB" else FILL[0]

    def affine(*matrix: float) -> Image.Image:
        return image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)

    factor = max(0.1, 1 + sign * (level / 10 * 0.9)) if increasing else level / 10 * 1.8 + 0.1
    bits = int(level / 10 * 4)
    bits = 4 - bits if increasing else bits
    threshold = min(256, int(level / 10 * 256))
    added = min(128, int(level / 10 * 110))
    enhancers = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhancers:
        return enhancers[name](image).enhance(factor)
    if name == "posterize" and bits == 0:
        # Pillow before 13 gave black, now it refuses
        return Image.new(image.mode, size)
    table = [min(255, i + added) if i < 128 else i for i in range(256)]
    return {
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "rotate": lambda: image.rotate(signed * 30, Image.Resampling.BILINEAR, fillcolor=fill),
        "posterize": lambda: ImageOps.posterize(image, bits),
        "solarize": lambda: ImageOps.solarize(image, 256 - threshold if increasing else threshold),
        "solarize-add": lambda: image.point(table * len(image.getbands())),
        "shear-x": lambda: affine(1, signed * 0.3, 0, 0, 1, 0),
        "shear-y": lambda: affine(1, 0, 0, signed * 0.3, 1, 0),
        "translate-x": lambda: affine(1, 0, signed * 0.45 * size[0], 0, 1, 0),
        "translate-y": lambda: affine(1, 0, 0, 0, 1, signed * 0.45 * size[1]),
    }[name]()


def tensor(values: np.ndarray) -> torch.Tensor:
    """[H, W] or [H, W, C] -> int32 [C, H, W]."""
    return torch.from_numpy(np.atleast_3d(values).astype(np.int32)).permute(2, 0, 1)


@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_gives_what_pillow_gives(name, increasing):
    """To the bit, on pictures of many contents and shapes."""
    for channels in (3, 1):
        levels = [0.0, 0.3, 2.5, 5.0, 7.77, 9.0, 9.4, 10.0]
        images = [pixels(seed, 23 + seed % 2, 30, channels) for seed in (0, 2, 4, 6, 8, 10, 12, 14)]
        images += [pixels(seed, 24 - seed % 2, 30, channels) for seed in (1, 5)]
        for shape in sorted({image.shape for image in images}):
            same = [image for image in images if image.shape == shape]
            for sign in (1.0, -1.0):
                for level in levels:
                    given = torch.stack([tensor(image) for image in same])
                    strength = torch.full((len(same),), level, dtype=torch.float64)
                    found = operate(
                        name,
                        given,
                        strength,
                        torch.full_like(strength, sign),
                        increasing=increasing,
                        fill=FILL[:channels],
                    )
                    for one, image in zip(found, same, strict=True):
                        picture = Image.fromarray(image if channels == 3 else image[..., 0])
                        expected = tensor(np.asarray(by_pillow(name, picture, level, sign, increasing)))
                        assert torch.equal(one, expected), (level, sign)


@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.sampled_from(OPERATIONS), st.data())
def test_images_of_any_size_and_content(height, width, channels, name, data):
    seed, level = data.draw(st.integers(0, 99)), data.draw(st.floats(0, 10))
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    strength = torch.tensor([level], dtype=torch.float64)
    one = torch.ones_like(strength)
    found = operate(name, tensor(image)[None], strength, one, increasing=True, fill=FILL[:channels])[0]
    picture = Image.fromarray(image if channels == 3 else image[..., 0])
    expected = tensor(np.asarray(by_pillow(name, picture, level, 1.0, True)))
    assert torch.equal(found, expected)


def test_a_million_colours_turn_gray_as_pillows_do():
    """Enough that the luma's rounding at its ties counts."""
    image = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    full = torch.tensor([10.0], dtype=torch.float64)
    found = operate("color", tensor(image)[None], full, -torch.ones_like(full), increasing=True, fill=FILL)[0]
    expected = by_pillow("color", Image.fromarray(image), 10.0, -1.0, True)
    assert torch.equal(found, tensor(np.asarray(expected)))


def test_operations_follow_each_other_on_their_own_images():
    batch = torch.stack([tensor(pixels(seed)) for seed in range(6)])
    choice = torch.tensor([[0, 7], [-1, -1], [3, 3], [-1, 10], [1, -1], [8, 0]])
    level = torch.arange(12, dtype=torch.float64).view(6, 2) % 10
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).expand(6, 2)
    images = batch.float() / 255
    found = apply_rand_augment(images, Operations(choice, level, sign), fill=[value / 255 for value in FILL])
    for row in range(6):
        picture = Image.fromarray(batch[row].permute(1, 2, 0).numpy().astype(np.uint8))
        for place in range(2):
            if (number := int(choice[row, place])) >= 0:
                amount, side = float(level[row, place]), float(sign[row, place])
                picture = by_pillow(OPERATIONS[number], picture, amount, side, True)
        assert torch.equal(found[row], tensor(np.asarray(picture)).float() / 255), row
    assert torch.equal(images, batch.float() / 255)


def test_what_is_drawn_is_keyed_and_spread():
    drawn = draw_rand_augment(IDS, seed=1, epoch=2)
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(0))
    again = draw_rand_augment(IDS[order], seed=1, epoch=2)
    assert all(torch.equal(a[order], b) for a, b in zip(drawn, again, strict=True))
    assert all(torch.equal(a[5:9], b) for a, b in zip(drawn, drawn.part(slice(5, 9)), strict=True))
    for other in (draw_rand_augment(IDS, seed=2, epoch=2), draw_rand_augment(IDS, seed=1, epoch=3)):
        assert (other.choice != drawn.choice).float().mean() > 0.5
    counts = torch.bincount(drawn.choice.flatten() + 1, minlength=16)
    assert stats.chisquare(counts.numpy(), 8000 * np.array([0.5, *[0.5 / 15] * 15])).pvalue > 1e-3
    assert stats.binomtest(int((drawn.sign > 0).sum()), 8000).pvalue > 1e-3
    assert drawn.level.max() == 10
    # clipped at 10, 2.3% of N(9, 0.5)
    assert stats.binomtest(int((drawn.level == 10).sum()), 8000, float(stats.norm.sf(2))).pvalue > 1e-3
    inner = drawn.level[drawn.level < 9].numpy()
    assert stats.kstest((9 - inner) / 0.5, stats.halfnorm.cdf).pvalue > 1e-3
    # one is not told by the other
    assert abs(np.corrcoef(drawn.choice.numpy().T)[0, 1]) < 0.06
    fixed = draw_rand_augment(IDS[:9], seed=1, epoch=2, operations=3, magnitude=4, std=0.0)
    assert fixed.choice.shape == (9, 3)
    assert torch.equal(fixed.level, torch.full((9, 3), 4.0, dtype=torch.float64))


def test_a_batch_is_augmented_alike_in_pieces():
    images = torch.stack([tensor(pixels(seed)) for seed in range(12)]).float() / 255
    ids = torch.arange(12) + 100
    whole = rand_augment(images, ids, seed=3, epoch=1)
    parts = [rand_augment(images[i : i + 5], ids[i : i + 5], seed=3, epoch=1) for i in (0, 5, 10)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, images)
    assert torch.equal(whole, (whole * 255).round() / whole.new_full((), 255))
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="images: expected 1 or 3 channels for RandAugment, got 4"):
        rand_augment(torch.zeros(1, 4, 8, 8), torch.tensor([0]), seed=0, epoch=1)
    with pytest.raises(ValueError, match="fill: expected 3 values, one a channel, got 1"):
        rand_augment(torch.zeros(1, 3, 8, 8), torch.tensor([0]), seed=0, epoch=1, fill=[0.5])
    with pytest.raises(ValueError, match=r"alpha: expected a number > 0, got 0\.0"):
        draw_mixup(IDS, seed=0, epoch=1, probability=1, alpha=0.0, count=9)
    boxes = draw_erase(torch.tensor([0]), seed=0, epoch=1, probability=1, height=8, width=8)
    with pytest.raises(ValueError, match="mean and std: expected 3 values each"):
        erase(torch.zeros(1, 3, 8, 8), boxes, torch.tensor([0]), seed=0, epoch=1, mean=[0.5], std=None)


# -- random erasing


@settings(max_examples=25)
@given(st.integers(4, 60), st.integers(4, 60), st.integers(0, 9))
def test_boxes_lie_inside_and_have_the_area_asked_for(height, width, epoch):
    boxes = draw_erase(IDS[:500], seed=1, epoch=epoch, probability=0.5, height=height, width=width)
    tall, wide = boxes.bottom - boxes.top, boxes.right - boxes.left
    assert (boxes.top >= 0).all()
    assert (boxes.left >= 0).all()
    assert (boxes.bottom <= height).all()
    assert (boxes.right <= width).all()
    assert (tall < height).all()
    assert (wide < width).all()
    # rounding to whole pixels moves each side by at most a half
    most = (height * width / 3) ** 0.5
    assert (tall * wide <= height * width / 3 + (most * 0.3**-0.5 + 1)).all()


def test_erasing_is_spread_as_the_paper_says():
    boxes = draw_erase(IDS, seed=1, epoch=2, probability=0.25, height=224, width=224)
    tall, wide = (boxes.bottom - boxes.top).double(), (boxes.right - boxes.left).double()
    erased = tall > 0
    assert stats.binomtest(int(erased.sum()), len(IDS), 0.25).pvalue > 1e-3
    area, ratio = (tall * wide / 224**2)[erased].numpy(), (tall / wide)[erased].log().numpy()
    # the largest boxes of extreme ratios do not fit and are drawn again, so not quite uniform
    assert stats.kstest(area, stats.uniform(0.02, 1 / 3 - 0.02).cdf).statistic < 0.06
    assert stats.kstest(ratio, stats.uniform(math.log(0.3), -2 * math.log(0.3)).cdf).statistic < 0.06
    again = draw_erase(IDS.flip(0), seed=1, epoch=2, probability=0.25, height=224, width=224)
    assert all(torch.equal(a.flip(0), b) for a, b in zip(boxes, again, strict=True))
    other = draw_erase(IDS, seed=1, epoch=3, probability=0.25, height=224, width=224)
    assert not torch.equal(boxes.top, other.top)


def test_the_rest_of_an_image_stays_and_noise_is_keyed_by_sample():
    ids = torch.arange(20)
    images = torch.full((20, 3, 40, 50), 0.5)
    boxes = draw_erase(ids, seed=1, epoch=2, probability=0.5, height=40, width=50)
    mean, std = (0.4, 0.5, 0.6), (0.05, 0.1, 0.3)
    found = erase(images, boxes, ids, seed=1, epoch=2, mean=mean, std=std)
    inside = replace_boxes(torch.zeros_like(images), boxes, torch.ones(())).bool()
    assert torch.equal(found[~inside], images[~inside])
    assert inside.flatten(1).any(1).sum() not in (0, 20)
    assert found.min() >= 0
    assert found.max() <= 1
    for channel in (0, 1):
        noise = found[:, channel][inside[:, channel]].numpy()
        assert stats.kstest((noise - mean[channel]) / std[channel], "norm").pvalue > 1e-3
    # clipped where it leaves [0, 1]
    assert (found[:, 2][inside[:, 2]] == 1).float().mean() == pytest.approx(stats.norm.sf(0.4 / 0.3), abs=0.03)
    part = slice(4, 11)
    assert torch.equal(
        erase(images[part], boxes.part(part), ids[part], seed=1, epoch=2, mean=mean, std=std), found[part]
    )
    plain = erase(images, boxes, ids, seed=1, epoch=2, mean=mean, std=None)
    assert torch.equal(plain, torch.where(inside, torch.tensor(mean).view(-1, 1, 1), images))
    none = draw_erase(ids, seed=1, epoch=2, probability=0.0, height=40, width=50)
    assert torch.equal(erase(images, none, ids, seed=1, epoch=2, mean=mean, std=std), images)


# -- MixUp


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_shares_are_betas(alpha):
    partners, share = draw_mixup(IDS, seed=1, epoch=2, probability=1.0, alpha=alpha, count=10)
    assert stats.kstest(share.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3
    assert stats.chisquare(torch.bincount(partners, minlength=9).numpy()).pvalue > 1e-3
    table = beta_quantiles(alpha).double()
    assert float(table.mean()) == pytest.approx(0.5, abs=1e-6)
    assert float(table.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-3)


def test_a_share_of_the_images_is_mixed_and_keyed():
    arguments = {"probability": 0.3, "alpha": 0.8, "count": 50}
    partners, share = draw_mixup(IDS, seed=1, epoch=2, **arguments)
    assert stats.binomtest(int((share < 1).sum()), len(IDS), 0.3).pvalue > 1e-3
    again = draw_mixup(IDS.flip(0), seed=1, epoch=2, **arguments)
    assert torch.equal(again[0].flip(0), partners)
    assert torch.equal(again[1].flip(0), share)
    assert not torch.equal(draw_mixup(IDS, seed=1, epoch=3, **arguments)[1], share)


def test_cutmix_or_mixup_but_not_both():
    size = {"height": 32, "width": 40}
    mixture = draw_mixture(IDS, seed=1, epoch=2, probability=1.0, switch=0.5, alpha=0.8, count=50, **size)
    cut, blended = mixture.boxes.share_outside(32, 40) < 1, mixture.blend < 1
    assert not (cut & blended).any()
    # a box may be empty by chance
    assert stats.binomtest(int(blended.sum()), len(IDS)).pvalue > 1e-3
    assert (cut | blended).float().mean() > 0.98
    by_box, boxes = draw_cutmix(IDS, seed=1, epoch=2, probability=1.0, count=50, **size)
    by_blend, share = draw_mixup(IDS, seed=1, epoch=2, probability=1.0, alpha=0.8, count=50)
    assert torch.equal(mixture.partners[cut], by_box[cut])
    assert torch.equal(mixture.partners[blended], by_blend[blended])
    assert torch.equal(mixture.own_share(32, 40)[cut], boxes.share_outside(32, 40)[cut])
    assert torch.equal(mixture.own_share(32, 40)[blended], share[blended])
    for switch, every in ((0.0, blended), (1.0, cut)):
        one = draw_mixture(IDS, seed=1, epoch=2, probability=1.0, switch=switch, alpha=0.8, count=50, **size)
        of_blend, of_box = (one.blend < 1).float().mean(), (one.boxes.bottom > one.boxes.top).float().mean()
        assert (of_blend, of_box) == (1 - switch, pytest.approx(switch, abs=0.02))
        assert every.any()
    part = mixture.part(slice(3, 9))
    assert torch.equal(part.blend, mixture.blend[3:9])
    assert torch.equal(part.boxes.top, mixture.boxes.top[3:9])


def test_blending_keeps_whole_images_and_labels_sum_to_one():
    images, partners = torch.rand(4, 3, 5, 6), torch.rand(4, 3, 5, 6)
    share = torch.tensor([1.0, 0.25, 0.7, 0.0])
    mixed = blend_images(images, partners, share)
    assert torch.equal(mixed[0], images[0])
    assert torch.equal(mixed[3], partners[3])
    torch.testing.assert_close(mixed[1], 0.25 * images[1] + 0.75 * partners[1])
    labels = mixed_labels(torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2]), share, num_classes=3)
    assert torch.equal(labels.sum(1), torch.ones(4))
