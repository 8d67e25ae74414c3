"""SVHN's files, extra images from .npz files, and limits of the training set."""

import dataclasses
import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from awp_engine.data import DataError, Dataset, Loading, Split, eval_batches, load_dataset, load_extra
from awp_engine.data.dataset import RawDataset, channel_statistics, fingerprint, limit_evenly, prepare
from awp_engine.data.loaders.framing import Framing
from awp_engine.data.sets.mat import read_mat

_COUNTS = {"train": 40, "test": 12}


def _svhn_part(part: str) -> dict[str, Any]:
    count = _COUNTS[part]
    generator = np.random.default_rng(count)
    images = generator.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    return {"X": images, "y": (np.arange(count, dtype=np.uint8)[:, None] % 10) + 1}


def _write_svhn(root: Path, *, compressed: bool = True, **changed: Any) -> None:
    for part in _COUNTS:
        content = _svhn_part(part) | (changed if part == "train" else {})
        present = {key: value for key, value in content.items() if value is not None}
        savemat(root / f"{part}_32x32.mat", present, do_compression=compressed)


def _load_svhn(root: Path, **options: Any) -> Dataset:
    return load_dataset("svhn", root=root, held_out_fraction=0.25, seed=0, **options)


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn(tmp_path: Path, compressed: bool) -> None:
    _write_svhn(tmp_path, compressed=compressed)
    data = _load_svhn(tmp_path)
    assert (len(data.train), len(data.held_out), len(data.test)) == (30, 10, 12)
    assert data.class_names == tuple("0123456789")
    assert data.mean == data.std == (0.5, 0.5, 0.5)
    train, test = _svhn_part("train"), _svhn_part("test")
    for split, content, first in ((data.train, train, 0), (data.held_out, train, 0), (data.test, test, 40)):
        assert split.images.is_contiguous()
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        for image, label, sample_id in zip(split.images, split.labels, split.ids, strict=True):
            n = int(sample_id) - first
            assert np.array_equal(image.permute(1, 2, 0).numpy(), content["X"][:, :, :, n])
            assert int(label) == (0 if content["y"][n, 0] == 10 else content["y"][n, 0])
    assert data.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert data.first_extra_id == 52


_X = _svhn_part("train")["X"]
_Y = _svhn_part("train")["y"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"X": None}, r"X is missing; expected uint8 \[32, 32, 3, N\]"),
        ({"X": _X.astype(np.float64)}, r"X is double \[32, 32, 3, 40\]; expected uint8"),
        ({"X": _X[:28]}, r"X is uint8 \[28, 32, 3, 40\]"),
        ({"X": _X[:, :, :, 0]}, r"X is uint8 \[32, 32, 3\];"),
        ({"X": np.moveaxis(_X, 3, 0)}, r"X is uint8 \[40, 32, 32, 3\]"),
        ({"X": _X[..., :0]}, r"X is .*; expected uint8"),
        ({"X": _X.astype(complex)}, r"X is complex double \[32, 32, 3, 40\]"),
        ({"X": {"field": 1}}, r"X is struct \[1, 1\]"),
        ({"X": "text"}, r"X is char \[1, 4\]"),
        ({"y": None}, r"y is missing; expected whole numbers \[40, 1\]"),
        ({"y": _Y[:39]}, r"y is uint8 \[39, 1\]; expected whole numbers \[40, 1\]"),
        ({"y": _Y.T}, r"y is uint8 \[1, 40\]"),
        ({"y": _Y.astype(np.float32)}, r"y is single \[40, 1\]"),
        ({"y": np.where(_Y == 10, 0, _Y)}, r"image 9 has label 0; expected 1 to 10, where 10 is the digit 0"),
        ({"y": np.where(_Y == 2, 11, _Y)}, r"image 1 has label 11; expected 1 to 10"),
    ],
)
def test_svhn_of_other_content(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    _write_svhn(tmp_path, **changed)
    with pytest.raises(DataError, match=rf"train_32x32.mat: {message}") as raised:
        _load_svhn(tmp_path)
    assert "\n" not in str(raised.value)


def test_svhn_files_that_are_missing_or_something_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data.root is required for svhn"):
        load_dataset("svhn", root=None, held_out_fraction=0.1, seed=0)
    with pytest.raises(DataError, match=r"train_32x32.mat is missing; svhn has the files train_32x32.mat and test"):
        _load_svhn(tmp_path)
    _write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "header alone": whole[:128],
        "text": b"no such page" * 100,
        "pickle": pickle.dumps({"X": 1}),
        "matlab 7.3": b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + whole[128:],
    }
    for content in contents.values():
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"test_32x32.mat") as raised:
            _load_svhn(tmp_path)
        assert "\n" not in str(raised.value)
    path.unlink()
    with pytest.raises(DataError, match=r"test_32x32.mat is missing"):
        _load_svhn(tmp_path)


def _element(kind: int, content: bytes, *, short: bool = False) -> bytes:
    if short:
        return struct.pack("<HH", kind, len(content)) + content.ljust(4, b"\0")
    return struct.pack("<II", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def _mat_file(
    dimensions: tuple[int, ...],
    stored: int,
    values: bytes,
    *,
    of_class: int = 9,
    short: bool = False,
    compressed: bool = False,
    other: bytes = b"",
) -> bytes:
    """A file with the variable y, put together by the format's description."""
    body = _element(6, struct.pack("<II", of_class, 0))
    body += _element(5, struct.pack(f"<{len(dimensions)}i", *dimensions))
    body += _element(1, b"y", short=True) + _element(stored, values, short=short)
    variable = _element(14, body)
    if compressed:
        packed = zlib.compress(variable)
        variable = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + other + variable


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("stored", "values", "of_class"),
    [
        (2, bytes([1, 10, 3, 4, 5, 6]), 9),
        (2, bytes([1, 10, 3, 4, 5, 6]), 12),
        (3, struct.pack("<6h", 1, 10, 3, 4, 5, 6), 14),
        (13, struct.pack("<6Q", 1, 10, 3, 4, 5, 6), 15),
    ],
    ids=["uint8", "int32 as uint8", "int64 as int16", "uint64"],
)
def test_mat_files_by_their_description(
    tmp_path: Path, stored: int, values: bytes, of_class: int, compressed: bool
) -> None:
    path = tmp_path / "some.mat"
    path.write_bytes(_mat_file((2, 3), stored, values, of_class=of_class, compressed=compressed))
    found = read_mat(path, ("y", "z"))["y"]
    assert found.values is not None
    assert found.values.tolist() == [[1, 3, 5], [10, 4, 6]]
    assert found.values.dtype == found.kind
    assert read_mat(path, ("z",)) == {}


def test_mat_file_with_a_short_element_and_a_variable_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "some.mat"
    other = _element(14, _element(6, struct.pack("<II", 17, 0)) + _element(1, b"opaque"))
    path.write_bytes(_mat_file((3, 1), 2, b"\x01\x02\x03", short=True, other=other))
    found = read_mat(path, ("y",))["y"]
    assert found.values is not None
    assert found.values.tolist() == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_mat_file((2, 3), 2, bytes(5)), r"variable y has 5 values and the dimensions \[2, 3\]"),
        (_mat_file((2, 3), 2, bytes(7)), r"variable y has 7 values and the dimensions \[2, 3\]"),
        (_mat_file((2, -3), 2, bytes(6)), r"variable y has the dimensions \[2, -3\]"),
        (_mat_file((6,), 2, bytes(6)), r"variable y has the dimensions \[6\]"),
        (_mat_file((2, 3), 9, bytes(48)), r"variable y has values of type 9"),
        (_mat_file((2, 3), 3, bytes(12)), r"variable y has values of type 3"),
        (_mat_file((2, 3), 2, bytes(6))[:-1], r"56 bytes were announced and 55 are there"),
        (_mat_file((2, 3), 2, bytes(6), compressed=True)[:-1], r"\d+ bytes were announced and \d+ are there"),
        (_mat_file((2, 3), 2, bytes(6), other=_element(2, b"")), r"an element of type 2 where a variable was expected"),
        (
            _mat_file((2, 3), 2, bytes(6), other=_element(14, _element(6, b"", short=True) * 2 + _element(1, b"y"))),
            r"variable y has no dimensions",
        ),
        (_mat_file((2, 3), 2, bytes(6), other=struct.pack("<HH", 14, 5) + bytes(4)), r"a short element of 5 bytes"),
    ],
)
def test_damaged_mat_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "some.mat"
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"some.mat \({len(content)} bytes\): not read, {message}.*; expected a MATLAB 5"
    ):
        read_mat(path, ("y",))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_svhn_ends_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    _write_svhn(folder, compressed=data.draw(st.booleans()))
    path = folder / "train_32x32.mat"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, 260), st.integers(-200, -1)))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    message = "train_32x32.mat"
    try:
        _load_svhn(folder)
    except DataError as error:
        message = str(error)
    assert "\n" not in message
    assert "train_32x32.mat" in message or "training images and none is left" in message


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 2**62), st.data())
def test_a_limit_is_spread_evenly_and_grows(counts: list[int], seed: int, data: st.DataObject) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images = torch.zeros(len(labels), 1, 1, 1, dtype=torch.uint8)
    split = Split(images=images, labels=labels, ids=torch.arange(len(labels)) + (1 << 35))
    limits = sorted(data.draw(st.lists(st.integers(len(counts), len(labels)), min_size=2, max_size=2)))
    smaller, larger = (limit_evenly(split, limit, seed=seed, classes=len(counts)) for limit in limits)
    assert not (smaller & ~larger).any()
    for limit, chosen in zip(limits, (smaller, larger), strict=True):
        assert int(chosen.sum()) == limit
        kept = torch.bincount(labels[chosen], minlength=len(counts)).tolist()
        assert all(number == count or number >= max(kept) - 1 for number, count in zip(kept, counts, strict=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert torch.equal(limit_evenly(split.select(order), limits[0], seed=seed, classes=len(counts)), smaller[order])
    for limit in (len(counts) - 1, len(labels) + 1, -1):
        with pytest.raises(
            DataError, match=f"--data.train-limit {limit}: expected at least {len(counts)}, .*{len(labels)}"
        ):
            limit_evenly(split, limit, seed=seed, classes=len(counts))


def test_train_limit() -> None:
    def load(limit: int | None, seed: int = 0) -> Dataset:
        return load_dataset("digits", root=None, held_out_fraction=0.1, seed=seed, train_limit=limit)

    full, limited, other = load(None), load(200), load(200, seed=1)
    assert len(limited.train) == 200
    assert torch.bincount(limited.train.labels).tolist() == [20] * 10
    assert torch.equal(limited.held_out.ids, full.held_out.ids)
    assert torch.equal(limited.test.ids, full.test.ids)
    assert limited.first_extra_id == full.first_extra_id == 1797
    assert torch.equal(limited.train.ids, limited.train.ids.sort().values)
    row_of = {int(i): n for n, i in enumerate(full.train.ids)}
    rows = torch.tensor([row_of[int(i)] for i in limited.train.ids])
    assert torch.equal(limited.train.images, full.train.images[rows])
    assert torch.equal(limited.train.labels, full.train.labels[rows])
    assert limited.train.ids.tolist() != other.train.ids.tolist()
    used = torch.cat([limited.train.images, limited.held_out.images])
    assert limited.mean == pytest.approx([used.double().mean().item() / 255])
    assert limited.std == channel_statistics([used])[1] != full.std
    # All that is left after the hold-out is the whole training part, by another name.
    everything = load(len(full.train))
    assert everything.fingerprint == full.fingerprint
    assert everything.mean == full.mean
    assert len({data.fingerprint for data in (full, limited, other, load(201))}) == 4
    for limit in (9, 1294):
        with pytest.raises(
            DataError, match=f"--data.train-limit {limit}: expected at least 10, one image a class, .* 1293"
        ):
            load(limit)


def test_constants_stay_under_a_limit_and_the_fingerprint_covers_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 2, 2), generator=generator, dtype=torch.uint8)
    raw = RawDataset(
        train_images=images,
        train_labels=torch.arange(12) % 2,
        test_images=images[:2],
        test_labels=torch.arange(2),
        class_names=("a", "b"),
        statistics=((0.5,), (0.25,)),
    )
    data = prepare("some", raw, held_out_fraction=0.2, seed=0, train_limit=4)
    assert (data.mean, data.std) == ((0.5,), (0.25,))
    ids = torch.cat([data.train.ids, data.held_out.ids]).sort().values
    used = Split(images=images[ids], labels=raw.train_labels[ids], ids=ids)
    assert data.fingerprint == fingerprint(used, ("a", "b"))
    relabelled = dataclasses.replace(used, labels=1 - used.labels)
    assert data.fingerprint != fingerprint(relabelled, ("a", "b"))


def _dataset(shape: tuple[int, int, int] = (3, 4, 5), classes: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, *shape), generator=generator, dtype=torch.uint8)
    raw = RawDataset(
        train_images=images,
        train_labels=torch.arange(12) % classes,
        test_images=images[:5],
        test_labels=torch.arange(5) % classes,
        class_names=tuple("abcdefgh"[:classes]),
    )
    return prepare("little", raw, held_out_fraction=0.25, seed=0)


def _images(count: int = 7) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)


_LABELS = np.array([0, 1, 2, 2, 1, 0, 1])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<i8", ">i4", "u1"])
@pytest.mark.parametrize("order", ["last", "first", "fortran"])
def test_extra(tmp_path: Path, save: Any, dtype: str, order: str) -> None:
    images = _images()
    kept = {"last": images, "first": np.moveaxis(images, 3, 1), "fortran": np.asfortranarray(images)}[order]
    save(tmp_path / "extra.npz", image=kept, label=_LABELS.astype(dtype), more=np.zeros(2))
    data = _dataset()
    lazy = load_extra(tmp_path / "extra.npz", like=data)
    extra = lazy.resident()
    assert np.array_equal(extra.images.permute(0, 2, 3, 1).numpy(), images)
    rows = torch.tensor([6, 0, 3, 3])
    assert torch.equal(lazy.store.gather(rows), extra.images[rows])
    assert torch.equal(lazy.labels_of(rows), extra.labels[rows])
    assert torch.equal(lazy.ids_of(rows), extra.ids[rows])
    assert extra.images.is_contiguous()
    assert (extra.images.dtype, extra.labels.dtype) == (torch.uint8, torch.int64)
    assert extra.labels.tolist() == _LABELS.tolist()
    assert extra.ids.tolist() == list(range(17, 24))
    assert extra.ids[0] == data.first_extra_id
    np.savez(tmp_path / "plain.npz", image=images, label=_LABELS)
    assert lazy.store.digest() == load_extra(tmp_path / "plain.npz", like=data).store.digest()


def test_extra_fingerprint_covers_images_and_labels(tmp_path: Path) -> None:
    other_image, other_label = _images(), _LABELS.copy()
    other_image[3, 2, 1, 0] ^= 1
    other_label[3] = 0
    data, found = _dataset(), set()
    for name, images, labels in (
        ("same", _images(), _LABELS),
        ("image", other_image, _LABELS),
        ("label", _images(), other_label),
        ("fewer", _images()[:6], _LABELS[:6]),
    ):
        np.savez(tmp_path / f"{name}.npz", image=images, label=labels)
        found.add(load_extra(tmp_path / f"{name}.npz", like=data).store.digest())
    assert len(found) == 4
    assert all(len(one) == 64 for one in found)


@pytest.mark.parametrize(("greys", "channels"), [(3, 3), (9, 1)])
def test_most_images_decide_about_colour_where_they_are_resized(tmp_path: Path, greys: int, channels: int) -> None:
    for part, name, count in (("train", "ant", 8), ("train", "bee", 4), ("test", "ant", 1), ("test", "bee", 1)):
        (tmp_path / part / name).mkdir(parents=True)
        for number in range(count):
            # the first ones of all are grey
            mode = "L" if greys > 8 or (part == "train" and name == "ant" and number < greys) else "RGB"
            Image.new(mode, (6 + number, 8)).save(tmp_path / part / name / f"{number}.png")
    loading = Loading(loader="torch", workers=0, framing=Framing(size=8))
    data = load_dataset("folder", root=str(tmp_path), held_out_fraction=0.0, seed=0, loading=loading)
    assert data.train.shape == (channels, 8, 8)
    assert sum(len(batch.labels) for batch in eval_batches(data.train, 5)) == 12


def test_extra_grey_images_and_images_that_fit_both_ways(tmp_path: Path) -> None:
    grey = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    np.savez(tmp_path / "grey.npz", image=grey, label=[0, 1])
    extra = load_extra(tmp_path / "grey.npz", like=_dataset((1, 8, 8))).resident()
    assert np.array_equal(extra.images[:, 0].numpy(), grey[..., 0])
    cube = np.arange(27, dtype=np.uint8).reshape(1, 3, 3, 3)
    np.savez(tmp_path / "cube.npz", image=cube, label=[0])
    extra = load_extra(tmp_path / "cube.npz", like=_dataset((3, 3, 3))).resident()
    assert np.array_equal(extra.images.permute(0, 2, 3, 1).numpy(), cube)


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["image", "label"])
def test_pickled_extra_is_refused(tmp_path: Path, name: str) -> None:
    target = tmp_path / "written"
    content: dict[str, Any] = {"image": _images(), "label": _LABELS}
    content[name] = np.array([_Touch(target)] * 7, dtype=object)
    path = tmp_path / "extra.npz"
    np.savez(path, **content)
    with pytest.raises(DataError, match=rf"extra.npz: {name} holds Python objects, which are refused"):
        load_extra(path, like=_dataset())
    path.write_bytes(pickle.dumps(_Touch(target)))
    with pytest.raises(DataError, match=r"extra.npz \(\d+ bytes\): not read, .*expected an .npz file of plain arrays"):
        load_extra(path, like=_dataset())
    assert not target.exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": None}, r"holds label.npy; expected the arrays image and label"),
        ({"label": None}, r"holds image.npy; expected the arrays image and label"),
        ({"image": None, "label": None}, r"holds nothing; expected the arrays image and label"),
        (
            {"image": _images().astype(np.float32)},
            r"image is float32 \[7, 4, 5, 3\]; expected uint8 \[N, 4, 5, 3\] or \[N, 3, 4, 5\] as the images of little",
        ),
        ({"image": _images().transpose(0, 2, 1, 3)}, r"image is uint8 \[7, 5, 4, 3\]; expected uint8 \[N, 4, 5, 3\]"),
        ({"image": _images()[0]}, r"image is uint8 \[4, 5, 3\]; expected uint8"),
        ({"image": np.uint8(3)}, r"image is uint8 \[\]; expected uint8"),
        ({"image": _images(0), "label": _LABELS[:0]}, r"image is uint8 \[0, 4, 5, 3\]; expected uint8"),
        ({"label": _LABELS[:6]}, r"label is int64 \[6\]; expected whole numbers \[7\], one for every image"),
        ({"label": _LABELS[:, None]}, r"label is int64 \[7, 1\]"),
        ({"label": _LABELS.astype(np.float32)}, r"label is float32 \[7\]"),
        ({"label": _LABELS.astype(str)}, r"label is <U21 \[7\]"),
        ({"label": _LABELS.astype(bool)}, r"label is bool \[7\]"),
        ({"label": np.where(_LABELS == 2, 3, _LABELS)}, r"image 2 has label 3; expected 0 to 2, the classes of little"),
        ({"label": _LABELS - 1}, r"image 0 has label -1; expected 0 to 2"),
        ({"label": np.full(7, 2**64 - 1, np.uint64)}, r"image 0 has label 18446744073709551615; expected 0 to 2"),
    ],
)
def test_extra_of_other_content(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    content = {"image": _images(), "label": _LABELS} | changed
    np.savez(tmp_path / "extra.npz", **{key: value for key, value in content.items() if value is not None})
    with pytest.raises(DataError, match=rf"extra.npz: {message}") as raised:
        load_extra(tmp_path / "extra.npz", like=_dataset())
    assert "\n" not in str(raised.value)


def _npy(array: Any, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()


def _write_members(path: Path, image: bytes, label: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", image)
        archive.writestr("label.npy", label)


def test_extra_arrays_that_do_not_keep_to_their_header(tmp_path: Path) -> None:
    path, data, label = tmp_path / "extra.npz", _dataset(), _npy(_LABELS)
    _write_members(path, _npy(_images(), (2, 0)), label)
    assert len(load_extra(path, like=data)) == 7
    whole = _npy(_images())
    huge = whole.replace(b"(7, 4, 5, 3)", b"(7777777777777, 4, 5, 3)")
    for image, message in (
        (whole[:-1], r"image has 547 bytes; expected 548 by its header"),
        (whole + b"\x00", r"image has 549 bytes; expected 548 by its header"),
        (huge, r"image has \d+ bytes; expected 466666666\d+ by its header"),
        (_npy(_images(), (3, 0)), r"image is in version 3.0 of the npy format; expected 1.0 or 2.0"),
        (whole[:40], r"\(\d+ bytes\): not read, .*expected an .npz file of plain arrays"),
        (b"", r"\(\d+ bytes\): not read, "),
        (whole.replace(b"'descr'", b"'descX'"), r"\(\d+ bytes\): not read, "),
        (whole.replace(b"(7, 4, 5, 3)", b"exit(1234567)"), r"\(\d+ bytes\): not read, "),
    ):
        _write_members(path, image, label)
        with pytest.raises(DataError, match=r"extra.npz:? ?" + message) as raised:
            load_extra(path, like=data)
        assert "\n" not in str(raised.value)


def test_extra_files_that_are_missing_or_something_else(tmp_path: Path) -> None:
    data = _dataset()
    with pytest.raises(
        DataError, match=r"nowhere.npz is not a file or directory; expected an .npz file with the array"
    ):
        load_extra(tmp_path / "nowhere.npz", like=data)
    with pytest.raises(DataError, match=r"holds no shards; expected \*.npz, or images-\*.npy with labels-\*.npy"):
        load_extra(tmp_path, like=data)
    path = tmp_path / "extra.npz"
    np.savez(path, image=_images(), label=_LABELS)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-30], whole[: len(whole) // 2], _npy(_images())):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"extra.npz \(\d+ bytes\): not read, .*; expected an .npz file"):
            load_extra(path, like=data)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_changed_pixels_in_an_archive_are_found(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "extra.npz"
    save(path, image=_images(), label=_LABELS)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("image.npy").header_offset + 300
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"extra.npz \(\d+ bytes\): not read, "):
        load_extra(path, like=_dataset())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_checksum_is_compared(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "extra.npz"
    # Noise, which is as long when compressed, so that the end is not reached by reading ahead.
    save(path, image=_images(70_000), label=np.zeros(70_000, dtype=np.uint8))
    with zipfile.ZipFile(path) as archive:
        checksum = archive.getinfo("image.npy").CRC.to_bytes(4, "little")
    content = path.read_bytes()
    path.write_bytes(content.replace(checksum, (123456).to_bytes(4, "little")))
    with pytest.raises(DataError, match=r"extra.npz \(\d+ bytes\): not read, Bad CRC-32 for file 'image.npy'"):
        load_extra(path, like=_dataset())


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_damaged_extra_ends_in_one_line_or_is_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "extra.npz"
    save = np.savez_compressed if data.draw(st.booleans()) else np.savez
    save(path, image=_images(), label=_LABELS)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    message, extra = "extra.npz", None
    try:
        extra = load_extra(path, like=_dataset()).resident()
    except DataError as error:
        message = str(error)
    assert "extra.npz" in message
    assert "\n" not in message
    if extra is None:
        return
    # The checksums cover the arrays, so what is read is what was written.
    assert np.array_equal(extra.images.permute(0, 2, 3, 1).numpy(), _images())
    assert extra.labels.tolist() == _LABELS.tolist()
