"""`awp data pack` and `verify`: shards that others read as they were meant, or none at all."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import stat
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from bad_files import encode, make_folder, pack_and_die, random_image
from disks import small_tmpfs

from awp_engine.cli.data import main
from awp_engine.data import DataError
from awp_engine.data.sets.inspect import decode
from awp_engine.data.sets.scan_list import LIST_NAME, write_scan
from awp_engine.data.tools.pack import Manifest, pack_folder, read_manifest, verify_pack
from awp_engine.data.tools.scan import scan_folder
from awp_engine.files.digest import sha256_of_json
from awp_engine.observe.bars import NoBar

SHARD = 20 * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pack") / "images", 60)


@pytest.fixture(scope="module")
def packed(folder: Path) -> Path:
    out = folder.parent / "tar"
    pack_folder(folder, out, shard_bytes=SHARD, workers=2)
    return out


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def files_in_order(root: Path, part: str) -> list[tuple[Path, int]]:
    """As a folder is read: by class, then by name."""
    classes = sorted(path.name for path in (root / part).iterdir())
    return [
        (root / part / name / file, label)
        for label, name in enumerate(classes)
        for file in sorted(path.name for path in (root / part / name).iterdir())
    ]


def shards(out: Path, part: str, pattern: str) -> list[Path]:
    return sorted((out / part).glob(pattern))


def tar_members(out: Path, part: str) -> list[tuple[str, bytes]]:
    members = []
    for shard in shards(out, part, "*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members.append((member.name, file.read()))
    return members


def test_tar_shards_hold_every_image_once_with_its_label(folder: Path, packed: Path) -> None:
    assert json.loads((packed / "classes.json").read_text()) == [f"class_{n}" for n in range(10)]
    for part in ("train", "test"):
        files = files_in_order(folder, part)
        members = tar_members(packed, part)
        images, labels = members[::2], members[1::2]
        assert sorted(int(name.split(".")[0]) for name, _ in images) == list(range(len(files)))
        order = []
        for (name, content), (label_name, label) in zip(images, labels, strict=True):
            place, suffix = name.split(".")
            order.append(int(place))
            path, expected = files[int(place)]
            assert content == path.read_bytes()
            assert (label_name, int(label)) == (f"{place}.cls", expected)
            assert suffix == ("png" if path.suffix == ".png" else "jpg")
        # Classes lie mixed where a reader shuffles neighbours only.
        assert (order == sorted(order)) == (part == "test")
        assert all(shard.stat().st_size <= SHARD for shard in shards(packed, part, "*.tar"))
    assert len(shards(packed, "train", "*.tar")) > 2
    manifest = read_manifest(packed)
    assert (manifest.form, manifest.classes, manifest.images) == ("tar", 10, {"train": 40, "test": 20})
    assert {entry.file for entry in manifest.files} | {"manifest.json"} == {
        path.relative_to(packed).as_posix() for path in packed.rglob("*.*")
    }
    assert verify_pack(packed) == []


def test_packing_again_gives_the_same_bytes(folder: Path, packed: Path, tmp_path: Path) -> None:
    again = pack_folder(folder, tmp_path / "again", shard_bytes=SHARD, workers=1)
    assert again == read_manifest(packed)


def test_indices_are_those_of_wds2idx(packed: Path, tmp_path: Path) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    for shard in (*shards(packed, "train", "*.tar"), *shards(packed, "test", "*.tar")):
        with wds2idx.IndexCreator(str(shard), str(tmp_path / "index"), verbose=False) as creator:
            creator.create_index()
        assert shard.with_suffix(".idx").read_text() == (tmp_path / "index").read_text()


def test_dali_reads_the_shards(folder: Path, packed: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    for part in ("train", "test"):
        tars = shards(packed, part, "*.tar")

        @dali.pipeline_def(batch_size=7, num_threads=1, device_id=None)
        def pipeline(tars=tars):
            images, labels = dali.fn.readers.webdataset(
                paths=[str(tar) for tar in tars],
                index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
                ext=["jpg;png", "cls"],
                missing_component_behavior="error",
            )
            return images, labels

        files = files_in_order(folder, part)
        reader = pipeline()
        reader.build()
        expected = sorted((path.read_bytes(), label) for path, label in files)
        found = []
        while len(found) < len(files):
            contents, labels = reader.run()
            found += [
                (bytes(np.asarray(contents[row])), int(bytes(np.asarray(labels[row])))) for row in range(len(contents))
            ]
        assert sorted(found[: len(files)]) == expected


def test_arrays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "arrays"
    manifest = pack_folder(folder, out, form="npy", shard_bytes=15 * 12 * 12 * 3, workers=2)
    for part, count in (("train", 40), ("test", 20)):
        images = [np.load(path, mmap_mode="r") for path in shards(out, part, "images-*.npy")]
        labels = [np.load(path) for path in shards(out, part, "labels-*.npy")]
        assert [len(shard) for shard in images] == [len(shard) for shard in labels]
        assert max(len(shard) for shard in images) == 15
        assert {str(shard.dtype) for shard in images + labels} == {"uint8", "int64"}
        files = files_in_order(folder, part)
        expected = np.stack([decode(path.read_bytes(), str(path)) for path, _ in files])
        assert np.array_equal(np.concatenate(images), expected)
        assert np.concatenate(labels).tolist() == [label for _, label in files]
        assert manifest.images[part] == count
    assert verify_pack(out) == []


def test_arrays_need_one_size(copy: Path, tmp_path: Path) -> None:
    odd = copy / "test" / "class_3" / "odd.png"
    odd.write_bytes(encode(random_image(1, 30), "PNG"))
    message = rf"{odd} is RGB 30x30; expected RGB 12x12 as the first image: resize it, or pack as tar"
    with pytest.raises(DataError, match=message):
        pack_folder(copy, tmp_path / "out", form="npy", workers=1)
    assert not (tmp_path / "out").exists()


def test_bad_files_are_refused_or_skipped_by_the_list(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bad = copy / "train" / "class_4" / "bad.jpg"
    good = encode(random_image(3), "JPEG")
    # whole by its header and its end
    bad.write_bytes(good[:-40] + b"\xff\xd8" + good[-40:])
    with pytest.raises(DataError, match=rf"{bad}: broken JPEG: .*; scan first: awp data scan"):
        pack_folder(copy, out, workers=1)
    assert not out.exists()
    # passed over, as in training
    (copy / "train" / "class_4" / "words.txt").write_text("words")
    (copy / "train" / "stray.jpg").write_bytes(good)
    with pytest.raises(DataError, match=r"stray.jpg lies in no class folder.*; scan first"):
        pack_folder(copy, out, workers=1)
    with pytest.raises(DataError, match=r"awp-scan.jsonl is missing; expected the list of a scan: awp data scan"):
        pack_folder(copy, out, workers=1, policy="skip")
    write_scan(copy / LIST_NAME, scan_folder(copy, workers=1))
    with pytest.raises(DataError, match=r"2 unusable files are listed in .* or pack with --bad-files skip"):
        pack_folder(copy, out, workers=1)
    assert not out.exists()
    assert pack_folder(copy, out, workers=1, policy="skip").images == {"train": 40, "test": 20}
    assert not any(content == bad.read_bytes() for _, content in tar_members(out, "train"))


def test_images_that_came_after_the_scan_are_decoded(copy: Path, tmp_path: Path) -> None:
    write_scan(copy / LIST_NAME, scan_folder(copy, workers=1))
    good = encode(random_image(3), "JPEG")
    (copy / "train" / "class_4" / "bad.jpg").write_bytes(good[:-40] + b"\xff\xd8" + good[-40:])
    with pytest.raises(DataError, match=r"broken JPEG: .*; scan first"):
        pack_folder(copy, tmp_path / "out", workers=1)


def test_a_class_that_loses_its_last_image(copy: Path, tmp_path: Path) -> None:
    for file in (copy / "test" / "class_9").iterdir():
        file.write_bytes(b"")
    write_scan(copy / LIST_NAME, scan_folder(copy, workers=1))
    with pytest.raises(DataError, match="class 'class_9' has good images in one of train and test alone"):
        pack_folder(copy, tmp_path / "out", workers=1, policy="skip")


@pytest.mark.parametrize("form", ["tar", "npy"])
def test_fewer_than_two_classes_are_not_packed(copy: Path, tmp_path: Path, form: Literal["tar", "npy"]) -> None:
    for kept, message in (("class_3", "good images of 1 classes"), ("", "good images of 0 classes; expected at least")):
        for file in copy.glob("t*/*/*"):
            if file.parent.name != kept:
                file.write_bytes(b"")
        write_scan(copy / LIST_NAME, scan_folder(copy, workers=1))
        with pytest.raises(DataError, match=message):
            pack_folder(copy, tmp_path / "out", form=form, workers=1, policy="skip")
        assert not (tmp_path / "out").exists()


def test_val_is_packed_as_test(copy: Path, packed: Path, tmp_path: Path) -> None:
    (copy / "test").rename(copy / "val")
    manifest = pack_folder(copy, tmp_path / "out", shard_bytes=SHARD, workers=1)
    assert manifest == read_manifest(packed)


def test_what_a_pack_leaves_at_any_moment_does_not_look_whole(folder: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []

    class Look(NoBar):
        def set(self, done: int, total: int) -> None:
            super().set(done, total)
            seen.append(done)
            assert any((out / "train").iterdir())
            with pytest.raises(DataError, match="not a pack, or not whole"):
                verify_pack(out)

    pack_folder(folder, out, shard_bytes=SHARD, workers=2, bar=Look)
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert verify_pack(out) == []


@pytest.mark.long
def test_a_killed_pack_does_not_look_whole(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = multiprocessing.get_context("forkserver").Process(target=pack_and_die, args=(folder, out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert any(path.is_file() for path in out.rglob("*"))
    with pytest.raises(DataError, match=r"manifest.json is missing: .* is not a pack, or not whole; pack again"):
        verify_pack(out)
    with pytest.raises(DataError, match=r"is not empty; expected a new or empty directory \(a pack that was killed"):
        pack_folder(folder, out, workers=1)


def test_a_failed_pack_leaves_nothing(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (copy / "train" / "class_9" / "zz.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"zz\.png is empty"):
        pack_folder(copy, out, shard_bytes=SHARD, workers=1)
    assert list(out.iterdir()) == []


def test_a_manifest_that_may_not_last_is_taken_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def failing(handle: int) -> None:
        # a disk that fails for directories alone cannot be had
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="Input/output"):
        pack_folder(folder, out, workers=1)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("size", ["16k", "148k", "156k", "164k", "1m"])
def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path, size: str) -> None:
    with small_tmpfs(tmp_path, size) as disk:
        try:
            pack_folder(folder, disk / "out", shard_bytes=SHARD, workers=1)
        except (DataError, OSError) as error:
            refused = str(error)
        else:
            refused = ""
        assert ("" if size == "1m" else "free" if size == "16k" else refused) in refused
        assert (size == "1m") <= (not refused)
        assert list(disk.iterdir()) == ([] if refused else [disk / "out"])
        assert refused or verify_pack(disk / "out") == []


def test_verify_names_all_damage(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(packed, tmp_path / "out"))
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out == f"sound: {out}\n"
    flipped, cut, gone = out / "train" / "00000.tar", out / "train" / "00001.idx", out / "test" / "00000.tar"
    content = bytearray(flipped.read_bytes())
    content[5000] ^= 1
    flipped.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    (out / "classes.json").rename(out / "other.json")
    (out / "classes.json").symlink_to("other.json")
    (out / "train" / "more.tar").write_bytes(b"")
    assert main(["verify", str(out)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("damaged: ").removeprefix(str(out)).split(":")[0] for line in lines] == [
        "/train/00000.tar",
        "/train/00001.idx",
        "/test/00000.tar",
        "/classes.json",
        "/other.json",
        "/train/more.tar",
    ]
    assert "SHA-256 differs" in lines[0]


def test_no_flipped_bit_in_the_manifest_is_accepted(packed: Path, tmp_path: Path) -> None:
    content = (packed / "manifest.json").read_bytes()
    for place in range(0, len(content), 29):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        (tmp_path / "manifest.json").write_bytes(flipped)
        with pytest.raises(DataError, match="is damaged"):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(images=[1]),
        lambda fields: fields["images"].update(train="1"),
        lambda fields: fields.update(classes=None),
        lambda fields: fields["files"].append([]),
        lambda fields: fields["files"][0].update(bytes="x"),
        lambda fields: fields["files"][0].update(images="x"),
        lambda fields: fields["files"][0].update(file="../x"),
    ],
)
def test_manifests_of_other_types_are_damaged(packed: Path, tmp_path: Path, change: Any) -> None:
    fields = json.loads((packed / "manifest.json").read_text())
    fields.pop("digest")
    change(fields)
    (tmp_path / "manifest.json").write_text(json.dumps({**fields, "digest": sha256_of_json(fields)}))
    with pytest.raises(DataError, match=r"manifest.json is damaged \(.*\); pack again"):
        verify_pack(tmp_path)


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(DataError, match=r"manifest.json is damaged \(not a file\); pack again"):
        verify_pack(tmp_path)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["pack", str(folder), "--out", str(out), "--shard-bytes", "20k", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 40 train and 20 test images of 10 classes in ")
    for arguments, code, message in [
        (["--out", str(out)], 1, "holds a pack already; expected a new or empty directory"),
        (["--out", str(folder / "train" / "x")], 1, "lies among the images of"),
        (["--out", str(tmp_path / "no" / "where")], 1, f"{tmp_path / 'no'} is not a directory"),
        (["--out", str(folder / LIST_NAME / "x"), "--format", "zip"], 2, "--format: invalid choice: 'zip'"),
        (["--out", str(out), "--shard-bytes", "0"], 2, "--shard-bytes: expected a number of bytes such as 256M"),
        ([], 2, "required: --out"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["pack", str(folder), *arguments])
        assert stop.value.code == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path)])
    assert stop.value.code == 1
    assert isinstance(read_manifest(out), Manifest)
