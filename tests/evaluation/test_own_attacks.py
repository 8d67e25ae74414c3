"""Attacks of somebody's own, `--attacks file.py:function`, and those of Foolbox, torchattacks and ART by name."""

import json
import re
from pathlib import Path

import pytest
from commands import run_command
from digits_model import clean_model, write_run

CODE = """
import torch



def nothing(model, images, labels):
    return images


def noise(model, images, labels, epsilon, norm, seed):
    assert norm == "linf" and seed == 5 and not model.training
    return (images + epsilon * (2 * torch.rand_like(images) - 1)).clamp(0, 1)


def careless(model, images, labels):
    model.train()
    model(images)
    return images


def too_far(model, images, labels):
    return 1 - images


def fewer(model, images, labels):
    return images[1:]


def broken(model, images, labels):
    return images + missing


def stop(model, images, labels):
    raise KeyboardInterrupt


def momentum(model, images, labels, epsilon):
    import torchattacks

    return torchattacks.MIFGSM(model, eps=epsilon, steps=5)(images, labels)
"""
QUICK = ("--limit", "30", "--no-gates", "--seed", "5", "--epsilon", "0.2", "--norm", "linf")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "strikes.py").write_text(CODE)
    return write_run(folder / "run", clean_model()), folder / "strikes.py"


def rows(out: Path) -> dict[str, dict]:
    return {row["attack"]: row for row in json.loads((out / "evaluation.json").read_text())["attacks"]}


def test_they_are_measured_as_all_others_are(place, tmp_path, monkeypatch, capsys):
    run, code = place
    names = ["clean", *(f"{code}:{name}" for name in ("careless", "nothing", "noise", "momentum")), "pgd5"]
    options = (*QUICK, "--output", tmp_path, "--save-images", "all", "--save-per-image")
    assert run_command("evaluate", monkeypatch, run, "--attacks", *names, *options) == 0
    found = rows(tmp_path)
    assert list(found)[1:] == [*(f"strikes.py:{name}" for name in ("careless", "nothing", "noise", "momentum")), "pgd5"]
    # it has left nothing behind
    assert found["strikes.py:careless"]["right"] == found["clean"]["right"]
    assert found["strikes.py:nothing"]["right"] == found["clean"]["right"]
    assert found["strikes.py:momentum"]["right"] < found["strikes.py:noise"]["right"] <= found["clean"]["right"]
    assert 0.15 < found["strikes.py:noise"]["largest"] <= 0.2 + 1e-5
    assert len(found["strikes.py:noise"]["parameters"]["code"]["sha256"]) == 64
    assert len(list(tmp_path.glob("images-*strikes.py:noise.safetensors"))) == 1
    first = found["strikes.py:noise"]["largest"]
    # the same noise
    assert run_command("evaluate", monkeypatch, run, "--attacks", *names, *options, "--again") == 0
    assert rows(tmp_path)["strikes.py:noise"]["largest"] == first
    # another attack of the same name is another question
    code.write_text(CODE.replace("return images\n", "return images.flip(0)\n", 1))
    assert run_command("evaluate", monkeypatch, run, "--attacks", *names, *options) == 3
    assert "read again" not in capsys.readouterr().out
    code.write_text(CODE)


def test_an_interrupt_names_the_finished_attacks_if_there_are_any(place, tmp_path, monkeypatch, capsys):
    run, code = place
    for first, more in (((), ()), (("clean",), ("autoattack",))):
        names = ("--attacks", *first, f"{code}:stop", *more)
        assert run_command("evaluate", monkeypatch, run, *names, *QUICK, "--output", tmp_path) == 130
        said, kept = capsys.readouterr().err.strip(), list(tmp_path.glob("evaluation-*.partial.json"))
        going_on = "; the same command again goes on from what autoattack saved" * bool(more)
        assert said.endswith(f"error: interrupted{going_on}" + "".join(f"; finished attacks are in {k}" for k in kept))
        assert len(kept) == len(first)


def test_one_that_leaves_the_ball_is_found_out(place, tmp_path, monkeypatch, capsys):
    run, code = place
    assert run_command("evaluate", monkeypatch, run, "--attacks", f"{code}:too_far", *QUICK, "--output", tmp_path) == 3
    assert "UNRELIABLE: strikes.py:too_far: attacked images left the ball" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fewer", "--attacks: strikes.py:fewer returned [29, 1, 8, 8]; expected attacked images [30, 1, 8, 8]"),
        ("broken", "--attacks: strikes.py:broken: the attack raised NameError: name 'missing' is not defined ("),
        ("nois", "--attacks: "),
    ],
)
def test_what_is_wrong_is_one_line(place, tmp_path, monkeypatch, capsys, name, message):
    run, code = place
    assert run_command("evaluate", monkeypatch, run, "--attacks", f"{code}:{name}", *QUICK, "--output", tmp_path) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "evaluation.json").exists()


def test_two_of_one_name_are_refused(place, tmp_path, monkeypatch, capsys):
    run, code = place
    (tmp_path / "strikes.py").write_text(CODE)
    names = f"{code}:noise", f"{tmp_path / 'strikes.py'}:noise"
    assert run_command("evaluate", monkeypatch, run, "--attacks", *names, *QUICK, "--output", tmp_path / "out") == 2
    assert "two are called strikes.py:noise" in capsys.readouterr().err


def test_attacks_of_other_libraries_by_name(place, tmp_path, monkeypatch, capsys):
    run, _ = place
    names = [
        "foolbox:LinfPGD,steps=10",
        "foolbox:HopSkipJumpAttack,steps=1,initial_gradient_eval_steps=10",
        "torchattacks:MIFGSM",
        "torchattacks:DeepFool,steps=5",
        "art:ProjectedGradientDescent,max_iter=10",
        "art:DeepFool,max_iter=10",
    ]
    options = (*QUICK, "--output", tmp_path)
    assert run_command("evaluate", monkeypatch, run, "--attacks", "clean", "pgd10", *names, *options) in (0, 3)
    found = rows(tmp_path)
    clean, ours = found.pop("clean")["right"], found.pop("pgd10")["right"]
    for name in names:
        assert found[name]["right"] <= clean
        assert found[name]["in_ball"]
        assert re.fullmatch(r"[a-z-]+ [0-9.]+", found[name]["parameters"]["package"])
    for name in (names[0], names[2], names[4]):
        # steps that cross the ball, unlike their own
        assert found[name]["largest"] == pytest.approx(0.2, abs=1e-5)
        assert abs(found[name]["right"] - ours) <= 2
    # they look for the nearest image of another class, in L2, and some of that is too far
    outside = [name for name in names if found[name]["details"]["outside"]]
    assert outside == ["torchattacks:DeepFool,steps=5", "art:DeepFool,max_iter=10"]
    assert "torchattacks:DeepFool,steps=5: found outside the ball" in capsys.readouterr().out
    # a step as epsilon is given, whose name is no directory
    strides = "torchattacks:PGD,steps=1,alpha=1/255,random_start=False"
    assert run_command("evaluate", monkeypatch, run, "--attacks", strides, *options, "--save-images", "3") in (0, 3)
    assert rows(tmp_path)[strides]["largest"] == pytest.approx(1 / 255, abs=1e-6)
    assert len(list(tmp_path.glob("images-*-torchattacks:PGD,steps=1,alpha=1_255,*"))) == 1
    # the same draws
    before = found["foolbox:LinfPGD,steps=10"]["largest"], found["art:DeepFool,max_iter=10"]["largest"]
    assert run_command("evaluate", monkeypatch, run, "--attacks", names[0], names[-1], *options, "--again") in (0, 3)
    assert tuple(row["largest"] for row in rows(tmp_path).values()) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("foolbox:LinfDeepFol", "has no attack LinfDeepFol; did you mean LinfDeepFoolAttack?"),
        ("foolbox:LinfPGD,stps=5", "LinfProjectedGradientDescentAttack takes no stps; did you mean steps?"),
        ("foolbox:L2DeepFoolAttack", "L2DeepFoolAttack is an attack in L2, the ball is of linf"),
        ("art:EvasionAttack", "has no attack EvasionAttack"),
    ],
)
def test_what_is_wrong_with_their_names_is_one_line(place, tmp_path, monkeypatch, capsys, name, message):
    run, _ = place
    assert run_command("evaluate", monkeypatch, run, "--attacks", name, *QUICK, "--output", tmp_path) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
