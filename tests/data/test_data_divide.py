"""`awp data split`: one folder of class folders becomes a training and a test part."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from image_folders import picture

from awp_engine.cli.data import main
from awp_engine.data import DataError, load_dataset
from awp_engine.data.tools.divide import divide_folder

CLASSES = {"cat": 10, "train": 5, os.fsdecode(b"caf\xe9"): 7}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One class is called as a part is; one name is not UTF-8; one image is a link, and one file is no image."""
    root = tmp_path / "photos"
    for name, count in CLASSES.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            picture(number, (12, 12)).save(root / name / f"{number}.jpg")
    (root / "cat" / "9.jpg").rename(tmp_path / "elsewhere.jpg")
    (root / "cat" / "9.jpg").symlink_to("../../elsewhere.jpg")
    (root / "cat" / "Thumbs.db").touch()
    return root


def files(place: Path) -> set[str]:
    return {str(file.relative_to(place)) for file in place.rglob("*.*")}


def test_every_class_is_divided_by_names_and_seed(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before, out = files(root), tmp_path / "new" / "out"
    assert main(["split", str(root), str(out), "--test", "0.2"]) == 0
    said, following = capsys.readouterr().out.splitlines()
    assert said == f"{out}: 18 training and 4 test images of 3 classes; the smallest, train, has 4 and 1"
    assert following == f"next: awp data scan {out}"
    expected = set()
    for name, count in CLASSES.items():
        tested = round(0.2 * count)
        names = [f"{name}/{number}.jpg" for number in range(count)]
        names.sort(key=lambda file: hashlib.sha256(b"0/" + os.fsencode(file)).digest())
        expected |= {f"test/{file}" for file in names[:tested]} | {f"train/{file}" for file in names[tested:]}
    assert files(out) == expected
    assert all((out / file).read_bytes() == (root / file.split("/", 1)[1]).read_bytes() for file in expected)
    # no room is taken, nothing is moved, and links are none any more, which may lead elsewhere from here
    assert (out / next(file for file in expected if "/train/" in file)).stat().st_nlink == 2
    assert not any((out / file).is_symlink() for file in expected)
    assert files(root) == before
    assert not list(out.parent.glob(".tmp-*"))
    # the whole can be trained on
    assert len(load_dataset("folder", root=out, held_out_fraction=0.0, seed=0).train) == 18
    for place, seed in (("same", 0), ("other", 1)):
        divide_folder(root, tmp_path / place, seed=seed)
        assert (files(tmp_path / place) == expected) == (seed == 0)


def test_without_hard_links_files_are_copied(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.access("/dev/shm", os.W_OK) or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    out = Path("/dev/shm") / f"divided-{os.getpid()}"
    try:
        assert divide_folder(root, out)["test"]["cat"] == 2
        copies = sorted(out.rglob("*.jpg"))
        assert len(copies) == 22
        assert all(copy.stat().st_nlink == 1 for copy in copies)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_what_cannot_be_divided_is_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for test, told in (
        (0.05, r"class caf\\xe9 has 7 images, of which 0.05 would be 0 .* at least one"),
        (0.95, "would be 7 for"),
    ):
        with pytest.raises(DataError, match=told):
            divide_folder(root, out, test=test)
    with pytest.raises(DataError, match=r"inside lies in .*photos; expected a new directory elsewhere"):
        divide_folder(root, root / "inside")
    with pytest.raises(DataError, match=r"nowhere is not a directory"):
        divide_folder(tmp_path / "nowhere", out)
    divide_folder(root, out)
    with pytest.raises(DataError, match=r"out is there already; expected a new or empty directory"):
        divide_folder(root, out)
    with pytest.raises(
        DataError, match=r"has class folders in train and test already; to divide train, give .*/train$"
    ):
        divide_folder(out, tmp_path / "again")
    (root / "cat" / "folder.jpg").mkdir()
    with pytest.raises(OSError, match="directory"):
        divide_folder(root, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere.jpg", "out", "photos"]
