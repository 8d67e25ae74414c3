"""What an evaluation must not believe: answers and gradients that are not finite, random models, forged states."""

import dataclasses
import json
import math
import os
import shutil
import stat
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from digits_model import digits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_methods import batch, build_step, small_model
from torch import Tensor, nn

from awp_engine.attack import Attack
from awp_engine.checkpoint import export_model, read_model
from awp_engine.data import Split
from awp_engine.evaluation import evaluate
from awp_engine.evaluation.attacks.autoattack import STANDARD, Budget, autoattack
from awp_engine.evaluation.attacks.named import EvaluationError, Threat, Trial, in_ball, measuring, parse_attack
from awp_engine.evaluation.attacks.state import AttackState, StateFile
from awp_engine.evaluation.gates.run import run_gates
from awp_engine.evaluation.reports.page import render_page
from awp_engine.evaluation.suite import measure
from awp_engine.files.user_key import KeyFileError, key_path, user_key
from awp_engine.models.answers import NO_CLASS, predicted

THREAT = Threat(epsilon=Fraction(1, 20), norm="linf")
ATTACKS = ("clean", "fgsm", "pgd3", "cw3", "square", "autoattack", "regional-pixels-45")
SHORT = Budget(iterations=3, queries=10)
STEP = Fraction(1, 50)
NAN, INF = math.nan, math.inf


def trial(model: nn.Module, split: Split, threat: Threat = THREAT, **changes) -> Trial:
    return Trial(model=model, split=split, threat=threat, seed=1, batch_size=10, **changes)


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def labelled(model: nn.Module, count: int = 24) -> Split:
    """Test images with the classes that the model gives them for labels, but for every tenth, which is wrong."""
    images = digits().test.images[:count]
    with torch.no_grad():
        labels = model(images / 255).argmax(1)
    labels[::10] = (labels[::10] + 1) % 10
    return Split(images=images, labels=labels, ids=torch.arange(count))


@given(
    rows=st.lists(st.lists(st.sampled_from([NAN, INF, -INF, 0.0, 1.0, -2.0, 3e38]), min_size=4, max_size=4), min_size=1)
)
def test_no_answer_is_right_that_is_not_finite(rows):
    classes = predicted(torch.tensor(rows)).tolist()
    for found, row in zip(classes, rows, strict=True):
        assert found == (row.index(max(row)) if all(map(math.isfinite, row)) else NO_CLASS)


class Silent(nn.Module):
    """A linear model that gives `fill` at the label, which argmax takes for the largest, and for every other logit
    `other`, on images that `chosen` picks."""

    def __init__(self, fill: float, other: float, chosen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.fill, self.other, self.chosen = linear(), fill, other, chosen

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        strange = torch.full_like(logits, self.other).scatter(1, logits.argmax(1, keepdim=True), self.fill)
        return torch.where(self.chosen(x).unsqueeze(1), strange, logits)


def bright(x: Tensor) -> Tensor:
    return x[:, 0, 2, 4] > 0.5


def moved(x: Tensor) -> Tensor:
    """Images that are none of the test images: attacked ones."""
    return torch.cdist(x.flatten(1), digits().test.images[:24].flatten(1) / 255).amin(1) > 1e-4


@pytest.mark.parametrize(("fill", "other"), [(NAN, NAN), (NAN, 0.0), (INF, 0.0), (0.0, -INF), (INF, NAN)])
def test_a_model_without_an_answer_gets_no_credit_clean(fill, other):
    model = Silent(fill, other, bright)
    split = labelled(model.inner)
    x = split.images / 255
    silent = bright(x)
    right = int(((model.inner(x).argmax(1) == split.labels) & ~silent).sum())
    assert 5 < right < 18
    attacks = [parse_attack(a) for a in ATTACKS]
    done = measure(trial(model, split), attacks, step_size=STEP, gates_limit=None, budget=SHORT, second=model)
    rows = {row.attack: row for row in done.rows}
    assert done.clean == rows["clean"].right == rows["autoattack"].details["right_after"]["clean"] == right
    assert done.not_finite == rows["clean"].not_finite == int(silent.sum())
    assert all(row.right <= right for row in done.rows)
    assert rows["regional-pixels-45"].details["flipped"] == right - rows["regional-pixels-45"].right
    assert done.worst <= min(row.right for row in done.rows if row.in_ball is not None)
    report = done.to_dict()
    assert report["unreliable"]
    assert f"logits of {done.not_finite} of 24 images are not finite" in report["doubts"][0] or done.not_finite < 24
    assert report["clean"]["not_finite"] == done.not_finite
    assert done.table()[0]["logits not finite"] == str(done.not_finite)
    attack = Attack(epsilon=0.05, step_size=0.02, steps=3, norm="linf")
    accuracy = evaluate(model, split, attack, batch_size=10)
    assert round(accuracy.clean * 24) == right
    assert accuracy.robust <= accuracy.clean


@pytest.mark.parametrize("fill", [NAN, INF])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_model_without_an_answer_gets_no_credit_attacked(fill, norm):
    """The package would keep every such image: its argmax is the label."""
    model = Silent(fill, 0.0, moved)
    split = labelled(model.inner)
    threat, step_size = THREAT, STEP
    if norm == "l2":
        threat, step_size = Threat(epsilon=Fraction(1, 5), norm="l2"), Fraction(1, 20)
    attacks = [parse_attack(a) for a in ATTACKS]
    done = measure(trial(model, split, threat), attacks, step_size=step_size, gates_limit=None, budget=SHORT)
    assert done.clean == 21
    assert done.not_finite == 0
    for row in done.rows[1:]:
        assert row.right == 0, row.attack
        assert row.in_ball is not False
        assert row.not_finite >= 21
        # the package itself sees it, in the passes with a gradient too
        assert row.attack != "autoattack" or row.details["right_after"]["apgd-ce"] == 0
    assert "no answer" not in str(done.to_dict())
    attack = Attack(epsilon=0.05, step_size=0.02, steps=3, norm="linf")
    assert evaluate(model, split, attack, batch_size=10).robust == 0.0


def test_pictures_of_no_answer_are_drawn():
    from awp_engine.evaluation.reports.figures import picture_cards

    model = Silent(NAN, NAN, moved)
    done = measure(trial(model, labelled(model.inner)), [parse_attack("pgd1")], step_size=STEP, gates_limit=None)
    assert set(done.pictures[0].predictions) == {NO_CLASS}
    cards = picture_cards(done.pictures[0], [str(n) for n in range(10)])
    assert {card.attacked_answer for card in cards} == {"no answer"}


def test_training_counts_no_answer_as_wrong():
    model = small_model()
    step = build_step(model, gamma=0.0)
    x, _, ids = batch(1)
    with torch.no_grad():
        model.linear.bias[0] = torch.nan
    # argmax takes NaN for the largest
    assert float(step(x, torch.zeros_like(ids), sample_ids=ids, seed=0).correct) == 0.0


class _Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *gradients):
        return torch.full_like(gradients[0], ctx.value), None


class NoGradient(nn.Module):
    """Finite logits, whose gradient is not finite."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner, self.value = linear(), value

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(_Broken.apply(x, self.value))


@pytest.mark.parametrize("value", [NAN, INF])
def test_gradients_that_are_not_finite_fail_gates_and_report(value):
    model = NoGradient(value)
    split = labelled(model.inner)
    attacks = [parse_attack(a) for a in ATTACKS]
    done = measure(trial(model, split), attacks, step_size=STEP, gates_limit=10, budget=SHORT)
    rows = {row.attack: row for row in done.rows}
    for name in ("fgsm", "pgd3", "cw3", "regional-pixels-45"):
        assert rows[name].right == 0, name
        assert rows[name].blind + rows[name].right <= 21
    assert rows["pgd3"].blind > 0
    assert done.gates is not None
    failed = {gate.name for gate in done.gates.gates if not gate.passed}
    assert {"gradients are not masked", "epsilon 0 is clean accuracy"} <= failed
    report = done.to_dict()
    assert report["unreliable"]
    doubts = "\n".join(report["doubts"])
    assert f"pgd3: gradients of {rows['pgd3'].blind} images are not finite" in doubts
    assert "autoattack: apgd-ce: " in doubts
    assert "gradients of images were not finite" in doubts
    assert "gate failed: gradients are not masked" in doubts
    page = render_page({"receipt": _receipt(), **report}, [done.table()], [])
    assert "Unreliable: pgd3: gradients of" in page
    json.dumps(report, allow_nan=False)
    attack = Attack(epsilon=0.05, step_size=0.02, steps=3, norm="linf")
    accuracy = evaluate(model, split, attack, batch_size=10)
    assert (round(accuracy.clean * 24), accuracy.robust) == (21, 0.0)


def _receipt() -> dict:
    return {
        "checkpoint": {"name": "best", "file": "model.safetensors", "sha256": "0" * 64},
        "data": {"name": "digits", "images": 24, "images_in_split": 24, "split": "test"},
        "parameters": 650,
        "norm": "linf",
        "epsilon": "1/20",
        "precision": {"computes_in": "fp32"},
        "normalisation": {"where": "inside the model", "mean": [0.5], "std": [0.25]},
        "date": "2026-11-30T00:00:00+00:00",
        "versions": {},
        "commit": None,
    }


class Random(nn.Module):
    """Dropout that eval mode does not turn off, too weak to change a class."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.001 * F.dropout(torch.ones(len(x), 10), 0.5, training=True)


def failed_gates(model: nn.Module, count: int) -> set[str]:
    with measuring(model):
        report = run_gates(trial(model, labelled(linear(), count)), queries=5)
        return {gate.name for gate in report.gates if not gate.passed}


def test_a_random_model_fails_the_gates():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert "the model answers alike every time" in failed_gates(Random(), 10)
    assert "the model answers alike every time" not in failed_gates(linear(), 10)


def test_gates_on_one_image_do_not_pass_what_is_not_finite():
    assert "gradients are not masked" in failed_gates(NoGradient(NAN), 2)
    # wrong everywhere
    assert "gradients are not masked" in failed_gates(Silent(NAN, NAN, lambda x: x[:, 0, 0, 0] >= 0), 1)


def test_autoattack_above_another_attack_is_doubted():
    model = linear()
    split = labelled(model)
    attacks = [parse_attack(a) for a in ("pgd3", "autoattack", "regional-pixels-45")]
    done = measure(trial(model, split), attacks, step_size=STEP, gates_limit=None, budget=SHORT)
    pgd, strong, regional = done.rows
    assert not done.doubts()
    assert not done.to_dict()["unreliable"]
    # one image more than PGD leaves; the regional attack has another ball
    forged = dataclasses.replace(done, rows=(pgd, dataclasses.replace(strong, right=pgd.right + 1), regional))
    assert forged.to_dict()["unreliable"]
    assert len(forged.doubts()) == 1
    assert f"more than under pgd3 ({pgd.right})" in forged.doubts()[0]
    assert not dataclasses.replace(
        done, rows=(pgd, dataclasses.replace(strong, right=pgd.right), dataclasses.replace(regional, right=0))
    ).doubts()


@given(data=st.data())
def test_what_lies_in_the_ball(data):
    norm = data.draw(st.sampled_from(["linf", "l2"]))
    threat = Threat(epsilon=Fraction(1, 4), norm=norm)
    value = st.sampled_from([0.0, 0.1, 0.25, 0.2500001, 0.26, 0.5, 1.0, 1.0001, -0.001, NAN, INF])
    x = torch.full((1, 1, 2, 2), 0.25)
    x_adv = torch.tensor(data.draw(st.lists(value, min_size=4, max_size=4))).view(1, 1, 2, 2)
    changes = [float(a) - 0.25 for a in x_adv.flatten()]
    distance = max(map(abs, changes)) if norm == "linf" else math.sqrt(sum(c * c for c in changes))
    inside = all(0 <= float(a) <= 1 for a in x_adv.flatten()) and distance <= 0.25 * (1 + 1e-5) + 1e-7
    assert bool(in_ball(x_adv, x, threat)) == inside


IDENTITY = {"checkpoint": "linear", "epsilon": "1/20"}


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> tuple[nn.Module, Split, Path, AttackState]:
    """A model, its images, the file of a finished AutoAttack, and the state in it."""
    model, directory = linear(), tmp_path_factory.mktemp("honest")
    split = labelled(model)
    file = StateFile(directory, IDENTITY)
    with measuring(model):
        autoattack(trial(model, split), budget=SHORT, state_file=file)
    tensors, metadata = read_model(file.path)
    state = AttackState(**{k: tensors[k] for k in ("x_adv", "robust", "begun")}, **json.loads(metadata["progress"]))
    assert 0 < state.counts["square"] < state.counts["clean"] == 21
    return model, split, file.path, state


def forged_files() -> dict[str, Callable[[Path, AttackState, Split], None]]:
    """Ways to make a file that this user's runs did not write."""
    forgeries = {}

    def forgery(make):
        forgeries[make.__name__] = make
        return make

    def all_robust(state: AttackState, split: Split) -> dict[str, Tensor]:
        robust = state.robust.clone()
        robust[state.x_adv.flatten(1).ne((split.images / 255).flatten(1)).any(1)] = True
        return {"x_adv": split.images / 255, "robust": robust, "begun": robust.clone()}

    def progress(count: int, attack: int = 4) -> str:
        counts = dict.fromkeys(("clean", *STANDARD[:attack]), count)
        return json.dumps(
            {"attack": attack, "batch": 0, "counts": counts, "warnings": [], "started": "2026-11-28T16:00:00+00:00"}
        )

    @forgery
    def nothing_attacked_all_robust(path, state, split):
        tensors = all_robust(state, split)
        export_model(
            path, tensors, {"identity": json.dumps(IDENTITY), "progress": progress(int(tensors["robust"].sum()))}
        )

    @forgery
    def the_same_with_an_invented_code(path, state, split):
        tensors = all_robust(state, split)
        metadata = {"identity": json.dumps(IDENTITY), "progress": progress(int(tensors["robust"].sum()))}
        export_model(path, tensors, metadata | {"code": "0" * 64})

    @forgery
    def the_same_with_the_code_of_an_honest_file(path, state, split):
        code = read_model(path)[1]["code"]
        tensors = all_robust(state, split)
        metadata = {"identity": json.dumps(IDENTITY), "progress": progress(int(tensors["robust"].sum()))}
        export_model(path, tensors, metadata | {"code": code})

    @forgery
    def signed_with_another_users_key(path, state, split):
        before = os.environ["XDG_STATE_HOME"]
        os.environ["XDG_STATE_HOME"] = str(path.parent / "other-user")
        try:
            StateFile(path.parent, IDENTITY).save(state)
        finally:
            os.environ["XDG_STATE_HOME"] = before

    @forgery
    def code_that_is_no_text(path, state, split):
        tensors, metadata = read_model(path)
        export_model(path, tensors, metadata | {"code": "é"})

    @forgery
    def one_flag_changed(path, state, split):
        tensors, metadata = read_model(path)
        tensors["robust"][int((~tensors["robust"]).nonzero()[0])] = True
        export_model(path, tensors, metadata)

    @forgery
    def one_pixel_changed(path, state, split):
        tensors, metadata = read_model(path)
        tensors["x_adv"][0, 0, 0, 0] += 2**-20
        export_model(path, tensors, metadata)

    @forgery
    def one_warning_removed(path, state, split):
        tensors, metadata = read_model(path)
        told = json.loads(metadata["progress"]) | {"warnings": ["fine"]}
        export_model(path, tensors, metadata | {"progress": json.dumps(told)})

    @forgery
    def honest_state_of_another_evaluation(path, state, split):
        other = StateFile(path.parent, IDENTITY | {"epsilon": "0"})
        other.save(state)
        other.path.replace(path)

    @forgery
    def flipped_bit(path, state, split):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    @forgery
    def cut_short(path, state, split):
        path.write_bytes(path.read_bytes()[:-40])

    @forgery
    def empty(path, state, split):
        path.write_bytes(b"")

    @forgery
    def no_metadata(path, state, split):
        save_file(all_robust(state, split), path)

    @forgery
    def deep_json(path, state, split):
        tensors, metadata = read_model(path)
        export_model(path, tensors, metadata | {"progress": "[" * 100_000})

    @forgery
    def a_directory(path, state, split):
        path.unlink()
        path.mkdir()

    @forgery
    def a_pipe(path, state, split):
        path.unlink()
        os.mkfifo(path)

    @forgery
    def a_link_to_nowhere(path, state, split):
        path.unlink()
        path.symlink_to("/nowhere/at/all")

    return forgeries


@pytest.mark.parametrize("name", forged_files())
def test_a_forged_file_is_not_believed(honest, tmp_path, name):
    _, split, path, state = honest
    here = tmp_path / path.name
    shutil.copy(path, here)
    forged_files()[name](here, state, split)
    lines, seen = [], []
    found = StateFile(tmp_path, IDENTITY).load(lines.append, seen.append)
    assert found is None
    assert not seen, "nothing of it is looked at"
    assert len(lines) == 1
    assert lines[0].startswith(f"autoattack: starting anew: {here}: this saved state is not believed: ")
    assert "which may be deleted" in lines[0]
    assert not here.exists()
    assert os.path.lexists(here.with_suffix(".refused"))


WRONG_STATES: dict[str, Callable[[AttackState, Tensor], dict]] = {
    "fewer images": lambda s, x: {n: getattr(s, n)[:-1].clone() for n in ("x_adv", "robust", "begun")},
    "other shape": lambda s, x: {"x_adv": s.x_adv.reshape(24, 1, 4, 16)},
    "fp64": lambda s, x: {"x_adv": s.x_adv.double()},
    "flags in numbers": lambda s, x: {"robust": s.robust.float()},
    "one flag": lambda s, x: {"begun": s.begun[:1].clone()},
    "NaN": lambda s, x: {"x_adv": s.x_adv.index_fill(0, torch.tensor([_fallen(s, x)]), NAN)},
    "infinite": lambda s, x: {"x_adv": s.x_adv.index_fill(0, torch.tensor([_fallen(s, x)]), INF)},
    "outside": lambda s, x: {"x_adv": (s.x_adv + 0.5).clamp(0, 1)},
    "below zero": lambda s, x: {"x_adv": s.x_adv - 0.01},
    "attack -3": lambda s, x: {"attack": -3},
    "attack 5": lambda s, x: {"attack": 5},
    "attack 2.0": lambda s, x: {"attack": 2.0},
    "attack true": lambda s, x: {"attack": True},
    "batch -1": lambda s, x: {"batch": -1},
    "batch 7": lambda s, x: {"batch": 7},
    "no counts": lambda s, x: {"counts": {}},
    "counts of other attacks": lambda s, x: {"counts": {"clean": 21, "pgd": 21}},
    "rising counts": lambda s, x: {"counts": s.counts | {"apgd-t": 22}},
    "broken counts": lambda s, x: {"counts": s.counts | {"clean": 21.5}},
    "other clean count": lambda s, x: {"counts": s.counts | {"clean": 24}},
    "warnings of numbers": lambda s, x: {"warnings": [1]},
    "no date": lambda s, x: {"started": 7},
    "robust though never begun": lambda s, x: {"begun": torch.zeros_like(s.begun)},
    "fallen before it began": lambda s, x: {"robust": torch.zeros_like(s.robust)},
    "all robust": lambda s, x: {
        "robust": torch.ones_like(s.robust),
        "begun": torch.ones_like(s.robust),
        "counts": dict.fromkeys(s.counts, 24),
    },
    "all robust, images clean": lambda s, x: {
        "x_adv": x.clone(),
        "robust": _right(s, x),
        "begun": _right(s, x),
        "counts": s.counts | {"square": 20},
    },
    "fallen, but the image is clean": lambda s, x: {"x_adv": x.clone()},
    "fallen, but the image is still right": lambda s, x: {"x_adv": torch.where(s.x_adv == x, x, (x - 1e-5).clamp(0))},
    "fallen before the first batch": lambda s, x: {
        "begun": _right(s, x),
        "counts": {"clean": 21},
        "attack": 0,
    },
    "robust, but not when it began": lambda s, x: {
        "begun": _swapped(s, x),
        "counts": {"clean": 21},
        "attack": 0,
        "batch": 1,
    },
    "withstood, but is changed": lambda s, x: {
        "x_adv": torch.where(s.robust.view(-1, 1, 1, 1), (x - 1e-3).clamp(0), s.x_adv)
    },
}


def _fallen(state: AttackState, x: Tensor) -> int:
    return int((state.x_adv != x).flatten(1).any(1).nonzero()[0])


def _right(state: AttackState, x: Tensor) -> Tensor:
    return state.robust | (state.x_adv != x).flatten(1).any(1)


def _swapped(state: AttackState, x: Tensor) -> Tensor:
    """As many flags as there are right images, one of which is left out for a wrong one."""
    flags = _right(state, x)
    flags[[int(state.robust.nonzero()[0]), int((~flags).nonzero()[0])]] = torch.tensor([False, True])
    return flags


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_state_that_cannot_be_is_refused_though_it_is_signed(honest, tmp_path, name):
    """Whatever went wrong in this program itself."""
    model, split, _, state = honest
    x = split.images / 255
    wrong = dataclasses.replace(state, **WRONG_STATES[name](state, x))
    file, lines = StateFile(tmp_path, IDENTITY), []
    file.save(wrong)

    def check(saved: AttackState) -> None:
        saved.require_sound(trial(model, split), STANDARD)

    state.require_sound(trial(model, split), STANDARD)
    assert file.load(lines.append, check) is None
    assert len(lines) == 1
    assert "is not believed" in lines[0]


def test_a_forged_state_changes_no_result(honest, tmp_path):
    model, split, path, state = honest
    here = tmp_path / path.name
    shutil.copy(path, here)
    forged_files()["nothing_attacked_all_robust"](here, state, split)
    file, lines = StateFile(tmp_path, IDENTITY), []
    with measuring(model):
        done = autoattack(trial(model, split, say=lines.append), budget=SHORT, state_file=file)
        assert done.resumed is None
        assert int(done.robust.sum()) == state.counts["square"]
        assert torch.equal(done.x_adv, state.x_adv)
        # its own state it goes on from, and the receipt says so
        again = autoattack(trial(model, split), budget=SHORT, state_file=file)
    assert again.resumed is not None
    assert again.resumed["file"] == here.name
    assert again.resumed["from"] == "the result"
    assert len(again.resumed["sha256"]) == 64
    assert again.resumed["started"].startswith("20")
    assert torch.equal(again.robust, done.robust)


def test_a_strangers_notes_are_told_and_never_followed(tmp_path):
    (tmp_path / "autoattack-0123456789abcdef.json").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "autoattack-0123456789abcdee.json")
    (tmp_path / "autoattack-\x1b[31m.json").write_text("{}")
    lines: list[str] = []
    assert StateFile(tmp_path, IDENTITY).load(lines.append, lambda _: None) is None
    assert len(lines) == 2
    assert all("is left alone: other what it says of itself" in line for line in lines)


def test_the_key_is_made_once_for_its_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    key = user_key()
    assert len(key) == 32
    assert user_key() == key
    assert [path.name for path in key_path().parent.iterdir()] == ["key"]
    assert stat.S_IMODE(key_path().stat().st_mode) == 0o600
    assert stat.S_IMODE(key_path().parent.stat().st_mode) == 0o700
    key_path().chmod(0o644)
    with pytest.raises(KeyFileError, match="yours alone"):
        user_key()
    key_path().chmod(0o600)
    key_path().write_bytes(b"short")
    with pytest.raises(KeyFileError, match="32 bytes"):
        user_key()
    key_path().unlink()
    os.mkfifo(key_path(), 0o600)
    with pytest.raises(KeyFileError, match="32 bytes"):
        user_key()
    # a relative path is none, by the standard
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert key_path() == tmp_path / "home" / ".local" / "state" / "awp-engine" / "key"


def test_without_a_place_for_the_key_nothing_is_saved_and_it_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    model, lines = linear(), []
    done = measure(
        trial(model, labelled(model), say=lines.append),
        [parse_attack("square")],
        step_size=STEP,
        gates_limit=None,
        budget=SHORT,
        states=tmp_path / "states",
        identity=IDENTITY,
    )
    assert done.rows[0].resumed is None
    assert lines[0].startswith("square: goes on without saving its progress: ")
    assert "set XDG_STATE_HOME" in lines[0]
    assert not (tmp_path / "states").exists()


def test_what_autoattack_cannot_do_is_said_before_other_attacks():
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    split = Split(images=digits().test.images[:4], labels=torch.tensor([0, 1, 2, 0]), ids=torch.arange(4))
    lines: list[str] = []
    attacks = [parse_attack(name) for name in ("pgd1", "autoattack")]
    with pytest.raises(EvaluationError, match="at least 4 classes"):
        measure(trial(three, split, say=lines.append), attacks, step_size=STEP, gates_limit=None)
    assert not lines


def test_a_missing_package_is_found_before_other_attacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model, lines = linear(), []
    for attacks, gates_limit in ((("pgd1", "autoattack"), None), (("pgd1", "square"), None), (("pgd1",), 10)):
        chosen = [parse_attack(name) for name in attacks]
        with pytest.raises(EvaluationError, match="pip install pyautoattack"):
            attacked = trial(model, labelled(model), say=lines.append)
            measure(attacked, chosen, step_size=STEP, gates_limit=gates_limit)
    assert not lines


def test_an_attack_that_cannot_cross_the_ball_is_doubted():
    """A run's config.json says the step, and comes with the run."""
    model = linear()
    for step, name, doubted in (("1/201", "pgd10", True), ("1/200", "pgd10", False), ("1/201", "pgd9", False)):
        attacked = trial(model, labelled(model))
        done = measure(attacked, [parse_attack(name)], step_size=Fraction(step), gates_limit=None)
        assert done.to_dict()["unreliable"] == doubted
        assert ("cannot cross a ball of radius 1/20" in "".join(done.doubts())) == doubted


class Interrupted(nn.Module):
    """A linear model that is interrupted at its pass number `last`."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.inner, self.left = linear(), last

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.inner(x)


def test_a_state_from_the_middle_of_an_attack_is_gone_on_from(honest, tmp_path, monkeypatch):
    monkeypatch.setattr("awp_engine.evaluation.attacks.autoattack._SAVE_SECONDS", 0.0)
    model, split, _, state = honest
    seen = set()
    for last in (18, 22, 26, 30, 60, 100):
        file = StateFile(tmp_path / str(last), IDENTITY)
        with pytest.raises(KeyboardInterrupt):
            autoattack(trial(Interrupted(last), split), budget=SHORT, state_file=file)
        with measuring(model):
            done = autoattack(trial(model, split), budget=SHORT, state_file=file)
        assert torch.equal(done.x_adv, state.x_adv), last
        assert torch.equal(done.robust, state.robust)
        assert done.details["right_after"] == state.counts
        if done.resumed is not None:
            seen.add((done.resumed["from"], done.resumed["batch"]))
    assert {batch for _, batch in seen} >= {1, 2}, seen
    assert len({name for name, _ in seen}) >= 2
