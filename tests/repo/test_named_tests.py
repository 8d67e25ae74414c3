"""Documents and programs name tests and modules that exist."""

import ast
import re

import pytest
from conftest import LONGEST, SLOW
from mutate import MODULES
from places import ROOT

FILES = {path.name: path for path in (ROOT / "tests").glob("*/test_*.py")}


@pytest.mark.parametrize(("document", "least"), [("SECURITY.md", 15), ("docs/reliability.md", 25)])
def test_every_test_that_a_document_names_exists(document: str, least: int) -> None:
    text = (ROOT / document).read_text()
    # `test_file.py::test_name`, and further `::test_name` of the same file
    named = re.findall(r"`(test_\w+\.py)?(?:::(\w+))?", text)
    file, count = "", 0
    for given, name in named:
        file = given or file
        if given:
            assert given in FILES, given
        if name:
            tree = ast.parse(FILES[file].read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
        count += bool(given or name)
    assert count >= least


def test_every_test_file_has_a_folder_and_a_name_of_its_own() -> None:
    assert sorted(FILES) == sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))


def test_what_lists_of_tests_and_modules_name_exists() -> None:
    named = {*LONGEST, *SLOW, *(f"test_{name}" for tests in MODULES.values() for name in tests)}
    assert [name for name in named if f"{name}.py" not in FILES] == []
    assert [module for module in MODULES if not (ROOT / module).exists()] == []
