"""The list that a scan of an image folder leaves: which files cannot be trained on, and why."""

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from awp_engine.data.dataset import DataError
from awp_engine.data.sets.files import listed_name
from awp_engine.files.atomic import atomic_write_text

LIST_NAME = "awp-scan.jsonl"
KINDS = (
    "corrupt",
    "truncated",
    "empty",
    "colour-mode",
    "odd-mode",
    "sixteen-bit",
    "unsupported",
    "too-small",
    "too-large",
    "odd-size",
    "animated",
    "wrong-extension",
    "no-such-class",
    "bad-name",
    "unreadable",
    "crashes-decoder",
    "suspect",
)
_FORMAT = 1


class Bad(NamedTuple):
    """Why a file cannot be used: one of `KINDS`, and a sentence that follows the file's name."""

    kind: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a scan found, as its list holds it.

    Attributes:
        files: that were looked at.
        total_bytes: of all files.
        digest: SHA-256, hexadecimal, of all names and sizes.
        pixels: whether every image was decoded.
        notes: what is odd about good files, one line each.
        bad: kind and reason of every bad file, by its `listed_name`.
        states: size and time of modification (ns) of every bad file, None where there was none.
    """

    files: int
    total_bytes: int
    digest: str
    pixels: bool
    notes: tuple[str, ...]
    bad: dict[str, Bad]
    states: dict[str, tuple[int, int] | None]


def listed_path(name: str) -> str:
    """The path whose `listed_name` this is."""

    def byte(match: re.Match[bytes]) -> bytes:
        return bytes([int(match[1], 16)]) if match[1] else b"\\"

    return os.fsdecode(re.sub(rb"\\(?:\\|x([0-9a-f]{2}))", byte, name.encode()))


def file_state(path: Path) -> tuple[int, int] | None:
    """Size and time of modification (ns) of a file, or of a link that leads nowhere; None if there is none."""
    for function in (path.stat, path.lstat):
        with contextlib.suppress(OSError):
            found = function()
            return found.st_size, found.st_mtime_ns
    return None


def scan_text(scan: Scan) -> str:
    """The list: JSON lines, the first one about the whole, then one a bad file."""
    header = {
        "format": _FORMAT,
        "files": scan.files,
        "bad": len(scan.bad),
        "bytes": scan.total_bytes,
        "digest": scan.digest,
        "pixels": scan.pixels,
        "notes": scan.notes,
    }
    lines = [header]
    for name, (kind, why) in scan.bad.items():
        size, time = scan.states[name] or (None, None)
        lines.append({"file": name, "kind": kind, "why": why, "size": size, "mtime_ns": time})
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_scan(path: Path, scan: Scan) -> None:
    """Writes the list.

    Raises:
        OSError: if it cannot be written.
    """
    atomic_write_text(path, scan_text(scan))


def read_scan(path: Path) -> Scan:
    """Reads the list that a scan wrote.

    Raises:
        DataError: it is missing, or is not what a scan wrote.
    """
    try:
        # a pipe would be waited for
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        lines = path.read_bytes().decode().split("\n")
        header, *rows = [json.loads(line) for line in lines[:-1]]
        return _parse_scan(header, rows, complete=lines[-1] == "")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {_again(path)}") from error
    # JSON's and Unicode's errors are ValueErrors, and so is an empty file's.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({' '.join(str(error).split())}); {_again(path)}") from error


def _again(path: Path) -> str:
    return f"scan again: awp data scan {path.parent}"


def typed(row: Any, expected: dict[str, type]) -> None:
    """Raises `ValueError` unless `row`, from JSON, is an object of these fields and types."""
    if not isinstance(row, dict) or set(row) != set(expected):
        raise ValueError(f"expected an object of {', '.join(expected)}")
    for key, kind in expected.items():
        if type(row[key]) is not kind:
            raise ValueError(f"{key}: expected {kind.__name__}")


def _parse_scan(header: Any, rows: list[Any], *, complete: bool) -> Scan:
    expected = {"format": int, "files": int, "bad": int, "bytes": int, "digest": str, "pixels": bool, "notes": list}
    typed(header, expected)
    if header["format"] != _FORMAT:
        raise ValueError(f"format {header['format']}, expected {_FORMAT}")
    if not complete or len(rows) != header["bad"] or header["bad"] > header["files"]:
        raise ValueError(f"{len(rows)} bad files, expected {header['bad']}")
    bad: dict[str, Bad] = {}
    states: dict[str, tuple[int, int] | None] = {}
    for row in rows:
        gone = isinstance(row, dict) and row.get("size") is None and row.get("mtime_ns") is None
        number = type(None) if gone else int
        typed(row, {"file": str, "kind": str, "why": str, "size": number, "mtime_ns": number})
        if row["kind"] not in KINDS or row["file"] in bad:
            raise ValueError(f"kind {row['kind']!r} of {row['file']!r}")
        if "\0" in row["file"] or listed_name(listed_path(row["file"])) != row["file"]:
            raise ValueError(f"{row['file']!r} is no listed name")
        bad[row["file"]] = Bad(row["kind"], row["why"])
        states[row["file"]] = None if gone else (row["size"], row["mtime_ns"])
    return Scan(
        files=header["files"],
        total_bytes=header["bytes"],
        digest=header["digest"],
        pixels=header["pixels"],
        notes=tuple(map(str, header["notes"])),
        bad=bad,
        states=states,
    )


def bad_files(
    root: Path,
    policy: Literal["refuse", "skip"],
    *,
    path: Path | None = None,
    remedy: str = "train with --data.bad-files skip",
) -> frozenset[str]:
    """The files to leave out, by the list of a scan; none if there is no list and the policy is to refuse.

    Listed files that are gone count no more. One that was changed since may be good now, which only a scan can tell.

    Args:
        root: the image folder.
        policy: what to do about listed files that are there: "refuse" to go on, or "skip" them.
        path: the list; None for the one in `root`.
        remedy: what to do, instead of removing the files, where they are refused.

    Returns:
        Names as `listed_name` gives them for paths below `root`.

    Raises:
        DataError: bad files are there and the policy is to refuse, or one of them was changed since the scan, or the
            list is damaged, or is wanted and missing.
    """
    wanted = path is not None or policy == "skip"
    path = path or root / LIST_NAME
    if not os.path.lexists(path):
        if not wanted:
            return frozenset()
        raise DataError(f"{path} is missing; expected the list of a scan: awp data scan {root}")
    scan = read_scan(path)
    there = []
    for name, before in scan.states.items():
        now = file_state(root / listed_path(name))
        if now is None:
            continue
        if now != before:
            raise DataError(
                f"{root / name} was changed after {path} listed it as {scan.bad[name].kind}; "
                f"scan again: awp data scan {root}"
            )
        there.append(name)
    if there and policy == "refuse":
        one = len(there) == 1
        raise DataError(
            f"{len(there):,} unusable {'file is' if one else 'files are'} listed in {path}: {'' if one else 'first '}"
            f"{there[0]} ({scan.bad[there[0]].kind}); remove {'it' if one else 'them'}, or {remedy}"
        )
    return frozenset(there)
