"""Downloads public data sets from where their authors keep them, and believes no byte without its checksum.

Everything comes to a temporary name first. A download that ends early goes on at the byte where it ended, in the same
call or in a later one, if the server can do that; what is unpacked gets its name when all of it is there.
"""

import hashlib
import http.client
import os
import shlex
import shutil
import socket
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import awp_engine
from awp_engine.config import ConfigError
from awp_engine.data.dataset import DataError
from awp_engine.files.atomic import (
    TEMPORARY,
    naming,
    remove_leftovers,
    require_space,
    sync_directory,
    temporary_beside,
)
from awp_engine.files.locking import locked
from awp_engine.files.text import reason
from awp_engine.observe.bars import MakeBar, NoBar

_TRIES = 4
_TIMEOUT_S = 60.0
_BLOCK = 1 << 20
_PART = f"{TEMPORARY}part-"
# of an archive's size, what it takes unpacked: images hardly compress, but each small file takes a block
_UNPACKED = 2


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """Where a data set is, and what tells its files from others.

    Attributes:
        address: of the directory that holds the files.
        files: name -> MD5, hexadecimal, as the host or torchvision publishes it.
        folder: that the archive, the only file, unpacks to; None where files are read as they are.
        preset: to train with, and further flags.
    """

    address: str
    files: Mapping[str, str]
    folder: str | None = None
    preset: str


_KRIZ = "https://www.cs.toronto.edu/~kriz"
_IDX = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz")
_IDX = (*_IDX, "t10k-labels-idx1-ubyte.gz")


def _idx(*md5: str) -> dict[str, str]:
    return dict(zip(_IDX, md5, strict=True))


SETS = {
    "cifar10": PublicSet(
        address=_KRIZ,
        files={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
        folder="cifar-10-batches-py",
        preset="cifar10-preact-resnet18-at-awp",
    ),
    "cifar100": PublicSet(
        address=_KRIZ,
        files={"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
        folder="cifar-100-python",
        preset="cifar100-preact-resnet18-at-awp",
    ),
    "svhn": PublicSet(
        address="http://ufldl.stanford.edu/housenumbers",
        files={
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
        },
        preset="svhn-preact-resnet18-at-awp",
    ),
    "mnist": PublicSet(
        # the author's own page refuses most downloads
        address="https://ossci-datasets.s3.amazonaws.com/mnist",
        files=_idx(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        preset="digits --data.name mnist",
    ),
    "fashion-mnist": PublicSet(
        address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        files=_idx(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        preset="digits --data.name fashion-mnist",
    ),
    "tiny-imagenet": PublicSet(
        address="http://cs231n.stanford.edu",
        files={"tiny-imagenet-200.zip": "90528d7ca1a48142e341f4ef8d21d0de"},
        folder="tiny-imagenet-200",
        preset="cifar100-preact-resnet18-at-awp --data.name tiny-imagenet",
    ),
}


def get_set(
    name: str,
    directory: Path,
    *,
    mirror: str | None = None,
    bar: MakeBar = NoBar,
    say: Callable[[str], None] = lambda line: None,
    pause: float = 2.0,
) -> Path:
    """Downloads a set, but for what is in the directory already.

    Args:
        name: one of `SETS`.
        directory: for the files; made if it is missing.
        mirror: address of another directory with the same files.
        bar: makes what shows how much of a file has come, or is unpacked.
        say: is told what happens, a line at a time.
        pause: seconds before a download is tried again; twice as many the next time.

    Returns:
        What `--data.root` is to name.

    Raises:
        DataError: a file cannot be had, or is not the one that was published.
        ConfigError: `mirror` is no address, or the directory is in use or cannot be written to.
        OSError: a file cannot be written.
    """
    given = SETS[name]
    address = given.address if mirror is None else mirror.rstrip("/")
    if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
        raise ConfigError(f"--mirror: expected an address that begins with http:// or https://, got {address[:80]!r}")
    with locked(directory):
        if given.folder is not None and (directory / given.folder).exists():
            say(f"{directory / given.folder} is there already; remove it to download it again")
        else:
            for file, md5 in given.files.items():
                path = directory / file
                if path.exists() and _md5(path) != md5:
                    raise DataError(
                        f"{path} is not the file of {name} that was published; give another directory or remove it"
                    )
                download = _Download(f"{address}/{file}", path, md5, given.folder is not None, bar, say)
                whole = path if path.exists() else download.run(pause)
                if given.folder is None:
                    whole.replace(path)
                    continue
                say(f"unpacking {file}")
                _unpack(whole, directory / given.folder, bar)
                if whole != path:
                    whole.unlink()
            sync_directory(directory)
    # the folder's name tells the reader of CIFAR which one it is
    return directory / given.folder if name == "tiny-imagenet" and given.folder else directory


def next_command(name: str, root: Path) -> str:
    """How to train on what `get_set` has returned."""
    return f"awp train {SETS[name].preset} --data.root {shlex.quote(str(root))}"


def _md5(path: Path) -> str:
    # it tells files apart, and is no defence against forgers: some systems refuse it for that
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@dataclass(frozen=True)
class _Download:
    """One file, which comes whole and right or not at all; what has come of it stays for the next call."""

    address: str
    path: Path
    md5: str
    unpacked: bool
    bar: MakeBar
    say: Callable[[str], None]

    @property
    def part(self) -> Path:
        return self.path.with_name(_PART + self.path.name)

    def run(self, pause: float) -> Path:
        """The file, still under its temporary name."""
        self.say(f"downloading {self.address}")
        for left in reversed(range(_TRIES)):
            try:
                self._receive()
                break
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "filename", None) == str(self.path):
                    # on a full disk it would be in the way
                    self.part.unlink(missing_ok=True)
                    raise
                why, permanent = _network_reason(error)
                if permanent or not left:
                    kept = "the same command goes on where it ended" if self.part.exists() else "try again later"
                    raise DataError(f"{self.address}: cannot be downloaded: {why}; {kept}, or give --mirror") from None
                self.say(f"{why}; trying again in {pause:g} s")
            time.sleep(pause)
            pause *= 2
        found = _md5(self.part)
        if found != self.md5:
            self.part.unlink()
            raise DataError(
                f"{self.address}: its MD5 is {found}, expected {self.md5}: damaged on the way, or another file; it was "
                "deleted: try again, or give --mirror"
            )
        return self.part

    def _receive(self) -> None:
        """Adds to the part what it lacks."""
        have = self.part.stat().st_size if self.part.exists() else 0
        headers = {"User-Agent": f"awp-engine/{awp_engine.__version__}", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            answer = urllib.request.urlopen(urllib.request.Request(self.address, headers=headers), timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            # nothing lies behind what we have; the checksum tells whether that is the file
            if have and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return
            raise
        with answer:
            goes_on = answer.status == HTTPStatus.PARTIAL_CONTENT
            if goes_on and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                raise http.client.HTTPException(f"the server sent other bytes than those from {have:,} on")
            have = have if goes_on else 0
            length = answer.headers.get("Content-Length", "")
            total = have + int(length) if length.isdecimal() else 0
            if goes_on:
                self.say(f"going on after {have:,} of {total:,} bytes")
            with naming(self.path):
                require_space(self.path.parent, total - have + self.unpacked * _UNPACKED * total)
                file = self.part.open("ab" if goes_on else "wb")
            with file, self.bar(self.path.name, total - have) as counted:
                while block := answer.read(_BLOCK):
                    with naming(self.path):
                        file.write(block)
                        file.flush()
                    have += len(block)
                    counted.advance(len(block))
                os.fsync(file.fileno())
        # urllib takes the end of a connection for the end of the file
        if have < total:
            raise http.client.HTTPException(f"the connection ended after {have:,} of {total:,} bytes")


def _network_reason(error: Exception) -> tuple[str, bool]:
    """What went wrong, and whether trying again is of no use."""
    if isinstance(error, urllib.error.HTTPError):
        # too many requests, a timeout and the server's own errors may pass
        passing = error.code in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or error.code >= 500
        return f"HTTP status {error.code} ({error.reason})", not passing
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    # a name that is not known will not be known in a moment
    return reason(getattr(inner, "strerror", None) or inner), isinstance(inner, socket.gaierror)


def _unpack(archive: Path, target: Path, bar: MakeBar) -> None:
    """Unpacks an archive that holds the folder `target.name`, which gets that name once all of it is there."""
    if not hasattr(tarfile, "data_filter"):
        raise DataError("archives are unpacked safely from Python 3.11.4 on; update Python")
    remove_leftovers(target.parent, target.name)
    temporary = temporary_beside(target)
    try:
        with naming(target):
            temporary.mkdir()
            if archive.suffix == ".zip":
                with zipfile.ZipFile(archive) as file, bar("unpacking", len(file.infolist())) as counted:
                    for member in file.infolist():
                        file.extract(member, temporary)
                        counted.advance()
            else:
                # a few large files
                with tarfile.open(archive) as file:
                    file.extractall(temporary, filter="data")
            os.sync()
            (temporary / target.name).rename(target)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{archive}: cannot be unpacked: {reason(error)}; remove it and try again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
