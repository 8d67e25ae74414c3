"""`awp data scan`: all bad files are found and nothing else, whatever they do to the one who looks."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_files import crash_or_decode, encode, hang_on_seven, make_folder, plant, random_image, refuse_three
from hypothesis import given
from hypothesis import strategies as st

from awp_engine.cli.data import main
from awp_engine.data import DataError
from awp_engine.data.loaders.workers import Died, process_all
from awp_engine.data.sets.files import listed_name
from awp_engine.data.sets.scan_list import (
    LIST_NAME,
    Bad,
    Scan,
    bad_files,
    listed_path,
    read_scan,
    write_scan,
)
from awp_engine.data.tools.scan import scan_folder
from awp_engine.observe.bars import NoBar

COMMAND = [sys.executable, "-m", "awp_engine", "data"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images", 60)


def kinds(scan: Scan) -> dict[str, str]:
    return {name: bad.kind for name, bad in scan.bad.items()}


def test_the_scan_finds_12_kinds_among_1000_images_and_nothing_else(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", 1000)
    planted = plant(root)
    assert len(set(planted.values())) == 12
    run = subprocess.run([*COMMAND, "scan", root], capture_output=True, text=True, timeout=200)
    assert run.returncode == 1, run.stderr
    assert all(line.startswith("files: ") for line in run.stderr.splitlines()), run.stderr
    scan = read_scan(root / LIST_NAME)
    assert kinds(scan) == {listed_name(path.relative_to(root)): kind for path, kind in planted.items()}
    assert scan.files == 1000 + len(planted)
    *rows, total, following = run.stdout.splitlines()[1:]
    assert [row.split()[1] for row in rows] == ["1"] * 11 + ["2"]
    assert {row.split()[0] for row in rows} == set(planted.values())
    assert str(root / LIST_NAME) in total
    assert "--data.bad-files skip" in following

    with pytest.raises(DataError, match=rf"^{len(planted)} unusable files are listed in .*: first .*remove them, or"):
        bad_files(root, "refuse")
    assert bad_files(root, "skip") == set(scan.bad)
    assert {root / listed_path(name) for name in scan.bad} == set(planted)
    for path in planted:
        path.unlink()
    assert bad_files(root, "refuse") == frozenset()


def test_a_clean_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/.hidden.jpg", "train/class_0/.DS_Store", "notes.txt", "train/labels.csv"):
        (folder / name).write_text("left alone")
    assert bad_files(folder, "refuse") == frozenset()
    assert main(["scan", str(folder), "--workers", "2"]) == 0
    assert capsys.readouterr().out.startswith("all of 60 files (")
    scan = read_scan(folder / LIST_NAME)
    files = [file for file in folder.rglob("*0*.*") if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    assert (scan.files, scan.bad, scan.notes, scan.pixels) == (60, {}, (), True)
    assert scan.total_bytes == sum(file.stat().st_size for file in files)
    assert bad_files(folder, "refuse") == frozenset()
    # what training passes over stops nothing
    (folder / "train" / "class_0" / "Thumbs.db").write_bytes(b"left by Windows")
    assert main(["scan", str(folder), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("note: files in class folders whose names do not end as those of images are passed over: 1,")
    assert "\nall of 60 files (" in said
    assert bad_files(folder, "refuse") == frozenset()
    again = scan_folder(folder, workers=1, pixels=False)
    assert (again.digest, again.pixels) == (scan.digest, False)
    (folder / "train" / "class_0" / "other.jpg").write_bytes(encode(random_image(5), "JPEG"))
    assert scan_folder(folder, workers=1, pixels=False).digest != scan.digest


def test_what_lies_in_a_folder_by_mistake(folder: Path) -> None:
    image = encode(random_image(77), "JPEG")
    train = folder / "train"
    expected = {}

    def add(name: str, content: bytes, kind: str) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        expected[name] = kind

    add("train/class_0/a.gif", encode(random_image(1), "GIF"), "wrong-extension")
    add("train/class_0/b.webp", encode(random_image(2), "GIF"), "wrong-extension")
    (train / "class_0" / "c.txt").write_bytes(b"words")
    (train / "class_1" / os.fsdecode(b"\xff.heic")).write_bytes(b"a photograph")
    add("train/class_0/gif.png", encode(random_image(3), "GIF"), "wrong-extension")
    add("train/stray.jpg", image, "no-such-class")
    add("train/class_0/deeper/and/deeper/x.png", image, "no-such-class")
    add("train/dragon/x.jpg", image, "no-such-class")
    (train / "class_0" / "deeper" / ".git").mkdir()
    for name in ("deeper/.hidden.jpg", "deeper/.git/y.jpg"):
        (train / "class_0" / name).write_bytes(image)
    add("train/class_1/grey.jpg", encode(random_image(4, channels=1), "JPEG"), "odd-mode")
    add("train/class_1/rgba.png", encode(random_image(6).convert("RGBA"), "PNG"), "colour-mode")
    add("train/class_1/word.jpg", b"not an image", "corrupt")
    (train / "hollow").mkdir()
    (folder / "test" / "hollow").mkdir()
    expected |= {"train/hollow": "empty", "test/hollow": "empty"}
    (train / "class_2" / "folder.jpg").mkdir()
    (train / "class_2" / "dangling.jpg").symlink_to("nowhere")
    (train / "gone").symlink_to("nowhere")
    (train / "class_2" / "device.png").symlink_to("/dev/zero")
    with (train / "class_2" / "sparse.jpg").open("wb") as file:
        file.truncate(2**40)
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        # addresses are short
        os.chdir(train / "class_2")
        server.bind("socket.jpg")
        os.chdir(before)
    for name in ("folder.jpg", "dangling.jpg", "device.png", "socket.jpg"):
        expected[f"train/class_2/{name}"] = "unreadable"
    expected |= {"train/gone": "unreadable", "train/class_2/sparse.jpg": "too-large"}
    (train / "class_3" / "linked.jpg").symlink_to(next((train / "class_3").glob("*.jpg")))
    scan = scan_folder(folder, workers=2)
    assert kinds(scan) == expected
    assert scan.bad["train/class_2/device.png"].why == "is a device, not a file; remove it"
    assert scan.bad["train/class_2/dangling.jpg"].why == "is a link to nothing; repair or remove it"
    assert scan.bad["train/dragon/x.jpg"].why == "is of a class that test lacks; move or remove it"
    assert not any(name in bad.why for name, bad in scan.bad.items())
    assert scan.notes[-1].endswith(
        "are passed over: 2, such as train/class_0/c.txt: convert them if they are photographs"
    )


def test_sizes_and_bytes_that_are_odd(folder: Path) -> None:
    (folder / "test" / "class_1" / "larger.png").write_bytes(encode(random_image(9, 30), "PNG"))
    twin = next((folder / "train" / "class_1").glob("*.png"), None) or next((folder / "train" / "class_2").iterdir())
    (folder / "test" / "class_3" / f"twin{twin.suffix}").write_bytes(twin.read_bytes())
    (folder / "test" / twin.parent.name / f"leak{twin.suffix}").write_bytes(twin.read_bytes())
    scan = scan_folder(folder, workers=1)
    assert scan.bad == {}
    sizes, classes, parts = scan.notes
    assert sizes.startswith("images have 2 sizes, most often 12x12 (62 of 63)")
    assert classes.startswith("1 images are there twice, in two classes, byte for byte")
    assert parts.startswith("1 images are there twice, in training and evaluation, byte for byte")
    scan = scan_folder(folder, workers=1, pixels=False, same_size=True)
    assert kinds(scan) == {"test/class_1/larger.png": "odd-size"}
    assert "has 30x30 pixels; expected 12x12" in scan.bad["test/class_1/larger.png"].why


def test_val_in_place_of_test_and_classes_that_are_links(folder: Path, tmp_path: Path) -> None:
    (folder / "test").rename(folder / "val")
    (folder / "val" / "class_4").rename(tmp_path / "elsewhere")
    (folder / "val" / "class_4").symlink_to(tmp_path / "elsewhere")
    scan = scan_folder(folder, workers=1)
    assert (scan.files, scan.bad) == (60, {})


def test_a_heap_of_unlabelled_images_beside_val_is_left_out(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    (folder / "test" / ".cache").mkdir(parents=True)
    (folder / "test" / "ILSVRC2012_test_00000001.JPEG").write_bytes(encode(random_image(8), "JPEG"))
    scan = scan_folder(folder, workers=1, pixels=False)
    assert (scan.files, scan.bad, scan.notes) == (60, {}, ("test has no labels and was left out",))


def test_files_that_kill_their_decoder_are_listed(folder: Path) -> None:
    deadly = ["train/class_1/deadly.jpg", "train/class_1/deadly2.jpg", "test/class_7/deadly.png"]
    for number, name in enumerate(deadly):
        kind = "PNG" if name.endswith("png") else "JPEG"
        (folder / name).write_bytes(encode(random_image(1000 + number), kind) + b"SEGFAULT")
    (folder / "test" / "class_8" / "broken.jpg").write_bytes(b"x")
    scan = scan_folder(folder, workers=2, decoder=crash_or_decode)
    assert kinds(scan) == {**dict.fromkeys(deadly, "crashes-decoder"), "test/class_8/broken.jpg": "corrupt"}
    assert "was killed by SIGSEGV" in scan.bad[deadly[0]].why


def test_work_that_hangs_or_raises() -> None:
    results = dict(process_all(range(10), hang_on_seven, workers=2, chunk=5, limit=1.5))
    assert results.pop(7) == Died("took more than 1.5 s")
    assert results == {number: number**2 for number in range(10) if number != 7}
    with pytest.raises(ValueError, match="three is refused"):
        list(process_all(range(10), refuse_three, workers=1, chunk=2))


@pytest.fixture
def interrupted(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A scan that would take minutes, in a process group of its own."""
    root = make_folder(tmp_path / "images", 40)
    large = tmp_path / "large.png"
    large.write_bytes(encode(random_image(0, 99).resize((1500, 1500)), "PNG", compress_level=1))
    for number in range(1000):
        (root / "train" / "class_0" / f"link{number}.png").symlink_to(large)
    process = subprocess.Popen(
        [*COMMAND, "scan", root, "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()


def test_an_interrupted_scan_leaves_no_process(folder: Path) -> None:
    class Interrupt(NoBar):
        def set(self, done: int, total: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        scan_folder(folder, workers=2, bar=Interrupt)
    assert multiprocessing.active_children() == []


@pytest.mark.long
def test_ctrl_c_ends_all_processes(interrupted: subprocess.Popen, tmp_path: Path) -> None:
    assert interrupted.stderr is not None
    # the first report of progress
    assert interrupted.stderr.readline().startswith("files: ")
    os.killpg(interrupted.pid, signal.SIGINT)
    # to the end of the file: when no process holds it any more
    _, errors = interrupted.communicate(timeout=60)
    lines = [line for line in errors.splitlines() if not line.startswith("files: ")]
    assert lines == ["python -m awp_engine data: error: scan was interrupted; nothing was written"]
    assert interrupted.returncode == 130
    assert not (tmp_path / "images" / LIST_NAME).exists()


@given(name=st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name))
def test_listed_names_are_text_and_can_be_turned_back(name: bytes) -> None:
    listed = listed_name(os.fsdecode(name))
    listed.encode()
    assert os.fsencode(listed_path(listed)) == name


def test_listed_files_that_were_repaired_or_removed(folder: Path) -> None:
    bad = folder / "train" / "class_0" / "bad.jpg"
    bad.write_bytes(b"bad")
    write_scan(folder / LIST_NAME, scan_folder(folder, workers=1))
    assert bad_files(folder, "skip") == {"train/class_0/bad.jpg"}
    elsewhere = folder.parent / "list.jsonl"
    with pytest.raises(DataError, match=r"list.jsonl is missing; expected the list of a scan: awp data scan"):
        bad_files(folder, "refuse", path=elsewhere)
    (folder / LIST_NAME).rename(elsewhere)
    assert bad_files(folder, "skip", path=elsewhere) == {"train/class_0/bad.jpg"}
    assert bad_files(folder, "refuse") == frozenset()
    with pytest.raises(DataError, match=r"awp-scan.jsonl is missing; expected the list of a scan: awp data scan"):
        bad_files(folder, "skip")
    elsewhere.rename(folder / LIST_NAME)
    with pytest.raises(DataError, match=r"^1 unusable file is .*: train/class_0/bad.jpg \(corrupt\); remove it"):
        bad_files(folder, "refuse")
    bad.write_bytes(encode(random_image(3), "JPEG"))
    for policy in ("refuse", "skip"):
        with pytest.raises(DataError, match=r"bad.jpg was changed after .* listed it as corrupt; scan again: awp data"):
            bad_files(folder, policy)
    bad.unlink()
    assert bad_files(folder, "refuse") == frozenset()
    bad.symlink_to("nowhere")
    with pytest.raises(DataError, match="was changed"):
        bad_files(folder, "refuse")


LISTED = Scan(
    files=9,
    total_bytes=1234,
    digest="00ff",
    pixels=True,
    notes=("a note",),
    bad={"train/a/b.jpg": Bad("corrupt", "is corrupt"), "test/\\xff": Bad("bad-name", "has a name")},
    states={"train/a/b.jpg": (3, 4), "test/\\xff": None},
)


def test_the_list_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "list"
    write_scan(path, LISTED)
    assert read_scan(path) == LISTED
    header, first, _ = map(json.loads, path.read_text().splitlines())
    assert (header["format"], header["files"], header["bad"], header["bytes"], header["digest"]) == (
        (1, 9, 2, 1234, "00ff")
    )
    assert {key: first[key] for key in ("file", "kind", "why")} == {
        "file": "train/a/b.jpg",
        "kind": "corrupt",
        "why": "is corrupt",
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"format": 1', '"format": 2'),
        ('"bad": 2', '"bad": 3'),
        ('"files": 9', '"files": "9"'),
        ('"kind": "corrupt"', '"kind": "purple"'),
        ('"size": 3, ', ""),
        ('"mtime_ns": 4', '"mtime_ns": null'),
        ("{", "[" * 200_000),
        ('"file": "test/\\\\xff"', '"file": "train/a/b.jpg"'),
        ("train/a/b.jpg", "train/a/b\\u0000.jpg"),
        ("train/a/b.jpg", "train/a/b\\ud800.jpg"),
        ("train/a/b.jpg", "train/a/b\\\\.jpg"),
    ],
)
def test_a_damaged_list_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / LIST_NAME
    write_scan(path, LISTED)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=r"is damaged \(.*\); scan again: awp data scan"):
        read_scan(path)


def test_a_cut_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / LIST_NAME
    write_scan(path, LISTED)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="is damaged"):
            read_scan(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_scan(tmp_path / "none")
    path.unlink()
    # waits for nobody
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"is damaged \(not a file\); scan again"):
        read_scan(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scan", "NOWHERE"], r"NOWHERE is not a directory; expected one with train/<class>/ and test/<class>/"),
        (["scan", "DIR/train"], r"train/train is not a directory; expected train/<class>/\*.jpg"),
        (["scan", "DIR", "--out", "NOWHERE/list"], r"NOWHERE is no directory that can be written to; .* --out FILE"),
        (["scan", "DIR", "--out", "DIR"], r"is a directory; expected a file for the list"),
        (["scan", "DIR", "--workers", "0"], r"--workers: expected a whole number from 1 to 9999, got '0'"),
        (["scan"], r"the following arguments are required: DIR"),
        (["look"], r"invalid choice: 'look'"),
    ],
)
def test_wrong_usage_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([argument.replace("DIR", str(folder)) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_folders_without_classes_or_test(folder: Path) -> None:
    (folder / "test").rename(folder / "elsewhere")
    with pytest.raises(DataError, match="has neither test nor val"):
        scan_folder(folder, workers=1)
    (folder / "test" / "class_0").mkdir(parents=True)
    with pytest.raises(DataError, match=r"test has 1 class folder, .*; expected at least 2"):
        scan_folder(folder, workers=1)


def test_a_script_without_a_main_guard_is_not_run_again(folder: Path, tmp_path: Path) -> None:
    """By the processes that scan, or that decode for training, none of which needs it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from awp_engine.data import Loading, eval_batches, load_dataset\n"
        "from awp_engine.data.tools.scan import scan_folder\n"
        "print('run')\n"
        "print(len(scan_folder(Path(sys.argv[1]), workers=1).bad))\n"
        "loading = Loading(loader='torch', workers=1)\n"
        "data = load_dataset('folder', root=Path(sys.argv[1]), held_out_fraction=0, seed=0, loading=loading)\n"
        "print(sum(len(batch.labels) for batch in eval_batches(data.test, 4)) == len(data.test))\n"
    )
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("run\n0\nTrue\n", "", 0)
