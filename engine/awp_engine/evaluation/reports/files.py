"""The files that a measurement leaves, and what of an earlier one is read again.

A report that came with a downloaded run says what its author wants, so that one is believed only with a code that is
made with this user's secret key.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import awp_engine
import awp_kernels
from awp_engine.checkpoint import CheckpointError, read_file
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.digest import sha256_of_json
from awp_engine.files.signed import Signer
from awp_engine.files.text import json_text
from awp_engine.files.user_key import KeyFileError

_BYTES = 1 << 27


def code_digest() -> str:
    """SHA-256, hexadecimal, of the sources of both packages: another version may measure another number."""
    digest = hashlib.sha256()
    for package in (awp_engine, awp_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What a measurement leaves.

    Attributes:
        report: what its JSON file holds, the receipt included.
        output: the directory with the reports.
        title: of the table.
    """

    report: dict[str, Any]
    output: Path
    title: str


class Reports:
    """The reports of one measurement: each under a name that no other question has, and as the newest of its kind.

    Args:
        directory: an existing one.
        parts: what the name says of the measurement.
        question: all that was asked for.
    """

    def __init__(self, directory: Path, parts: Iterable[object], question: Mapping[str, Any]) -> None:
        digest = sha256_of_json(question)[:8]
        self.directory = directory
        self.name = "-".join([*(re.sub(r"[^A-Za-z0-9]+", "_", str(part)) for part in parts), digest])

    def path(self, kind: str) -> Path:
        """Of the measurement's own report of a kind such as evaluation.json."""
        stem, _, suffix = kind.partition(".")
        return self.directory / f"{stem}-{self.name}.{suffix}"

    def rename(self, kind: str, *, again: bool) -> dict[str, Any] | None:
        """The newest finished report on the question, whose name is taken; else None, and a name that is free.

        Args:
            kind: such as evaluation.json.
            again: look for none.
        """
        first, names = self.name, []
        for number in itertools.count(1):
            self.name = first if number == 1 else f"{first}-{number}"
            if not self.path(kind).exists():
                break
            names.append(self.name)
        unused = self.name
        for self.name in reversed([] if again else names):
            if (found := read_finished(self.path(kind))) is not None:
                return found
        self.name = unused
        return None

    def put(self, kind: str, text: str) -> None:
        """Writes a report twice: under the measurement's own name, and as the newest."""
        for path in (self.path(kind), self.directory / kind):
            atomic_write_text(path, text)


def _signed(report: Mapping[str, Any]) -> tuple[Signer, str]:
    return Signer("evaluation"), json_text({name: value for name, value in report.items() if name != "code"})


def sealed(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with this user's code, where there is a key."""
    try:
        signer, text = _signed(report)
    except KeyFileError:
        return {**report, "code": None}
    return {**report, "code": signer.code(text)}


def read_finished(path: Path) -> dict[str, Any] | None:
    """The report in a file, if it is finished and this user's; else None."""
    try:
        report = json.loads(read_file(path, limit=_BYTES))
        signer, text = _signed(report)
        ours = signer.made(report["code"], text)
    except (CheckpointError, KeyFileError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return report if ours and report.get("finished") is True else None
