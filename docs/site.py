"""What mkdocs needs beside the pages: files that they link to outside docs/, and the commands' own help."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")
_HELP = re.compile(r"^<!-- help: (.+) -->$", re.MULTILINE)


def _outside(target: str, page: Path) -> str | None:
    """Path below the checkout of what `page` links to, if that lies there but outside docs/."""
    there = (page.parent / target).resolve()
    inside = there.is_relative_to(ROOT / "docs") or not there.is_relative_to(ROOT)
    return None if inside or not there.is_file() else str(there.relative_to(ROOT))


def on_files(files: Files, *, config: Any) -> Files:
    """Put files that pages link to outside docs/ into the site, below source/."""
    for page in files.documentation_pages():
        if page.abs_src_path is None:
            continue
        source = Path(page.abs_src_path)
        for _, target in _LINK.findall(source.read_text()):
            path = _outside(target, source)
            if path is not None and files.get_file_from_path(f"source/{path}") is None:
                files.append(File.generated(config, f"source/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lead links to those files there, and put each command's help in its place."""
    source = Path(page.file.abs_src_path)
    here = Path(page.file.src_uri).parent

    def moved(found: re.Match[str]) -> str:
        path = _outside(found[2], source)
        return found[0] if path is None else found[1] + os.path.relpath(f"source/{path}", here)

    return _HELP.sub(lambda found: _help(found[1]), _LINK.sub(moved, markdown))


def _help(command: str) -> str:
    python = [sys.executable, "-m", "awp_engine", *command.split()[1:]]
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "engine"), os.environ.get("PYTHONPATH", "")])
    text = subprocess.run(
        python, env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "100"}, capture_output=True, text=True, check=True
    ).stdout
    return f"```text\n{text.rstrip()}\n```"
