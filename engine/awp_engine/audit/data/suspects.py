"""Suspects as lists: the one that training skips by, and a table for data sets whose images are no files."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from awp_engine.data import Split, StreamedSplit
from awp_engine.data.sets.files import FileImages
from awp_engine.data.sets.scan_list import Bad, Scan, file_state, listed_path, read_scan, scan_text

KIND = "suspect"


def file_names(split: Split | StreamedSplit) -> list[str] | None:
    """The images' files, as the list of a scan names them; None where images are no files of their own."""
    if not isinstance(split, StreamedSplit) or not isinstance(store := split.store, FileImages):
        return None
    return [store.listed(row) for row in split.rows.tolist()]


def reason(suspect: Mapping[str, Any], method: str) -> str:
    """Why an image is a suspect, as the end of a sentence."""
    parts = [f"{name} {value:.4g}, limit {limit:.4g}" for name, (value, limit) in suspect["beyond"].items()]
    return f"is a suspect of awp audit data, by {method}, in class {suspect['class']}: {' and '.join(parts)}"


def skip_list(root: Path, known: Path | None, suspects: Sequence[Mapping[str, Any]], method: str, images: int) -> str:
    """The text of a list for `--data.bad-files skip`.

    Args:
        root: the image folder.
        known: the list of an earlier scan, whose files stay listed.
        suspects: each with its file, class and what it is beyond.
        method: that found them.
        images: that were looked at, all classes' together.

    Raises:
        DataError: the earlier list is damaged.
    """
    scan = None if known is None else read_scan(known)
    bad, states = ({}, {}) if scan is None else (dict(scan.bad), dict(scan.states))
    for suspect in suspects:
        name = suspect["file"]
        bad[name], states[name] = Bad(KIND, reason(suspect, method)), file_state(root / listed_path(name))
    bad = {name: bad[name] for name in sorted(bad)}
    return scan_text(
        Scan(
            files=max(images + (0 if scan is None else len(scan.bad)), 0 if scan is None else scan.files),
            total_bytes=0 if scan is None else scan.total_bytes,
            # of no folder: that all pixels can be decoded is for a scan to say
            digest="" if scan is None else scan.digest,
            pixels=scan is not None and scan.pixels,
            notes=() if scan is None else scan.notes,
            bad=bad,
            states=states,
        )
    )


def table_text(suspects: Sequence[Mapping[str, Any]]) -> str:
    """CSV: an image a line, the strangest of a class first."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "class", "file", "strangeness", "beyond"])
    for suspect in suspects:
        file = suspect["file"] or ""
        writer.writerow(
            [suspect["id"], suspect["class"], file, f"{suspect['strangeness']:.4f}", " and ".join(suspect["beyond"])]
        )
    return text.getvalue()
