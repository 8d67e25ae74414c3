"""Documents name tests that exist."""

import ast
import re

import pytest
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
