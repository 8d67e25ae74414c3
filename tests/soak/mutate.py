"""Mutation testing: changes one line at a time and says which changes no test notices.

    pip install cosmic-ray
    python tests/soak/mutate.py --each 12 --json mutants.json
    python tests/soak/mutate.py --modules engine/awp_engine/attack/pgd.py --each 100

Mutations are cosmic-ray's (comparisons, arithmetic, booleans, numbers, loops), and statements left out. --each are
drawn of each module, at most one a line, by a hash of the line and the seed: a line that stays is drawn again after
other lines have changed. Each is tried in a copy of the checkout, against the test files that MODULES names, until the
first test fails. What runs into the time limit counts as noticed.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# which test files belong to a module
MODULES = {
    "kernels/awp_kernels/awp.py": ["awp", "awp_misuse", "sharding", "interrupts"],
    "kernels/awp_kernels/sgd.py": ["sgd_step"],
    "kernels/awp_kernels/_ball.py": ["operations", "attack", "apgd"],
    "kernels/awp_kernels/_checks.py": ["arguments", "operations"],
    "kernels/awp_kernels/perturb/__init__.py": ["arguments", "operations", "awp"],
    "kernels/awp_kernels/perturb/reference.py": ["operations", "awp"],
    "kernels/awp_kernels/pgd_init/__init__.py": ["arguments", "operations", "attack"],
    "kernels/awp_kernels/pgd_init/reference.py": ["operations", "attack"],
    "kernels/awp_kernels/pgd_step/__init__.py": ["arguments", "operations", "attack"],
    "kernels/awp_kernels/pgd_step/reference.py": ["operations", "attack"],
    "kernels/awp_kernels/pgd_step_normalize/__init__.py": ["arguments", "pgd_step_normalize", "narrow_input"],
    "kernels/awp_kernels/pgd_step_normalize/reference.py": ["pgd_step_normalize", "narrow_input"],
    "kernels/awp_kernels/sgd_step/__init__.py": ["arguments", "sgd_step"],
    "kernels/awp_kernels/sgd_step/reference.py": ["sgd_step"],
    "kernels/awp_kernels/conv/__init__.py": ["conv", "derivatives"],
    "kernels/awp_kernels/conv/_weights.py": ["conv"],
    "kernels/awp_kernels/bn_act/__init__.py": ["bn_act", "derivatives"],
    "engine/awp_engine/attack/pgd.py": ["attack", "attack_arguments", "apgd", "layer_modes"],
    "engine/awp_engine/attack/apgd.py": ["apgd", "attack_arguments"],
    "engine/awp_engine/attack/attack.py": ["methods", "attack_arguments", "evaluation"],
    "engine/awp_engine/attack/common.py": ["attack", "attack_arguments"],
    "engine/awp_engine/attack/checks.py": ["attack_arguments"],
    "engine/awp_engine/models/answers.py": ["evaluation_trust"],
    "engine/awp_engine/models/batch_norm.py": ["layer_modes", "sync_batch_norm", "average", "methods"],
    "engine/awp_engine/step/awp_step.py": ["methods", "public_code", "precision"],
    "engine/awp_engine/step/passes.py": ["methods", "precision", "replicas"],
    "engine/awp_engine/step/update.py": ["methods", "precision"],
    "engine/awp_engine/optim/optimizer.py": ["sgd_step", "precision", "methods"],
    "engine/awp_engine/step/precision.py": ["precision", "methods"],
    "engine/awp_engine/optim/average.py": ["average"],
    "engine/awp_engine/files/atomic.py": ["checkpoint", "checkpoint_disk", "locking"],
    "engine/awp_engine/checkpoint/read.py": ["checkpoint", "hostile_files"],
    "engine/awp_engine/checkpoint/write.py": ["checkpoint", "checkpoint_disk"],
    "engine/awp_engine/checkpoint/background.py": ["checkpoint_writer"],
    "engine/awp_engine/checkpoint/model_file.py": ["checkpoint", "hostile_files"],
}

# BitOr is left out, which stands for unions of types; most pairs of arithmetic are alike
_ARITHMETIC = (
    "Add_Sub",
    "Sub_Add",
    "Mul_Div",
    "Div_Mul",
    "Div_FloorDiv",
    "FloorDiv_Div",
    "Mod_Mul",
    "Pow_Mul",
    "BitAnd_BitOr",
)
_OPERATORS = (
    "AddNot",
    "NumberReplacer",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ReplaceFalseWithTrue",
    "ReplaceTrueWithFalse",
    "ReplaceComparisonOperator",
    "ReplaceUnaryOperator",
    "ZeroIterationForLoop",
)


@dataclass(frozen=True)
class Mutant:
    """A module's text with one change."""

    line: int
    before: str
    after: str
    text: str


def _changed(before: str, after: str) -> Mutant | None:
    """The mutant, if the two differ; by the first line in which they do."""
    old, new = before.splitlines(), after.splitlines()
    first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), None)
    return None if first is None else Mutant(first + 1, old[first].strip(), new[first].strip(), after)


def _by_cosmic_ray(text: str) -> Iterator[Mutant]:
    import cosmic_ray.plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    for name in cosmic_ray.plugins.operator_names():
        short = name.removeprefix("core/")
        if not (short.startswith(_OPERATORS) or short.removeprefix("ReplaceBinaryOperator_") in _ARITHMETIC):
            continue
        operator = cosmic_ray.plugins.get_operator(name)()
        count = sum(1 for node in ast_nodes(get_ast(text)) for _ in operator.mutation_positions(node))
        for occurrence in range(count):
            mutated = mutate_code(text, operator, occurrence)
            found = None if mutated is None else _changed(text, mutated)
            if found is not None:
                yield found


def _statements_left_out(text: str) -> Iterator[Mutant]:
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        written = isinstance(target, ast.Attribute | ast.Subscript)
        if call or written or isinstance(node, ast.AugAssign | ast.Raise):
            begin, end = node.lineno - 1, node.end_lineno
            indent = lines[begin][: node.col_offset]
            if not indent.strip():
                changed = "".join([*lines[:begin], f"{indent}pass\n", *lines[end:]])
                yield Mutant(begin + 1, lines[begin].strip(), "pass", changed)


def drawn(text: str, number: int, seed: int) -> list[Mutant]:
    """As many mutants, at most one a line, in the order of lines."""

    def key(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed} {mutant.before} -> {mutant.after}".encode()).hexdigest()

    of_line: dict[int, Mutant] = {}
    for mutant in sorted([*_by_cosmic_ray(text), *_statements_left_out(text)], key=key):
        of_line.setdefault(mutant.line, mutant)
    return sorted(sorted(of_line.values(), key=key)[:number], key=lambda mutant: mutant.line)


def outcome(tree: Path, tests: list[str], limit: float) -> str:
    """What comes of the tests in the tree: "passed", "failed" or "time"."""
    paths = os.pathsep.join(str(tree / folder) for folder in ("kernels", "engine"))
    options = ["-n", "0", "-q", "-x", "-p", "no:cacheprovider"]
    with (tree / "pytest.log").open("w") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pytest",
                *options,
                *(str(next(tree.glob(f"tests/*/test_{name}.py"))) for name in tests),
            ],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            return "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            return "time"
        finally:
            # with what the tests have started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def try_module(tree: Path, module: str, each: int, seed: int) -> dict[str, object]:
    """Try a module's mutants; returns what came of them."""
    path, tests = tree / module, MODULES[module]
    text = path.read_text()
    begin = time.monotonic()
    if outcome(tree, tests, limit=900) != "passed":
        sys.exit(f"{module}: expected its tests to pass without a change, see {tree / 'pytest.log'}")
    limit = 30 + 4 * (time.monotonic() - begin)
    mutants, survivors, late = drawn(text, each, seed), [], 0
    try:
        for mutant in mutants:
            path.write_text(mutant.text)
            came = outcome(tree, tests, limit)
            late += came == "time"
            if came == "passed":
                survivors.append({"line": mutant.line, "before": mutant.before, "after": mutant.after})
                print(f"  {module}:{mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
    finally:
        path.write_text(text)
    noticed = len(mutants) - len(survivors)
    print(f"{module}: {noticed} of {len(mutants)} noticed, {late} of them by the time limit", flush=True)
    return {"tried": len(mutants), "noticed": noticed, "by time": late, "survivors": survivors}


def main() -> None:
    """Parse, copy, try, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=MODULES, metavar="MODULE", default=list(MODULES))
    parser.add_argument("--each", type=int, default=12, help="mutants a module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="results, written after every module")
    options = parser.parse_args()
    results = {}
    tree = Path(tempfile.mkdtemp())
    try:
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        built = ["kernels/awp_kernels/libawp_kernels.so", "kernels/awp_kernels/build.json"]
        for name in [*files.rstrip("\0").split("\0"), *built]:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        for module in options.modules:
            results[module] = try_module(tree, module, options.each, options.seed)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        shutil.rmtree(tree)
    tried, noticed = (sum(result[key] for result in results.values()) for key in ("tried", "noticed"))
    print(f"{noticed} of {tried} noticed")


if __name__ == "__main__":
    main()
