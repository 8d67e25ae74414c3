"""Code that users bring: which files it is, what of it is run, and what it can reach."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_own_models import config, refusal, trained

from awp_engine import load_model
from awp_engine.checkpoint import CheckpointError, export_model, read_model
from awp_engine.config import ConfigError, DataConfig, load_config
from awp_engine.evaluation.model.loaded_model import load_trained
from awp_engine.evaluation.reports.hub_folder import export_folder
from awp_engine.evaluation.run import evaluate_checkpoint
from awp_engine.files.digest import sha256_of
from awp_engine.models.trained import MODEL_FILE, described
from awp_engine.models.user_code import Code, code_of, load_code
from awp_engine.observe.report import REPORT
from awp_engine.train.run_dir import finished_report
from awp_engine.train.trainer import Trainer

FILES = {
    "net.py": "import json\nimport torch\nimport layers\nfrom pack import inner\n\n\ndef make():\n"
    "    import late\n    return layers.SIZE, inner.SIZE, late.SIZE\n",
    "layers.py": "SIZE = 1\n",
    "late.py": "SIZE = 2\n",
    "pack/__init__.py": "",
    "pack/inner.py": "from .deep import other\nSIZE = other.SIZE\n",
    "pack/deep/other.py": "import net\nSIZE = 3\n",
}
OTHERS = {"unused.py": "", "pack/unused.py": "", "torch.py": "1 / 0\n"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        yield tmp_path
    for name, module in [*sys.modules.items()]:
        # a folder without an __init__.py has a path alone
        held = getattr(module, "__dict__", {})
        if str(tmp_path) in f"{held.get('__file__')} {held.get('__path__')}":
            del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", ["net.py:make", "net:make"])
def test_code_is_what_it_imports_of_the_users_own(here: Path, name: str) -> None:
    write(here, FILES | OTHERS | {"late.py": "import pathlib\nSIZE = 2\npathlib.Path('ran').touch()\n"})
    module = "net" if name == "net:make" else ""
    before = code_of(here / "net.py", module)
    assert [file for file, _ in before.files] == sorted(FILES)
    assert all(sha256_of(here / file) == digest for file, digest in before.files)
    assert not (here / "ran").exists()
    make, code = load_code(name, "--model.name")
    assert code == before
    assert not (here / "ran").exists()
    assert make() == (1, 3, 2)
    assert (here / "ran").exists()
    assert load_code(name, "--model.name")[1] == before
    for file in FILES:
        text = (here / file).read_text()
        (here / file).write_text(text + "# changed\n")
        now = code_of(here / "net.py", module)
        assert now.sha256 != before.sha256
        assert before.changed() == str(here / file)
        (here / file).write_text(text)
    write(here, dict.fromkeys(OTHERS, "# changed\n"))
    assert code_of(here / "net.py", module) == before
    assert before.changed() == ""


def test_a_file_alone_is_its_own_digest(here: Path) -> None:
    write(here, {"net.py": "import torch\n\n\ndef make():\n    pass\n"})
    assert code_of(here / "net.py") == Code(file=str(here / "net.py"), sha256=sha256_of(here / "net.py"))


def test_a_file_that_computes_what_it_imports_is_its_whole_folder(here: Path) -> None:
    write(
        here,
        {
            "net.py": "import parts\n\n\nmake = parts.all\n",
            "parts/__init__.py": "import importlib\nfrom pathlib import Path\n\nfound = [importlib.import_module("
            "f'.{p.stem}', __name__) for p in Path(__file__).parent.glob('[a-z]*.py')]\n\n\n"
            "def all():\n    return sorted(part.NAME for part in found)\n",
            "parts/one.py": "from shared import NAME\n",
            "parts/two.py": "NAME = 'two'\n",
            "shared.py": "NAME = 'one'\n",
        },
    )
    make, code = load_code("net.py:make", "--method")
    assert make() == ["one", "two"]
    names = ["net.py", "parts/__init__.py", "parts/one.py", "parts/two.py", "shared.py"]
    assert [name for name, _ in code.files] == names


def test_what_the_call_imports_from_elsewhere_is_part_of_it_after_the_call(here: Path) -> None:
    text = "import sys\n\n\ndef make():\n    sys.path.append(%r)\n    import far\n    return far.SIZE\n"
    write(here, {"net.py": text % str(here / "lib"), "lib/far.py": "SIZE = 4\n"})
    make, code = load_code("net.py:make", "--method")
    assert code.files == ()
    assert make() == 4
    assert [name for name, _ in load_code("net.py:make", "--method")[1].files] == ["lib/far.py", "net.py"]


def test_installed_packages_are_no_part_of_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(here, {"net.py": "import bought\n\nSIZE = bought.SIZE\n", "target/bought.py": "SIZE = 1\n"})
    (here / "target" / "bought-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(here / "target")
    assert load_code("net.py:SIZE", "--method")[1].files == ()


def test_what_has_changed_is_run_anew_in_the_same_process(here: Path) -> None:
    write(here, FILES)
    assert load_code("net.py:make", "--method")[0]() == (1, 3, 2)
    write(here, {"layers.py": "SIZE = 1000\n", "pack/deep/other.py": "SIZE = 3000\n"})
    assert load_code("net.py:make", "--method")[0]() == (1000, 3000, 2)


def test_two_files_of_one_name_are_told_apart_or_refused(here: Path) -> None:
    write(here / "a", {"net.py": "import layers\n", "layers.py": "SIZE = 1\n"})
    write(here / "b", {"net.py": "import layers\n", "layers.py": "SIZE = 2\n"})
    assert load_code("a/net.py:layers.SIZE", "--model.name")[0] == 1
    with pytest.raises(ConfigError) as refused:
        load_code("b/net.py:layers.SIZE", "--model.name")
    assert f"`import layers` in {here / 'b' / 'net.py'} gives {here / 'a' / 'layers.py'}, and not" in str(refused.value)
    write(here / "b", {"net.py": "SIZE = 3\n"})
    assert load_code("b/net.py:SIZE", "--model.name")[0] == 3


def test_nothing_beside_it_replaces_what_is_imported_later(here: Path) -> None:
    """Also where a run names the directory of its package; what lies there can still be imported by a function."""
    write(
        here / "home", {"mine/__init__.py": "", "mine/nets.py": "def make():\n    import near\n    return near.SIZE\n"}
    )
    write(here / "home", {"near.py": "SIZE = 5\n", "this.py": "1 / 0\n", "colorsys.py": "1 / 0\n"})
    write(here, {"mine.py": "1 / 0\n"})
    sys.modules.pop("colorsys", None)
    make, code = load_code("mine.nets:make", "--model.name", root=here / "home")
    assert code.file == str(here / "home" / "mine" / "nets.py")
    assert make() == 5
    assert not str(importlib.import_module("colorsys").__file__).startswith(str(here))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nte.py:make", "expected a Python file {here}/nte.py, which is not there; did you mean net.py?"),
        ("net.py:mak", "{here}/net.py has no mak; did you mean make?"),
        ("nowhere.nets:make", "nowhere.nets:make: its import raised ModuleNotFoundError: No module named 'nowhere'"),
        ("stops.py:make", "stops.py:make: its import raised SystemExit: usage ({here}/stops.py, line 3)"),
        ("deep.py:make", "deep.py:make: its import raised KeyError: 'one two' ({here}/within.py, line 2)"),
        ("wrong.py:make", "wrong.py:make: its import raised SyntaxError: '(' was never closed (wrong.py, line 1)"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_users_own_line(here: Path, name: str, told: str) -> None:
    write(
        here,
        {
            "net.py": "def make():\n    pass\n",
            "stops.py": "import sys\n\nsys.exit('usage')\n",
            "deep.py": "import json\nimport within\n\njson.loads('{}', object_hook=within.fails)\n",
            "within.py": "def fails(found):\n    found['one\\ntwo']\n",
            "wrong.py": "make(\n",
        },
    )
    with pytest.raises(ConfigError) as refused:
        load_code(name, "--method")
    assert str(refused.value) == "--method: " + told.format(here=here).replace("'one two'", r"'one\ntwo'")


OWN = {
    "mine.py": "import layers\n\n\ndef make(num_classes):\n    import late\n"
    "    return layers.net(num_classes * late.ONE)\n",
    "layers.py": "from torch import nn\n\n\ndef net(classes):\n    return nn.Sequential(nn.Flatten(), "
    "nn.Linear(64, classes))\n",
    "late.py": "ONE = 1\n",
}


FAR = """
import sys


def make(num_classes):
    sys.path.append(%r)
    import far
    return far.net(num_classes)
"""


def test_a_run_goes_on_and_loads_by_all_of_its_code_alone(here: Path) -> None:
    write(here, OWN)
    trained("mine.py:make")
    digest = code_of(here / "mine.py").sha256
    assert json.loads((here / "run" / "report.json").read_text())["made_by"] == {"model": digest}
    assert load_model("run").name == "mine.py:make"
    for file, text in OWN.items():
        write(here, {file: text + "# changed\n"})
        with pytest.raises(CheckpointError) as refused:
            load_model("run")
        assert f"is not run because a file says so, as {here / file} has changed since" in str(refused.value)
        assert "\n" not in str(refused.value)
        with pytest.raises(
            ConfigError, match=r"^--run-dir: run was trained by other code of --model\.name mine\.py:make"
        ):
            Trainer(config("mine.py:make"))
        write(here, {file: text})
    assert load_model("run").name == "mine.py:make"
    Trainer(config("mine.py:make"))
    # a seal from before the files that are imported were part of it
    tensors, metadata = read_model(here / "run" / MODEL_FILE)
    description = described(metadata, here)
    alone = Code(file=str(here / "mine.py"), sha256=sha256_of(here / "mine.py"))
    older = type(description)(**{**vars(description), "code": alone}).sealed()
    export_model(here / "older.safetensors", tensors, {**metadata, **older.to_metadata()})
    with pytest.raises(CheckpointError, match=r"as it imports late\.py, which its seal says nothing of; if you trust"):
        load_model("older.safetensors")
    write(here, {"mine.py": OWN["layers.py"].replace("net", "make").replace("classes", "num_classes")})
    alone = code_of(here / "mine.py")
    assert alone.files == ()
    older = type(description)(**{**vars(description), "code": alone}).sealed()
    assert "files" not in json.loads(older.to_metadata()["model"])["code"]
    export_model(here / "alone.safetensors", tensors, {**metadata, **older.to_metadata()})
    assert load_model("alone.safetensors").name == "mine.py:make"


def test_an_ended_run_knows_its_code_by_what_the_call_imports_too(here: Path) -> None:
    """In a process that has not made the model."""
    write(here, {"mine.py": FAR % str(here / "lib"), "lib/far.py": OWN["layers.py"]})
    trained("mine.py:make")
    digest = json.loads((here / "run" / REPORT).read_text())["made_by"]["model"]
    del sys.modules["far"]
    sys.path.remove(str(here / "lib"))
    assert code_of(here / "mine.py").sha256 != digest
    assert finished_report(config("mine.py:make")) is not None
    write(here, {"lib/far.py": OWN["layers.py"] + "# changed\n"})
    with pytest.raises(ConfigError, match=r"^--run-dir: run was trained by other code of --model\.name mine\.py:make"):
        finished_report(config("mine.py:make"))


def test_a_report_says_what_made_the_run(here: Path) -> None:
    """Files and code of the user; a run that goes on says so of the weights that it has started from."""
    data = "import numpy as np\nimport sizes\n\n\ndef images(split):\n    pixels = np.random.default_rng(0)"
    data += ".integers(0, 256, (60, 8, 8), np.uint8)\n    return pixels, np.arange(60) % sizes.CLASSES\n"
    method = (
        "from awp_engine.step.objectives import AdversarialTraining\n\n\nclass Same(AdversarialTraining):\n    pass\n"
    )
    files = {"photos.py": data, "sizes.py": "CLASSES = 10\n", "same.py": method, "w.json": json.dumps([1.0] * 10)}
    write(here, OWN | files)
    trained("mine.py:make")
    start = here / "start.safetensors"
    (here / "run" / MODEL_FILE).rename(start)
    (here / "run").rename("before")
    settings = config(
        f"{here}/mine.py:make",
        model={"pretrained": start},
        data=DataConfig(name=f"{here}/photos.py:images", class_weights=f"{here}/w.json"),
        method=f"{here}/same.py:Same",
    )
    Trainer(settings).run()
    made_by = json.loads((here / "run" / REPORT).read_text())["made_by"]
    assert made_by == {
        "model": code_of(here / "mine.py").sha256,
        "data": code_of(here / "photos.py").sha256,
        "method": sha256_of(here / "same.py"),
        "class_weights": sha256_of(here / "w.json"),
        "pretrained": sha256_of(start),
    }
    evaluate_checkpoint(
        Path("run"), attacks=["clean"], gates_limit=None, limit=20, data_name=f"{here}/photos.py:images"
    )
    require_folder_without_paths(here, start)
    (here / "run" / REPORT).unlink()
    start.unlink()
    assert Trainer(settings).made_by == made_by


def require_folder_without_paths(here: Path, start: Path) -> None:
    """What `awp export --hub` writes of the run says nothing of where its files were."""
    written = export_folder(load_trained(here / "run"), here / "hub")
    assert {path.name for path in written} == {"README.md", "config.json", "model.safetensors", "learning_curves.png"}
    text = {path.name: path.read_bytes() for path in written}
    for place in {str(here), str(here.resolve()), here.name, str(Path.home())} - {"/"}:
        assert not [name for name, content in text.items() if place.encode() in content]
    shown = load_config(here / "hub" / "config.json")
    assert (shown.model.name, shown.data.name, shown.method) == ("mine.py:make", "photos.py:images", "same.py:Same")
    assert (shown.model.pretrained, shown.data.class_weights) == (Path(start.name), "w.json")
    assert b"# mine.py:make, Same-AWP on photos.py:images" in text["README.md"]
    own, public = load_model("run"), load_model(here / "hub" / MODEL_FILE, model="mine.py:make")
    assert all(torch.equal(value, public.state_dict()[name]) for name, value in own.state_dict().items())
    # a run of somebody's may have a link to a file of the user's in place of its curves
    (here / "secret").write_text("key")
    (here / "run" / "learning_curves.png").unlink()
    (here / "run" / "learning_curves.png").symlink_to(here / "secret")
    with pytest.raises(CheckpointError, match=r"learning_curves\.png: cannot be read: is a link"):
        export_folder(load_trained(here / "run"), here / "other")
    assert not (here / "other").exists()


def test_two_of_one_name_in_a_run_are_refused_before_it_begins(here: Path) -> None:
    data = "import layers\n\n\ndef images(split):\n    raise AssertionError\n"
    write(here / "data", {"photos.py": data, "layers.py": "SIZE = 1\n"})
    load_code("data/photos.py:images", "--data.name")
    write(here, OWN)
    assert "rename one of them" in refusal("mine.py:make")
