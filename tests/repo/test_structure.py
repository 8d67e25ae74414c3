"""The house keeps its shape: imports go down, and what reads like the algorithm stays short."""

from pathlib import Path

import draw_architecture
import pytest
import structure

MODULES = structure.modules(structure.ROOT)
IMPORTS = structure.imports(MODULES)


def test_no_import_goes_upward() -> None:
    assert [str(one) for one in structure.upward(IMPORTS)] == []
    assert structure.circles(structure.wing_arrows(IMPORTS)) == []


def test_every_wing_has_its_floor_and_is_there() -> None:
    found = {module.wing for module in MODULES} - {structure.DOOR}
    assert found == set(structure.FLOOR)


def test_few_modules_lie_outside_the_wings() -> None:
    assert len(structure.measure(structure.ROOT)["top_level_modules"]) <= structure.MODULES


def test_the_trainer_is_short() -> None:
    trainer = structure.trainer_class(MODULES)
    assert trainer is not None
    assert structure.lines_of(trainer) <= structure.TRAINER_LINES


def test_the_step_is_short() -> None:
    step = structure.step_class(MODULES)
    assert step is not None
    assert structure.lines_of(step) <= structure.STEP_LINES


def test_the_loop_calls_the_algorithm() -> None:
    way = structure.chain(MODULES)
    assert 0 < len(way) <= structure.HOPS, way


def test_one_value_carries_an_attack() -> None:
    assert len(structure.representations(MODULES)) <= structure.REPRESENTATIONS


def test_the_picture_is_up_to_date() -> None:
    drawn = draw_architecture.PICTURE.read_text()
    assert drawn == draw_architecture.picture(), "python tests/repo/draw_architecture.py"


@pytest.mark.parametrize(
    ("path", "statement", "complaint"),
    [
        ("optim/sgd.py", "def step():\n    from awp_engine.step import build", "awp_engine.step.build"),
        ("attack/pgd.py", "from ..train.trainer import Trainer", "awp_engine.train.trainer"),
        ("models/__init__.py", "import awp_engine.cli", "awp_engine.cli"),
        ("cellar/wine.py", "from awp_engine.config import Config", "awp_engine.config"),
    ],
)
def test_an_import_upward_is_named(tmp_path: Path, path: str, statement: str, complaint: str) -> None:
    package = tmp_path / "engine" / "awp_engine"
    files = {"step/build.py": "", "train/trainer.py": "", "cli/__init__.py": "", "config/__init__.py": ""}
    files |= {"train/setup.py": "from awp_engine.step import build", path: statement}
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (only,) = structure.upward(structure.imports(structure.modules(tmp_path)))
    line = statement.count("\n") + 1
    assert f"{Path(path).name}:{line}: " in str(only)
    assert str(only).endswith(f"imports {complaint}")


def test_kernels_know_nothing_of_the_engine(tmp_path: Path) -> None:
    for name, text in {"engine/awp_engine/__init__.py": "", "kernels/awp_kernels/awp.py": "import awp_engine"}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    (only,) = structure.upward(structure.imports(structure.modules(tmp_path)))
    assert str(only) == "awp.py:1: awp_kernels.awp imports awp_engine"
