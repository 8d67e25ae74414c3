"""`awp data get`: from a server on this machine, one that breaks off, or has other bytes, or knows no ranges."""

import contextlib
import hashlib
import io
import re
import shlex
import tarfile
import threading
import urllib.request
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from disks import small_tmpfs

from awp_engine.cli import data as command
from awp_engine.cli.command_line import parse_train
from awp_engine.data import DataError, dataset_names
from awp_engine.data.tools import get
from awp_engine.data.tools.get import SETS, PublicSet, get_set, next_command
from awp_engine.observe.bars import NoBar

PIXELS = bytes(range(256)) * 4000


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=0) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Server:
    """Files over HTTP, and what was asked for: (path, range, bytes that were sent).

    `ends` are numbers of bytes after which the next answers break off; `status` is what all are refused with.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None, int]] = []
        self.ends: list[int] = []
        self.ranges, self.length, self.shift, self.status = True, True, 0, 200
        self.address = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name, wanted = handler.path.rpartition("/")[2], handler.headers["Range"]
        if self.status != 200 or name not in self.files:
            self.asked.append((name, wanted, 0))
            handler.send_error(self.status if self.status != 200 else 404)
            return
        whole = self.files[name]
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.ranges else 0
        if first >= len(whole):
            handler.send_error(416)
            return
        rest = whole[first:]
        handler.send_response(206 if first else 200)
        if first:
            handler.send_header("Content-Range", f"bytes {first - self.shift}-{len(whole) - 1}/{len(whole)}")
        if self.length:
            handler.send_header("Content-Length", str(len(rest)))
        handler.end_headers()
        sent = rest[: self.ends.pop(0)] if self.ends else rest
        self.asked.append((name, wanted, len(sent)))
        with contextlib.suppress(ConnectionError):
            handler.wfile.write(sent)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    served = Server()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # urllib looks at them once for a process
    monkeypatch.setattr(urllib.request, "_opener", None)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        served.address = f"http://127.0.0.1:{running.server_address[1]}/some/place/"
        yield served
        running.shutdown()


@pytest.fixture
def small(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Every set with other, small files, in the layout of the real ones."""
    inside = "cifar-10-batches-py"
    server.files = {
        "cifar-10-python.tar.gz": tar_of({f"{inside}/data_batch_1": PIXELS, f"{inside}/test_batch": b"test"}),
        **{name: name.encode() * 1000 for name in SETS["svhn"].files},
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "val_0.JPEG\tn01\n")
    server.files["tiny-imagenet-200.zip"] = buffer.getvalue()
    for name in ("cifar10", "svhn", "tiny-imagenet"):
        real = SETS[name]
        sums = {file: md5(server.files[file]) for file in real.files}
        fields = {"address": real.address, "folder": real.folder, "preset": real.preset}
        monkeypatch.setitem(SETS, name, PublicSet(files=sums, **fields))
    return server


def inside(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def awp(*arguments: object) -> int:
    try:
        return command.main(["get", *map(str, arguments)])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_an_archive_is_checked_unpacked_and_the_next_command_is_named(small, tmp_path, capsys):
    assert awp("cifar10", tmp_path / "new" / "data", "--mirror", small.address) == 0
    assert inside(tmp_path / "new") == ["data/cifar-10-batches-py/data_batch_1", "data/cifar-10-batches-py/test_batch"]
    assert (tmp_path / "new" / "data" / "cifar-10-batches-py" / "data_batch_1").read_bytes() == PIXELS
    out = capsys.readouterr().out
    assert f"next: awp train cifar10-preact-resnet18-at-awp --data.root {tmp_path / 'new' / 'data'}\n" in out
    before = len(small.asked)
    assert awp("cifar10", tmp_path / "new" / "data", "--mirror", small.address) == 0
    assert len(small.asked) == before
    assert "is there already" in capsys.readouterr().out


def test_files_that_are_read_as_they_are_and_a_zip(small, tmp_path):
    assert get_set("svhn", tmp_path, mirror=small.address) == tmp_path
    assert inside(tmp_path) == ["test_32x32.mat", "train_32x32.mat"]
    # the one that is missing alone
    (tmp_path / "test_32x32.mat").unlink()
    small.asked.clear()
    get_set("svhn", tmp_path, mirror=small.address)
    assert [name for name, *_ in small.asked] == ["test_32x32.mat"]
    # beside other data
    assert get_set("tiny-imagenet", tmp_path, mirror=small.address) == tmp_path / "tiny-imagenet-200"
    assert (tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt").is_file()


def test_a_connection_that_ends_is_gone_on_with_from_its_last_byte(small, tmp_path):
    name = "cifar-10-python.tar.gz"
    size, said, made = len(small.files[name]), [], []

    class Counted(NoBar):
        def __init__(self, label: str, total: int) -> None:
            super().__init__(label, total)
            made.append(self)

    small.ends = [300_000, 200_000]
    get_set("cifar10", tmp_path, mirror=small.address, pause=0.01, say=said.append, bar=Counted)
    assert small.asked == [
        (name, None, 300_000),
        (name, "bytes=300000-", 200_000),
        (name, "bytes=500000-", size - 500_000),
    ]
    assert sum("ended after 300,000 of" in line for line in said) == 1
    assert [(bar.done, bar.total) for bar in made] == [
        (300_000, size),
        (200_000, size - 300_000),
        (size - 500_000, size - 500_000),
    ]
    assert len(inside(tmp_path)) == 2


def test_a_later_call_goes_on_and_one_without_ranges_begins_anew(small, tmp_path, capsys):
    name = "cifar-10-python.tar.gz"
    small.ends = [1000] * 4
    with pytest.raises(DataError, match=r"ended after 4,000 of .* the same command goes on where it ended"):
        get_set("cifar10", tmp_path, mirror=small.address, pause=0.001)
    assert inside(tmp_path) == [f".tmp-part-{name}"]
    # other bytes than those that were asked for are not added
    small.shift = 1
    with pytest.raises(DataError, match=r"other bytes than those from 4,000 on"):
        get_set("cifar10", tmp_path, mirror=small.address, pause=0.001)
    small.ranges, small.shift = False, 0
    assert awp("cifar10", tmp_path, "--mirror", small.address) == 0
    assert small.asked[-1] == (name, "bytes=4000-", len(small.files[name]))
    assert len(inside(tmp_path)) == 2
    # all of it came, but the process was killed before it was unpacked
    whole = tmp_path / "again" / f".tmp-part-{name}"
    whole.parent.mkdir()
    whole.write_bytes(small.files[name])
    small.ranges = True
    assert awp("cifar10", whole.parent, "--mirror", small.address) == 0
    assert small.asked[-1] == (name, "bytes=4000-", len(small.files[name]))
    assert len(inside(whole.parent)) == 2


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert awp(*arguments) in (1, 2)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    return errors[0]


def test_what_goes_wrong_is_one_line_and_leaves_nothing(small, tmp_path, capsys, monkeypatch):
    slept = []
    monkeypatch.setattr(get.time, "sleep", slept.append)
    place, mirror = tmp_path / "data", ("--mirror", small.address)
    small.files["cifar-10-python.tar.gz"] = b"another file"
    assert f"its MD5 is {md5(b'another file')}, expected" in refused(capsys, "cifar10", place, *mirror)
    assert not place.exists()
    del small.files["cifar-10-python.tar.gz"]
    small.asked.clear()
    assert "cannot be downloaded: HTTP status 404" in refused(capsys, "cifar10", place, *mirror)
    assert (len(small.asked), slept) == (1, [])
    small.status = 503
    assert "HTTP status 503" in refused(capsys, "cifar10", place, *mirror)
    assert (len(small.asked), slept) == (5, [2, 4, 8])
    slept.clear()
    # a name that nobody knows, and one where nobody listens
    assert "cannot be downloaded: " in refused(capsys, "svhn", place, "--mirror", "http://never.invalid")
    assert slept == []
    assert "cannot be downloaded: Connection refused" in refused(
        capsys, "svhn", place, "--mirror", "http://127.0.0.1:1"
    )
    assert "expected an address that begins with http" in refused(capsys, "svhn", place, "--mirror", "file:///etc")
    assert "invalid choice: 'cifar'" in refused(capsys, "cifar", place)
    assert not place.exists()
    place.write_bytes(b"")
    assert "is a file, not a directory" in refused(capsys, "svhn", place, *mirror)
    # MNIST's files have the names of Fashion-MNIST's
    other = tmp_path / "other" / "train_32x32.mat"
    other.parent.mkdir()
    other.write_bytes(b"mine")
    assert "is not the file of svhn that was published" in refused(capsys, "svhn", other.parent, *mirror)
    assert other.read_bytes() == b"mine"


def test_an_archive_that_would_write_elsewhere_is_refused(small, tmp_path, capsys, monkeypatch):
    evil = tar_of({"cifar-10-batches-py/test_batch": b"", "../../outside": b"evil"})
    small.files["cifar-10-python.tar.gz"] = evil
    fields = {"address": "", "folder": "cifar-10-batches-py", "preset": ""}
    monkeypatch.setitem(SETS, "cifar10", PublicSet(files={"cifar-10-python.tar.gz": md5(evil)}, **fields))
    assert "cannot be unpacked" in refused(capsys, "cifar10", tmp_path / "a" / "b", "--mirror", small.address)
    assert not list(tmp_path.rglob("outside"))
    assert not (tmp_path / "a" / "b" / "cifar-10-batches-py").exists()


@pytest.mark.parametrize(("size", "length"), [("1500k", True), ("500k", False)])
def test_a_full_disk_is_named_and_left_as_it_was(small, tmp_path, capsys, size, length):
    # the archive alone would fit into the first one; of the second nobody knows how much will come
    small.length = length
    with small_tmpfs(tmp_path, size) as disk:
        assert "No space left on device" in refused(capsys, "cifar10", disk / "data", "--mirror", small.address)
        assert not (disk / "data").exists()


def test_proxies_of_the_environment_are_used(small, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", small.address)
    monkeypatch.setenv("no_proxy", "")
    get_set("svhn", tmp_path, mirror="http://never.invalid/there")
    assert inside(tmp_path) == ["test_32x32.mat", "train_32x32.mat"]


@pytest.mark.parametrize("name", SETS)
def test_the_next_command_is_one(name, tmp_path):
    if name not in dataset_names:
        pytest.skip("a data set that is not read yet")
    given = shlex.split(next_command(name, tmp_path / "a b"))
    config = parse_train(given[2:])
    assert (given[:2], config.data.name, config.data.root) == (["awp", "train"], name, tmp_path / "a b")


def test_what_is_published_is_complete():
    assert all(re.fullmatch(r"[0-9a-f]{32}", md5) for given in SETS.values() for md5 in given.files.values())
    assert all(given.folder is None or len(given.files) == 1 for given in SETS.values())


def test_the_command_line_knows_the_sets():
    assert sorted(SETS) == list(command.PUBLIC)
