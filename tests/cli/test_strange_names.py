"""Names and numbers that nobody expects: nothing ends in a traceback, no entry is missing, JSON stays JSON."""

import functools
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError
from awp_engine.cli.command_line import parse_train
from awp_engine.config import AttackConfig, Config, DataConfig, EvaluationConfig, ModelConfig, to_json
from awp_engine.evaluation.reports.figures import picture_cards
from awp_engine.evaluation.reports.results import Pictures
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.text import json_text, printable, shortened
from awp_engine.landscape.directions import Direction, random_direction
from awp_engine.landscape.moving import WorkingCopy
from awp_engine.landscape.plots import plot_curves, plot_flatness, plot_surfaces
from awp_engine.models import build_model
from awp_engine.models.trained import MODEL_FILE, ModelDescription
from awp_engine.observe.drawing import attempt, drawable, legend, save
from awp_engine.observe.metrics import read_metrics
from awp_engine.observe.report import plot_learning_curves, print_table
from awp_engine.observe.run_log import RunLog
from awp_engine.train.run_dir import prepare_run_dir
from awp_engine.train.trainer import Trainer

NAMES = [
    "_x",
    r"$\foo$",
    "$",
    "[bold]red[/]",
    "[/]",
    "a\nb\r\tc",
    "\x1b[31mred\x1b[0m",
    "\udcff\udc80",
    "<script>alert(1)</script>",
    "猫\U0001f408",
    "‮evil",
    "",
    "x" * 5000,
]
KEPT = checkpoint.Retention()
PNG = b"\x89PNG\r\n\x1a\n"


def strict_loads(text: str) -> Any:
    """JSON as RFC 8259 has it, of UTF-8."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} in JSON")

    return json.loads(text.encode(), parse_constant=refuse)


@given(text=st.text() | st.sampled_from(NAMES), most=st.integers(2, 60))
def test_text_is_printable_and_short(text: str, most: int) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()
    short = shortened(shown, most)
    assert len(short) <= most
    assert short == shown if len(shown) <= most else short[0] == shown[0] and (most < 3 or short[-1] == shown[-1])
    assert drawable(text).isprintable()


@given(value=st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_json_has_no_nan(value: Any) -> None:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return b is None if isinstance(a, float) and not math.isfinite(a) else a == b

    assert same(value, strict_loads(json_text({"key": value, "path": Path("a")}))["key"])


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_show_text_as_it_is(terminal: bool) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as a real output
    console = Console(file=file, force_terminal=terminal, width=20_000, color_system=None)
    print_table([{name: name, "b": "1"} for name in NAMES[:1]], title=NAMES[3], console=console)
    print_table([{"run": name, "[bold]": "1"} for name in NAMES], title="[/]", console=console)
    file.flush()
    text = file.buffer.getvalue().decode()
    for name in [*NAMES, "[bold]"]:
        assert printable(name) in text
    assert "\x1b[31m" not in text


def test_every_entry_is_in_the_legend(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    legend(axes, [(axes.plot([0, 1], [0, n])[0], name) for n, name in enumerate(NAMES)])
    shown = axes.get_legend()
    assert shown is not None
    drawn = shown.get_texts()
    assert [text.get_text() for text in drawn] == [drawable(name) for name in NAMES]
    assert not any(text.get_parse_math() for text in drawn)
    assert [drawable(name) for name in NAMES[:2]] == NAMES[:2]
    assert drawable("猫") == r"\u732b"
    assert len(set(map(drawable, ("x" * 99 + "1", "x" * 99 + "2")))) == 2
    save(axes.figure, tmp_path / "legend.png")
    assert [path.name for path in tmp_path.iterdir()] == ["legend.png"]


NUMBERS = {
    "wide": [[1e-30, 1.0, 5e118]],
    "huge": [[1.7e308, 0.5, -1.7e308]],
    "some": [[math.nan, 0.5, math.inf], [math.nan] * 3, [0.1, 0.2, -math.inf]],
    "none": [[math.nan, math.inf, -math.inf]],
}


def curves(label: str, values: list[float]) -> dict[str, Any]:
    """A run as all three figures take it."""
    spans = {"mean": values, "low": values, "high": values}
    points = [{"xi": 0.1 * (n + 1), "value": v, "low": v, "high": v} for n, v in enumerate(values)]
    amounts = [-1e30, 0.0, 1e30]
    return {
        "label": label,
        "curves": {
            kind: {"amounts": amounts, **spans, "by_direction": [values, values], "spread": None}
            for kind in ("random", "adversarial")
        },
        "surface": {"kinds": ["random", "random"], "first": amounts, "second": amounts, "mean": [values] * 3},
        "average": points,
        "worst": points,
    }


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_figures_of_any_numbers(tmp_path: Path, numbers: list[list[float]]) -> None:
    path = tmp_path / "figure.png"
    runs = [curves(name, values) for name, values in zip(NAMES, numbers, strict=False)]
    said: list[str] = []
    for draw in (plot_curves, plot_flatness, plot_surfaces):
        figure = attempt("figure", functools.partial(draw, runs, "title"), said.append)
        if figure is not None:
            save(figure, path)
        assert path.read_bytes().startswith(PNG)
    few = "warning: figure could not be drawn: no point has a finite loss; the numbers are written"
    assert said == ([] if any(abs(value) < 1e150 for values in numbers for value in values) else [few])
    names = ("loss", "lr", "train_pgd_accuracy", "held_out_pgd_accuracy")
    metrics = [{"epoch": n + 1, **dict.fromkeys(names, value)} for n, value in enumerate(numbers[0])]
    assert plot_learning_curves(tmp_path, metrics, 1).read_bytes().startswith(PNG)


def test_figures_of_any_names(tmp_path: Path) -> None:
    runs = [curves(name, [0.1, 0.2, 0.3]) for name in NAMES]
    for draw in (plot_curves, plot_flatness, plot_surfaces):
        save(draw(runs[:5] if draw is plot_surfaces else runs, "title"), tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(PNG)


def test_pictures_of_any_class_names() -> None:
    count = len(NAMES)
    images, labels = torch.zeros(count, 1, 8, 8), tuple(range(count))
    pictures = Pictures(
        attack="a", clean=images, attacked=images, labels=labels, clean_predictions=labels, predictions=labels
    )
    cards = picture_cards(pictures, NAMES)
    assert all(card.clean.startswith(PNG) and card.clean_answer.isprintable() for card in cards)


LINES = [
    '{"epoch": 2, "loss": "x", "lr": "0.1", "train_pgd_accuracy": [1], "held_out_pgd_accuracy": {}}',
    '{"epoch": 3, "loss": NaN, "lr": Infinity, "train_pgd_accuracy": true, "held_out_pgd_accuracy": 1e999}',
    f'{{"epoch": 4, "loss": 1{"0" * 400}, "lr": 0.1}}',
    '{"epoch": 2.5}',
    '{"epoch": true}',
    '{"epoch": 0}',
    '{"epoch": -3}',
    f'{{"epoch": 1{"0" * 30}}}',
    f'{{"epoch": 1{"0" * 5000}}}',
    '{"epoch": 5, "lo',
    "[1, 2]",
    "null",
    "[" * 100_000,
    "\0",
    "not JSON",
    "",
]


@given(
    lines=st.lists(st.sampled_from(LINES).map(str.encode) | st.binary(max_size=20), max_size=8),
    seed=st.randoms(use_true_random=False),
)
@settings(max_examples=20)
def test_any_metrics_are_read_as_numbers(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], seed: Any
) -> None:
    run = tmp_path_factory.mktemp("run")
    good = b'{"epoch": 1, "loss": 2.5, "lr": 0.1}'
    lines = [*lines, good]
    seed.shuffle(lines)
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found = read_metrics(run)
    assert {"epoch": 1, "loss": 2.5, "lr": 0.1} in found
    epochs = [entry["epoch"] for entry in found]
    assert epochs == sorted(set(epochs))
    for entry in found:
        assert all(v is None or (type(v) in (int, float) and math.isfinite(v)) for v in entry.values())


def test_a_run_goes_on_over_a_spoiled_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(LINES))
    console = Console(file=io.StringIO())
    with RunLog(tmp_path, "{}", 4, 1.0, start_epoch=3, console=console) as log:
        log.message("a\nb \udcff")
        log.end_epoch(4, {"loss": math.nan, "lr": 0.1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strict_loads(line)["epoch"] for line in lines] == [2, 3, 4]
    assert strict_loads(lines[0])["lr"] is None
    assert plot_learning_curves(tmp_path, read_metrics(tmp_path), 2).exists()
    assert r"a\nb \udcff" in console.file.getvalue()


def test_checkpoints_hold_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state: expected what JSON holds"):
        checkpoint.save(tmp_path, "epoch-1", {}, {"best": math.nan}, checkpoint.Retention())


def test_files_take_names_that_are_not_utf_8(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "page.html", "<p>a\udcff")
    assert (tmp_path / "page.html").read_text() == r"<p>a\udcff"


def test_moves_that_are_not_finite_are_no_moves_of_nothing() -> None:
    """Where w + v is not finite there is no loss; least of all the one at w."""
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=1).eval()
    copy = WorkingCopy(model)
    direction = random_direction(model, seed=0)
    x = torch.rand(2, 1, 8, 8)
    at_w = model(x)
    spoiled = Direction(tensors={n: t.clone() for n, t in direction.tensors.items()}, scope="layer")
    next(iter(spoiled.tensors.values())).view(-1)[3] = torch.nan
    for followed, amount in ((direction, 1e39), (spoiled, 0.5)):
        copy.move_(followed, amount)
        assert copy.model(x).isnan().all()
        copy.move_(direction, 0.0)
        assert torch.equal(copy.model(x), at_w)
    copy.move_(direction, 0.1)
    assert copy.model(x).isfinite().all()


@pytest.fixture(scope="module")
def strange_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Random weights on digits, in directories of strange names."""
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for name in ("_x", r"$\foo$", "[bold]<b>\n\udcff"):
        run = folder / name
        config = Config(
            run_dir=run,
            model=ModelConfig(width=1),
            attack=AttackConfig(epsilon="0.2", step_size="0.05"),
            evaluation=EvaluationConfig(steps=1, batch_size=100),
        )
        run.mkdir()
        (run / "config.json").write_text(to_json(config))
        described = ModelDescription(
            name="preact-resnet-digits",
            num_classes=10,
            mean=(0.3,),
            std=(0.3,),
            width=1,
            activation="relu",
            class_names=tuple("0123456789"),
        )
        checkpoint.export_model(run / MODEL_FILE, described.build().state_dict(), described.to_metadata())
        runs.append(run)
    return runs


SMALL = ["--images", "6", "--steps", "1", "--points", "3", "--points-2d", "3", "--draws", "1", "--epochs", "1"]


def test_landscape_of_runs_of_any_name(strange_runs, monkeypatch, capsys, tmp_path) -> None:
    out = tmp_path / "\udcff$_out"
    flags = ["--mode", "1d,2d,flatness", "--attempts", "1", "--output", out, *SMALL]
    assert not run_command("landscape", monkeypatch, *strange_runs, *flags)
    said = capsys.readouterr().out
    assert "could not be drawn" not in said
    assert said.count("wrote ") == 9
    labels = ["_x", r"$\\foo$", r"[bold]<b>\n\xff"]
    for name in ("curves", "surface", "flatness"):
        found = strict_loads((out / f"{name}.json").read_text())
        assert [run["label"] for run in found["runs"]] == labels
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
        assert found["losses_not_finite"] == 0
    assert all(label in said for label in labels)


def test_landscape_of_a_radius_beyond_fp32(strange_runs, monkeypatch, capsys, tmp_path) -> None:
    flags = ["--mode", "1d,2d", "--radius", "1e30", "--output", tmp_path / "out", *SMALL]
    assert not run_command("landscape", monkeypatch, strange_runs[0], *flags)
    for name in ("curves", "surface"):
        found = strict_loads((tmp_path / "out" / f"{name}.json").read_text())
        assert found["losses_not_finite"] > 0
        means = (
            found["runs"][0]["curves"]["random"]["mean"] if name == "curves" else found["runs"][0]["surface"]["mean"]
        )
        assert means[0] is None or means[0][0] is None
        middle = means[1] if name == "curves" else means[1][1]
        assert middle == pytest.approx(2.3, abs=1)
    assert "losses are not finite" in capsys.readouterr().out


def test_a_landscape_that_cannot_be_drawn_is_measured(strange_runs, monkeypatch, capsys, tmp_path) -> None:
    (tmp_path / "curves.png").mkdir()
    assert not run_command("landscape", monkeypatch, strange_runs[0], "--output", tmp_path, *SMALL)
    said = capsys.readouterr().out
    assert f"warning: {tmp_path / 'curves.png'} could not be drawn" in said
    assert strict_loads((tmp_path / "curves.json").read_text())["runs"][0]["label"] == "_x"
    assert [line.split("/")[-1] for line in said.splitlines() if line.startswith("wrote")] == [
        "curves.json",
        "curves.safetensors",
    ]


def test_a_diverged_run_leaves_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "_$\\foo$\udcff"
    config = Config(
        run_dir=run,
        epochs=1,
        global_batch_size=256,
        device="cpu",
        data=DataConfig(pad=1),
        model=ModelConfig(width=1),
        attack=AttackConfig(steps=1),
        evaluation=EvaluationConfig(steps=1),
    )
    trainer = Trainer(config)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(torch.nan)
    (run / "learning_curves.png").mkdir()
    trainer.run()
    report = strict_loads((run / "report.json").read_text())
    assert report["selected_epoch"] == 1
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    # not 0, though no step was taken
    assert strict_loads(line)["loss"] is None
    assert strict_loads(line)["skipped_steps"] == 6
    assert "learning_curves.png could not be drawn" in capsys.readouterr().out
    # numbers of a state that somebody wrote
    found = checkpoint.load_latest(run / "checkpoints")
    assert found is not None
    for key, value in (("epoch", "1"), ("best_robust", None), ("step", 10**400)):
        checkpoint.save(found.path.parent, "epoch-2", found.tensors, found.state | {key: value}, KEPT)
        with pytest.raises(CheckpointError, match=f"has it in another shape: {key} .*expected a finite number"):
            Trainer(config)


def test_the_first_of_two_methods_is_shown_where_the_second_fails(tmp_path, monkeypatch, capsys) -> None:
    flags = "--epochs 1 --global-batch-size 512 --device cpu --compare-without-awp --data.pad 1 --model.width 1"
    flags += f" --attack.steps 1 --evaluation.steps 1 --run-dir {tmp_path / 'run'}"
    prepare_run_dir(parse_train(flags.split()))
    (tmp_path / "run" / "without-awp").mkdir()
    (tmp_path / "run" / "without-awp" / "mine").touch()
    assert run_command("train", monkeypatch, *flags.split()) == 2
    said = capsys.readouterr()
    assert "AT-AWP" in said.out
    assert f"results in {tmp_path / 'run'}" in said.out
    assert "without-awp is not empty" in said.err
