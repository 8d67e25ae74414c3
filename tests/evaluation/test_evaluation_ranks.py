"""Several ranks that share the images of one evaluation: the same results as one, and one line for what is wrong."""

import json
import os
import subprocess
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from digits_model import description, write_run
from places import ENGINE
from ranks import run_ranks
from torch import nn
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

import awp_engine
from awp_engine.checkpoint import read_model
from awp_engine.distributed.ranks import Ranks
from awp_engine.evaluation.attacks.autoattack import Budget
from awp_engine.evaluation.model.external import ExternalModel
from awp_engine.evaluation.run import evaluate_checkpoint

OURS = ("clean", "fgsm", "pgd3", "cw2", "pgd2-random-target", "regional-pixels-45")
ALL = {"attacks": (*OURS, "autoattack"), "limit": 11, "gates_limit": 2, "save_per_image": "npz", "save_images": 5}
ALL |= {"budget": Budget(iterations=3, queries=9), "restarts": 2, "batch_size": 4}


# of least squares, so that a pass takes no time
NETWORK = """
import torch
from torch import nn

from awp_engine.data import load_dataset

def make(num_classes):
    digits = load_dataset("digits", root=None, held_out_fraction=0, seed=0).train
    images, right = digits.images.flatten(1) / 255, torch.eye(num_classes)[digits.labels]
    inputs = torch.cat([images, torch.ones(len(images), 1)], 1)
    found = torch.linalg.solve(inputs.T @ inputs + torch.eye(65), inputs.T @ right)
    layer = nn.Linear(64, num_classes)
    layer.weight.data, layer.bias.data = found[:-1].T.contiguous(), found[-1]
    return nn.Sequential(nn.Flatten(), layer)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The network's code, and a run of another."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "net.py").write_text(NETWORK)
    write_run(folder / "other", description().build(), description().build())
    return folder


def asked(place: Path) -> dict:
    external = ExternalModel(name=f"{place}/net.py:make", normalize="none")
    return ALL | {
        "external": external,
        "data_name": "digits",
        "norm": "linf",
        "epsilon": "1/10",
        "transfer_to": place / "other",
    }


def on_rank(rank: int, world: int, output: Path, arguments: dict) -> tuple[dict, list[str]]:
    said: list[str] = []
    store = FileStore(str(output.with_suffix(".store")), world)
    ranks = Ranks(rank=rank, world=world, local_rank=rank, store=store)
    told = []
    done = evaluate_checkpoint(None, output=output, say=said.append, tell=told.append, ranks=ranks, **arguments)
    assert bool(told) == (rank == 0)
    return json.loads(json.dumps(done.report)), said


def together(place: Path, output: Path, world: int, **arguments) -> tuple[dict, list[list[str]]]:
    output.with_suffix(".store").unlink(missing_ok=True)
    found = run_ranks(on_rank, world, output, asked(place) | arguments)
    reports, said = zip(*found, strict=True)
    assert all(report == reports[0] for report in reports)
    return reports[0], list(said)


def on_one(place: Path, output: Path, **arguments) -> dict:
    """As JSON holds it, as that of several ranks."""
    return json.loads(json.dumps(evaluate_checkpoint(None, output=output, **asked(place) | arguments).report))


def counted(report: dict, names: tuple[str, ...]) -> list[dict]:
    """What does not depend on how long it took, nor on the order of summation."""
    rows = [row for row in report["attacks"] if row["attack"] in names]
    assert len(rows) == len(names)
    rounded = {"largest": lambda value: round(value, 6), "seconds": lambda _: None, "details": lambda _: None}
    return [{name: rounded.get(name, lambda v: v)(value) for name, value in row.items()} for row in rows]


def test_two_ranks_measure_what_one_does(place, tmp_path):
    one = on_one(place, tmp_path / "one")
    report, said = together(place, tmp_path / "two", 2)
    assert (one["receipt"]["ranks"], report["receipt"]["ranks"]) == (1, 2)
    assert counted(report, OURS) == counted(one, OURS)
    assert report["clean"] == one["clean"]
    assert [row["clean"] for row in report["per_class"]] == [row["clean"] for row in one["per_class"]]
    own, alone = (next(row for row in r["attacks"] if row["attack"] == OURS[-1]) for r in (report, one))
    assert own["details"] == pytest.approx(alone["details"], rel=1e-5)
    # pyautoattack draws for a batch, and a batch is another one; it knows of all images
    autoattack = report["attacks"][-1]
    assert autoattack["details"]["right_after"]["clean"] == report["clean"]["right"] > autoattack["right"]
    assert set(autoattack["details"]) == {"right_after", "warnings"}
    # the gates are the first rank's
    assert report["gates"]["gates"] == one["gates"]["gates"]

    files = [next((tmp_path / name).glob("per-image-*.npz")) for name in ("one", "two")]
    tables = [np.load(file) for file in files]
    assert set(tables[0]) == set(tables[1])
    for column in (
        {"id", "label", "clean_prediction"} | {f"prediction/{n}" for n in OURS} | {f"robust/{n}" for n in OURS}
    ):
        assert np.array_equal(tables[0][column], tables[1][column]), column
    for name in OURS[1:]:
        images = [read_model(next((tmp_path / n).glob(f"images-*-{name}.safetensors")))[0] for n in ("one", "two")]
        assert images[0]["ids"].tolist() == images[1]["ids"].tolist()
        assert (images[0]["x_adv"] - images[1]["x_adv"]).abs().max() < 1e-5
    assert (tmp_path / "two" / "evaluation.html").exists()
    assert not list((tmp_path / "two").glob("*.partial.json"))
    # what is of all images is said once, what is of a rank's own by that rank
    assert sum(line.startswith("pgd3: ") for line in said[0]) == 1
    assert all(line.startswith("rank 1: autoattack: after ") for line in said[1])
    assert len(said[1]) == 4

    # every rank goes on from its own state
    for path in (tmp_path / "two").glob("evaluation-*.json"):
        path.unlink()
    again, said = together(place, tmp_path / "two", 2)
    assert list(again["receipt"]["resumed"]["autoattack"]) == ["rank 0", "rank 1"]
    assert again["attacks"][-1]["right"] == autoattack["right"]
    assert not any("left alone" in line for lines in said for line in lines)
    # and a finished report is read by the first one for all
    repeated, _ = together(place, tmp_path / "two", 2)
    assert repeated == again


def test_ranks_without_images_wait(place, tmp_path):
    arguments = {"limit": 2, "gates_limit": None}
    one = on_one(place, tmp_path / "one", **arguments)
    report, _ = together(place, tmp_path / "three", 3, **arguments)
    assert counted(report, OURS) == counted(one, OURS)
    assert sum(row["images"] for row in report["per_class"]) == 2


def module_on_rank(rank: int, world: int, output: Path) -> int:
    torch.manual_seed(0)
    module, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.rand(9, 3, 2, 2)
    ranks = Ranks(rank=rank, world=world, local_rank=rank, store=FileStore(str(output.with_suffix(".store")), world))
    options = {"epsilon": "1/10", "attacks": ["pgd2"], "gates_limit": None, "device": "cpu"}
    labels = torch.arange(9) % 4
    return awp_engine.evaluate(module, images, labels, output=output, ranks=ranks, **options).measurement.worst


def test_ranks_measure_an_object_of_python(tmp_path):
    assert len(set(run_ranks(module_on_rank, 2, tmp_path / "out"))) == 1


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    return forked.run(*command, *arguments, env=environment)


BAD_ON_RANK_1 = """
import os

def attack(model, images, labels):
    if os.environ["RANK"] == "1":
        raise OSError("a disk of the second machine")
    return images
"""


def test_the_command_under_torchrun(place, tmp_path):
    model = ("--model.name", place / "net.py:make", "--model.normalize", "none")
    images = ("--data.name", "digits", "--norm", "linf", "--epsilon", "1/10", "--limit", 9, "--device", "cpu")
    quick = (*images, "--no-gates", "--output", tmp_path / "out")
    done = torchrun(ENGINE / "evaluate.py", *model, "--attacks", "clean", "pgd2", *quick)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reports in ") == done.stdout.count("worst of pgd2") == 1
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["receipt"]["ranks"] == 2

    (tmp_path / "bad.py").write_text(BAD_ON_RANK_1)
    failed = torchrun("-m", "awp_engine", "evaluate", *model, "--attacks", f"{tmp_path}/bad.py:attack", *quick)
    assert failed.returncode == 1
    told = [line for line in failed.stderr.splitlines() if "error: " in line and "awp_engine evaluate" in line]
    assert len(told) == 1, failed.stderr
    assert "rank 1: " in told[0]
    assert "a disk of the second machine" in told[0]
