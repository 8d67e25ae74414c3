"""SECURITY.md names tests that exist."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_every_test_that_the_threat_model_names_exists() -> None:
    text = (TESTS.parent / "SECURITY.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(named) >= 15
    for file, name in named:
        tree = ast.parse((TESTS / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
