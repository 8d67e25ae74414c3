"""The evaluation as a user runs it: reports, receipts, gates, refusals."""

import dataclasses
import hashlib
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import forked
import pytest
import torch
from commands import run_command
from digits_model import clean_model, description, digits, robust_model, write_run
from disks import small_tmpfs
from places import ENGINE
from torch import nn

from awp_engine import checkpoint
from awp_engine.data import eval_batches
from awp_engine.evaluation import spread
from awp_engine.evaluation.attacks.autoattack import Budget
from awp_engine.evaluation.attacks.named import EvaluationError, Threat, Trial, measuring, parse_attack
from awp_engine.evaluation.certify import certify_checkpoint
from awp_engine.evaluation.gates.run import run_gates
from awp_engine.evaluation.reports.confidence import interval
from awp_engine.evaluation.reports.receipt import percent, split_hash
from awp_engine.evaluation.reports.results import Measurement
from awp_engine.evaluation.reports.robustbench import Publication, leaderboard_epsilon, model_info
from awp_engine.evaluation.run import evaluate_checkpoint
from awp_engine.evaluation.smoothing import Smoothing
from awp_engine.evaluation.suite import measure
from awp_engine.observe.report import print_table

SCRIPT = ENGINE / "evaluate.py"
THREAT = Threat(epsilon=Fraction(1, 5), norm="linf")
PUBLICATION = Publication(
    link="https://arxiv.org/abs/2004.05884",
    name="Adversarial Weight Perturbation Helps Robust Generalization",
    authors="Dongxian Wu, Shu-Tao Xia, Yisen Wang",
    venue="NeurIPS 2020",
    architecture="PreActResNet-8",
    additional_data=False,
)
# a RobustBench file of 2024, for its keys and their types
LEADERBOARD = {
    "link": str,
    "name": str,
    "authors": str,
    "additional_data": bool,
    "number_forward_passes": int,
    "dataset": str,
    "venue": str,
    "architecture": str,
    "eps": str,
    "clean_acc": str,
    "reported": str,
    "autoattack_acc": str,
    "unreliable": bool,
    "doubts": list,
}


def evaluate_command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run(SCRIPT, *arguments, "--threads", "1")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "robust")


@pytest.fixture(scope="module")
def reported(run_dir) -> tuple[str, dict, str]:
    """What one command prints and leaves."""
    attacks = ["clean", "fgsm", "pgd5", "cw5", "regional-frame-45", "regional-pixels-28"]
    done = evaluate_command(
        run_dir,
        "--attacks",
        *attacks,
        "--limit",
        "60",
        "--gates-limit",
        "40",
        "--transfer-to",
        run_dir / "checkpoints" / "epoch-2",
    )
    assert done.returncode == 0, done.stderr
    folder = run_dir / "evaluation"
    return done.stdout, json.loads((folder / "evaluation.json").read_text()), (folder / "evaluation.html").read_text()


def test_the_report_is_a_receipt(run_dir, reported):
    _, report, _ = reported
    receipt = report["receipt"]
    assert receipt["checkpoint"]["sha256"] == hashlib.sha256((run_dir / "model.safetensors").read_bytes()).hexdigest()
    assert receipt["transfer_to"]["name"] == "epoch-2"
    assert receipt["data"]["sha256_of_split"] == split_hash(digits().test)
    assert receipt["data"]["sha256_of_these_images"] == split_hash(spread(digits().test, 60))
    assert (receipt["data"]["images"], receipt["data"]["images_in_split"]) == (60, 360)
    assert receipt["data"]["chosen"] == "evenly spread"
    assert (receipt["epsilon"], receipt["norm"], receipt["step_size"]) == ("1/5", "linf", "1/20")
    assert receipt["normalisation"]["mean"] == pytest.approx(digits().mean)
    assert receipt["normalisation"]["std"] == pytest.approx(digits().std)
    assert receipt["batch_norm"].startswith("eval")
    assert receipt["precision"]["weights"] == ["float32"]
    assert receipt["precision"]["convolution"] == receipt["precision"]["matmul"] == "ieee"
    assert receipt["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert receipt["versions"]["pyautoattack"]
    for key in ("seed", "batch_size", "device", "threads", "commit", "parameters"):
        assert key in receipt
    by_name = {row["attack"]: row for row in report["attacks"]}
    assert by_name["cw5"]["parameters"]["loss"].startswith("margin")
    assert by_name["fgsm"]["parameters"]["step_size"] == "1/5"


def test_split_hash_sees_images_labels_ids_and_order():
    split = spread(digits().test, 5)
    flipped = split.select(torch.tensor([1, 0, 2, 3, 4]))
    relabelled = type(split)(images=split.images, labels=split.labels + 1, ids=split.ids)
    renumbered = type(split)(images=split.images, labels=split.labels, ids=split.ids + 1)
    assert len({split_hash(s) for s in (split, flipped, relabelled, renumbered, spread(split, 4))}) == 5


def test_counts_add_up(reported):
    out, report, _ = reported
    rows = {row["attack"]: row for row in report["attacks"]}
    assert [row["images"] for row in rows.values()] == [60] * 6
    x, y, *_ = next(eval_batches(spread(digits().test, 60), 60))
    with torch.no_grad():
        right = int((robust_model()(x).argmax(1) == y).sum())
    assert rows["clean"]["right"] == report["clean"]["right"] == right
    assert all(row["right"] <= right for row in rows.values())
    worst = report["robust_to_all"]
    assert worst["over"] == ["clean", "fgsm", "pgd5", "cw5"]
    assert worst["right"] <= min(rows[name]["right"] for name in worst["over"])
    for name in ("fgsm", "pgd5", "cw5"):
        assert rows[name]["in_ball"]
        assert 0 < rows[name]["transferable"] <= right - rows[name]["right"]
        assert rows[name]["transferred"] <= rows[name]["transferable"]
    regional = rows["regional-pixels-28"]
    assert regional["in_ball"] is None
    assert regional["details"]["flipped"] == right - regional["right"]
    assert 0 < regional["details"]["L0"] <= 18  # 28% of 64 pixels
    assert f"{rows['pgd5']['accuracy_percent']}%" in out
    assert "of 9 passed, on 40 images" in out
    assert worst["confidence_interval"] == list(interval(worst["right"], 60))
    assert str(interval(worst["right"], 60)) in out.partition("worst of fgsm, pgd5, cw5")[2]


def test_the_page_needs_nothing_else(reported):
    _, report, page = reported
    sources = re.findall(r"(?:src|href)\s*=\s*(.{23})", page)
    assert all(source.startswith(('"data:image/png;base64,', '"data:,"')) for source in sources)
    assert not re.search(r'<script|<link(?! rel="icon")|<iframe|@import|url\(|https?://', page)
    # both curves, the learning curves, and three for every picture of every attack but clean
    assert page.count("data:image/png;base64,") == 3 + 3 * page.count("<figcaption>class ")
    assert len(re.findall(r'<div class="pictures"><figure>', page)) == 5
    weights = report["receipt"]["checkpoint"]
    assert weights["sha256"] in page
    assert (weights["run"], weights["method"], weights["gamma"]) == ("robust", "AT-AWP", 0.002)
    for told in ("robust, seed 0", "AT-AWP", "0.002", "preact-resnet-digits (width 6), ", "digits, test split, 60"):
        assert told in page.partition("<h2>")[0], told
    settings = [f"fgsm: steps 1, step size {report['receipt']['epsilon']}", "pgd5: steps 5, step size 1/20"]
    assert all(f"<li>{told}, random starts 1</li>" in page for told in settings)
    assert "<dt>normalisation</dt><dd>mean 0.3" in page
    assert "more steps do not help the defender" in page


def test_what_is_asked_for_is_escaped_in_the_page(tmp_path, reported):
    from awp_engine.evaluation.reports.page import render_page

    _, report, _ = reported
    hostile = {**report, "receipt": {**report["receipt"], "note": "<script>alert(1)</script>"}}
    assert "<script" not in render_page(hostile, [[{"attack": "<script>"}]], [])


@pytest.mark.parametrize("classes", [10, 1000])
def test_the_page_has_a_table_of_classes(reported, classes):
    from awp_engine.evaluation.reports.page import render_page

    _, report, _ = reported
    row = {"class": "<script>", "images": 8, "clean": 7, "attacked": {"pgd5": 3}, "worst": 2}
    page = render_page({**report, "per_class": [row] * classes}, [[{"attack": "a"}]], [])
    assert page.count("37.50%</td>") == classes
    assert ("all 1000 classes" in page) == (classes == 1000)
    assert "<script" not in page


def test_the_page_begins_with_the_number_to_believe(reported):
    from awp_engine.evaluation.reports.page import render_page

    _, report, page = reported
    worst = f"{report['robust_to_all']['accuracy_percent']}%"
    low, high = report["robust_to_all"]["confidence_interval"]
    assert f'<b class="">{worst}</b>Robust accuracy<br>' in page
    assert f"{low:.1%} to {high:.1%} with 95% confidence; 60 images, under each of fgsm, pgd5, cw5" in page
    stronger = {"attack": "BPDA", "right": 6, "images": 50, "accuracy": 0.12, "confidence_interval": [0.045, 0.243]}
    receipt = report["receipt"] | {"data": report["receipt"]["data"] | {"name": "/home/me/photos.py:make"}}
    changed = {"stronger_attack": stronger, "unreliable": True, "receipt": receipt}
    page = render_page({**report, **changed}, [[{"attack": "a"}]], [])
    assert page.index("≤ 12.0%") < page.index(f'<b class="bad">{worst}</b>Unreliable') < page.index("Clean accuracy")
    assert "4.5% to 24.3% with 95% confidence; 50 images, under BPDA" in page
    assert "<title>Evaluation of AT-AWP: photos.py:make, linf" in page
    assert "at most, in linf, on pixels in [0, 1]." in page


def test_checkpoints_can_be_chosen(run_dir, tmp_path):
    arguments = {"attacks": ["clean"], "limit": 60, "gates_limit": None, "output": tmp_path / "out"}
    best = evaluate_checkpoint(run_dir, **arguments)
    file = evaluate_checkpoint(run_dir / "model.safetensors", **arguments)
    assert best.report["receipt"]["checkpoint"]["sha256"] == file.report["receipt"]["checkpoint"]["sha256"]
    last = evaluate_checkpoint(run_dir, checkpoint="last", **arguments)
    named = evaluate_checkpoint(run_dir, checkpoint="epoch-2", **arguments)
    inner = evaluate_checkpoint(run_dir / "checkpoints" / "epoch-2", **arguments)
    hashes = {done.report["receipt"]["checkpoint"]["sha256"] for done in (last, named, inner)}
    assert hashes == {
        hashlib.sha256((run_dir / "checkpoints" / "epoch-2" / "model.safetensors").read_bytes()).hexdigest()
    }
    (run_dir / "model.safetensors").rename(run_dir / "elsewhere.safetensors")
    try:
        unfinished = evaluate_checkpoint(run_dir, **arguments)
    finally:
        (run_dir / "elsewhere.safetensors").rename(run_dir / "model.safetensors")
    assert unfinished.measurement.clean == best.measurement.clean


def test_a_lone_file_is_told_data_and_ball(run_dir, tmp_path):
    lone = tmp_path / "mine.safetensors"
    lone.write_bytes((run_dir / "model.safetensors").read_bytes())
    arguments = {"attacks": ["pgd2"], "limit": 20, "gates_limit": None}
    with pytest.raises(EvaluationError, match=r"give --data\.name, --norm, --epsilon"):
        evaluate_checkpoint(lone, **arguments)
    with pytest.raises(EvaluationError, match=r"give --data\.name"):
        evaluate_checkpoint(lone, epsilon="1/2", norm="l2", **arguments)
    done = evaluate_checkpoint(lone, epsilon="1/2", norm="l2", data_name="digits", **arguments)
    assert done.output == tmp_path / "mine-evaluation"
    assert done.report["receipt"]["step_size"] == "1/8"
    assert done.report["gates"] is None
    assert "Not run" in (done.output / "evaluation.html").read_text()


def test_autoattack_with_leaderboard_file(run_dir, tmp_path):
    lines = []
    arguments = {
        "attacks": ["clean", "pgd2", "autoattack", "square"],
        "limit": 24,
        "gates_limit": None,
        "output": tmp_path,
        "publication": PUBLICATION,
        "budget": Budget(iterations=4, queries=20),
    }
    done = evaluate_checkpoint(run_dir, say=lines.append, **arguments)
    info = json.loads((tmp_path / "robustbench.json").read_text())
    assert {key: type(value) for key, value in info.items()} == LEADERBOARD
    assert list(info) == list(LEADERBOARD)
    autoattack = next(row for row in done.measurement.rows if row.attack == "autoattack")
    assert info["clean_acc"] == percent(done.measurement.clean, 24)
    assert info["autoattack_acc"] == info["reported"] == percent(autoattack.right, 24)
    assert info["unreliable"]
    assert {"the gates were not run", "only 24 images were measured"} <= set(info["doubts"])
    assert any("marked unreliable" in line and "only 24 images" in line for line in lines)
    # where the report was lost, it goes on from the saved, finished state; --again measures anew, and saves it
    (report,) = tmp_path.glob("evaluation-*.json")
    report.unlink()
    for again, words in ((False, "autoattack: going on with the result, of a state begun at "), (True, "after square")):
        lines.clear()
        repeated = evaluate_checkpoint(run_dir, say=lines.append, again=again, **arguments)
        assert any(words in line for line in lines)
        assert ("resumed" in repeated.report["receipt"]) != again
        assert [row.right for row in repeated.measurement.rows] == [row.right for row in done.measurement.rows]


@pytest.mark.parametrize("what", ["evaluate", "certify"])
def test_nothing_of_other_code_is_gone_on_from(run_dir, tmp_path, monkeypatch, what):
    said = []
    for code in ("one", "other"):
        monkeypatch.setattr("awp_engine.evaluation.prepare.code_digest", lambda code=code: code)
        common = {"gates_limit": None, "limit": 3, "attacks": ["square"], "budget": Budget(queries=2)}
        if what == "evaluate":
            done = evaluate_checkpoint(run_dir, output=tmp_path, say=said.append, **common)
        else:
            few = Smoothing(sigma=0.25, n0=2, n=20)
            done = certify_checkpoint(run_dir, few, limit=1, output=tmp_path, say=said.append)
        assert "resumed" not in done.report["receipt"]
    assert not [line for line in said if "going on" in line or "before" in line]
    assert len(list(tmp_path.glob("autoattack-*.json" if what == "evaluate" else "certify-*"))) == 2


def test_leaderboard_spelling():
    assert [leaderboard_epsilon(Fraction(e)) for e in ("8/255", "1/2", "128/255", "1/51", "0.2", "3/7")] == [
        "8/255",
        "0.5",
        "128/255",
        "5/255",
        "0.2",
        "3/7",
    ]
    info = model_info(
        PUBLICATION,
        dataset="cifar10",
        epsilon=Fraction(8, 255),
        clean=8536,
        autoattack=5617,
        images=10_000,
        doubts=(),
    )
    assert (info["clean_acc"], info["autoattack_acc"], info["eps"]) == ("85.36", "56.17", "8/255")
    assert [percent(1, 3), percent(2, 3), percent(1, 1), percent(0, 7), percent(1, 16, 1)] == [
        "33.33",
        "66.67",
        "100.00",
        "0.00",
        "6.2",
    ]


class Quantised(nn.Module):
    """Rounds its input, which stops every gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.round(x * 4) / 4)


class Cold(nn.Module):
    """Logits at temperature 1e-4, which saturate the loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) / 1e-4


def gates_of(model: nn.Module, threat: Threat = THREAT, images: int = 20) -> dict[str, bool]:
    with measuring(model):
        trial = Trial(model=model, split=spread(digits().test, images), threat=threat, seed=1, batch_size=60)
        report = run_gates(trial, queries=150)
    return {gate.name: gate.passed for gate in report.gates}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_honest_model_passes_the_gates(norm):
    threat = THREAT if norm == "linf" else Threat(epsilon=Fraction(1, 2), norm="l2")
    assert all(gates_of(robust_model(), threat).values())


def test_a_cleanly_trained_model_passes_the_gates():
    assert all(gates_of(clean_model(), Threat(epsilon=Fraction(1, 20), norm="linf")).values())


def test_masked_gradients_are_flagged():
    quantised = gates_of(Quantised(robust_model()))
    failed = {name for name, passed in quantised.items() if not passed}
    assert {
        "gradients are not masked",
        "accuracy falls as epsilon grows",
        "black-box does not beat white-box",
    } <= failed
    cold = gates_of(Cold(robust_model()), images=10)
    assert not cold["gradients are not masked"]


def test_square_beside_gradients_is_compared_image_by_image_without_gates():
    names = ["clean", "square", "pgd20-random-target", "pgd5", "pgd20", "cw20"]
    for model, masked in ((Quantised(robust_model()), True), (robust_model(), False)):
        trial = Trial(model=model, split=spread(digits().test, 40), threat=THREAT, seed=1, batch_size=40)
        attacks, quick = [parse_attack(name) for name in names], Budget(queries=150)
        done = measure(trial, attacks, step_size=Fraction(1, 20), gates_limit=None, budget=quick)
        found, single = done.black_box, done.per_image
        assert found is not None
        assert single is not None
        assert found.gradients == ("pgd20", "cw20")
        robust = {name: answers.robust for name, answers in single.attacks.items()}
        both = robust["pgd20"] & robust["cw20"]
        assert found.square_alone == int((both & ~robust["square"]).sum())
        assert found.gradients_alone == int((robust["square"] & ~both).sum())
        assert any("square broke" in doubt for doubt in done.doubts()) is masked
        again = Measurement.from_dict(json.loads(json.dumps(done.to_dict(), default=str)))
        assert (again.doubts(), again.notes()) == (done.doubts(), done.notes())
        lines: list[str] = []
        alone, told = [parse_attack("square")], dataclasses.replace(trial, say=lines.append)
        without = measure(told, alone, step_size=Fraction(1, 20), gates_limit=None, budget=quick)
        assert without.black_box is None
        assert [line.partition(": ")[0] for line in lines] == ["square"]


class Noisy(nn.Module):
    """Answers at random, differently every time."""

    def forward(self, x):
        return torch.rand(len(x), 10) + 0 * x.sum((1, 2, 3)).unsqueeze(1)


def test_a_random_model_is_flagged():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not gates_of(Noisy(), images=20)["epsilon 0 is clean accuracy"]


def test_measure_takes_any_module_and_leaves_it_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).train()
    trial = Trial(model=net, split=spread(digits().test, 40), threat=THREAT, seed=1, batch_size=16)
    result = measure(trial, [parse_attack("pgd3")], step_size=Fraction(1, 20), gates_limit=20)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    assert result.gates is not None
    assert result.gates.gates[-1].name == "attacked images lie in the ball"
    assert result.gates.gates[-1].passed
    print_table(result.table())


def test_the_same_weights_in_other_layers_are_another_question(tmp_path):
    """A checkpoint's description lies in another file than its weights."""
    tensors = {"model": robust_model().state_dict(), "best_model": robust_model().state_dict()}
    for name in ("relu", "silu"):
        metadata = dataclasses.replace(description(), activation=name).to_metadata()
        checkpoint.save(tmp_path / name, "epoch-1", tensors, {**metadata}, checkpoint.Retention(last=1))
        evaluate_checkpoint(
            tmp_path / name / "epoch-1",
            attacks=["clean", "autoattack"],
            epsilon="1/10",
            norm="linf",
            data_name="digits",
            limit=2,
            gates_limit=None,
            budget=Budget(queries=2, iterations=2),
            output=tmp_path / "out",
        )
    assert len(list((tmp_path / "out").glob("evaluation-*.json"))) == 2
    assert len(list((tmp_path / "out").glob("autoattack-*.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attacks", "pgd20", "autoatack"], ["--attacks", "autoatack", "pgdN"]),
        (["--epsilon", "8/0"], ["--epsilon", "8/255"]),
        (["--epsilon", "2"], ["--epsilon", "at most 1"]),
        (["--epsilon", "9.1", "--norm", "l2"], ["--epsilon: expected at most 9 for l2", "9.1"]),
        (["--norm", "l3"], ["--norm", "l3"]),
        (["--norm", "l1"], ["--norm l1: give --epsilon", "0.2, is of linf"]),
        (["--norm", "l1", "--epsilon", "3"], ["--attacks", "fgsm has no L1"]),
        (["--norm", "l1", "--epsilon", "65", "--attacks", "pgd5"], ["--epsilon: expected at most 64 for l1", "65"]),
        (["--eot", "1,many"], ["--eot", "1,5,20", "many"]),
        (["--eot", "0"], ["--eot", "whole numbers from 1"]),
        (["--save-images", "some"], ["--save-images", "some"]),
        (["--save-per-image", "csv"], ["--save-per-image", "csv"]),
        (["--limit", "0"], ["--limit", "0"]),
        (["--limit", "many"], ["--limit", "many"]),
        (["--restarts", "0"], ["--restarts"]),
        (["--seed", "-1"], ["--seed"]),
        (["--checkpoint", "epoch-77"], ["--checkpoint", "epoch-77"]),
        (["--data.name", "cifar10"], ["--data.root"]),
        (["--transfer-to", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--transfer-to", "net.pt"], ["--transfer-to net.pt", "awp export --model.name NAME --weights net.pt --hub"]),
        (["--robustbench"], ["--robustbench", "autoattack"]),
        (["--reported", "abc"], ["--reported", "percentage", "abc"]),
        (["--reported", "nan"], ["--reported", "nan"]),
        (["--reported", "101"], ["--reported", "101"]),
        (["--batch-size", "99999999999999999999"], ["--batch-size", "99999999999999999999"]),
        (["--restarts", "9" * 50], ["--restarts", "from 1 to 2147483647"]),
        (["--limit", "9" * 5000], ["--limit", "whole number"]),
        (["--gates-limit", "9999999999"], ["--gates-limit", "9999999999"]),
        (["--epsilon", "1e400", "--norm", "l2"], ["--epsilon", "1e400"]),
        (["--step-size", "1/2"], ["--step-size", "twice epsilon (1/5)", "1/2"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("-") else "",
)
def test_bad_input_is_one_line(run_dir, arguments, words, monkeypatch, capsys):
    output = run_dir.parent / "nothing"
    assert run_command("evaluate", monkeypatch, run_dir, "--output", output, *arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("evaluate.py: error: ")
    assert all(word in err for word in words), err
    assert not output.exists()


def test_bad_input_of_a_real_process(tmp_path):
    done = evaluate_command(tmp_path / "missing")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


QUICK = ("--attacks", "clean", "fgsm", "--limit", "20", "--no-gates")


def test_an_output_that_cannot_be_written_is_found_before_any_attack(run_dir, monkeypatch, capsys):
    file = "is a file; expected a directory, which is made if it is missing"
    for output, why in (
        (run_dir / "config.json", file),
        (run_dir / "config.json" / "below", "cannot be written: Not a directory"),
        (Path("/dev/full"), file),
    ):
        assert run_command("evaluate", monkeypatch, run_dir, *QUICK, "--output", output) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
        assert f"--output: {output} {why}" in err


def test_a_disk_that_is_full_before_any_attack(run_dir, tmp_path, monkeypatch, capsys):
    with small_tmpfs(tmp_path, "16k") as disk:
        assert run_command("evaluate", monkeypatch, run_dir, *QUICK, "--output", disk / "out") == 2
    out, err = capsys.readouterr()
    assert not out
    assert f"--output: {disk / 'out'} cannot be written: No space left on device" in err


def test_a_disk_that_fills_up_keeps_the_numbers(run_dir, tmp_path, monkeypatch, capsys):
    """Files of at most 70,000 bytes: the probe, the numbers, and not the page."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
    try:
        code = run_command("evaluate", monkeypatch, run_dir, *QUICK, "--output", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out, err = capsys.readouterr()
    assert code == 1
    assert "worst of fgsm" in out
    assert err.count("\n") == 1
    assert re.search(rf"error: {tmp_path}/evaluation-digits-20-linf-1_5-[0-9a-f]{{8}}\.html: File too large", err)
    assert json.loads((tmp_path / "evaluation.json").read_text())["finished"]
    assert not list(tmp_path.glob("*.html"))
    assert not list(tmp_path.glob(".tmp*"))


def test_head_gets_its_line_and_the_reports_are_written(run_dir, tmp_path):
    command = [sys.executable, SCRIPT, run_dir, *QUICK, "--output", tmp_path, "--threads", "1"]
    line = f"{shlex.join(map(str, command))} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("clean: ")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "evaluation.html").exists()


def test_evaluations_of_other_questions_overwrite_nothing(run_dir, tmp_path):
    arguments = {"gates_limit": None, "output": tmp_path}

    def ask(**question) -> bytes:
        evaluate_checkpoint(run_dir, **(arguments | {"attacks": ["clean"], "limit": 20} | question))
        return (tmp_path / "evaluation.json").read_bytes()

    def kept() -> set[bytes]:
        return {path.read_bytes() for path in tmp_path.glob("evaluation-*.json")}

    questions = [{}, {"limit": 21}, {"epsilon": "1/10"}, {"attacks": ["fgsm"]}, {"restarts": 2}, {"checkpoint": "last"}]
    answers = [ask(**question) for question in questions]
    assert kept() == set(answers)
    assert len(kept()) == len(questions)
    assert len(list(tmp_path.glob("evaluation-*.html"))) == len(questions)
    assert (tmp_path / "evaluation.html").read_text() in {p.read_text() for p in tmp_path.glob("evaluation-*.html")}
    # the same question is answered from what was measured, and measured anew on request, under another name
    assert ask() == answers[0]
    assert kept() == set(answers)
    again = ask(again=True)
    assert kept() == {again, *answers}
    assert all(path.name.startswith("evaluation-digits-2") for path in tmp_path.glob("evaluation-*"))


def test_what_is_finished_is_saved_while_other_attacks_run(run_dir, tmp_path):
    seen: list[list[str]] = []

    def look(line: str) -> None:
        partial = list(tmp_path.glob("evaluation-*.partial.json"))
        if line.startswith("pgd2"):
            report = json.loads(partial[0].read_text())
            seen.append([row["attack"] for row in report["attacks"]])
            assert not report["finished"]

    evaluate_checkpoint(
        run_dir, attacks=["clean", "fgsm", "pgd2"], limit=20, gates_limit=None, output=tmp_path, say=look
    )
    assert seen == [["clean", "fgsm"]]
    assert not list(tmp_path.glob("*.partial.json"))


def test_weights_that_answer_nan_are_told_and_exit_with_3(run_dir, tmp_path, monkeypatch, capsys):
    tensors, metadata = checkpoint.read_model(run_dir / "model.safetensors")
    tensors["linear.bias"][0] = torch.nan
    broken = tmp_path / "broken.safetensors"
    checkpoint.export_model(broken, tensors, metadata)
    shutil.copy(run_dir / "config.json", tmp_path)
    assert run_command("evaluate", monkeypatch, broken, *QUICK, "--output", tmp_path / "out") == 3
    out = capsys.readouterr().out
    assert "UNRELIABLE: logits of 20 of 20 images are not finite; they count as wrong" in out
    assert "right: with and without the attack" in out
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["unreliable"]
    assert [row["right"] for row in report["attacks"]] == [0, 0]
    assert "Unreliable: logits of 20" in (tmp_path / "out" / "evaluation.html").read_text()


def test_a_downloaded_state_is_not_believed(run_dir, tmp_path):
    """Clean images, all of them robust, all attacks done."""
    arguments = {"attacks": ["autoattack", "pgd2"], "limit": 20, "gates_limit": None, "output": tmp_path}
    arguments |= {"budget": Budget(iterations=3, queries=10)}
    honest = evaluate_checkpoint(run_dir, **arguments)
    assert not honest.report["unreliable"]
    assert honest.measurement.rows[0].right < honest.measurement.clean
    (state,) = tmp_path.glob("autoattack-*.safetensors")
    _, metadata = checkpoint.read_model(state)
    x, y, *_ = next(eval_batches(spread(digits().test, 20), 20))
    with torch.no_grad():
        right = robust_model()(x).argmax(1) == y
    progress = json.loads(metadata["progress"])
    progress["counts"] = dict.fromkeys(progress["counts"], int(right.sum()))
    checkpoint.export_model(
        state,
        {"x_adv": x, "robust": right, "begun": right.clone()},
        {"identity": metadata["identity"], "progress": json.dumps(progress)},
    )
    lines: list[str] = []
    for report in tmp_path.glob("evaluation-*.json"):
        report.unlink()
    done = evaluate_checkpoint(run_dir, say=lines.append, **arguments)
    assert lines[0].startswith(f"autoattack: starting anew: {state}: this saved state is not believed: lacks 'code'")
    assert [row.right for row in done.measurement.rows] == [row.right for row in honest.measurement.rows]
    assert "resumed" not in done.report["receipt"]
    for report in tmp_path.glob("evaluation-*.json"):
        report.unlink()
    again = evaluate_checkpoint(run_dir, **arguments)
    resumed = again.report["receipt"]["resumed"]["autoattack"]
    assert (resumed["file"], resumed["from"]) == (state.name, "the result")
    assert resumed["sha256"] == hashlib.sha256(state.read_bytes()).hexdigest()
    assert resumed["sha256"] in (tmp_path / "evaluation.html").read_text()
