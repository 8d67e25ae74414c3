"""`awp data scan|split|pack|verify|get`: looks after image folders and shards, and downloads public data sets."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import ending, share, whole_number
from awp_engine.config.data_sets import PUBLIC
from awp_engine.files.locking import LOCK, locked
from awp_engine.files.text import one_line

if TYPE_CHECKING:
    from awp_engine.data.sets.scan_list import Scan

# as `awp_engine.data.sets.scan_list` has it, which would import torch for --help
LIST_NAME = "awp-scan.jsonl"
_SHOWN = 3


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([KMG]?)", text.upper())
    if not match or int(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of bytes such as 256M or 1G, got {text!r}")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]


def _show(scan: Scan, root: Path, path: Path) -> None:
    from rich.markup import escape

    from awp_engine.data.sets.scan_list import KINDS
    from awp_engine.observe.report import print_table
    from awp_engine.observe.terminal import console_of

    for note in scan.notes:
        print(f"note: {one_line(note)}")
    checked = f"{scan.files:,} files ({scan.total_bytes:,} bytes)"
    if not scan.bad:
        print(f"all of {checked} can be used{'' if scan.pixels else ', by their headers'}; said so in {path}")
        return
    by_kind: defaultdict[str, list[str]] = defaultdict(list)
    for name, (kind, _) in scan.bad.items():
        by_kind[kind].append(name)
    console = console_of(sys.stdout)
    # Brackets in names are no colours.
    shown = escape if console.is_terminal else str
    rows = []
    for kind in sorted(by_kind, key=KINDS.index):
        names = by_kind[kind]
        first = ", ".join(map(one_line, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
        rows.append({"kind": kind, "files": f"{len(names):,}", "first": shown(first)})
    print_table(rows, console=console)
    print(f"{len(scan.bad):,} of {checked} cannot be used; each with its reason in {path}")
    elsewhere = "" if path == root / LIST_NAME else f" --data.bad-list {path}"
    print(f"next: repair or remove them and scan {root} again, or train with --data.bad-files skip{elsewhere}")


def _scan(arguments: argparse.Namespace) -> int:
    from awp_engine.data.dataset import DataError
    from awp_engine.data.sets.scan_list import write_scan
    from awp_engine.data.tools.scan import scan_folder
    from awp_engine.observe.bars import Bar

    root: Path = arguments.place
    path: Path = arguments.out or root / LIST_NAME
    # An hour's scan must not end with a list that cannot be written.
    if not root.is_dir():
        raise DataError(f"{root} is not a directory; expected one with train/<class>/ and test/<class>/")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise DataError(f"{path.parent} is no directory that can be written to; choose another list with --out FILE")
    if path.is_dir():
        raise DataError(f"{path} is a directory; expected a file for the list: choose another one with --out FILE")
    # of that one file: the directory may be anyone's
    with locked(path.parent, f"{LOCK}-{path.name}"):
        scan = scan_folder(
            root,
            workers=arguments.workers,
            pixels=not arguments.skip_pixels,
            same_size=arguments.same_size,
            bar=Bar,
        )
        write_scan(path, scan)
    _show(scan, root, path)
    return 1 if scan.bad else 0


def _split(arguments: argparse.Namespace) -> int:
    from awp_engine.data.tools.divide import divide_folder

    counts = divide_folder(arguments.place, arguments.out, test=arguments.test, seed=arguments.seed)
    train, test = counts["train"], counts["test"]
    least = min(train, key=lambda name: train[name])
    print(
        f"{one_line(str(arguments.out))}: {sum(train.values()):,} training and {sum(test.values()):,} test images of "
        f"{len(train):,} classes; the smallest, {one_line(least)}, has {train[least]:,} and {test[least]:,}"
    )
    print(f"next: awp data scan {one_line(shlex.quote(str(arguments.out)))}")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from awp_engine.data.tools.pack import pack_folder
    from awp_engine.observe.bars import Bar

    manifest = pack_folder(
        arguments.place,
        arguments.out,
        form=arguments.format,
        shard_bytes=arguments.shard_bytes,
        workers=arguments.workers,
        policy=arguments.bad_files,
        bar=Bar,
    )
    images = " and ".join(f"{count:,} {part}" for part, count in manifest.images.items())
    shards = sum(entry.images is not None for entry in manifest.files)
    size = sum(entry.bytes for entry in manifest.files)
    print(f"{arguments.out}: {images} images of {manifest.classes} classes in {shards:,} shards, {size:,} bytes")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from awp_engine.data.tools.pack import verify_pack
    from awp_engine.observe.bars import Bar

    problems = verify_pack(arguments.place, Bar)
    print("\n".join(f"damaged: {one_line(line)}" for line in problems) or f"sound: {arguments.place}")
    return 1 if problems else 0


def _get(arguments: argparse.Namespace) -> int:
    from awp_engine.data.tools.get import get_set, next_command
    from awp_engine.observe.bars import Bar

    root = get_set(
        arguments.name,
        arguments.place,
        mirror=arguments.mirror,
        bar=Bar,
        say=lambda line: print(one_line(line), flush=True),
    )
    print(f"{arguments.name} is in {one_line(str(root))}, with the checksums that were published")
    print(f"next: {one_line(next_command(arguments.name, root))}")
    return 0


def _parser(prog: str) -> OneLineParser:
    parser = OneLineParser(prog=prog, description="Looks after image folders and shards, and downloads data sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="scan|split|pack|verify|get")
    texts = {
        "scan": "find every file that cannot be trained on and list them; exit code 1 if there is one",
        "pack": "write an image folder as shards with a manifest",
        "verify": "compare shards with their manifest; exit code 1 if one is damaged",
    }
    workers = os.process_cpu_count() if sys.version_info >= (3, 13) else os.cpu_count()
    examples = {"scan": "photos", "pack": "photos --out shards", "verify": "shards"}
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text, example=examples[name])
        place = "the shards" if name == "verify" else "image folder with train/<class>/ and test/<class>/ (or val)"
        command.add_argument("place", type=Path, metavar="OUT" if name == "verify" else "DIR", help=place)
        if name != "verify":
            text = "processes (default: one a core)"
            command.add_argument("--workers", type=whole_number(1, 9999), default=workers or 1, metavar="N", help=text)
        if name == "scan":
            command.add_argument("--out", type=Path, metavar="FILE", help=f"the list (default: DIR/{LIST_NAME})")
            command.add_argument("--skip-pixels", action="store_true", help="read headers alone, decode nothing")
            command.add_argument("--same-size", action="store_true", help="list images of another size than most")
        if name == "pack":
            command.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new or empty directory")
            command.add_argument(
                "--format", choices=("tar", "npy"), default="tar", help="WebDataset tars or arrays (default: tar)"
            )
            command.add_argument(
                "--shard-bytes", type=_size, default=256 * 2**20, metavar="N", help="such as 1G (default: 256M)"
            )
            command.add_argument(
                "--bad-files", choices=("refuse", "skip"), default="refuse", help="what a scan listed (default: refuse)"
            )
    text = "divide one folder of class folders into training and test images, in a new folder"
    command = commands.add_parser("split", help=text, description=text)
    command.add_argument("place", type=Path, metavar="DIR", help="holds a folder of images for each class")
    command.add_argument("out", type=Path, metavar="OUT", help="a new or empty directory, for OUT/train and OUT/test")
    text = "part of every class's images that is for testing (default: 0.2)"
    command.add_argument("--test", type=share, default=0.2, metavar="SHARE", help=text)
    text = "another number chooses other images (default: 0)"
    command.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, metavar="N", help=text)
    text = "download a public data set, compare it with the published MD5, and unpack it"
    command = commands.add_parser("get", help=text, description=text, example="cifar10 data")
    command.add_argument("name", choices=PUBLIC, metavar="NAME", help=", ".join(PUBLIC))
    command.add_argument("place", type=Path, metavar="DIR", help="where to put it; made if it is missing")
    command.add_argument("--mirror", metavar="URL", help="address of a directory that has the same files")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "awp data") -> int:
    """Runs one command.

    Returns:
        0; 1 where `scan` found bad files or `verify` damage.

    Raises:
        SystemExit: after one line on stderr: 2 for bad arguments and what is no image folder, 1 for what cannot be
            packed, verified or downloaded, 130 or 143 after a signal.
    """
    arguments = _parser(prog).parse_args(argv)

    command = {"scan": _scan, "split": _split, "pack": _pack, "verify": _verify, "get": _get}[arguments.command]
    # A scan says by 1 that there are bad files, and nothing else.
    code = 2 if arguments.command == "scan" else 1
    kept = "the same command goes on where it ended" if arguments.command == "get" else "nothing was written"
    interrupted = f"{arguments.command} was interrupted; {kept}"
    place = getattr(arguments, "out", None) or arguments.place
    with ending(prog, interrupted=interrupted, unusable=code, failed=code, place=place):
        return command(arguments)
