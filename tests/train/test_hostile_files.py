"""Files written by somebody who means harm: nothing is executed, and nothing outside is touched."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import socket
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from awp_engine import load_model
from awp_engine.checkpoint import CheckpointError, Retention, export_model, load, load_latest, read_model, save
from awp_engine.cli.checkpoint import main
from awp_engine.data import DataError, load_dataset


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def hostile(path: Path, files: dict[str, bytes], manifest_names: dict[str, str] | None = None) -> None:
    """A checkpoint whose manifest agrees with its files, written by somebody else."""
    path.mkdir(parents=True)
    listed = {}
    for name, payload in files.items():
        (path / name).write_bytes(payload)
        shown = (manifest_names or {}).get(name, name)
        listed[shown] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    text = json.dumps({"files": listed, "format": 1}, indent=1, sort_keys=True) + "\n"
    (path / "manifest.json").write_text(text)


def torch_zip(executed: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": Bomb(executed)}, buffer)
    return buffer.getvalue()


def zip_slip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../outside/written", "harm")
        archive.writestr("/tmp/written", "harm")
    return buffer.getvalue()


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def described(**changed: object) -> bytes:
    return header(json.dumps({"a": {**ENTRY, **changed}}).encode()) + bytes(16)


def payloads(executed: Path) -> dict[str, bytes]:
    return {
        "pickle": pickle.dumps(Bomb(executed)),
        "pickle, protocol 0": pickle.dumps(Bomb(executed), protocol=0),
        "torch zip": torch_zip(executed),
        "zip with paths that lead outside": zip_slip(),
        "oversized header": header(b"{}", 2**63),
        "header of all ones": b"\xff" * 8 + b"{}",
        "header beyond the file": header(b"{}", 10_000),
        "header of 200 MB": header(b" " * 1000, 200_000_000),
        "offsets beyond the file": header(json.dumps({"a": ENTRY}).encode()),
        "offsets beyond 64 bits": described(data_offsets=[0, 2**64]),
        "negative offsets": described(data_offsets=[-16, 0]),
        "offsets that fall": described(data_offsets=[16, 0]),
        "a gap": described(data_offsets=[8, 24]),
        "overlapping": header(json.dumps({"a": ENTRY, "b": ENTRY}).encode()) + bytes(16),
        "bytes that belong to none": described() + bytes(16),
        "shape and offsets that differ": described(shape=[3]),
        "huge shape": described(shape=[2**62, 2**62]),
        "negative shape": described(shape=[-4]),
        "shape of 1e999": header(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}') + bytes(16),
        "unknown type": described(dtype="OBJ"),
        "a key twice": header(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}')
        + bytes(16),
        "metadata that is no text": header(b'{"__metadata__": {"model": {"name": "x"}}}'),
        "nested": header(b'{"a":' * 5000),
        "nested lists": header(b"[" * 100_000),
        "no UTF-8": header(b'{"\xff": 1}'),
        "half a surrogate": header(b'{"\\ud800": 1}'),
        "a list": header(b"[]"),
        "empty": b"",
        "seven bytes": b"\x02\0\0\0\0\0\0",
    }


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(directory.rglob("*"))
    }


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory beside the checkpoints, with a safetensors file that is right; nothing in it may change."""
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "secret.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    (directory / "state.json").write_text("{}\n")
    before = snapshot(directory)
    yield directory
    assert snapshot(directory) == before


def refused_everywhere(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Whether all that reads checkpoints refuses the one in `directory`, in one line that names it."""
    path = directory / "epoch-1"
    with pytest.raises(CheckpointError) as caught:
        load(path)
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        load_latest(directory)
    with pytest.raises(CheckpointError):
        load_model(path)
    assert main(["verify", str(directory)]) == 1
    assert main(["list", str(directory)]) == 0
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(path), str(directory / "x.safetensors")])
    assert stopped.value.code == 1
    assert not (directory / "x.safetensors").exists()
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("what", sorted(payloads(Path("x"))))
def test_hostile_tensor_files(tmp_path: Path, outside: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    executed = tmp_path / "executed"
    payload = payloads(executed)[what]
    hostile(tmp_path / "c" / "epoch-1", {"model.safetensors": payload, "state.json": b"{}\n"})
    assert "model.safetensors: not a safetensors file" in refused_everywhere(tmp_path / "c", capsys)
    single = tmp_path / "single.safetensors"
    single.write_bytes(payload)
    for read in (read_model, load_model):
        with pytest.raises(CheckpointError, match=r"single\.safetensors: not a safetensors file"):
            read(single)
    assert not executed.exists()


def test_the_bomb_goes_off_where_pickles_are_read(tmp_path: Path) -> None:
    pickle.loads(payloads(tmp_path / "executed")["pickle"])
    assert (tmp_path / "executed").exists()


def place_link(file: Path, outside: Path) -> None:
    file.symlink_to(outside / ("state.json" if file.suffix == ".json" else "secret.safetensors"))


def place_device(file: Path, outside: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root makes devices")
    os.mknod(file, stat.S_IFCHR | 0o666, os.makedev(1, 5))


def place_socket(file: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(file.parent):
        server.bind(file.name)


PLACES: dict[str, Callable[[Path, Path], object]] = {
    "link": place_link,
    "link to itself": lambda file, outside: file.symlink_to(file.name),
    "link to a device": lambda file, outside: file.symlink_to("/dev/zero"),
    "directory": lambda file, outside: file.mkdir(),
    "named pipe": lambda file, outside: os.mkfifo(file),
    "device": place_device,
    "socket": place_socket,
}


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("what", PLACES)
def test_what_is_no_file(
    tmp_path: Path, outside: Path, name: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c" / "epoch-1"
    secret = (outside / "secret.safetensors").read_bytes()
    hostile(path, {"model.safetensors": secret, "state.json": b"{}\n"})
    (path / name).unlink()
    PLACES[what](path / name, outside)
    text = refused_everywhere(tmp_path / "c", capsys)
    assert name in text
    assert "is a link" in text or "is not a regular file" in text or "cannot be read" in text


def test_a_link_in_place_of_a_checkpoint_is_none(tmp_path: Path, outside: Path) -> None:
    hostile(tmp_path / "elsewhere", {"state.json": b"{}\n"})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "epoch-1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "c" / "latest").symlink_to(outside / "state.json")
    assert load_latest(tmp_path / "c") is None
    save(tmp_path / "c", "epoch-1", {}, {"n": 1}, Retention(1))
    save(tmp_path / "c", "epoch-2", {}, {"n": 2}, Retention(1))
    # neither followed, nor pruned
    assert (tmp_path / "elsewhere" / "state.json").exists()
    assert (tmp_path / "c" / "epoch-1").is_symlink()
    assert not (tmp_path / "c" / "latest").is_symlink()
    found = load_latest(tmp_path / "c")
    assert found is not None
    assert found.state == {"n": 2}


@pytest.mark.parametrize("what", ["named pipe", "directory", "link to a device", "socket"])
def test_a_latest_that_is_no_file_is_not_needed(tmp_path: Path, outside: Path, what: str) -> None:
    save(tmp_path / "c", "epoch-1", {}, {"n": 1}, Retention())
    (tmp_path / "c" / "latest").unlink()
    PLACES[what](tmp_path / "c" / "latest", outside)
    found = load_latest(tmp_path / "c")
    assert found is not None
    assert found.state == {"n": 1}
    assert str(tmp_path / "c" / "latest") in found.skipped[0]


def test_links_in_a_temporary_directory_are_removed_and_not_followed(tmp_path: Path, outside: Path) -> None:
    stale = tmp_path / "c" / ".tmp-epoch-1-0000"
    stale.mkdir(parents=True)
    (stale / "inside").symlink_to(outside)
    (tmp_path / "c" / ".tmp-link").symlink_to(outside)
    save(tmp_path / "c", "epoch-1", {}, {}, Retention())
    assert sorted(entry.name for entry in (tmp_path / "c").iterdir()) == ["epoch-1", "latest"]


DESCRIPTIONS = {
    "no JSON": "{",
    "nested": "[" * 100_000,
    "a list": "[1, 2]",
    "unknown field": '{"name": "wrn-28-10", "__class__": 1}',
    "text for a number": '{"num_classes": "10"}',
    "huge width": {"width": 10**30},
    "more weights than there are": {"width": 65536},
    "more layers than there are": {"name": "wrn-1006-1", "width": None},
    "negative classes": {"num_classes": -1},
    "2^31 classes": {"num_classes": 2**31 - 1},
    "no channels": {"mean": [], "std": []},
    "nested mean": {"mean": [[0.5]], "std": [[0.5]]},
    "a path for a name": {"name": "../../etc/passwd"},
    "unknown activation": {"activation": "os.system"},
}


@pytest.mark.parametrize("what", DESCRIPTIONS)
def test_hostile_descriptions_of_models(tmp_path: Path, what: str) -> None:
    right = {"name": "preact-resnet-digits", "num_classes": 10, "mean": [0.5], "std": [0.5], "width": 4}
    changed = DESCRIPTIONS[what]
    text = changed if isinstance(changed, str) else json.dumps({**right, "activation": "relu", **changed})
    export_model(tmp_path / "model.safetensors", {"w": torch.ones(3)}, {"model": text})
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "model.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "model.safetensors"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../outside/secret.safetensors",
        "../../outside/secret.safetensors",
        "/etc/passwd",
        "OUTSIDE/secret.safetensors",
        "a/b.safetensors",
        "./model.safetensors",
        "..\\\\outside\\\\secret.safetensors",
        "%2e%2e%2foutside%2fsecret.safetensors",
        "．．／outside／secret.safetensors",
        "\u202esrosnetefas.ledom",
        "mоdel.safetensors",
        "model.safetensors\n",
        "-rf.safetensors",
        ".safetensors",
        "..safetensors",
        "x.pt",
        "manifest.json",
        "latest",
        ".",
        "",
        "a\0.safetensors",
        "a" * 101 + ".safetensors",
        "CON\ud800.safetensors",
    ],
    ids=ascii,
)
def test_a_manifest_cannot_name_what_is_outside(
    tmp_path: Path, outside: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = (outside / "secret.safetensors").read_bytes()
    name = name.replace("OUTSIDE", str(outside))
    path = tmp_path / "c" / "epoch-1"
    hostile(path, {"state.json": b"{}\n", "model.safetensors": secret}, {"model.safetensors": name})
    assert "lists a file that no checkpoint has" in refused_everywhere(tmp_path / "c", capsys)


@pytest.mark.parametrize(
    "manifest",
    [
        {"format": 2, "files": {}},
        {"format": "1", "files": {}},
        {"format": 1, "files": {}},
        {"format": 1, "files": []},
        {"format": 1},
        {"format": 1, "files": {"state.json": {"bytes": "3", "sha256": ""}}},
        {"format": 1, "files": {"state.json": {"bytes": True, "sha256": ""}}},
        {"format": 1, "files": {"state.json": {"bytes": -1, "sha256": ""}}},
        {"format": 1, "files": {"state.json": None}},
        {"format": 1, "files": {"state.json": {"bytes": 1e300, "sha256": ""}}},
        {"format": 1, "files": {"state.json": {"bytes": 10**4000, "sha256": ""}}},
        {"format": 10**4000, "files": {}},
        {"format": 1.0, "files": {"state.json": {"bytes": 3, "sha256": hashlib.sha256(b"{}\n").hexdigest()}}},
        {"format": True, "files": {"state.json": {"bytes": 3, "sha256": hashlib.sha256(b"{}\n").hexdigest()}}},
        {"format": 1, "files": {"state.json": {"bytes": 3, "sha256": "x" * 100_000}}},
        [],
        None,
    ],
    ids=lambda value: str(value)[:60],
)
def test_malformed_manifests_are_refused(tmp_path: Path, manifest: object) -> None:
    path = save(tmp_path, "x", {}, {}, Retention(1))
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    (path / "manifest.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(CheckpointError, match="expected at most"):
        load(path)


RIGHT = json.dumps({"bytes": 3, "sha256": hashlib.sha256(b"{}\n").hexdigest()})


@pytest.mark.parametrize(
    "text",
    [
        f'{{"files": {{"state.json": {RIGHT}, "state.json": {RIGHT}}}, "format": 1}}',
        f'{{"format": 2, "files": {{"state.json": {RIGHT}}}, "format": 1}}',
        '{"files": ' * 100_000,
        "[" * 100_000,
        '{"files": {}, "format": ' + "9" * 10_000 + "}",
        '{"files": {}, "format": NaN}',
        '{"files": {}, "format": 1e999}',
        f'\ufeff{{"files": {{"state.json": {RIGHT}}}, "format": 1}}',
        "\0" * 100,
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_manifests_that_no_program_writes(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "c", "epoch-1", {}, {}, Retention(1))
    (path / "manifest.json").write_text(text)
    assert "manifest.json: damaged, or not a manifest" in refused_everywhere(tmp_path / "c", capsys)


@pytest.mark.parametrize(
    "state", [b"[]", b"nonsense", b"[" * 100_000, b"\xff", b"9" * 10_000, b'{"a": 1} {"b": 2}', b""]
)
def test_a_state_that_is_no_object_is_refused(tmp_path: Path, state: bytes) -> None:
    hostile(tmp_path / "x", {"state.json": state})
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load(tmp_path / "x")


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises more pixels than anybody has memory for."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", body) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


SOUND = encoded(Image.new("RGB", (6, 4)))
IMAGES = {
    "pickle": pickle.dumps(Bomb(Path("executed"))),
    "empty": b"",
    "text": b"no image",
    "truncated": SOUND[:40],
    "CMYK": encoded(Image.new("CMYK", (6, 4)), "JPEG"),
    "16-bit": encoded(Image.fromarray(np.zeros((4, 6), np.uint16))),
    "1x1": encoded(Image.new("RGB", (1, 1))),
    "2^31 - 1 pixels a side": png_header(2**31 - 1, 2**31 - 1),
    "30,000 pixels a side": png_header(30_000, 30_000),
    "no pixels": png_header(0, 0),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n(touch executed) system\n",
}


@pytest.mark.parametrize("what", IMAGES)
@pytest.mark.parametrize("place", ["train/a/1.png", "train/b/3.jpg", "test/b/1.png"])
def test_hostile_images_are_named(tmp_path: Path, what: str, place: str) -> None:
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(4):
            (tmp_path / folder / f"{number}.png").write_bytes(SOUND)
    (tmp_path / place).write_bytes(IMAGES[what])
    with pytest.raises(DataError) as caught:
        load_dataset("folder", root=tmp_path, held_out_fraction=0.25, seed=0)
    assert Path(place).name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()
