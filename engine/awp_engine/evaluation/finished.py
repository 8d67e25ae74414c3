"""Finished reports that are read again instead of measured, if this user's own runs have written them.

A report that came with a downloaded run says what its author wants, so that one is believed only with a code (HMAC)
made with this user's secret key.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import awp_engine
import awp_kernels
from awp_engine.checkpoint import CheckpointError, read_file
from awp_engine.files.text import json_text
from awp_engine.files.user_key import KeyFileError, user_key

_BYTES = 1 << 27


def code_digest() -> str:
    """SHA-256, hexadecimal, of the sources of both packages: another version may measure another number."""
    digest = hashlib.sha256()
    for package in (awp_engine, awp_kernels):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _code(report: Mapping[str, Any]) -> str | None:
    try:
        key = user_key()
    except KeyFileError:
        return None
    text = json_text({name: value for name, value in report.items() if name != "code"})
    return hmac.digest(key, text.encode(), "sha256").hex()


def sealed(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with this user's code, where there is a key."""
    return {**report, "code": _code(report)}


def read_finished(path: Path) -> dict[str, Any] | None:
    """The report in a file, if it is finished and this user's; else None."""
    try:
        report = json.loads(read_file(path, limit=_BYTES))
        code = _code(report)
        given = report["code"]
        ours = code is not None and isinstance(given, str) and hmac.compare_digest(code.encode(), given.encode())
    except (CheckpointError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return report if ours and report.get("finished") is True else None
