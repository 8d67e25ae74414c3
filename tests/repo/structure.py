"""Measures the structure of a checkout: sizes, wings, and the imports between them.

    python tests/repo/structure.py [CHECKOUT] [--json]

Nothing is imported and nothing is run: all of it is read from the source text, so that any commit can be measured, from
`git worktree add`. Modules of commits before there were wings count for the wing that they moved to.
"""

import argparse
import ast
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

# from top to bottom: a wing imports from lower floors; `device` and `objects` are modules
FLOORS = (
    ("cli", "objects"),
    ("train", "landscape", "compare", "audit"),
    ("evaluation",),
    ("step", "data"),
    ("attack", "optim", "distributed"),
    ("models",),
    ("checkpoint", "observe", "device"),
    ("config", "files", "awp_kernels"),
)
FLOOR = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
# the package's own __init__ and __main__: they open the house from outside, and belong to no floor
DOOR = "awp_engine"

TRAINER_LINES = 200
STEP_LINES = 250
MODULES = 4
HOPS = 2
REPRESENTATIONS = 1

PRODUCT = ("engine", "kernels", "csrc")
_SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh"}

# their dictionaries go into reports and error messages, never into an attack
_WRITTEN_DOWN = ("attack_facts", "gradient_attack", "make_receipt")

# where the modules of the flat package went
_WENT_TO = {
    "cli": "command_line checkpoint.__main__ data.__main__",
    "train": "trainer",
    "step": "build_step folding graphs objectives perturbation precision",
    "attack": "attack_checks",
    "optim": "adamw average optimizer",
    "distributed": "replicas sharding signals watchdog",
    "models": "answers batch_norm class_names loading sync_batch_norm",
    "observe": "drawing monitor profile regions report run_log throughput",
    "config": "presets",
    "files": "checkpoint._files locking output text",
}
_WENT = {module: wing for wing, modules in _WENT_TO.items() for module in modules.split()}


@dataclass(frozen=True)
class Module:
    """One Python file of the product: its dotted name, its path, and what it says."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def wing(self) -> str:
        """The part of the house that it belongs to."""
        return wing_of(self.name)

    @property
    def room(self) -> str:
        """Its package, or the module itself where it lies flat in the package."""
        parts = self.name.split(".")
        inside = self.path.name == "__init__.py" or len(parts) == 2
        return self.name if inside else ".".join(parts[:-1])


@dataclass(frozen=True)
class Import:
    """One import statement of the product, inside functions and for types alone too."""

    source: Module
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.source.path.name}:{self.line}: {self.source.name} imports {self.target}"


def wing_of(name: str) -> str:
    """The wing of a module by its dotted name."""
    top, *rest = name.split(".")
    if top != DOOR or not rest or rest == ["__main__"]:
        return top
    return _WENT.get(".".join(rest[:2])) or _WENT.get(rest[0], rest[0])


def modules(checkout: Path) -> list[Module]:
    """All Python files of both packages."""
    found = []
    for folder in ("engine/awp_engine", "kernels/awp_kernels"):
        for path in sorted((checkout / folder).rglob("*.py")):
            parts = path.relative_to((checkout / folder).parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, path, ast.parse(path.read_text())))
    return found


def imports(found: list[Module]) -> list[Import]:
    """All imports of the product's modules by each other, a name a line."""
    names = {module.name for module in found}

    def targets(module: Module, node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom):
            package = module.name.split(".")
            if node.level:
                package = package[: len(package) - node.level + (module.path.name == "__init__.py")]
            base = ".".join(package if node.level else []) + ("." if node.level and node.module else "")
            base += node.module or ""
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if inner in names or base in names:
                    yield inner if inner in names else base

    return [
        Import(module, target, node.lineno)
        for module in found
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for target in targets(module, node)
        if target != module.name
    ]


def wing_arrows(found: list[Import]) -> dict[str, set[str]]:
    """For every wing, the others that it imports."""
    arrows: dict[str, set[str]] = {wing: set() for wing in FLOOR}
    for one in found:
        source, target = one.source.wing, wing_of(one.target)
        if source != target and DOOR not in (source, target):
            arrows.setdefault(source, set()).add(target)
    return arrows


def upward(found: list[Import]) -> list[Import]:
    """Imports from a floor above one's own, and of wings that have no floor."""

    def goes_up(one: Import) -> bool:
        source, target = one.source.wing, wing_of(one.target)
        if source == target or DOOR in (source, target):
            # the kernels stand alone, and do not even know the door
            return source == "awp_kernels" != target
        return source not in FLOOR or target not in FLOOR or FLOOR[target] < FLOOR[source]

    return [one for one in found if goes_up(one)]


def beside(found: list[Import]) -> list[Import]:
    """Imports from another wing of the same floor."""
    wings = [(one, one.source.wing, wing_of(one.target)) for one in found]
    return [one for one, a, b in wings if a != b and FLOOR.get(a, -1) == FLOOR.get(b, -2)]


def reach(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """For every room, all that it imports, directly or by way of others."""
    found: dict[str, set[str]] = {}
    for start in arrows:
        seen, queue = set(), deque(arrows[start])
        while queue:
            room = queue.popleft()
            if room not in seen:
                seen.add(room)
                queue.extend(arrows.get(room, ()))
        found[start] = seen
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Rooms that import each other, directly or by way of others."""
    reached = reach(arrows)
    groups = {frozenset(b for b in arrows if b in reached[a] and a in reached[b]) for a in arrows}
    return sorted(sorted(group) for group in groups if group)


def levels(arrows: dict[str, set[str]]) -> int:
    """Rooms on the longest way down; those of a circle count once."""
    reached = reach(arrows)
    # of two rooms in one circle each reaches all that the other does
    below = {a: {b for b in reached[a] if a not in reached.get(b, ())} for a in arrows}
    depth: dict[str, int] = {}
    for room in sorted(arrows, key=lambda room: len(below[room])):
        depth[room] = 1 + max((depth[other] for other in below[room]), default=0)
    return max(depth.values())


def lines_of(node: ast.AST) -> int:
    """Lines of a class or function, docstring and comments included."""
    assert isinstance(node, (ast.ClassDef, ast.FunctionDef))
    return (node.end_lineno or node.lineno) - node.lineno + 1


def classes(found: list[Module]) -> Iterator[tuple[Module, ast.ClassDef]]:
    """All classes at the top of a module."""
    for module in found:
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                yield module, node


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    """A class's methods by name."""
    return {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}


def calls(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What is called below a node: (what it is called on, as text, and the name)."""
    for item in ast.walk(node):
        if isinstance(item, ast.Call) and isinstance(item.func, ast.Attribute):
            yield ast.unparse(item.func.value), item.func.attr


def is_algorithm(node: ast.FunctionDef) -> bool:
    """Whether it reads like Algorithm 1: attack, ascent, descent and update, called by one function."""
    called = " ".join(name for _, name in calls(node))
    parts = (("attack",), ("ascen", "climb"), ("descen",), ("update",))
    return all(any(stem in called for stem in part) for part in parts)


def trainer_class(found: list[Module]) -> ast.ClassDef | None:
    """Class Trainer."""
    return next((node for _, node in classes(found) if node.name == "Trainer"), None)


def bases(found: list[Module], node: ast.ClassDef) -> list[ast.ClassDef]:
    """The classes of the product that a class inherits from, and theirs."""
    of_name = {other.name: other for _, other in classes(found)}
    direct = [of_name[ast.unparse(base)] for base in node.bases if ast.unparse(base) in of_name]
    return [*direct, *(further for base in direct for further in bases(found, base))]


def step_class(found: list[Module]) -> ast.ClassDef | None:
    """The class with a method that reads like Algorithm 1."""
    steps = (node for module, node in classes(found) if module.wing == "step")
    return next((node for node in steps if any(map(is_algorithm, methods(node).values()))), None)


def chain(found: list[Module]) -> list[str]:
    """The functions from the trainer's loop over batches to Algorithm 1, both included; empty where none is found.

    Calls of a method of the same class are followed, and calls on an attribute whose name has "step" in it, to classes
    of the step's wing: to `__call__`, or to the method that is named. The shortest way counts.
    """
    trainer = trainer_class(found)
    if trainer is None:
        return []
    steps = {node.name: node for module, node in classes(found) if module.wing == "step" and "Step" in node.name}
    inherited = {name: item for base in bases(found, trainer) for name, item in methods(base).items()}
    of_class = {"Trainer": inherited | methods(trainer)} | {name: methods(node) for name, node in steps.items()}

    def following(owner: str, node: ast.FunctionDef) -> Iterator[tuple[str, str]]:
        for on, name in calls(node):
            if on == "self" and name in of_class[owner]:
                yield owner, name
            elif on == "self" and "step" in name:
                yield from ((step, "__call__") for step in steps if "__call__" in of_class[step])
            elif on.startswith("self.") and "step" in on:
                yield from ((step, name) for step in steps if name in of_class[step])

    def loops(node: ast.FunctionDef) -> bool:
        return any(
            isinstance(item, ast.For) and ("batch" in ast.unparse(item.iter) or "next(batches)" in ast.unparse(item))
            for item in ast.walk(node)
        ) and any("step" in name or "step" in on for on, name in calls(node))

    queue = deque([[("Trainer", name)] for name, node in of_class["Trainer"].items() if loops(node)])
    seen = {way[0] for way in queue}
    while queue:
        way = queue.popleft()
        owner, name = way[-1]
        node = of_class[owner][name]
        if owner != "Trainer" and is_algorithm(node):
            return [".".join(function) for function in way]
        for function in following(owner, node):
            if function not in seen:
                seen.add(function)
                queue.append([*way, function])
    return []


def representations(found: list[Module]) -> list[str]:
    """What carries an attack's settings on their way from the run's settings to the attack.

    That is a class with fields, or a function with a dictionary that it returns or binds to a name, with at least two
    of epsilon, step size and steps. Not counted: fields of text, as a user gives them, where settings are checked, and
    what is only written down.
    """
    numbers = {"epsilon", "step_size", "steps"}

    def held(keys: list[ast.expr | None]) -> set[str]:
        return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}

    def outermost(node: ast.AST) -> Iterator[ast.Dict]:
        for item in ast.walk(node):
            if isinstance(item, (ast.Return, ast.Assign, ast.AnnAssign)) and isinstance(item.value, ast.Dict):
                yield item.value

    def carries(node: ast.AST) -> bool:
        if isinstance(node, ast.ClassDef):
            fields = {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                if "str" not in ast.unparse(item.annotation)
            }
            return len(fields & numbers) >= 2
        return isinstance(node, ast.FunctionDef) and any(len(held(d.keys) & numbers) >= 2 for d in outermost(node))

    names = []
    for module in found:
        if module.wing in ("config", "cli", "observe", "awp_kernels"):
            continue
        for top in module.tree.body:
            if not isinstance(top, (ast.ClassDef, ast.FunctionDef)):
                continue
            # what a class that carries them does with them is its own business
            inner = [] if isinstance(top, ast.FunctionDef) or carries(top) else [*methods(top).values()]
            names += [
                f"{module.name}.{node.name}"
                for node in (top, *inner)
                if carries(node) and node.name not in _WRITTEN_DOWN
            ]
    return names


def product_lines(checkout: Path) -> dict[str, int]:
    """Lines of source text by folder, blank ones and comments included."""
    return {
        folder: sum(
            len(path.read_bytes().splitlines())
            for path in (checkout / folder).rglob("*")
            if path.suffix in _SOURCES and path.is_file()
        )
        for folder in PRODUCT
    }


def measure(checkout: Path) -> dict[str, Any]:
    """All figures of a checkout."""
    found = modules(checkout)
    if not found:
        raise SystemExit(f"{checkout}: expected a checkout of awp-engine, found no engine/awp_engine in it")
    links = imports(found)
    engine = [module for module in found if module.name.startswith(f"{DOOR}.")]
    rooms: dict[str, set[str]] = {module.room: set() for module in engine}
    room_of = {module.name: module.room for module in engine}
    for link in links:
        source, target = room_of.get(link.source.name), room_of.get(link.target)
        if source and target and source != target:
            rooms[source].add(target)
    trainer, step = trainer_class(found), step_class(found)
    lines = product_lines(checkout)
    return {
        "top_level_modules": sorted(
            module.name for module in engine if module.path.parent.name == DOOR and module.path.stem != "__main__"
        ),
        "trainer_lines": lines_of(trainer) if trainer else None,
        "trainer_bases": {base.name: lines_of(base) for base in bases(found, trainer)} if trainer else {},
        "step_class": step.name if step else None,
        "step_lines": lines_of(step) if step else None,
        "attack_representations": representations(found),
        "loop_to_algorithm": chain(found),
        "upward": [str(link) for link in upward(links)],
        "beside": [str(link) for link in beside(links)],
        "circles": circles(wing_arrows(links)),
        "wings": {wing: sorted(others) for wing, others in sorted(wing_arrows(links).items())},
        "rooms": len(rooms),
        "arrows_between_rooms": sum(map(len, rooms.values())),
        "levels_of_rooms": levels(rooms),
        "lines": {**lines, "sum": sum(lines.values())},
    }


def table(figures: dict[str, Any]) -> str:
    """The figures, a line each, with what they should be."""
    count, chained = len(figures["attack_representations"]), figures["loop_to_algorithm"]
    rows = [
        ("top-level modules of awp_engine", len(figures["top_level_modules"]), f"at most {MODULES}"),
        ("lines of class Trainer", figures["trainer_lines"], f"at most {TRAINER_LINES}"),
        *((f"lines of its base {name}", lines, "") for name, lines in figures["trainer_bases"].items()),
        (f"lines of class {figures['step_class'] or '(step)'}", figures["step_lines"], f"at most {STEP_LINES}"),
        ("what carries an attack's settings", count, REPRESENTATIONS),
        ("functions from the loop to Algorithm 1", len(chained) or "not found", HOPS),
        ("imports upward", len(figures["upward"]), 0),
        ("imports from the same floor", len(figures["beside"]), "few"),
        ("circles of wings", len(figures["circles"]), 0),
        ("rooms (packages, flat modules)", figures["rooms"], ""),
        ("arrows between rooms", figures["arrows_between_rooms"], ""),
        ("rooms on the longest way down", figures["levels_of_rooms"], ""),
        *((f"lines in {folder}", f"{lines:,}", "") for folder, lines in figures["lines"].items()),
    ]
    said = [f"{name:40} {value!s:>10}  {wanted}".rstrip() for name, value, wanted in rows]
    said += [f"  way: {' -> '.join(chained)}"] if chained else []
    said += [f"  settings travel in {name}" for name in figures["attack_representations"]]
    said += [f"  upward: {link}" for link in figures["upward"]]
    said += [f"  beside: {link}" for link in figures["beside"]]
    said += [f"  circle: {', '.join(circle)}" for circle in figures["circles"]]
    return "\n".join(said)


def main() -> None:
    """Print the figures of one checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT, help="a working tree; this one if not given")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    figures = measure(arguments.checkout.resolve())
    print(json.dumps(figures, indent=2) if arguments.json else table(figures))


if __name__ == "__main__":
    main()
