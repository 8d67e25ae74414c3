"""`augment`: the bits of every implementation against a definition in plain lists, and what is special about it."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import generator

from awp_kernels import augment, use_backend
from awp_kernels.philox import STREAM_AUGMENT, STREAM_CUTOUT, sample_words

BACKENDS = ("reference", "cpp")
FORMATS = (torch.channels_last, torch.contiguous_format)
SIZES = ((1, 1), (2, 9), (5, 16), (7, 17), (32, 32), (40, 24), (3, 67))
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "every other image": lambda t: t.repeat_interleave(2, 0)[::2],
    "every other channels_last image": lambda t: t.repeat_interleave(2, 0).contiguous(
        memory_format=torch.channels_last
    )[::2],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}


def pixels(shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def random_ids(count, seed=0):
    return torch.randint(-(2**62), 2**62, (count,), generator=generator(seed))


def defined(images, sample_ids, seed, *, pad=0, flip=False, cutout=0, fill=None, rows=None):
    """Pixel by pixel in Python's numbers."""
    rows = range(len(images)) if rows is None else rows.tolist()
    _, channels, height, width = images.shape
    # fp32 quotients of bytes are fp64 ones rounded once more: 24 bits of a number whose bits repeat every 8
    quotients = [torch.tensor(value / 255, dtype=torch.float32).item() for value in range(256)]
    all_images, result = images.tolist(), []
    for row, sample_id in zip(rows, sample_ids, strict=True):
        first, second, third = sample_words(sample_id.view(1), 3, seed=seed, stream=STREAM_AUGMENT)[0].tolist()
        down, right = first * (2 * pad + 1) // 2**32 - pad, second * (2 * pad + 1) // 2**32 - pad
        first, second = sample_words(sample_id.view(1), 2, seed=seed, stream=STREAM_CUTOUT)[0].tolist()
        top, left = first * height // 2**32 - cutout // 2, second * width // 2**32 - cutout // 2

        def value(c, i, j, row=row, down=down, right=right, mirrored=flip and third % 2, top=top, left=left):
            if 0 <= i - top < cutout and 0 <= j - left < cutout:
                return fill[c]
            y, x = i + down, (width - 1 - j if mirrored else j) + right
            return quotients[all_images[row][c][y][x]] if 0 <= y < height and 0 <= x < width else 0.0

        result.append([[[value(c, i, j) for j in range(width)] for i in range(height)] for c in range(channels)])
    return torch.tensor(result, dtype=torch.float32).reshape(len(result), channels, height, width)


def assert_same(found, expected, memory_format):
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=memory_format)
    assert torch.equal(found.contiguous().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_same_bits_in_any_layout(backend, layout):
    """Sizes, channels and options take turns; rows repeat."""
    options = itertools.cycle(itertools.product((0, 2, 50), (False, True), (0, 3, 8, 99)))
    for (height, width), channels in itertools.product(SIZES, (1, 2, 3, 4)):
        images, ids, rows = pixels((4, channels, height, width)), random_ids(3, height), torch.tensor([3, 0, 3])
        pad, flip, cutout = next(options)
        chosen = {"pad": pad, "flip": flip, "cutout": cutout, "fill": [0.1, 0.7, 1.0, 0.0][:channels]}
        expected = defined(images, ids, 2**63 - 1, rows=rows, **chosen)
        for memory_format in FORMATS:
            with use_backend(backend):
                found = augment(
                    LAYOUTS[layout](images),
                    sample_ids=ids,
                    seed=2**63 - 1,
                    rows=rows,
                    memory_format=memory_format,
                    **chosen,
                )
            assert_same(found, expected, memory_format)


@given(
    shape=st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 3, 4, 7]), st.integers(1, 12), st.integers(1, 70)),
    pad=st.sampled_from([0, 1, 4, 60]),
    flip=st.booleans(),
    cutout=st.sampled_from([0, 1, 6, 100]),
    seed=st.integers(0, 2**63 - 1),
    layout=st.sampled_from(sorted(LAYOUTS)),
    data=st.data(),
)
def test_any_arguments_give_the_definitions_bits(shape, pad, flip, cutout, seed, layout, data):
    count = data.draw(st.integers(0, 4)) if shape[0] else 0
    rows = torch.tensor(data.draw(st.lists(st.integers(0, max(0, shape[0] - 1)), min_size=count, max_size=count)))
    rows = rows.to(torch.int64)
    ids = torch.tensor(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=count, max_size=count)))
    ids, images = ids.to(torch.int64), pixels(shape, 1)
    fill = data.draw(st.lists(st.floats(0, 1, width=32), min_size=shape[1], max_size=shape[1]))
    options = {"pad": pad, "flip": flip, "cutout": cutout, "fill": fill}
    expected = defined(images, ids, seed, rows=rows, **options)
    for backend, memory_format in itertools.product(BACKENDS, FORMATS):
        with use_backend(backend):
            found = augment(
                LAYOUTS[layout](images), sample_ids=ids, seed=seed, rows=rows, memory_format=memory_format, **options
            )
        assert_same(found, expected, memory_format)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_byte_is_divided_and_rounded_to_nearest(backend):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 4, 64)
    exact = torch.arange(256, dtype=torch.float64) / 255
    with use_backend(backend):
        found = augment(images, sample_ids=torch.zeros(1, dtype=torch.int64), seed=0).flatten()
    for neighbour in (0.0, 2.0):
        other = torch.nextafter(found, torch.tensor(neighbour))
        assert ((found.double() - exact).abs() <= (other.double() - exact).abs()).all()


BASELINE = """
import torch
from operations import OPERATIONS, same_bits
operation, layouts = OPERATIONS["augment"], (torch.contiguous_format, torch.channels_last)
for shape in [(2, 3, 32, 32)], [(3, 3, 5, 67)], [(3, 1, 9, 24)], [(2, 4, 5, 17)]:
    for options in operation.variants.values():
        arguments = operation.build(shape, torch.float32, **options)
        (expected,) = operation.define(arguments, torch.float32)["returned"]
        for layout, out in [(a, b) for a in layouts for b in layouts]:
            arguments |= {"images": arguments["images"].contiguous(memory_format=layout), "memory_format": out}
            assert same_bits([operation.call(**arguments)], [expected]), (options, layout, out, shape)
bytes_ = torch.arange(256, dtype=torch.uint8).view(1, 1, 4, 64)
found = operation.call(images=bytes_, sample_ids=torch.zeros(1, dtype=torch.int64), seed=0)
assert torch.equal(found, (bytes_.double() / 255).float())
print("right")
"""


def test_the_baseline_gives_the_same_bits():
    """In a process of its own, which chooses when it first calls; test_sanitizers.py fuzzes all instruction sets."""
    environment = os.environ | {"AWP_CPU": "baseline", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BASELINE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "right\n", done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_depends_on_seed_and_id_alone(backend):
    """Neither on its place, nor on what else is in the batch, nor on where its image lies."""
    images, ids = pixels((40, 3, 12, 10)), random_ids(40)
    options = {"seed": 11, "pad": 3, "flip": True, "cutout": 5, "fill": (0.2, 0.4, 0.6)}
    with use_backend(backend):
        all_of_them = augment(images, sample_ids=ids, **options)
        order = torch.randperm(40, generator=generator(3))
        for rows in (order, order[:7], order[5:6], order[:3].repeat(4), order[:0]):
            assert torch.equal(augment(images, sample_ids=ids[rows], rows=rows, **options), all_of_them[rows])
        moved = augment(images.flip(0), sample_ids=ids[order], rows=39 - order, **options)
        assert torch.equal(moved, all_of_them[order])
        assert not torch.equal(augment(images, sample_ids=ids, **options | {"seed": 12}), all_of_them)


def test_draws_are_uniform():
    """Every offset, both sides and every centre, about as often."""
    count = 6000
    image = pixels((1, 1, 9, 9)).clamp_(1)
    rows, options = torch.zeros(count, dtype=torch.int64), {"seed": 5, "pad": 1, "flip": True}
    ids = torch.arange(count)
    looks, numbers = augment(image, sample_ids=ids, rows=rows, **options).flatten(1).unique(dim=0, return_counts=True)
    assert len(looks) == 3 * 3 * 2
    assert (numbers - count / 18).abs().max() < 5 * (count / 18) ** 0.5
    dots = augment(image, sample_ids=ids, rows=rows, seed=5, cutout=1, fill=[0.0])
    often = (dots == 0).sum(dim=0).flatten()
    assert often.sum() == count
    assert (often - count / 81).abs().max() < 5 * (count / 81) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_large_file_are_read_and_nothing_else(backend, tmp_path):
    """Offsets beyond 2^32 in a sparse file that is mapped: none of its 6 GB is held, in either layout."""
    count, shape = 2_000_003, (3, 32, 32)
    path = tmp_path / "images"
    with path.open("wb") as file:
        file.truncate(count * 3072)
        file.seek((count - 2) * 3072)
        file.write(pixels((2, *shape)).numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=count * 3072, dtype=torch.uint8)
    rows, ids = torch.tensor([count - 1, 0, count - 2, count - 1]), torch.arange(4)
    options = {"seed": 9, "pad": 4, "flip": True, "cutout": 8, "fill": (0.1, 0.2, 0.3)}
    for images in (mapped.view(count, *shape), mapped.view(count, 32, 32, 3).permute(0, 3, 1, 2)):
        before = _resident_bytes()
        with use_backend(backend):
            found = augment(images, sample_ids=ids, rows=rows, **options)
        assert _resident_bytes() - before < 2**26
        expected = defined(images[rows], ids, **options)
        assert_same(found, expected, torch.channels_last)
        assert found[0].sum() != found[3].sum()  # one image, two ids


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_images_of_any_number_of_threads_are_the_same():
    images, ids = pixels((200, 3, 32, 32)), random_ids(200)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(augment(images, sample_ids=ids, seed=1, pad=4, flip=True))
    torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found)
