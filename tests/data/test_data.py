import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from augmented import augment
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from awp_engine.data import Augmentation, DataError, Split, eval_batches, load_dataset, train_batches
from awp_engine.data.dataset import channel_statistics, hold_out
from awp_engine.data.sets.cifar import CIFAR10, CIFAR100, CifarLayout, read_cifar
from awp_kernels.philox import mix_seed, philox4x32

_SMALL10 = dataclasses.replace(CIFAR10, train_records=20, test_records=10)
_SMALL100 = dataclasses.replace(CIFAR100, train_records=200, test_records=100)


def _split(count: int, shape: tuple[int, int, int] = (2, 5, 7), classes: int = 3) -> Split:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    ids = torch.randperm(10 * count, generator=generator)[:count] + (1 << 33)
    return Split(images=images, labels=labels, ids=ids)


def _augment_one(image: Tensor, sample_id: int, *, seed: int, epoch: int, pad: int, flip: bool) -> Tensor:
    """The plain definition for one sample: pad, crop, mirror, scale."""
    key = mix_seed(seed, epoch)
    counter = [torch.tensor(value) for value in (0, 2, sample_id & 0xFFFFFFFF, sample_id >> 32)]
    words = [
        int(word)
        for word in philox4x32((counter[0], counter[1], counter[2], counter[3]), (key & 0xFFFFFFFF, key >> 32))
    ]
    top, left = (word * (2 * pad + 1) // 2**32 for word in words[:2])
    padded = torch.nn.functional.pad(image, (pad, pad, pad, pad))
    crop = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
    if flip and words[2] % 2:
        crop = crop.flip(-1)
    return crop.float() / 255


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 9), st.booleans(), st.integers(0, 2**62), st.integers(0, 300))
def test_augment_equals_its_plain_definition(count: int, pad: int, flip: bool, seed: int, epoch: int) -> None:
    split = _split(count)
    options: dict[str, Any] = {"seed": seed, "epoch": epoch, "pad": pad, "flip": flip}
    result = augment(split.images, split.ids, **options)
    expected = [_augment_one(image, int(i), **options) for image, i in zip(split.images, split.ids, strict=True)]
    assert torch.equal(result, torch.stack(expected))
    assert result.is_contiguous()


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(8)), st.integers(1, 8), st.integers(0, 1000))
def test_augmentation_does_not_depend_on_the_batch(order: list[int], size: int, seed: int) -> None:
    split, options = _split(8), {"seed": seed, "epoch": 1, "pad": 2, "flip": True}
    everything = augment(split.images, split.ids, **options)
    part = split.select(torch.tensor(order[:size]))
    assert torch.equal(augment(part.images, part.ids, **options), everything[order[:size]])


def test_augmentation_takes_every_offset_and_depends_on_the_epoch() -> None:
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(4000, -1, -1, -1)
    ids = torch.arange(4000)
    first, second = (augment(image, ids, seed=0, epoch=epoch, pad=1, flip=True) for epoch in (0, 1))
    kinds, counts = torch.unique(first, dim=0, return_counts=True)
    assert len(kinds) == 3 * 3 * 2
    assert counts.min() > 150
    assert counts.max() < 300
    assert not torch.equal(first, second)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(0, 5), st.booleans())
def test_an_epoch_has_every_sample_once(count: int, batch_size: int, epoch: int, drop_last: bool) -> None:
    split = _split(count)
    options: dict[str, Any] = {"seed": 3, "epoch": epoch, "pad": 1, "flip": True}
    batches = list(
        train_batches(
            split, Augmentation(pad=1, flip=True), batch_size=batch_size, drop_last=drop_last, seed=3, epoch=epoch
        )
    )
    assert all(len(batch.labels) == batch_size for batch in (batches if drop_last else batches[:-1]))
    seen = torch.cat([batch.ids for batch in batches]) if batches else torch.empty(0)
    assert len(seen) == (count - count % batch_size if drop_last else count)
    assert len(set(seen.tolist())) == len(seen)
    place = {int(i): n for n, i in enumerate(split.ids)}
    for batch in batches:
        rows = torch.tensor([place[int(i)] for i in batch.ids])
        assert torch.equal(batch.labels, split.labels[rows])
        assert torch.equal(batch.images, augment(split.images[rows], batch.ids, **options))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    split = _split(64)

    def order(split: Split, seed: int, epoch: int, batch_size: int) -> list[int]:
        batches = train_batches(split, Augmentation(), batch_size=batch_size, seed=seed, epoch=epoch)
        return torch.cat([batch.ids for batch in batches]).tolist()

    reference = order(split, 0, 0, 8)
    shuffled = split.select(torch.randperm(64, generator=torch.Generator().manual_seed(1)))
    assert order(split, 0, 0, 64) == order(shuffled, 0, 0, 5) == reference
    assert reference not in (order(split, 0, 1, 8), order(split, 1, 0, 8), split.ids.tolist())


def test_eval_batches_keep_order_and_values() -> None:
    split = _split(10)
    batches = list(eval_batches(split, 4))
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.images for batch in batches]), split.images.float() / 255)
    assert torch.equal(torch.cat([batch.ids for batch in batches]), split.ids)
    assert len(split.to("cpu")) == 10


@pytest.mark.gpu
def test_batches_on_the_gpu_equal_those_on_the_cpu() -> None:
    split = _split(200, (3, 32, 32))
    batches = [
        train_batches(split.to(device), Augmentation(pad=4, flip=True), batch_size=64, seed=0, epoch=2)
        for device in ("cpu", "cuda")
    ]
    for on_cpu, on_gpu in zip(*batches, strict=True):
        assert all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu[:3], on_gpu[:3], strict=True))


def test_wrong_batch_arguments() -> None:
    split = _split(4)
    with pytest.raises(ValueError, match="batch_size: 0"):
        train_batches(split, Augmentation(), batch_size=0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="batch_size: -1"):
        eval_batches(split, -1)
    with pytest.raises(ValueError, match=r"pad: .* got -1"):
        augment(split.images, split.ids, seed=0, epoch=0, pad=-1, flip=False)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=5), st.floats(0, 0.5), st.integers(0, 2**63 - 1))
def test_hold_out_is_stratified(counts: list[int], fraction: float, seed: int) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    split = Split(
        images=torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8), labels=labels, ids=torch.arange(len(labels))
    )
    names = tuple(str(label) for label in range(len(counts)))
    if any(max(1, int(fraction * count + 0.5)) >= count for count in counts) and fraction > 0:
        with pytest.raises(DataError, match="none is left"):
            hold_out(split, fraction, seed=seed, class_names=names)
        return
    chosen = hold_out(split, fraction, seed=seed, class_names=names)
    for label, count in enumerate(counts):
        number = int(chosen[labels == label].sum())
        assert number == (0 if fraction == 0 else max(1, int(fraction * count + 0.5)))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert torch.equal(hold_out(split.select(order), fraction, seed=seed, class_names=names), chosen[order])


def test_digits() -> None:
    data = load_dataset("digits", root=None, held_out_fraction=0.1, seed=0)
    parts = (data.train, data.held_out, data.test)
    assert [len(part) for part in parts] == [1293, 144, 360]
    assert sorted(torch.cat([part.ids for part in parts]).tolist()) == list(range(1797))
    for part, smallest in zip(parts, (120, 14, 34), strict=True):
        assert part.images.shape[1:] == (1, 8, 8)
        assert part.images.dtype == torch.uint8
        assert torch.bincount(part.labels, minlength=10).min() >= smallest
        assert len(torch.unique(part.images)) == 17
    other_seed = load_dataset("digits", root=None, held_out_fraction=0.1, seed=1)
    assert torch.equal(other_seed.test.images, data.test.images)
    assert not torch.equal(other_seed.held_out.ids, data.held_out.ids)
    none = load_dataset("digits", root=None, held_out_fraction=0, seed=0)
    assert (len(none.train), len(none.held_out)) == (1437, 0)
    assert data.fingerprint == other_seed.fingerprint == none.fingerprint
    assert data.mean == pytest.approx([none.train.images.float().mean().item() / 255], rel=1e-5)


def test_channel_statistics() -> None:
    images = torch.randint(0, 256, (9, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 2] = 7
    mean, std = channel_statistics([images[:2], images[2:]])
    values = images.double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(values.mean(1).tolist())
    assert std[:2] == pytest.approx(values.std(1, correction=0)[:2].tolist())
    assert std[2] == 1 / 255


def _cifar_parts(layout: CifarLayout) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(0)
    counts = [layout.train_records] * len(layout.binary_train) + [layout.test_records]
    classes = len(layout.class_names)
    return [(generator.integers(0, 256, (n, 3072), dtype=np.uint8), np.arange(n) % classes) for n in counts]


def _write_binary(folder: Path, layout: CifarLayout) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in zip((*layout.binary_train, layout.binary_test), _cifar_parts(layout), strict=True):
        coarse = np.full((len(labels), layout.label_bytes - 1), 99, dtype=np.uint8)
        np.hstack([coarse, labels[:, None].astype(np.uint8), pixels]).tofile(folder / name)


def _write_python(folder: Path, layout: CifarLayout, protocol: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, labels) in zip((*layout.python_train, layout.python_test), _cifar_parts(layout), strict=True):
        content = {
            "data": pixels,
            layout.label_key: labels.tolist(),
            "batch_label": "training batch",
            "filenames": ["a.png"],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("layout", [_SMALL10, _SMALL100], ids=lambda layout: layout.name)
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("protocol", [None, 0, 2, 3, 5])
def test_cifar_files(tmp_path: Path, layout: CifarLayout, inside: bool, protocol: int | None) -> None:
    if protocol is None:
        _write_binary(tmp_path / layout.binary_folder if inside else tmp_path, layout)
    else:
        _write_python(tmp_path / layout.python_folder if inside else tmp_path, layout, protocol)
    raw = read_cifar(tmp_path, layout)
    parts = _cifar_parts(layout)
    train = np.concatenate([pixels for pixels, _ in parts[:-1]]).reshape(-1, 3, 32, 32)
    assert np.array_equal(raw.train_images.numpy(), train)
    assert np.array_equal(raw.test_images.numpy(), parts[-1][0].reshape(-1, 3, 32, 32))
    assert np.array_equal(raw.train_labels.numpy(), np.concatenate([labels for _, labels in parts[:-1]]))
    assert raw.test_labels.dtype == torch.int64
    assert len(raw.class_names) == len(layout.class_names) == len(set(layout.class_names))


def _old_numpy_pickle(
    pixels: bytes, labels: int, global_line: bytes = b"cnumpy.core.multiarray\n_reconstruct\n"
) -> bytes:
    """A protocol 2 pickle as Python 2 and numpy 1 wrote the official files: keys and pixels are byte strings."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    count = len(pixels) // 3072
    dtype = (
        b"cnumpy\ndtype\n("
        + short(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + short(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    empty = global_line + b"(cnumpy\nndarray\nK\x00\x85" + short(b"b") + b"tR"
    state = (
        b"(K\x01K"
        + bytes([count])
        + b"M\x00\x0c\x86"
        + dtype
        + b"\x89T"
        + len(pixels).to_bytes(4, "little")
        + pixels
        + b"tb"
    )
    label_list = b"](" + b"K\x03" * labels + b"e"
    return b"\x80\x02}(" + short(b"data") + empty + state + short(b"labels") + label_list + b"u."


def test_pickles_of_python_2(tmp_path: Path) -> None:
    pixels = bytes(range(256)) * 12
    for name in (*CIFAR10.python_train, CIFAR10.python_test):
        (tmp_path / name).write_bytes(_old_numpy_pickle(pixels * 2, 2))
    raw = read_cifar(tmp_path, dataclasses.replace(CIFAR10, train_records=2, test_records=2))
    assert bytes(raw.train_images[3].flatten().tolist()) == pixels
    assert raw.train_labels.tolist() == [3] * 10


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "payload",
    [
        lambda path: _Call(os.system, f"touch {path}"),
        lambda path: _Call(eval, f"open({str(path)!r}, 'w')"),
        lambda path: _Call(open, str(path), "w"),
        lambda path: _Call(np.save, str(path), 0),
        lambda path: _Call(np.zeros(1).tofile, str(path)),
        lambda path: np.array([_Call(open, str(path), "w")], dtype=object),
        lambda path: np.zeros(1, dtype=np.float32),
        lambda path: np.zeros(1, dtype=[("a", "u1")]),
        lambda path: Path(path),
    ],
    ids=["system", "eval", "open", "save", "tofile", "object", "float", "fields", "path"],
)
def test_a_pickle_that_wants_more_is_refused(tmp_path: Path, payload: Any, protocol: int) -> None:
    _write_python(tmp_path, _SMALL10)
    target = tmp_path / "written"
    content = {"data": payload(target), "labels": [0] * 20}
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(DataError, match=r"data_batch_3.*refused") as raised:
        read_cifar(tmp_path, _SMALL10)
    assert "\n" not in str(raised.value)
    assert not target.exists()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_pickles_end_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    layout = dataclasses.replace(CIFAR10, train_records=1, test_records=1)
    _write_python(folder, layout)
    content = bytearray((folder / "data_batch_1").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # The structure is at both ends; the middle is pixels.
        place = data.draw(st.one_of(st.integers(0, 200), st.integers(-200, -1)))
        content[place] = data.draw(st.integers(0, 255))
    (folder / "data_batch_1").write_bytes(
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    message = "data_batch_1"
    try:
        read_cifar(folder, layout)
    except DataError as error:
        message = str(error)
    assert "data_batch_1" in message
    assert "\n" not in message


@pytest.mark.parametrize("change", [-1, 1, -3073, 3073])
def test_binary_file_of_another_size(tmp_path: Path, change: int) -> None:
    _write_binary(tmp_path, _SMALL10)
    os.truncate(tmp_path / "data_batch_2.bin", 20 * 3073 + change)
    with pytest.raises(DataError, match=rf"data_batch_2.bin has {20 * 3073 + change} bytes; expected 61460"):
        read_cifar(tmp_path, _SMALL10)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_standard_sizes_are_required(tmp_path: Path, name: str) -> None:
    layout, record = (CIFAR10, 3073) if name == "cifar10" else (CIFAR100, 3074)
    for file, records in [(f, layout.train_records) for f in layout.binary_train] + [(layout.binary_test, 10_000)]:
        (tmp_path / file).touch()
        os.truncate(tmp_path / file, records * record)
    os.truncate(tmp_path / layout.binary_train[0], 12345)
    with pytest.raises(DataError, match=f"has 12345 bytes; expected {layout.train_records * record} "):
        load_dataset(name, root=tmp_path, held_out_fraction=0.1, seed=0)


def test_full_size_cifar10(tmp_path: Path) -> None:
    for file in (*CIFAR10.binary_train, CIFAR10.binary_test):
        records = np.zeros((10_000, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(10_000) % 10
        records.tofile(tmp_path / file)
    data = load_dataset("cifar10", root=tmp_path, held_out_fraction=0.02, seed=0)
    assert (len(data.train), len(data.held_out), len(data.test)) == (49_000, 1_000, 10_000)
    assert torch.bincount(data.held_out.labels).tolist() == [100] * 10
    assert data.test.ids[0] == 50_000
    assert data.mean == (0.4914, 0.4822, 0.4465)


def test_cifar_labels_out_of_range(tmp_path: Path) -> None:
    _write_binary(tmp_path, _SMALL10)
    content = bytearray((tmp_path / "test_batch.bin").read_bytes())
    content[4 * 3073] = 10
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"test_batch.bin: record 4 has label 10; expected 0 to 9"):
        read_cifar(tmp_path, _SMALL10)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"data": np.zeros((19, 3072), np.uint8), "labels": [0] * 19},
            r"uint8 \[19, 3072\]; expected uint8 \[20, 3072\]",
        ),
        ({"data": np.zeros((20, 3072), np.int64), "labels": [0] * 20}, r"'data' is int64"),
        ({"data": [1, 2], "labels": [0] * 20}, r"'data' is list"),
        ({"data": np.zeros((20, 3072), np.uint8), "labels": [0] * 19}, r"no list of 20 labels"),
        ({"data": np.zeros((20, 3072), np.uint8), "labels": ["a"] * 20}, r"no list of 20 labels"),
        ({"data": np.zeros((20, 3072), np.uint8), "labels": [2**80] * 20}, r"no list of 20 labels"),
        ({"data": np.zeros((20, 3072), np.uint8), "fine_labels": [0] * 20}, r"keys \['data', 'fine_labels'\]"),
        ([1, 2, 3], r"holds a list"),
    ],
)
def test_wrong_python_files(tmp_path: Path, content: Any, message: str) -> None:
    _write_python(tmp_path, _SMALL10)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=message):
        read_cifar(tmp_path, _SMALL10)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    def load(name: str, root: Path | None, fraction: float = 0.1) -> None:
        load_dataset(name, root=root, held_out_fraction=fraction, seed=0)

    for name in ("cifar10", "cifar100", "folder"):
        with pytest.raises(DataError, match=f"--data.root is required for {name}"):
            load(name, None)
        with pytest.raises(DataError, match="nowhere is not a directory"):
            load(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no cifar10; expected data_batch_1.bin or data_batch_1 there"):
        load("cifar10", tmp_path)
    with pytest.raises(DataError, match=r"train is not a directory; expected train/<class>"):
        load("folder", tmp_path)
    with pytest.raises(DataError, match=r"digits ship inside scikit-learn"):
        load("digits", tmp_path)
    with pytest.raises(DataError, match=r"unknown name 'emnist'; expected one of digits, cifar10"):
        load("emnist", tmp_path)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="held_out_fraction"):
            load("digits", None, fraction)
    with pytest.raises(DataError, match=r"none is left after holding out 0\.999"):
        load("digits", None, 0.999)
    _write_binary(tmp_path / "cifar-10-batches-bin", _SMALL10)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_4.bin is missing"):
        read_cifar(tmp_path, _SMALL10)
    _write_python(tmp_path, _SMALL10)
    assert len(read_cifar(tmp_path, _SMALL10).train_labels) == 100


def _write_folder(root: Path, *, mode: str = "RGB", size: tuple[int, int] = (6, 4), suffix: str = ".png") -> None:
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for class_name in ("cat", "ant"):
            folder = root / part / class_name
            folder.mkdir(parents=True)
            for number in range(count):
                shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
                Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{number}{suffix}")
            (folder / "notes.txt").write_text("left alone")
    (root / "train" / ".cache").mkdir()


def _load_folder(root: Path) -> Any:
    return load_dataset("folder", root=root, held_out_fraction=0.25, seed=0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_folder(tmp_path: Path, mode: str, suffix: str) -> None:
    _write_folder(tmp_path, mode=mode, suffix=suffix)
    data = _load_folder(tmp_path)
    assert data.class_names == ("ant", "cat")
    assert (len(data.train), len(data.held_out), len(data.test)) == (6, 2, 4)
    assert data.train.images.shape[1:] == (1 if mode == "L" else 3, 4, 6)
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert data.test.ids.tolist() == [8, 9, 10, 11]
    pixels = np.asarray(Image.open(tmp_path / "test" / "cat" / f"1{suffix}")).reshape(4, 6, -1)
    assert np.array_equal(data.test.images[3].permute(1, 2, 0).numpy(), pixels)
    assert len(data.mean) == len(data.std) == data.train.images.shape[1]


def test_folder_of_larger_images_in_threads(tmp_path: Path) -> None:
    _write_folder(tmp_path, size=(160, 128))
    data = _load_folder(tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "test" / "ant" / "0.png"))
    assert np.array_equal(data.test.images[0].permute(1, 2, 0).numpy(), pixels)
    (tmp_path / "test" / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"cat/1.png: PNG of 8 bytes that ends within its header"):
        _load_folder(tmp_path)


def _truncate(root: Path) -> None:
    file = root / "train" / "cat" / "2.png"
    file.write_bytes(file.read_bytes()[:50])


def test_all_images_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """Of every kind, in both parts, none of the sound ones; the first image of all is one of them."""
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(30):
                Image.new("RGB", (6, 4), (number, 0, 9)).save(tmp_path / part / name / f"{number:03}.png")
    sound = (tmp_path / "train" / "ant" / "001.png").read_bytes()
    spoiled = {
        "train/ant/000.png": b"",
        "train/ant/007.png": sound[:50],
        "train/bee/029.png": b"\x80\x04pickle",
        "test/ant/011.png": sound.replace(b"IDAT", b"IDAX"),
        "test/bee/000.png": b"GIF89a",
    }
    for name, content in spoiled.items():
        (tmp_path / name).write_bytes(content)
    for name, mode, size in (("train/ant/015.png", "L", (6, 4)), ("test/bee/002.png", "RGB", (1, 1))):
        Image.new(mode, size).save(tmp_path / name)
        spoiled[name] = b""
    with pytest.raises(DataError, match="6 more cannot be used") as raised:
        _load_folder(tmp_path)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/train/ant/000.png is empty")
    assert {name for name in spoiled if f"{tmp_path}/{name}" in message} == spoiled.keys()
    assert message.count(".png") == len(spoiled)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, r"train/cat/2.png is truncated"),
        (
            lambda root: (root / "train" / "cat" / "2.png").write_bytes(b"no image"),
            r"cat/2.png is none of JPEG, PNG",
        ),
        (lambda root: (root / "train" / "ant" / "0.png").write_bytes(b""), r"ant/0.png is empty"),
        (lambda root: (root / "train" / "dog").mkdir(), r"train/dog has no image"),
        (lambda root: _write_folder(root / "test" / "dog"), r"dog has no image"),
        (lambda root: (root / "test" / "cat").rename(root / "test" / "dog"), r"class 'dog' is not in"),
        (lambda root: (root / "train" / "eel").symlink_to(root / "train" / "ant"), r"lacks class 'eel'"),
        (lambda root: Image.new("RGB", (6, 5)).save(root / "test" / "ant" / "1.png"), r"RGB 6x5; expected RGB 6x4"),
        (lambda root: Image.new("L", (6, 4)).save(root / "test" / "ant" / "1.png"), r"L 6x4; expected RGB 6x4"),
        (lambda root: Image.new("RGBA", (6, 4)).save(root / "train" / "ant" / "0.png"), r"mode RGBA\); expected RGB"),
        (
            lambda root: Image.new("RGB", (6, 4)).save(root / "test" / "ant" / "1.png", format="GIF"),
            r"1.png is GIF; expected JPEG, PNG",
        ),
    ],
)
def test_spoiled_folders(tmp_path: Path, spoil: Any, message: str) -> None:
    _write_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        _load_folder(tmp_path)
    assert "\n" not in str(raised.value)
