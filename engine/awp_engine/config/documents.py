"""A file of settings -> nested values: JSON, such as a run's own, or YAML.

Whatever is wrong is a `ConfigError` of one line, which names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from awp_engine.config.schema import ConfigError, Word, show

JSON = "JSON as this program writes it"
# twenty times as much as all settings take
_MOST_BYTES = 65536


def read_text(path: Path, kind: str) -> str:
    """The text of a small file.

    Args:
        path: a regular file: a pipe might never end.
        kind: what the text is meant to be, for messages.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"{path}: not {kind}: more than {_MOST_BYTES} bytes")
        return data.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not {kind}: not UTF-8 text") from None


def read_document(path: Path) -> Any:
    """The values in a .json, .yaml or .yml file; unquoted words of YAML are `Word`s."""
    kind = path.suffix.lower()
    if kind == ".json":
        return parse_json(read_text(path, JSON), str(path))
    if kind in (".yaml", ".yml"):
        return _parse_yaml(read_text(path, "YAML"), str(path))
    raise ConfigError(f"--config: expected a .yaml, .yml or .json file, got {show(path)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def parse_json(text: str, source: str) -> Any:
    """The values in JSON; `source` is the file's name for messages."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not {JSON}: {' '.join(str(error).split())}") from None


def _parse_yaml(text: str, source: str) -> Any:
    try:
        import yaml
    except ImportError:
        message = "the package pyyaml is missing; install it with: pip install pyyaml, or give a .json file"
        raise ConfigError(f"{source}: {message}") from None

    class Loader(yaml.BaseLoader):
        """Nothing is typed here: to YAML 1.1 1e-3 is text, 0.20 a number, no is false, 1:30 is 90."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            event: Any = self.peek_event()
            if event.anchor or event.tag:
                self._refuse("anchors, aliases and tags are not taken", event)
            return super().compose_node(parent, index)

        def construct_scalar(self, node: Any) -> Any:
            text = super().construct_scalar(node)
            if node.style is not None:
                return text
            return None if text in ("", "~", "null", "Null", "NULL") else Word(text)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep=True)
            if len(mapping) != len(node.value):
                self._refuse("a key is given twice", node)
            return mapping

        def _refuse(self, problem: str, where: Any) -> None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)

    try:
        return yaml.load(text, Loader)
    # ValueError, OverflowError: an escape of no character
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{source}: not YAML: {f'line {mark.line + 1}: ' if mark else ''}{problem}") from None
