"""Documents lead to what exists: files, sections, and the sources that they name."""

import re
from functools import cache
from pathlib import Path

import pytest
import structure

PAGES = [
    *structure.ROOT.glob("*.md"),
    *(page for folder in ("docs", "bench", ".github") for page in (structure.ROOT / folder).rglob("*.md")),
]
# what a newcomer reads first
FIRST = [
    page for page in PAGES if page.parent.name == "areas" or page.stem in ("README", "CONTRIBUTING", "architecture")
]
# all but the record of changes
READ = [page for page in PAGES if page.stem != "CHANGELOG"]
# what is made by a run, an installation or a user
MADE = {"report.json", "config.json", "manifest.json", "evaluation.json", "classes.json", "build.json", "utils_awp.py"}


def name_of(page: Path) -> str:
    return str(page.relative_to(structure.ROOT))


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """The sections of a page, as GitHub links to them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def sources() -> set[str]:
    """All files, as /path/below/the/checkout."""
    folders = ("engine", "kernels", "csrc", "tests", "bench", "docs", "examples", ".github")
    files = [path for folder in folders for path in (structure.ROOT / folder).rglob("*")]
    return {f"/{path.relative_to(structure.ROOT)}" for path in [*files, *structure.ROOT.glob("*")]}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, section = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not section or section in anchors(there), target


@pytest.mark.parametrize("page", FIRST, ids=name_of)
def test_sources_that_are_named_exist(page: Path) -> None:
    for named in re.findall(r"`([\w./*]+\.(?:py|cpp|h|cu|sh|svg|json))`", prose(page)):
        known = named in MADE or "*" in named or any(path.endswith(f"/{named}") for path in sources())
        assert known, named


@pytest.mark.parametrize("page", READ, ids=name_of)
def test_lines_are_short(page: Path) -> None:
    # a row of a table is one line, however much it says
    assert [line for line in page.read_text().splitlines() if len(line) > 100 and not line.startswith("|")] == []
