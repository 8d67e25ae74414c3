"""The plan for a GPU, rehearsed on the CPU: what is written, and what is left when a check or a stage fails."""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from places import BENCH

from awp_kernels import _backend

sys.path.insert(0, str(BENCH.parent / "csrc"))

import sources

from bench import first_contact, gpu_result
from bench.study import real_run

del sys.path[0]


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=BENCH.parent,
        env=os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu"} | environment,
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Ten images of each of two classes to train on, two to test; random noise."""
    path = tmp_path_factory.mktemp("archive") / "images.tar.xz"
    pixels = torch.randint(0, 256, (24, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with tarfile.open(path, "w:xz") as file:
        for number, image in enumerate(pixels):
            content = io.BytesIO()
            Image.fromarray(image.numpy()).save(content, "JPEG")
            part, label = "train" if number < 20 else "test", ("cat", "dog")[number % 2]
            member = tarfile.TarInfo(f"{part}/{label}/{number}.jpg")
            member.size = content.tell()
            content.seek(0)
            file.addfile(member, content)
    return path


@pytest.mark.compile
def test_a_check_that_crashes_or_hangs_costs_itself(tmp_path):
    result, outcomes = tmp_path / "first-contact.json", {}
    for checks, hangs in ((["hang"], "2"), (["crash", "cpp restore_", "plain step"], "60")):
        done = run(sys.executable, "-m", "bench.first_contact", "--device", "cpu", "--rehearse", "--only", *checks,
                   "--hangs", hangs, "--seconds", "120", "--json", result)  # fmt: skip
        assert done.returncode == 1, done.stderr
        told = json.loads(result.read_text())
        outcomes |= {check["name"]: check["outcome"] for check in told["checks"]}
        assert told["go_on_with"] is None
    assert outcomes == {"crash": "crashed", "hang": "hung", "cpp restore_": "held", "plain step": "held"}
    assert "ended by SIGSEGV" in done.stdout


@pytest.mark.usefixtures("poisoned_memory")
def test_a_wrong_result_is_found(monkeypatch):
    assert first_contact.operation("cpp restore_", "cpu", 3).startswith("18 of 18 cases, at most 0.00 of the error")
    # outputs that nobody writes stay NaN
    monkeypatch.setitem(_backend._cache, ("cpp", "restore"), lambda weights, saved: None)
    with pytest.raises(AssertionError, match=r"weights has inf times the error that is allowed, seed 3"):
        first_contact.operation("cpp restore_", "cpu", 3)


def test_the_first_implementation_without_a_fault_serves():
    def serving(**outcomes):
        checks = [first_contact.Check(name=f"{name} perturb_", outcome=told) for name, told in outcomes.items()]
        return first_contact.serving("cuda", checks)

    assert serving(cuda="held", triton="failed") is None
    assert serving(cuda="not reached", triton="held") is None
    assert serving(cuda="crashed", triton="held") == "triton"
    assert serving(cuda="hung", triton="failed") == "reference"


def test_a_stage_that_crashes_or_hangs_costs_itself(tmp_path):
    done = run("bash", "bench/gpu.sh", "measure", REHEARSE="1", STAGES="crash hang rates", OUT=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    stages = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    outcomes = {stage["stage"]: stage["outcome"] for stage in stages}
    assert outcomes == {"crash": "failed with 139", "hang": "cut off", "rates": "held"}, done.stdout
    assert "did not hold: crash hang" in done.stdout
    assert json.loads((tmp_path / "rates.json").read_text())["layers"][0]["tflops"].keys() == {
        "fprop",
        "dgrad",
        "wgrad",
    }


@pytest.mark.compile
def test_both_arms_train_side_by_side(tmp_path, archive):
    settings = {"ARCHIVE": str(archive), "STEP_MS": "30 35", "OUT": str(tmp_path)}
    done = run("bash", "bench/gpu.sh", "train", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "real-run.json").read_text())
    assert told["equal_epochs"]["epochs"] == 2
    assert told["data"] == "images.tar.xz"
    for arm, gamma in (("at", 0.0), ("at-awp", 0.01)):
        report = told["arms"][arm]["report"]
        assert (report["gamma"], report["epochs"], report["test_images"]) == (gamma, 2, 4)
        assert [epoch["epoch"] for epoch in told["arms"][arm]["epochs"]] == [1, 2]
        assert "held_out_pgd_accuracy" in told["arms"][arm]["epochs"][0]


def test_the_recipe_of_the_real_run():
    """On a GPU, where the rehearsal's small settings are left out."""
    arguments = argparse.Namespace(data=Path("images"), work=Path("work"), device="cuda", small=False)
    for arm, gamma in real_run.ARMS.items():
        config = real_run.run_config(arm, arguments, 24)
        assert (config.method, config.awp.gamma, config.epochs, config.cuda_graphs) == ("at", gamma, 24, "auto")
        assert (config.optimizer.schedule, config.optimizer.milestones) == ("piecewise", (0.5, 0.75))
        evaluation = config.evaluation
        assert (evaluation.steps, evaluation.evaluate_every, evaluation.test_limit) == (20, 1, 2000)
        assert (config.model.name, config.attack.steps, config.seed) == ("preact-resnet-18", 10, 0)
    # 330 s for steps of 17 ms in both arms
    assert real_run.planned_epochs(330, 391, {"at": 0.017, "at-awp": 0.017}) == 22
    assert real_run.planned_epochs(1, 391, {"at": 1.0, "at-awp": 1.0}) == 1


def test_a_cut_leaves_equal_epochs():
    states = {
        "at": {"epochs": [{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.0}]},
        "at-awp": {"epochs": [{"loss": 3.5}, {"loss": 2.5}]},
    }
    found = real_run.compared(states)
    assert found["epochs"] == 2
    assert [found["last"][arm]["loss"] for arm in states] == [2.0, 2.5]
    assert real_run.compared({"at": {"epochs": []}, "at-awp": states["at"]}) == {"epochs": 0, "last": {}}


def test_data_that_are_none_take_one_line(tmp_path, capsys):
    damaged = tmp_path / "damaged.tar.xz"
    damaged.write_bytes(b"nothing of the kind")
    for data, told in ((damaged, "cannot be read"), (tmp_path, "expected train/<class>/ and test/<class>/")):
        with pytest.raises(SystemExit) as stop:
            real_run.prepare_data(data, tmp_path / "images")
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("real_run.py: error: DATA: ")
        assert told in error


def test_predictions_stand_beside_what_was_measured(tmp_path, capsys):
    def arm(name, seconds):
        return {"name": name, "seconds": {"median": seconds}}

    step = {"kind": "step", "machine": {"device_name": "NVIDIA H100 80GB HBM3"}}
    step["settings"] = {"model": "wrn-34-10", "engine": {}}
    step["arms"] = [arm("engine", 0.15), arm("public", 0.6)]
    plain = step | {"settings": step["settings"] | {"engine": {"cuda_graphs": False}}, "arms": [arm("engine", 0.3)]}
    small = step | {"settings": step["settings"] | {"model": "preact-resnet-18"}, "arms": [arm("engine", 0.0195)]}
    first, second = tmp_path / "1", tmp_path / "2"
    for folder, files in ((first, {}), (second, {"step-0.json": plain, "step-1.json": step, "step-2.json": small})):
        folder.mkdir()
        stage = {"stage": folder.name, "outcome": "held", "seconds": 1, "limit": 2}
        for name, content in ({"stages.jsonl": stage} | files).items():
            (folder / name).write_text(json.dumps(content) + "\n")
    gpu_result.main([str(first), str(second), "--result", str(tmp_path / "result.json")])
    text = capsys.readouterr().out
    assert "| WRN-34-10, step in a graph, ms | 132 to 160 | 150 |" in text
    assert "| WRN-34-10, public (TF32) over engine | 3 to 4 | 4 |" in text
    assert 'STEP_MS="17.2 19.5"' in text
    kept = json.loads((tmp_path / "result.json").read_text())
    assert list(kept["stages"]) == ["1", "2"]
    # of this device alone
    assert not [row for row in kept["predictions"] if row["predicted"] == [113, 142]]
    (second / "step-1.json").write_text("{")
    with pytest.raises(SystemExit):
        gpu_result.main([str(second)])
    assert "step-1.json: expected JSON" in capsys.readouterr().err


def test_a_library_of_other_sources_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PACKAGE", tmp_path)
    assert sources.mismatch("") == "there is no build.json that names sources and architectures"
    sources.write(tmp_path, "80;90a")
    assert sources.mismatch("90a") == "there is no libawp_kernels.so"
    (tmp_path / "libawp_kernels.so").touch()
    assert sources.mismatch("90a") is None
    assert sources.mismatch("") is None
    assert sources.mismatch("100") == "it was built for 80;90a, not for 100"
    report = json.loads((tmp_path / "build.json").read_text())
    (tmp_path / "build.json").write_text(json.dumps(report | {"sources": "0"}))
    assert sources.mismatch("90a") == "it was built of other sources"
