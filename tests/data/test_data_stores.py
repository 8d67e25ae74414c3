"""Sources of images: folders, tars, shards and saved tables, read by row; whole, damaged, hostile and huge."""

import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_folders import write_images
from PIL import Image

from awp_engine.data import Augmentation, Batches, DataError, Loading, load_dataset
from awp_engine.data.sets.files import PackedNames, evenly
from awp_engine.data.sets.huggingface import HuggingFaceImages
from awp_engine.data.sets.mat import read_mat
from awp_engine.data.sets.scan_list import LIST_NAME, bad_files, write_scan
from awp_engine.data.sets.shards import ArrayShards
from awp_engine.data.sets.sources import Source, open_source, source_names
from awp_engine.data.sets.store import EncodedImages, ImageArrays
from awp_engine.data.sets.tar import TarImages
from awp_engine.data.sets.unpickle import read_pickle
from awp_engine.data.tools.pack import pack_folder
from awp_engine.data.tools.scan import scan_folder

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0, 1, 2, 0])


def content(number: int, size: int = 700) -> bytes:
    return random.Random(number).randbytes(size + number)


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert message.isprintable()
    return message


def all_bytes(images: EncodedImages) -> list[bytes]:
    return [images.read(row) for row in range(len(images))]


# folders


def write_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), inside: str = "") -> None:
    for part in parts:
        for number, name in enumerate(("b", "a", "c")):
            folder = root / part / name / inside
            folder.mkdir(parents=True)
            for image in range(3):
                (folder / f"{image}.{('jpg', 'PNG', 'JPEG')[image]}").write_bytes(content(number * 3 + image))
            (folder / "notes.txt").write_text("left alone")
            (folder / ".hidden.jpg").write_text("left alone")


@pytest.mark.parametrize("test_part", ["test", "val"])
def test_folder(tmp_path: Path, test_part: str) -> None:
    write_folder(tmp_path, ("train", test_part))
    source = open_source("folder", tmp_path)
    assert source.class_names == ("a", "b", "c")
    assert source.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all_bytes(source.train) == [content(n) for n in (3, 4, 5, 0, 1, 2, 6, 7, 8)]
    assert source.train.name(1) == f"{tmp_path}/train/a/1.PNG"
    assert source.test.name(0) == f"{tmp_path}/{test_part}/a/0.jpg"
    # the same files in another place
    assert source.train.digest() == source.test.digest()
    (tmp_path / "train" / "a" / "1.PNG").write_bytes(content(3)[::-1])
    assert source.train.digest() != source.test.digest()


def test_names_that_are_not_utf8_and_lists_to_skip(tmp_path: Path) -> None:
    write_folder(tmp_path)
    odd = os.fsencode(tmp_path) + b"/train/a/\xff\n\xe4.png"
    with open(odd, "wb") as file:  # noqa: PTH123
        file.write(b"odd")
    images = open_source("folder", tmp_path).train
    assert images.read(3) == b"odd"
    assert images.name(3) == rf"{tmp_path}/train/a/\xff\n\xe4.png"
    os.unlink(odd)  # noqa: PTH108
    with pytest.raises(DataError, match=r"\\xff\\n\\xe4.png cannot be read: No such file") as raised:
        images.read(3)
    one_line(raised)
    skip = frozenset({"train/a/\\xff\n\\xe4.png", "train/b/0.jpg", "test/c/1.PNG", "train/nowhere/1.jpg"})
    kept = open_source("folder", tmp_path, skip=skip)
    assert len(kept.train) == 8
    assert kept.train_labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert len(kept.test) == 8
    with pytest.raises(DataError, match=r"train/a has no image left: all 3 are skipped"):
        open_source("folder", tmp_path, skip=frozenset(f"train/a/{n}" for n in ("0.jpg", "1.PNG", "2.JPEG")))


@pytest.mark.timeout(60)
def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    write_folder(tmp_path)
    folder = tmp_path / "train" / "a"
    os.mkfifo(folder / "3.jpg")
    (folder / "4.jpg").mkdir()
    (folder / "5.jpg").symlink_to("nowhere")
    (folder / "6.jpg").write_bytes(b"")
    (folder / "7.jpg").symlink_to("0.jpg")
    with (folder / "8.jpg").open("wb") as file:
        file.truncate(2**28 + 1)
    images = open_source("folder", tmp_path).train
    for row, message in (
        (3, "is a named pipe, not a file; remove it"),
        (4, "is a directory, not a file; remove it"),
        (5, "is a link to nothing; repair or remove it"),
        (8, "has 268,435,457 bytes; expected at most 268,435,456: remove it"),
    ):
        with pytest.raises(DataError, match=rf"{row}.jpg .*{message}") as raised:
            images.read(row)
        one_line(raised)
    assert images.read(6) == b""
    assert images.read(7) == content(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "test").rename(root / "elsewhere"), r"test is not a directory; expected test/<class>/"),
        (lambda root: (root / "test" / "a").rename(root / "test" / "z"), r"test/z: class 'z' is not in .*train"),
        (lambda root: (root / "test" / "a").rename(root / "a"), r"test lacks class 'a' of .*train"),
        (lambda root: (root / "train" / "d").mkdir(), r"train/d has no image; expected \*.jpg"),
        (
            lambda root: [(root / "train" / n).rename(root / n) for n in "ab"],
            r"train has 1 class folder, c; expected at lea",
        ),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    write_folder(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        open_source("folder", tmp_path)
    one_line(raised)


@given(st.lists(st.lists(st.binary(min_size=1, max_size=9), max_size=5), max_size=5))
def test_packed_names_are_the_names(groups: list[list[bytes]]) -> None:
    names = PackedNames.pack(groups)
    assert list(names) == [name for group in groups for name in group]
    assert list(pickle.loads(pickle.dumps(names))) == list(names)
    with pytest.raises(IndexError):
        names[len(names)]


def test_a_million_names_take_little_more_than_their_letters() -> None:
    names = PackedNames.pack([b"n%08d/n%08d_%d.JPEG" % (c, c, n) for n in range(1300)] for c in range(1000))
    assert len(names) == 1_300_000
    assert names[1_299_999] == b"n00000999/n00000999_1299.JPEG"
    assert len(names.joined) + names.ends.nbytes < 50e6


@given(st.integers(0, 5000), st.integers(1, 1000))
def test_even_rows(count: int, most: int) -> None:
    rows = evenly(count, most)
    assert len(rows) == len(set(rows)) == min(count, most)
    assert all(0 <= row < count for row in rows)


# ImageNet


def test_imagenet(tmp_path: Path) -> None:
    write_folder(tmp_path, ("train", "val"))
    source = open_source("imagenet", tmp_path)
    assert (source.class_names, len(source.train)) == (("a", "b", "c"), 9)
    assert source.statistics == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    flat = tmp_path / "val"
    flat.rename(tmp_path / "sorted")
    flat.mkdir()
    (flat / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match=r"val has 1 images in no class folders; expected val/<wnid>/\*.JPEG") as raised:
        open_source("imagenet", tmp_path)
    one_line(raised)


def write_tiny_imagenet(root: Path) -> None:
    write_folder(root, ("train",), inside="images")
    (root / "wnids.txt").write_text("c\na\nb\n")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for number in range(12):
        (root / "val" / "images" / f"val_{number}.JPEG").write_bytes(content(number))
        lines.append(f"val_{number}.JPEG\t{'cab'[number % 3]}\t0\t1\t2\t3\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def test_tiny_imagenet(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    source = open_source("tiny-imagenet", tmp_path, skip=frozenset({"val/images/val_5.JPEG", "train/a/images/0.jpg"}))
    assert source.class_names == ("a", "b", "c")
    assert source.train_labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    numbers = [0, 1, 10, 11, 2, 3, 4, 6, 7, 8, 9]
    assert all_bytes(source.test) == [content(number) for number in numbers]
    assert source.test_labels.tolist() == [[2, 0, 1][number % 3] for number in numbers]


def test_tiny_imagenet_is_scanned_where_it_lies(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    for number, file in enumerate(sorted(tmp_path.rglob("[!.]*.[jJP]*"))):
        Image.fromarray(np.full((8, 8, 3), 3 * number, np.uint8)).save(file)
    (tmp_path / "test" / "images").mkdir(parents=True)
    (tmp_path / "train" / "a" / "a_boxes.txt").touch()
    broken = ["train/b/images/2.JPEG", "val/images/val_7.JPEG"]
    for name in broken:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    scan = scan_folder(tmp_path, workers=1)
    assert (sorted(scan.bad), scan.files) == (broken, 9 + 12)
    assert scan.notes == ("test has no labels and was left out",)
    write_scan(tmp_path / LIST_NAME, scan)
    source = open_source("tiny-imagenet", tmp_path, skip=bad_files(tmp_path, "skip"))
    assert (len(source.train_labels), len(source.test_labels)) == (8, 11)
    with pytest.raises(DataError, match=r"is Tiny-ImageNet as unpacked, .* sort val into class folders to pack it"):
        pack_folder(tmp_path, tmp_path.parent / "packed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: (r / "wnids.txt").write_text("a b d"), r"wnids.txt and .*train differ in 2 classes, such as c; "),
        (
            lambda r: (r / "val/images/val_3.JPEG").unlink(),
            r"val_3.JPEG is in .*annotations.txt but not in .*val/images",
        ),
        (lambda r: (r / "val/images/more.png").touch(), r"more.png is in .*val/images but not in .*annotations.txt"),
        (lambda r: (r / "val/val_annotations.txt").unlink(), r"val_annotations.txt is missing; expected the classes"),
        (lambda r: (r / "val/val_annotations.txt").write_text("val_0.JPEG\tz\n"), r"line 1 names no class of train"),
        (lambda r: (r / "val/val_annotations.txt").write_bytes(b"\xff\n"), r"line 1 names no class of train"),
        (lambda r: (r / "val/val_annotations.txt").write_text("x\ta\nx\tb\n"), r"line 2 names an image for the second"),
    ],
)
def test_tiny_imagenet_that_does_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    write_tiny_imagenet(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        open_source("tiny-imagenet", tmp_path)
    one_line(raised)


# tars


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: str = "ustar") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_index(path: Path) -> None:
    """As DALI's wds2idx does."""
    samples: dict[str, list[str]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isreg() and not member.name.rpartition("/")[2].startswith("."):
                key, _, suffix = member.name.partition(".")
                samples.setdefault(key, []).append(f"{suffix} {member.offset_data} {member.size} {member.name}")
    lines = [f"v1.2 {len(samples)}", *(" ".join(parts) for parts in samples.values())]
    path.with_suffix(".idx").write_text("\n".join(lines) + "\n")


def samples(count: int, first: int = 0, prefix: str = "") -> list[tuple[str, bytes]]:
    return [
        member
        for n in range(first, first + count)
        for member in ((f"{prefix}{n:05d}.jpg", content(n)), (f"{prefix}{n:05d}.cls", f"{n % 3}\n".encode()))
    ]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("prefix", ["", "a/b-", "d" * 70 + "/" + "e" * 80 + "/", "ü"])
def test_webdataset(tmp_path: Path, kind: str, indexed: bool, prefix: str) -> None:
    write_tar(tmp_path / "train" / "0.tar", samples(5, prefix=prefix), kind)
    write_tar(
        tmp_path / "train" / "1.tar", [(".notes.txt", b"x"), ("README", b"x"), *samples(4, 5, prefix)[::-1]], kind
    )
    write_tar(tmp_path / "test" / "0.tar", [("1.png", b"p"), ("1.seg.png", b"s"), ("1.json", b'{"label": 2}')], kind)
    if indexed and prefix != "ü":  # GNU tar, from which wds2idx has them, writes such names otherwise
        for part in ("train/0", "train/1"):
            write_index(tmp_path / f"{part}.tar")
    source = open_source("webdataset", tmp_path)
    order = [0, 1, 2, 3, 4, 8, 7, 6, 5]
    assert all_bytes(source.train) == [content(n) for n in order]
    assert source.train_labels.tolist() == [n % 3 for n in order]
    assert source.class_names == ("0", "1", "2")
    assert (source.test.read(0), source.test_labels.tolist()) == (b"p", [2])
    assert source.train.name(5) == f"{tmp_path}/train/1.tar: {prefix}00008.jpg"
    skipped = open_source("webdataset", tmp_path, skip=frozenset({f"train/1.tar/{prefix}00008.jpg"}))
    assert all_bytes(skipped.train) == [content(n) for n in order if n != 8]


def test_an_index_that_belongs_to_another_tar_is_not_used(tmp_path: Path) -> None:
    tar = tmp_path / "train" / "0.tar"
    write_tar(tar, samples(3))
    write_index(tar)
    write_tar(tar, samples(6, 3))
    assert all_bytes(TarImages(tar.parent)) == [content(n) for n in range(3, 9)]
    write_tar(tar, samples(2))
    assert all_bytes(TarImages(tar.parent)) == [content(n) for n in range(2)]
    # further samples were appended
    write_tar(tar, samples(3))
    write_index(tar)
    write_tar(tar, samples(6))
    assert all_bytes(TarImages(tar.parent)) == [content(n) for n in range(6)]
    # as long, but of other files
    write_tar(tar, samples(3))
    write_index(tar)
    index = tar.with_suffix(".idx")
    index.write_text(index.read_text().replace(f" {len(content(1))} 00001", f" {len(content(1)) - 1} 00001"))
    with pytest.raises(DataError, match=r"0.tar: 00001.jpg is not at byte \d+, where it was listed"):
        TarImages(tar.parent).read(1)
    write_index(tar)
    write_tar(tar, samples(3, prefix="x"))
    assert all_bytes(TarImages(tar.parent)) == [content(n) for n in range(3)]
    # the last member alone is the same one
    write_tar(tar, [*samples(2, prefix="y"), *samples(1, 2)])
    with pytest.raises(DataError, match=r"0.tar: 00000.cls is not at byte 1536, where it was listed"):
        TarImages(tar.parent)


def test_names_of_classes(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_tar(tmp_path / part / "0.tar", samples(4))
    given = tmp_path / "classes.json"
    given.write_text('["cat", "dog", "eel", "fox"]')
    assert open_source("webdataset", tmp_path).class_names == ("cat", "dog", "eel", "fox")
    for text in ("[", '["a"]', '["a", "a", "b"]', '{"a": 1}', "[1, 2, 3]", "[" * 100_000):
        given.write_text(text)
        with pytest.raises(DataError, match=r"classes.json (cannot be read|is no list of at least 2)") as raised:
            open_source("webdataset", tmp_path)
        one_line(raised)
    given.unlink()
    os.mkfifo(given)
    with pytest.raises(DataError, match=r"classes.json cannot be read: not a file"):
        open_source("webdataset", tmp_path)
    given.unlink()
    given.write_text('["a", "b"]')
    with pytest.raises(DataError, match=r"train/0.tar: 00002.jpg has label 2; expected 0 to 1 .*classes.json"):
        open_source("webdataset", tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.jpg", b"x")], r"sample 1 has .jpg; expected one image"),
        ([("1.cls", b"1")], r"sample 1 has .cls; expected one image"),
        ([("1.jpg", b"x"), ("1.png", b"x"), ("1.cls", b"1")], r"sample 1 has .jpg, .png, .cls; expected"),
        ([("1.jpg", b"x"), ("1.JPG", b"x"), ("1.cls", b"1")], r"sample 1 has two .jpg; expected"),
        ([("1.jpg", b"x"), ("2.jpg", b"x"), ("1.cls", b"1"), ("2.cls", b"1")], r"sample 1 has .jpg; .*tar --sort=name"),
        ([("1.jpg", b"x"), ("1.cls", b"-1")], r"1.cls holds '-1'; expected a class's number"),
        ([("1.jpg", b"x"), ("1.cls", b"cat\n\xff")], r"1.cls holds 'cat\\\\n\\\\xff'; expected a class's number"),
        (
            [("1.jpg", b"x"), ("1.json", b"[1]")],
            r"1.json holds '\[1\]'; expected a class's number, as \{\"label\": 7\}",
        ),
        ([("1.jpg", b"x"), ("1.json", b'{"label": true}')], r"1.json holds .*; expected a class's number"),
        ([("1.jpg", b"x"), ("1.json", b"[" * 100_000)], r"1.json holds .*; expected a class's number"),
        ([], r"train has no samples; expected images and labels in its 1 tars"),
    ],
)
def test_samples_that_are_not_whole(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "train" / "0.tar", members)
    with pytest.raises(DataError, match=message) as raised:
        TarImages(tmp_path / "train")
    one_line(raised)


def test_links_joined_tars_and_other_files(tmp_path: Path) -> None:
    tar = tmp_path / "train" / "0.tar"
    write_tar(tar, samples(2))
    whole = tar.read_bytes()
    tar.write_bytes(whole + whole)
    with pytest.raises(
        DataError, match=r"0.tar: something follows the archive's end at byte \d+; expected one archive"
    ):
        TarImages(tar.parent)
    tar.write_bytes(whole[:3100])
    with pytest.raises(
        DataError, match=r"0.tar: 00001.jpg goes on to byte \d+ of 3100; truncated or damaged: write or"
    ):
        TarImages(tar.parent)
    tar.write_bytes(whole[:3072])
    with pytest.raises(
        DataError, match=r"0.tar: 00001.jpg goes on to byte \d+ of 3072; truncated or damaged: write or"
    ):
        TarImages(tar.parent)
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE):
        with tarfile.open(tar, "w") as out:
            info = tarfile.TarInfo("1.jpg")
            info.type, info.linkname = kind, "0.jpg"
            out.addfile(info)
        with pytest.raises(DataError, match=r"0.tar: 1.jpg is (a link|of type 'S'); expected a regular file"):
            TarImages(tar.parent)
    tar.unlink()
    os.mkfifo(tar)
    with pytest.raises(DataError, match=r"0.tar is not a regular file; expected a tar"):
        TarImages(tar.parent)
    tar.unlink()
    with pytest.raises(DataError, match=r"train has no tar; expected WebDataset's train/\*.tar"):
        TarImages(tar.parent)


def test_tars_that_change_while_they_are_used(tmp_path: Path) -> None:
    tar = tmp_path / "train" / "0.tar"
    write_tar(tar, samples(3))
    images = TarImages(tar.parent)
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"0.tar has changed since it was listed \(\d+ bytes, before \d+\)"):
        images.read(0)
    images = TarImages(tar.parent)
    tar.write_bytes(tar.read_bytes().replace(b"00001.jpg", b"0x001.jpg"))
    with pytest.raises(DataError, match=r"0.tar: 00001.jpg is not at byte \d+, where it was listed"):
        images.read(1)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(sorted(FORMATS)), st.booleans())
def test_damaged_tars_end_in_one_line_or_give_what_tarfile_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, kind: str, indexed: bool
) -> None:
    tar = tmp_path_factory.mktemp("damaged") / "train" / "0.tar"
    write_tar(tar, [(name, body[:200]) for name, body in samples(4, prefix="p" * 90 if kind == "pax" else "")], kind)
    if indexed:
        write_index(tar)
    broken = tar.with_suffix(".idx") if indexed and data.draw(st.booleans()) else tar
    damaged = bytearray(broken.read_bytes())
    used = min(len(damaged), 4 * 4 * 512)
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, used - 1))] = data.draw(st.integers(0, 255))
    broken.write_bytes(damaged[: data.draw(st.integers(0, used))] if data.draw(st.booleans()) else damaged)
    found = message = None
    try:
        found = all_bytes(TarImages(tar.parent))
    except DataError as error:
        message = str(error)
    if found is None:
        assert message is not None
        assert message.isprintable()
        assert str(tar.parent) in message
        return
    with tarfile.open(tar, encoding="utf-8") as whole:
        files = [whole.extractfile(member) for member in whole if member.name.endswith(".jpg")]
        assert found == [file.read() for file in files if file is not None]
    assert len(found) == 4


def test_more_tars_than_may_be_open_read_by_threads(tmp_path: Path) -> None:
    for number in range(150):
        write_tar(tmp_path / "train" / f"{number:03d}.tar", samples(2, 2 * number))
    images = TarImages(tmp_path / "train")
    rows = [row for seed in range(4) for row in random.Random(seed).sample(range(300), 300)]
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda row: images.read(row) == content(row), rows))
    assert len(os.listdir("/proc/self/fd")) <= before + 128  # noqa: PTH208


def test_a_tar_of_more_than_4_gib(tmp_path: Path) -> None:
    tar, size = tmp_path / "train" / "0.tar", 9 * 2**30
    tar.parent.mkdir()
    with tar.open("wb") as file:
        for name, data in (("0.bin", size), ("0.cls", b"1"), ("0.jpg", b"far away")):
            info = tarfile.TarInfo(name)
            info.size = data if isinstance(data, int) else len(data)
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.write(b"" if isinstance(data, int) else data.ljust(512, b"\0"))
            file.seek(info.size if isinstance(data, int) else 0, os.SEEK_CUR)
        file.write(bytes(1024))
    images = TarImages(tar.parent)
    assert all_bytes(images) == [b"far away"]
    assert images.labels.tolist() == [1]


# shards


def write_pair(folder: Path, number: int, images: Any, labels: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"images-{number:05d}.npy", images)
    np.save(folder / f"labels-{number:05d}.npy", labels)


def write_shards(folder: Path, kind: str) -> None:
    """The nine images in three files."""
    for number, (first, stop) in enumerate(((0, 4), (4, 5), (5, 9))):
        images, labels = PIXELS[first:stop], LABELS[first:stop].astype(("<i8", "u1", ">i4")[number])
        if "first" in kind:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        folder.mkdir(parents=True, exist_ok=True)
        if "npy" in kind:
            write_pair(folder, number, images, labels)
        else:
            save = np.savez_compressed if "compressed" in kind else np.savez
            names = ("image", "label") if number else ("images", "labels")
            save(folder / f"part-{number}.npz", other=np.array([{}]), **dict(zip(names, (images, labels), strict=True)))


@pytest.mark.parametrize(
    "kind", ["npy", "npy, first", "npz", "npz, first", "npz, compressed", "npz, compressed, first"]
)
def test_shards(tmp_path: Path, kind: str) -> None:
    write_shards(tmp_path / "train", kind)
    write_shards(tmp_path / "val", "npy, first" if kind == "npz" else kind)
    source = open_source("shards", tmp_path)
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    store = source.train
    assert isinstance(store, ImageArrays)
    assert (store.shape, len(store), source.class_names) == ((3, 4, 5), 9, ("0", "1", "2"))
    for rows in ([], [3], [8, 0, 4, 4, 3, 8, 1], list(range(9)), list(range(9))[::-1]):
        assert torch.equal(store.gather(torch.tensor(rows, dtype=torch.int64)), expected[rows])
        assert store.labels(torch.tensor(rows, dtype=torch.int64)).tolist() == LABELS[rows].tolist()
    assert source.train_labels.tolist() == LABELS.tolist()
    for rows in ([-1], [9], [0, 9]):
        with pytest.raises(IndexError):
            store.gather(torch.tensor(rows))
    write_pair(tmp_path / "one", 0, PIXELS, LABELS)
    assert store.digest() == source.test.digest() == ArrayShards(tmp_path / "one").digest()
    changed = PIXELS.copy()
    changed[7, 3, 4, 2] ^= 1
    write_pair(tmp_path / "one", 0, changed, LABELS)
    assert ArrayShards(tmp_path / "one").digest() != store.digest()


@pytest.mark.parametrize("place", ["image", "label"])
def test_a_changed_bit_in_an_archive_is_found_at_opening(tmp_path: Path, place: str) -> None:
    write_shards(tmp_path, "npz")
    path = tmp_path / "part-1.npz"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(f"{place}.npy").header_offset + 30 + 9 + 20 + 128
    damaged = bytearray(path.read_bytes())
    damaged[start] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"part-1.npz \(\d+ bytes\): not read, Bad CRC-32 for file '{place}.npy'"):
        ArrayShards(tmp_path)


def test_large_images_and_cold_files(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 70, 90, 3), dtype=np.uint8)
    for number in range(4):
        write_pair(tmp_path, number, images[number * 10 : number * 10 + 10], np.zeros(10, np.int64))
    store = ArrayShards(tmp_path)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2)
    rows = torch.from_numpy(np.random.default_rng(2).integers(0, 40, 300))
    for _ in range(2):
        for path in tmp_path.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        store._is_cold = True  # as after a batch that waited for the disk
        assert torch.equal(store.gather(rows), expected[rows])


def test_more_shards_than_descriptors(tmp_path: Path) -> None:
    for number in range(300):
        write_pair(tmp_path, number, PIXELS[:2] + np.uint8(number % 256), LABELS[:2])
    store = ArrayShards(tmp_path)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    found = store.gather(torch.arange(600))
    assert torch.equal(found[598], torch.from_numpy(PIXELS[0] + np.uint8(299 % 256)).permute(2, 0, 1))
    assert store.labels(torch.arange(600)).tolist() == [0, 1] * 300
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    # a few hundred bytes a file
    assert len(pickle.dumps(store)) < 300 * 1500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: (d / "labels-00001.npy").unlink(),
            r"labels-00001.npy is missing; expected the labels of images-00001",
        ),
        (lambda d: (d / "images-00001.npy").unlink(), r"labels-00001.npy has no partner; expected pairs"),
        (lambda d: np.save(d / "more.npy", LABELS), r"more.npy has no partner; expected pairs"),
        (lambda d: os.truncate(d / "images-00002.npy", 200), r"images-00002.npy: the file has 200 bytes; expected 368"),
        (
            lambda d: os.truncate(d / "images-00002.npy", 100),
            r"images-00002.npy \(100 bytes\): not read, .*an .npy file",
        ),
        (lambda d: os.truncate(d / "labels-00000.npy", 159), r"labels-00000.npy: the file has 159 bytes; expected 160"),
        (lambda d: os.truncate(d / "labels-00000.npy", 161), r"labels-00000.npy: the file has 161 bytes; expected 160"),
        (
            lambda d: write_pair(d, 1, PIXELS[:, :3], LABELS),
            r"is uint8 \[9, 3, 5, 3\]; expected uint8 \[N, 4, 5, 3\] as in",
        ),
        (
            lambda d: write_pair(d, 1, PIXELS.transpose(0, 3, 1, 2), LABELS),
            r"\[9, 3, 4, 5\]; expected uint8 \[N, 4, 5, 3",
        ),
        (
            lambda d: write_pair(d, 0, PIXELS[..., :2], LABELS),
            r"\[9, 4, 5, 2\]; expected uint8 \[N, H, W, C\] or .* 1 or 3 channels$",
        ),
        (lambda d: write_pair(d, 0, PIXELS[..., 0], LABELS), r"make it by images\[..., None\]"),
        (lambda d: write_pair(d, 1, PIXELS, LABELS[:8]), r"labels-00001.npy: the array is int64 \[8\]; expected whole"),
        (lambda d: write_pair(d, 1, PIXELS, np.array([{}] * 9)), r"labels-00001.npy: the array holds Python objects"),
        (lambda d: os.mkfifo(d / "a.npz"), r"a.npz is not a file; expected a shard"),
    ],
)
@pytest.mark.timeout(60)
def test_shards_that_are_not_whole(tmp_path: Path, change: Any, message: str) -> None:
    write_shards(tmp_path, "npy")
    change(tmp_path)
    with pytest.raises(DataError, match=message) as raised:
        ArrayShards(tmp_path)
    one_line(raised)


def test_shards_that_change_or_go_away(tmp_path: Path) -> None:
    write_shards(tmp_path, "npy")
    store = ArrayShards(tmp_path)
    np.save(tmp_path / "images-00002.npy", PIXELS)
    with pytest.raises(DataError, match=r"images-00002.npy has changed since it was opened \(668 bytes, before 368\)"):
        store.gather(torch.tensor([0, 8]))
    (tmp_path / "images-00000.npy").unlink()
    with pytest.raises(DataError, match=r"images-00000.npy cannot be read: No such file"):
        pickle.loads(pickle.dumps(store)).gather(torch.tensor([0]))


@pytest.mark.parametrize("cut", [1, 4000 * 48])
def test_a_shard_that_is_cut_between_two_batches_ends_training_by_its_name(tmp_path: Path, cut: int) -> None:
    for part in ("train", "test"):
        write_pair(tmp_path / part, 0, np.zeros((4000, 4, 4, 3), np.uint8), np.arange(4000) % 3)
    data = load_dataset("shards", root=tmp_path, held_out_fraction=0, seed=0, loading=Loading(loader="torch"))
    batches = iter(Batches(data.train, Augmentation(), global_batch_size=40, seed=0))
    next(batches)
    path = tmp_path / "train" / "images-00000.npy"
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(
        DataError, match=r"train/images-00000.npy has changed since it was opened \(\d+ bytes"
    ) as raised:
        list(batches)
    one_line(raised)


def test_labels_and_files_that_are_cut_or_removed_while_mapped(tmp_path: Path) -> None:
    write_pair(tmp_path, 0, PIXELS, LABELS)
    store = ArrayShards(tmp_path)
    rows = torch.arange(9)
    assert store.labels(rows).tolist() == LABELS.tolist()
    assert len(store.gather(rows)) == 9
    os.truncate(tmp_path / "labels-00000.npy", 0)
    for read in (store.all_labels, lambda: store.labels(rows), lambda: store.require_labels(3, "x")):
        with pytest.raises(
            DataError, match=r"labels-00000.npy has changed since it was opened \(0 bytes, before 200\)"
        ):
            read()
    (tmp_path / "images-00000.npy").unlink()
    with pytest.raises(DataError, match=r"images-00000.npy cannot be read: No such file"):
        store.gather(rows)


@pytest.mark.parametrize("name", ["shards", "webdataset"])
def test_one_damaged_label_does_not_fill_the_memory_with_names(tmp_path: Path, name: str) -> None:
    for part in ("train", "test"):
        write_pair(tmp_path / part, 0, PIXELS, np.where(LABELS == 1, 300_000_000, LABELS))
        write_tar(tmp_path / part / "0.tar", [("1.jpg", b"x"), ("1.cls", b"300000000")])
    with pytest.raises(DataError, match=r"train has the label 300000000; expected fewer than 1,000,000 cl") as raised:
        open_source(name, tmp_path)
    one_line(raised)


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    for number, suffix in enumerate(("tar", "TAR")):
        write_tar(tmp_path / "tars" / f"{number}.{suffix}", samples(3, 3 * number))
    assert all_bytes(TarImages(tmp_path / "tars")) == [content(n) for n in range(6)]
    write_pair(tmp_path / "shards", 0, PIXELS, LABELS)
    for kind in ("images", "labels"):
        shutil.copy(tmp_path / "shards" / f"{kind}-00000.npy", tmp_path / "shards" / f"{kind}-00001.NPY")
    with (tmp_path / "shards" / "more.NPZ").open("wb") as file:
        np.savez(file, image=PIXELS, label=LABELS)
    assert len(ArrayShards(tmp_path / "shards")) == 27
    assert len(ArrayShards(tmp_path / "shards" / "images-00001.NPY")) == 9


def bomb(begin: bytes, megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return packer.compress(begin) + b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


def test_what_would_unpack_to_much_is_refused_in_little_memory(tmp_path: Path) -> None:
    header = b"\x93NUMPY\2\0" + struct.pack("<I", 2**25)
    with zipfile.ZipFile(tmp_path / "header.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", header + bytes(2**25))
    packed = bomb(b"", 4)
    (tmp_path / "zeros.mat").write_bytes(bytes(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed)
    (tmp_path / "cut.mat").write_bytes(bytes(124) + b"\0\1IM" + struct.pack("<II", 15, 100) + packed[:100])
    # nine bytes that ask for 4 GiB of places
    (tmp_path / "memo").write_bytes(b"\x80\2}r" + struct.pack("<I", 2**28) + b".")
    for read, message in (
        (lambda: ArrayShards(tmp_path / "header.npz"), r"header.npz .*: not read, EOF: reading array header"),
        (lambda: read_mat(tmp_path / "zeros.mat", "X"), r"zeros.mat .*: not read, an element of type 0 where a variab"),
        (lambda: read_mat(tmp_path / "cut.mat", "X"), r"cut.mat .*: not read, a compressed variable that is cut off"),
        (lambda: read_pickle(tmp_path / "memo"), r"memo .*: not read, refused: a value of number 268435456 in 9 by"),
    ):
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=message) as raised:
                read()
            assert tracemalloc.get_traced_memory()[1] < 2**24
        finally:
            tracemalloc.stop()
        one_line(raised)


def test_files_that_fail_when_they_are_read(tmp_path: Path) -> None:
    for name in ("train_32x32.mat", "test_32x32.mat"):
        # opens, and then fails to be read
        (tmp_path / name).symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"cannot be read: Input/output error; expected a file of svhn") as raised:
        load_dataset("svhn", root=tmp_path, held_out_fraction=0, seed=0)
    one_line(raised)


def test_labels_out_of_range_name_their_file(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_shards(tmp_path / part, "npy")
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b"]))
    with pytest.raises(DataError, match=r"train/labels-00000.npy: image 2 has label 2; expected 0 to 1") as raised:
        open_source("shards", tmp_path)
    one_line(raised)
    (tmp_path / "classes.json").unlink()
    np.save(tmp_path / "test" / "labels-00002.npy", np.array([0, 1, 3, 0]))
    with pytest.raises(DataError, match=r"test/labels-00002.npy: image 2 has label 3; expected 0 to 2"):
        open_source("shards", tmp_path)
    with pytest.raises(DataError, match=r"images in shards cannot be skipped one by one, as 'x' was to be"):
        open_source("shards", tmp_path, skip=frozenset("x"))


def test_compressed_arrays_that_would_fill_the_memory_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    np.savez_compressed(path, image=PIXELS, label=LABELS)
    count = (2**30 + 60) // 60
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (count, 4, 5, 3)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", header.getvalue())
        archive.writestr(
            "label.npy", header.getvalue().replace(b"|u1", b"<i8").replace(b", 4, 5, 3)", b",)" + b" " * 8)
        )
        for name, size in (("image.npy", 60), ("label.npy", 8)):
            archive.getinfo(name).file_size = 128 + size * count
    with pytest.raises(
        DataError, match=r"large.npz: image is compressed and has 1073741\d\d\d bytes; .*savez"
    ) as raised:
        ArrayShards(path)
    one_line(raised)


@settings(max_examples=60)
@given(st.data())
def test_damaged_shards_end_in_one_line_or_give_what_numpy_reads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    kind = data.draw(st.sampled_from(["npy", "npz", "npz, compressed"]))
    write_shards(folder, kind)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))] if data.draw(st.booleans()) else damaged)
    found = message = None
    try:
        store = ArrayShards(folder)
        found = store.gather(torch.arange(len(store))).permute(0, 2, 3, 1).numpy(), store.all_labels().numpy()
    except DataError as error:
        message = str(error)
    if found is None:
        assert message is not None
        assert message.isprintable()
        assert str(folder) in message
    elif kind == "npy":
        for got, name in zip(found, ("images", "labels"), strict=True):
            expected = [np.load(one) for one in sorted(folder.glob(f"{name}-*.npy"))]
            assert np.array_equal(got, np.concatenate(expected).astype(got.dtype))
    else:  # checksums cover the arrays
        assert np.array_equal(found[0], PIXELS)
        assert np.array_equal(found[1], LABELS)


def anonymous_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def npy_header(shape: tuple[int, ...], kind: str) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    return header.getvalue()


def write_zip64(path: Path, members: list[tuple[str, bytes, int]]) -> list[int]:
    """An archive of stored, sparse members (name, beginning, size); returns where their contents begin."""
    starts, directory = [], b""
    with path.open("wb") as file:
        for name, begin, size in members:
            here, checksum = file.tell(), 0
            if size < 2**24:
                checksum = zlib.crc32(begin.ljust(size, b"\0"))
            sizes = struct.pack("<HHQQ", 1, 16, size, size)
            common = struct.pack("<HHHHHL", 45, 0, 0, 0, 33, checksum) + b"\xff" * 8
            file.write(b"PK\3\4" + common + struct.pack("<HH", len(name), len(sizes)) + name.encode() + sizes)
            starts.append(file.tell())
            file.write(begin)
            file.seek(starts[-1] + size)
            extra = struct.pack("<HHQQQ", 1, 24, size, size, here)
            directory += (
                b"PK\1\2" + struct.pack("<H", 45) + common + struct.pack("<HHHHHL", len(name), len(extra), 0, 0, 0, 0)
            )
            directory += b"\xff" * 4 + name.encode() + extra
        where = file.tell()
        count = len(members)
        end = struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), where)
        locator = struct.pack("<LQL", 0, where + len(directory), 1)
        file.write(directory + b"PK\6\6" + end + b"PK\6\7" + locator)
        file.write(b"PK\5\6" + struct.pack("<HHHHLLH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    return starts


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_shards_of_more_than_4_gib(tmp_path: Path, kind: str) -> None:
    count, item = 1_500_000, 32 * 32 * 3  # 4.3 GiB
    image, label = npy_header((count, 32, 32, 3), "|u1"), npy_header((count,), "|u1")
    labels = (np.arange(count) % 251).astype(np.uint8)
    if kind == "npy":
        path, start = tmp_path / "images-0.npy", 0
        path.write_bytes(image)
        os.truncate(path, len(image) + count * item)
        (tmp_path / "labels-0.npy").write_bytes(label + labels.tobytes())
    else:
        path = tmp_path / "large.npz"
        body = label + labels.tobytes()
        members = [("image.npy", image, len(image) + count * item), ("label.npy", body, len(body))]
        start, _ = write_zip64(path, members)
    rows = [0, 1, 700_000, 1_398_101, 1_398_102, count - 1]  # 2^32 bytes lie within one of them
    with path.open("r+b") as file:
        for row in rows:
            file.seek(start + len(image) + row * item)
            file.write(content(row % 7, item)[:item])
    store = ArrayShards(tmp_path)
    before = anonymous_megabytes()
    assert len(store) == count
    found = store.gather(torch.tensor(rows[::-1])).permute(0, 2, 3, 1).numpy()
    for got, row in zip(found[::-1], rows, strict=True):
        assert got.tobytes() == content(row % 7, item)[:item]
    assert store.labels(torch.tensor(rows)).tolist() == labels[rows].tolist()
    assert not store.gather(torch.tensor([2, 1_398_103, 1_200_000])).any()
    for seed in range(5):
        store.gather(torch.from_numpy(np.random.default_rng(seed).integers(0, count, 512)))
    assert anonymous_megabytes() - before < 64
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(
        DataError, match=rf"{path.name}(: the file has \d+ bytes; expected \d+ by|.*not read)"
    ) as raised:
        ArrayShards(tmp_path)
    one_line(raised)


# tables


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty images in train, in four files, and five of them in validation."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"]), "more": datasets.Value("string")}
    )
    rows = {
        "img": [{"bytes": content(n), "path": None if n % 2 else f"{n}.jpg"} for n in range(30)],
        "label": [n % 3 for n in range(30)],
        "more": ["text"] * 30,
    }
    data = datasets.Dataset.from_dict(rows, features=features)
    root = tmp_path_factory.mktemp("table")
    parts = datasets.DatasetDict(train=data, validation=data.select([7, 3, 29, 3, 0]))
    parts.save_to_disk(str(root), num_shards={"train": 4, "validation": 1})
    return root


def test_huggingface(table: Path) -> None:
    source = open_source("huggingface", table)
    assert source.class_names == ("a", "b", "c")
    assert all_bytes(source.train) == [content(n) for n in range(30)]
    assert source.train_labels.tolist() == [n % 3 for n in range(30)]
    assert all_bytes(source.test) == [content(n) for n in (7, 3, 29, 3, 0)]
    assert source.test_labels.tolist() == [1, 0, 2, 0, 0]
    assert source.train.name(12) == f"{table}/train: row 12"
    skipped = open_source("huggingface", table, skip=frozenset({"train/0", "train/12"}))
    assert all_bytes(skipped.train) == [content(n) for n in range(30) if n not in (0, 12)]
    assert skipped.train_labels.tolist() == [n % 3 for n in range(30) if n not in (0, 12)]
    assert len({skipped.train.digest(), source.train.digest(), source.test.digest()}) == 3


def copy_table(table: Path, root: Path) -> Path:
    shutil.copytree(table, root)
    return root


def edit_info(part: Path, change: Any) -> None:
    path = part / "dataset_info.json"
    info = json.loads(path.read_text())
    change(info["features"])
    path.write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: (r / "train" / "state.json").unlink(), r"train/state.json is missing; expected a split"),
        (lambda r: (r / "train" / "state.json").write_text("{"), r"train: not read, .*save it again"),
        (lambda r: shutil.rmtree(r / "validation"), r"test/state.json is missing"),
        (lambda r: next((r / "train").glob("data-00001*")).unlink(), r"train: not read, .*save it again"),
        (lambda r: os.truncate(next((r / "train").glob("data-00001*")), 700), r"train: not read, .*save it again"),
        (
            lambda r: edit_info(r / "validation", lambda f: f["label"].update(names=["a", "c", "b"])),
            r"validation has the classes a, c, b, ... and train a, b, c, ...; both need the same ones",
        ),
        (
            lambda r: edit_info(r / "train", lambda f: f["label"].update(names=["a", "b"])),
            r"train: row 2 has label 2; expected 0 to 1",
        ),
    ],
)
def test_tables_that_are_not_whole(table: Path, tmp_path: Path, change: Any, message: str) -> None:
    root = copy_table(table, tmp_path / "copy")
    change(root)
    with pytest.raises(DataError, match=message) as raised:
        open_source("huggingface", root)
    one_line(raised)


def test_labels_that_go_on_after_their_buffer_are_refused(table: Path, tmp_path: Path) -> None:
    root = copy_table(table, tmp_path / "copy")
    (path,) = (root / "validation").glob("*.arrow")
    whole, size = path.read_bytes(), struct.pack("<q", 5 * 8)
    refused = 0
    for place in range(0, len(whole), 8):
        if whole[place : place + 8] == size:
            path.write_bytes(whole[:place] + struct.pack("<q", 8) + whole[place + 8 :])
            with pytest.raises(DataError, match=r"validation: not read, .*too small in array of type int64") as raised:
                HuggingFaceImages(root / "validation")
            one_line(raised)
            refused += 1
    assert refused == 1


def test_pipes_among_tables_and_rows_that_are_all_skipped(table: Path, tmp_path: Path) -> None:
    root = copy_table(table, tmp_path / "copy")
    every = frozenset(f"validation/{row}" for row in range(5))
    with pytest.raises(DataError, match=r"validation has no image left: all 5 are skipped"):
        HuggingFaceImages(root / "validation", skip=every)
    (path,) = (root / "validation").glob("*.arrow")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"arrow is not a file; expected what datasets.save_to_disk has written"):
        HuggingFaceImages(root / "validation")


def test_rows_without_bytes_or_labels_and_columns_of_other_types(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = [{"bytes": None, "path": "/data/5.jpg"}, None, {"bytes": b"x", "path": None}]
    pairs = datasets.Features({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    features = datasets.Features({"image": pairs, "label": datasets.ClassLabel(names=["a", "b"])})
    part = tmp_path / "train"
    datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features).save_to_disk(str(part))
    with pytest.raises(
        DataError, match=r"train has the columns image .*; expected one Image, or one of several called"
    ):
        HuggingFaceImages(part)
    edit_info(part, lambda features: features.update(image={"_type": "Image"}))
    found = HuggingFaceImages(part)
    for row, message in (
        (0, r"row 0 has no bytes, only the path '/data/5.jpg' as image"),
        (1, r"row 1 has no bytes as"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            found.read(row)
        one_line(raised)
    assert found.read(2) == b"x"
    part = tmp_path / "unlabelled"
    datasets.Dataset.from_dict({"image": images, "label": [0, None, 1]}, features=features).save_to_disk(str(part))
    edit_info(part, lambda features: features.update(image={"_type": "Image"}))
    with pytest.raises(DataError, match=r"unlabelled: 1 rows have no label; expected a class for every image"):
        HuggingFaceImages(part)


def test_without_the_package_it_is_named(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what Python raises ImportError for
    with pytest.raises(DataError, match=r"datasets, which is not here .*; pip install datasets$") as raised:
        open_source("huggingface", table)
    one_line(raised)


# all of them


def write_source(name: str, root: Path, table: Path) -> Source:
    if name == "huggingface":
        return open_source(name, table)
    if name == "tiny-imagenet":
        write_tiny_imagenet(root)
    elif name == "webdataset":
        for part in ("train", "test"):
            write_tar(root / part / "0.tar", samples(9))
    elif name == "shards":
        for part in ("train", "test"):
            write_shards(root / part, "npz")
    else:
        write_folder(root, ("train", "val"))
    return open_source(name, root)


def first_and_last(source: Source) -> list[Any]:
    found: list[Any] = []
    for images in (source.train, source.test):
        if isinstance(images, ImageArrays):
            rows = torch.tensor([0, len(images) - 1])
            found += [images.gather(rows).tolist(), images.labels(rows).tolist()]
        else:
            found += [images.read(0), images.read(len(images) - 1), images.name(0)]
        found.append(images.digest())
    return found


def test_every_source_is_read_alike_by_another_process(tmp_path: Path, table: Path) -> None:
    sources = [write_source(name, tmp_path / name, table) for name in source_names]
    for source in sources:
        assert isinstance(source.train, EncodedImages) != isinstance(source.train, ImageArrays)
        assert len(source.train) == len(source.train_labels)
        assert len(source.test) == len(source.test_labels)
        assert source.train_labels.dtype == source.test_labels.dtype == torch.int64
    expected = [first_and_last(source) for source in sources]  # so that all files are open
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(first_and_last, sources) == expected


def test_unknown_names_and_missing_roots(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"unknown name 'mnist'; expected one of folder, tiny-imagenet, imagenet, webdat"
    ):
        open_source("mnist", tmp_path)
    for name in source_names:
        with pytest.raises(
            DataError, match=rf"nowhere is not a directory; expected the one that holds the files of {name}"
        ):
            open_source(name, tmp_path / "nowhere")
        with pytest.raises(DataError, match=r"train") as raised:
            open_source(name, tmp_path)
        one_line(raised)


def test_a_root_that_is_another_one_is_guessed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_folder(root)
    (root / "train" / "train").mkdir()
    for place in (root / "train", tmp_path):
        with pytest.raises(DataError, match=rf"did you mean {root}\?$") as raised:
            open_source("folder", place)
        one_line(raised)
    (root / "train" / "train").rmdir()
    with pytest.raises(DataError, match=rf"did you mean {root}\?$"):
        scan_folder(root / "train", workers=1)
    write_images(tmp_path / "small", 9)
    pack_folder(tmp_path / "small", tmp_path / "packed")
    with pytest.raises(DataError, match=r"did you mean --data.name webdataset or shards, as it was packed\?$"):
        open_source("folder", tmp_path / "packed")
    with pytest.raises(DataError, match=rf"did you mean {tmp_path}/packed/train\?$"):
        ArrayShards(tmp_path / "packed")
