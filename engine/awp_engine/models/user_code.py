"""Code that users bring: models, data sets, methods and attacks, by `file.py:NAME` or `package.module:NAME`.

`load_code` runs it. It is called with names that the user gave, and with those of a file whose seal shows that the same
user trained by the same code: see `awp_engine.models.trained`.

`code_of` tells code from other code, and runs none: it follows the imports of the file that is named, also those inside
functions, as far as they lead to files of the user's own.
"""

import ast
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import operator
import os
import sys
import sysconfig
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import nn

import awp_engine
import awp_kernels
from awp_engine.config import ConfigError
from awp_engine.config.model_names import source_of
from awp_engine.config.schema import did_you_mean
from awp_engine.files.text import one_line
from awp_engine.models.import_timm import declare_operators

Factory = Callable[..., Any]

# by these a file imports what its text does not name
_COMPUTED = {"__import__", "import_module", "iter_modules", "walk_packages", "run_path", "spec_from_file_location"}
_NOT_OWN = frozenset(
    (
        *(Path(sysconfig.get_paths()[key]).resolve() for key in ("stdlib", "platstdlib")),
        *(Path(str(package.__file__)).resolve().parent for package in (awp_engine, awp_kernels, torch)),
    )
)
# SHA-256 of a file as it was when it was run
_ran: dict[str, str] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
    """What tells somebody's code from other code.

    Attributes:
        file: that was named, absolute.
        sha256: of its bytes; where it imports others of the user's own files, of `files`.
        files: of it and of those, the path from its directory, and the SHA-256; sorted; nothing where it is alone.
    """

    file: str
    sha256: str
    files: tuple[tuple[str, str], ...] = ()

    def changed(self) -> str:
        """The first file that is no longer as it was; empty where all are."""
        for name, sha256 in self.files or ((self.file, self.sha256),):
            path = Path(os.path.normpath(Path(self.file).parent / name))
            try:
                same = _sha256(path.read_bytes()) == sha256
            except (OSError, ValueError):
                same = False
            if not same:
                return str(path)
        return ""

    def new(self, before: "Code") -> str:
        """The first file that `before` has not imported; empty where there is none."""
        known = dict(before.files)
        return next((name for name, _ in self.files if name not in known and name != Path(self.file).name), "")


@contextlib.contextmanager
def told_in_one_line(
    name: str, doing: str, flag: str = "--model.name", error: type[ValueError] = ConfigError
) -> Iterator[None]:
    """A block of foreign code, whatever that raises: becomes an `error` that says what, and where in that code."""
    try:
        yield
    except (ConfigError, error):
        raise
    # a script that ends by sys.exit() would end the command without a word
    except (Exception, SystemExit) as raised:
        frames = [frame for frame in traceback.extract_tb(raised.__traceback__) if is_own_file(frame.filename)]
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        words = f"{type(raised).__name__}: {one_line(str(raised))[:300]}{where}"
        raise error(f"{flag}: {name}: {doing} raised {words}") from raised


def load_factory(name: str, flag: str = "--model.name", *, root: Path | None = None) -> tuple[Factory, Code]:
    """As `load_code`, for what is called.

    Raises:
        ConfigError: also where it is no function or class.
    """
    factory, code = load_code(name, flag, root=root)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ConfigError(f"{flag}: {name} is {type(factory).__name__}; expected a function or a class")
    return factory, code


def load_code(name: str, flag: str, *, root: Path | None = None) -> tuple[Any, Code]:
    """The object that `file.py:NAME` or `package.module:NAME` names, and the code that it is.

    The file, or the module, is run: once a process, unless it or what it imports has changed since. Other modules are
    found beside the file, or in the working directory, after all others, so that none there replaces one of a package.

    What is loaded while the object is called may add to the code: the second result of a call after that has it.

    Args:
        name: as given to a flag.
        flag: that gave the name, for messages.
        root: where a package is looked for before anywhere else.

    Raises:
        ConfigError: no such file, module or name, or the code raises an error.
    """
    place, _, attribute = name.rpartition(":")
    # the code may import timm or torchvision
    declare_operators()
    with told_in_one_line(name, "its import", flag):
        if source_of(name) == "file":
            module, code = _run_file(Path(place), flag)
        else:
            module, code = _run_module(place, flag, root or Path.cwd(), first=root is not None)
        try:
            return operator.attrgetter(attribute)(module), code
        except AttributeError:
            public = [key for key in vars(module) if not key.startswith("_")]
            hint = did_you_mean(attribute, public, "expected the name of a function or a class in it")
            raise ConfigError(f"{flag}: {code.file} has no {attribute}; {hint}") from None


def _run_file(path: Path, flag: str) -> tuple[types.ModuleType, Code]:
    path = path.resolve()
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{flag}: expected a Python file {path}, which is not there{hint}")
    _add_to_path(path.parent)
    _forget_changed(_closure(path, flag=flag))
    name = f"{path.stem}_{_sha256(os.fsencode(path))[:8]}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__file__ = str(path)
        # dataclasses and torch.compile look it up
        sys.modules[name] = module
        try:
            exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name], _remembered(path, "", flag)


def _run_module(name: str, flag: str, root: Path, *, first: bool) -> tuple[types.ModuleType, Code]:
    _add_to_path(root)
    if first:
        _import_from(name.partition(".")[0], root)
    file, _ = _find(name, root)
    if file is not None:
        _forget_changed(_closure(Path(file), name, flag))
    module = importlib.import_module(name)
    if (file := getattr(module, "__file__", None)) is None:
        raise ConfigError(f"{flag}: {name}: expected a module that is a file")
    return module, _remembered(Path(file), name, flag)


def _import_from(name: str, root: Path) -> None:
    """Imports a top-level package or module from a directory, whatever else has its name, unless it is there."""
    spec = None if name in sys.modules else PathFinder.find_spec(name, [str(root)])
    if spec is not None and spec.loader is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            sys.modules.pop(name, None)
            raise


def _add_to_path(directory: Path) -> None:
    # at the end, for good: functions may import when they are called, and nothing there may replace other modules
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def _forget_changed(files: Mapping[str, str]) -> None:
    """Lets files run anew, all of them, where one has changed since it was run."""
    if any(_ran.get(file, sha256) != sha256 for file, sha256 in files.items()):
        held = {name: getattr(module, "__dict__", {}).get("__file__") for name, module in [*sys.modules.items()]}
        gone = tuple(name for name, file in held.items() if file in files and name != "__main__")
        for name in held:
            # a folder without an __init__.py has no file
            if name in gone or name.startswith(tuple(f"{package}." for package in gone)):
                sys.modules.pop(name)
        for file in files:
            _ran.pop(file, None)


def _remembered(path: Path, module: str, flag: str) -> Code:
    files = _closure(path, module, flag)
    for file, sha256 in files.items():
        _ran.setdefault(file, sha256)
    return _as_code(path, files)


def code_of(file: Path, module: str = "", flag: str = "--model.name") -> Code:
    """What tells a file of code from others; nothing is run.

    Args:
        file: to begin with.
        module: its dotted name; empty for a file that is run by its path.
        flag: for messages.

    Raises:
        ConfigError: a file cannot be read, or a module of the same name would be run in place of one beside it.
    """
    return _as_code(file, _closure(file, module, flag))


def _as_code(path: Path, files: Mapping[str, str]) -> Code:
    if len(files) == 1:
        return Code(file=str(path), sha256=files[str(path)])
    listed = tuple(sorted((os.path.relpath(file, path.parent), sha256) for file, sha256 in files.items()))
    text = "".join(f"{sha256}  {name}\n" for name, sha256 in listed)
    return Code(file=str(path), sha256=_sha256(os.fsencode(text)), files=listed)


def _closure(path: Path, module: str = "", flag: str = "--model.name") -> dict[str, str]:
    """A file and all of the user's own that it imports, directly or not, each with its SHA-256."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    root = path.parents[len(package.split(".")) if package else 0]
    found: dict[str, str] = {}
    waiting = [(str(path), package)]
    while waiting:
        file, package = waiting.pop()
        if file in found:
            continue
        try:
            source = Path(file).read_bytes()
        except OSError as error:
            raise ConfigError(f"{flag}: expected a Python file {file}; it cannot be read: {error.strerror}") from None
        found[file] = _sha256(source)
        if file.endswith(".py"):
            waiting += _imports(source, Path(file), package, root, flag)
    return found


def _imports(source: bytes, path: Path, package: str, root: Path, flag: str) -> Iterator[tuple[str, str]]:
    """The files of the user's own that a file's text imports, each with the package that it is in."""
    names, computed = _imported_names(source, package)
    for name in names:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            inner = ".".join(parts[:count])
            file, places = _find(inner, root)
            if file is not None and is_own_file(file):
                if count == 1 and root in path.parents:
                    _require_beside(inner, file, path, root, flag)
                yield file, inner if places is not None else inner.rpartition(".")[0]
            elif places is None or file is not None:
                break
    if computed:
        inside = (path.parent / "__init__.py").is_file()
        for other in path.parent.rglob("*.py") if inside else path.parent.glob("*.py"):
            below = other.parent.relative_to(path.parent).parts
            yield str(other), ".".join((package, *below)) if package else ""


@functools.lru_cache(maxsize=4096)
def _imported_names(source: bytes, package: str) -> tuple[tuple[str, ...], bool]:
    """The modules, and what may be one, that a text imports, and whether it computes names of others."""
    names: list[str] = []
    computed = False
    try:
        with warnings.catch_warnings():
            # it says so when it is run
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        # it cannot be run either
        return (), False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            with contextlib.suppress(ImportError):
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Name | ast.Attribute):
            computed |= (node.id if isinstance(node, ast.Name) else node.attr) in _COMPUTED
    return tuple(dict.fromkeys(names)), computed


def _find(name: str, root: Path) -> tuple[str | None, Sequence[str] | None]:
    """The file of a module that is there, or would be imported by what lies in `root`, and where its submodules are."""
    held = getattr(sys.modules.get(name), "__dict__", None)
    if held is not None:
        return held.get("__file__"), held.get("__path__")
    parent, _, last = name.rpartition(".")
    places = _find(parent, root)[1] if parent else [*sys.path, str(root)]
    spec = None if places is None else PathFinder.find_spec(last, list(places))
    if spec is None:
        return None, None
    inside = spec.submodule_search_locations
    return spec.origin if spec.has_location else None, None if inside is None else list(inside)


def _require_beside(name: str, file: str, path: Path, root: Path, flag: str) -> None:
    """Refuses another module of the same name: two directories may both have a utils.py, and Python has one of them."""
    for beside in (root / f"{name}.py", root / name / "__init__.py"):
        if beside.is_file() and not beside.samefile(file):
            raise ConfigError(f"{flag}: `import {name}` in {path} gives {file}, and not {beside}; rename one of them")


def is_own_file(file: str) -> bool:
    """Whether a file is the user's: of no installed package, and not Python's or this package's."""
    if file.startswith("<") or {"site-packages", "dist-packages"} & {*Path(file).parts}:
        return False
    parents = {*Path(file).parents, *Path(file).resolve().parents}
    return not parents & _NOT_OWN and not any(Path(place) in parents and _holds_installed(place) for place in sys.path)


@functools.cache
def _holds_installed(directory: str) -> bool:
    return any(Path(directory).glob("*.dist-info"))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
