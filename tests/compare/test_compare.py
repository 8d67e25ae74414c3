"""Runs side by side: what shares a row, what shares a column, and what strange files do."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run_command
from finished_runs import IMAGES_SHA256, write_evaluation, write_finished, write_measured, write_unfinished

from awp_engine.compare.curves import draw_runs
from awp_engine.compare.formats import fitted, formatted, text_rows
from awp_engine.compare.page import write
from awp_engine.compare.read import read_run, read_runs
from awp_engine.compare.table import Difference, Section, Statistic, compare
from awp_engine.config import AttackConfig, ConfigError, EvaluationConfig, ModelConfig, OptimizerConfig


def sections(*runs: Path) -> list[Section]:
    return compare(*read_runs([str(run) for run in runs])[:2])


def table(*runs: Path) -> list[dict[str, str]]:
    """The rows of the results, which must be one table."""
    (only,) = sections(*runs)
    return text_rows(only.tables[0])


def notes(*runs: Path) -> str:
    return "\n".join(note for section in sections(*runs) for one in section.tables for note in one.notes)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two settings, two seeds each."""
    for seed, (plain, awp) in enumerate([(0.50, 0.53), (0.52, 0.57)]):
        write_finished(tmp_path / f"at-{seed}", seed=seed, robust=plain)
        write_finished(tmp_path / f"awp-{seed}", seed=seed, gamma=0.005, robust=awp, last=awp)
    return tmp_path


def test_seeds_of_one_setting_are_a_row(study: Path) -> None:
    rows = table(study / "at-0", study / "awp-0", study / "at-1", study / "awp-1")
    assert [row["method"] for row in rows] == ["AT", "AT-AWP"]
    assert [row["seeds"] for row in rows] == ["2", "2"]
    # 50 and 52: mean 51, standard deviation by n - 1 the root of 2
    assert rows[0]["PGD-20"] == "51.00 ± 1.41"
    assert rows[0]["clean"] == "90.00 ± 0.00"
    # training less test accuracy of the last epoch
    assert rows[0]["gap"] == "40.00 ± 0.00"
    assert rows[1]["gap"] == "25.00 ± 2.83"


def test_a_rounded_zero_has_no_sign() -> None:
    assert Statistic((-0.001, -0.001), 2).text() == "0.00 ± 0.00"


def test_one_seed_has_no_deviation(study: Path) -> None:
    (row,) = table(study / "at-0")
    assert (row["PGD-20"], row["seeds"]) == ("50.00", "1")
    assert "±" not in notes(study / "at-0")


def test_only_settings_that_differ_are_columns(study: Path) -> None:
    rows = table(study / "at-0", study / "awp-0")
    assert list(rows[0]) == [
        "method", "gamma", "seeds", "clean", "PGD-20", "PGD-20 last", "gap", "epoch", "seconds",
    ]  # fmt: skip
    write_finished(study / "slow", optimizer=OptimizerConfig(lr=0.01))
    rows = table(study / "at-0", study / "slow")
    assert [row["optimizer.lr"] for row in rows] == ["0.1", "0.01"]
    assert "gamma" not in rows[0]


def test_many_settings_that_differ_are_listed_below(study: Path) -> None:
    other = OptimizerConfig(lr=0.01, momentum=0.8, schedule="cosine", weight_decay=0.0)
    write_finished(study / "other", optimizer=other)
    rows = table(study / "at-0", study / "other")
    assert [row["settings"] for row in rows] == ["A", "B"]
    told = notes(study / "at-0", study / "other")
    assert (
        "settings B: optimizer.lr 0.01, optimizer.momentum 0.8, optimizer.weight_decay 0, optimizer.schedule cosine"
        in told
    )
    # what has a column of its own makes no other letter
    write_finished(study / "other-awp", gamma=0.005, optimizer=other)
    runs = [study / name for name in ("at-0", "awp-0", "other", "other-awp")]
    assert [(row["gamma"], row["settings"]) for row in table(*runs)] == [
        ("0", "A"), ("0.005", "A"), ("0", "B"), ("0.005", "B"),
    ]  # fmt: skip
    assert [notes(*runs).count(f"settings {letter}: ") for letter in "ABC"] == [1, 1, 0]


def test_what_a_method_brings_along_is_noted(study: Path) -> None:
    brought = AttackConfig(bn_mode="eval", start="normal")
    write_finished(study / "trades", method="trades", attack=brought)
    (section,) = sections(study / "at-0", study / "trades")
    assert [setting.label for setting in section.settings] == ["AT", "TRADES"]
    assert "settings of TRADES: attack.bn_mode eval, attack.start normal" in section.tables[0].notes
    # what tells runs of one method apart is a column
    write_finished(study / "other", method="trades")
    rows = table(study / "at-0", study / "trades", study / "other")
    assert [row["attack.start"] for row in rows] == ["uniform", "normal", "uniform"]


def test_equal_amounts_are_one_setting(study: Path) -> None:
    write_finished(study / "fraction", seed=7, attack=AttackConfig(epsilon="1/5"))
    assert len(table(study / "at-0", study / "fraction")) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"images": 100},
        {"sha256": "ef" * 32},
        {"attack": AttackConfig(epsilon="0.1")},
        {"attack": AttackConfig(norm="l2")},
        {"evaluation": EvaluationConfig(steps=10)},
        {"evaluation": EvaluationConfig(steps=20, step_size="0.01")},
    ],
    ids=["images", "other images", "epsilon", "norm", "steps", "step"],
)
def test_what_was_measured_otherwise_is_another_table(study: Path, other: dict) -> None:
    write_finished(study / "other", **other)
    found = sections(study / "at-0", study / "other")
    assert len(found) == 2
    assert all("do not compare" in section.tables[0].notes[0] for section in found)
    # nor is a difference taken between them
    assert len([one for section in found for one in section.tables]) == 2


def test_reports_without_a_hash_of_their_images_join_with_a_word(study: Path) -> None:
    write_finished(study / "old", seed=1, gamma=0.01, sha256=None)
    assert len(table(study / "old", study / "at-0")) == 2
    assert "do not name their test images by a hash" in notes(study / "old", study / "at-0")


def test_runs_on_other_training_images_are_another_row(study: Path) -> None:
    write_finished(study / "other", seed=1, data="ef" * 32)
    rows = table(study / "at-0", study / "other")
    assert [row["training images"] for row in rows] == ["cd" * 6, "ef" * 6]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model", "own model"),
        ("data", "own data"),
        ("class_weights", "class weights"),
        ("pretrained", "pretrained weights"),
    ],
)
def test_runs_by_other_files_are_another_row(tmp_path: Path, key: str, name: str) -> None:
    for seed, digits in enumerate(("11", "22", "11")):
        write_finished(tmp_path / f"{seed}", seed=seed, made_by={key: digits * 32, "method": "33" * 32})
    rows = table(tmp_path)
    assert [(row[name], row["seeds"]) for row in rows] == [("11" * 6, "2"), ("22" * 6, "1")]
    assert "own method" not in rows[0]
    assert f"{name}: two different files" in notes(tmp_path)


@pytest.mark.parametrize("digits", ["11", "22"])
def test_held_out_accuracies_by_other_class_weights_do_not_compare(tmp_path: Path, digits: str) -> None:
    for seed, own in enumerate(("11", digits)):
        write_finished(tmp_path / f"{seed}", seed=seed, made_by={"class_weights": own * 32})
    told = "held-out accuracies weigh images by a run's class weights" in notes(tmp_path)
    assert told == (digits == "22")


@pytest.mark.parametrize("name", ["given(nets.Wide)", "awp_engine.cli.objects:model"])
def test_models_that_fit_was_given_are_told_apart_by_their_weights(tmp_path: Path, name: str) -> None:
    for seed, shape in enumerate(([8, 3], [8, 3], [16, 3])):
        run = write_finished(tmp_path / f"{seed}", seed=seed, model=ModelConfig(name=name))
        header = json.dumps({"__metadata__": {"seed": f"{seed}"}, "w": {"shape": shape, "dtype": "F32"}}).encode()
        (run / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert [row["seeds"] for row in table(tmp_path)] == ["2", "1"]
    assert "told apart by the names and shapes of their weights alone" in notes(tmp_path)


def test_runs_of_earlier_versions_do_not_say_by_which_file(tmp_path: Path) -> None:
    write_finished(tmp_path / "old", seed=0)
    write_finished(tmp_path / "older", seed=1)
    assert [row["seeds"] for row in table(tmp_path)] == ["2"]
    write_finished(tmp_path / "new", seed=2, made_by={"model": "11" * 32})
    assert [row["seeds"] for row in table(tmp_path)] == ["3"]
    assert "old, " in notes(tmp_path)
    assert "does not say by which file: own model" in notes(tmp_path)
    # of which of two nobody knows
    write_finished(tmp_path / "newer", seed=3, made_by={"model": "22" * 32})
    rows = {row["own model"]: row["seeds"] for row in table(tmp_path)}
    assert rows == {"11" * 6: "1", "22" * 6: "1", "unknown": "2"}


def test_evaluations_of_other_weights_are_rows_beside_runs(study: Path) -> None:
    write_evaluation(study / "at-0", {"clean": 180, "autoattack": 80})
    write_evaluation(study / "at-1", {"clean": 160, "autoattack": 60})
    for name, weights in (("one", "34" * 32), ("two", "56" * 32)):
        write_measured(study / "theirs", {"clean": 190, "pgd20": 90}, name=name, weights=weights, doubts=("noise",))
    # by each of its names, and within what was given
    (only,) = sections(study / "theirs" / "evaluation.json", study)
    rows = text_rows(only.tables[1])
    # not averaged, though both files have one name
    assert [row["method"] for row in rows] == ["AT", "wrn-28-10 (FILE.pt) [1]", "wrn-28-10 (FILE.pt) [2]"]
    assert [row["clean"] for row in rows] == ["85.00 ± 7.07", "95.00*", "95.00*"]
    assert [row["autoattack"] for row in rows] == ["35.00 ± 7.07", "-", "-"]
    assert (rows[1]["gamma"], rows[1]["seeds"]) == ("-", "-")
    told = notes(study)
    assert "theirs/evaluation-one.json, weights of SHA-256 343434343434" in told
    assert "unreliable: noise" in told
    # what is measured in training is of runs alone
    assert [row["method"] for row in text_rows(only.tables[0])] == ["AT", "AT-AWP"]


@pytest.mark.parametrize("other", [{"epsilon": "1/10"}, {"sha256": "ef" * 32}, {"images": 100}, {"precision": "bf16"}])
def test_evaluations_on_other_images_or_balls_share_no_table(study: Path, other: dict) -> None:
    write_evaluation(study / "at-0", {"clean": 80}, precision="fp32")
    same = write_measured(study / "same", {"clean": 90})
    others = write_measured(study / "others", {"clean": 95}, **other)
    runs, alone = sections(study / "at-0", same, others)
    assert [row["clean"] for row in text_rows(runs.tables[1])] == ["40.00", "45.00"]
    assert [len(one.rows) for one in alone.tables] == [1]
    assert "do not compare across" in alone.tables[0].notes[0]
    assert f"{other.get('sha256', IMAGES_SHA256)[:12]}" in alone.tables[0].notes[0]


def test_evaluations_need_no_run(tmp_path: Path, monkeypatch, capsys) -> None:
    write_measured(tmp_path / "one", {"clean": 90})
    write_measured(tmp_path / "one", {"clean": 80}, name="other", weights="56" * 32)
    write_measured(tmp_path / "two", {"clean": 95}, sha256="ef" * 32)
    (partial := tmp_path / "two" / "evaluation-x.partial.json").write_text("{}")
    found = sections(tmp_path)
    assert [[row["clean"] for row in text_rows(one.tables[0])] for one in found] == [["45.00", "40.00"], ["47.50"]]
    for kind in ("text", "markdown", "latex", "csv"):
        assert run_command("compare", monkeypatch, tmp_path, "--format", kind) == 0
        out = capsys.readouterr().out
        assert "47.5" in out
        assert "epoch" not in out
    assert run_command("compare", monkeypatch, tmp_path, "--output", tmp_path / "out", "--format", "json") == 0
    first, second = json.loads(capsys.readouterr().out)["sections"]
    assert (first["runs"], first["evaluations"][0]["images_sha256"]) == ([], IMAGES_SHA256)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "3 evaluations, as their own files say" in page
    assert second["evaluations"][0]["sha256"] in page
    assert run_command("compare", monkeypatch, partial) == 2
    assert "expected a finished evaluation.json: finished: expected true" in capsys.readouterr().err


def test_a_runs_own_evaluation_given_by_itself(study: Path) -> None:
    file = write_evaluation(study / "at-0", {"clean": 80})
    assert len(sections(study / "at-0", file)[0].tables[1].rows) == 1
    (alone,) = sections(file)
    assert text_rows(alone.tables[0]) == [{"model": "weights (model.safetensors) [1]", "clean": "40.00"}]


def test_a_seed_counts_once(study: Path) -> None:
    shutil.copytree(study / "at-0", study / "copy")
    assert table(study / "at-0", study / "copy")[0]["seeds"] == "1"
    assert f"copy: has the settings and the seed of {study / 'at-0'}" in notes(study / "at-0", study / "copy")


def test_unfinished_runs_are_shown_as_such(study: Path) -> None:
    write_unfinished(study / "at-2", seed=2)
    write_unfinished(study / "new", gamma=0.1)
    rows = table(study / "at-0", study / "at-2", study / "new")
    assert [row["seeds"] for row in rows] == ["1 (+1 unfinished)", "0 (+1 unfinished)"]
    assert [row["PGD-20"] for row in rows] == ["50.00", "-"]
    assert "at-2: not finished: epoch 2 of 4; held-out PGD-20 18.00%" in notes(study / "at-2")


@pytest.mark.parametrize("change", [{"config_hash": "0" * 64}, {"epochs": 3}], ids=["settings", "epochs"])
def test_a_report_of_other_settings_is_not_used(study: Path, change: dict) -> None:
    path = study / "at-0" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert table(study / "at-0")[0]["PGD-20"] == "-"
    assert "report.json is not used: of " in notes(study / "at-0")


def test_autoattack_stands_beside_what_was_measured_on_the_same_images(study: Path) -> None:
    write_evaluation(study / "at-0", {"clean": 180, "autoattack": 80})
    write_evaluation(study / "awp-0", {"clean": 20, "autoattack": 9}, images=20, sha256="ef" * 32)
    (only,) = sections(study)
    rows = text_rows(only.tables[0])
    assert [row["AutoAttack"] for row in rows] == ["40.00 (1 of 2)", "-"]
    titles = [one.title for one in only.tables[1:3]]
    assert ["200 images" in titles[0], ", 20 images" in titles[1]] == [True, True]
    assert text_rows(only.tables[2]) == [
        {"method": "AT-AWP", "gamma": "0.005", "seeds": "1", "clean": "100.00", "autoattack": "45.00"}
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"epsilon": "1/10"},
        {"sha256": "ef" * 32},
        {"version": "custom"},
        {"weights": "epoch-4"},
        {"precision": "bf16"},
    ],
)
def test_another_autoattack_does_not(study: Path, other: dict) -> None:
    write_evaluation(study / "at-0", {"autoattack": 80}, **other)
    assert "AutoAttack" not in table(study / "at-0")[0]


def test_autoattack_on_another_number_of_images_does_not(tmp_path: Path) -> None:
    """In reports of earlier versions the number is all that there is."""
    write_finished(tmp_path / "old", sha256=None)
    write_evaluation(tmp_path / "old", {"autoattack": 80}, images=100)
    assert "AutoAttack" not in table(tmp_path / "old")[0]
    write_evaluation(tmp_path / "old", {"autoattack": 80}, images=200)
    assert table(tmp_path / "old")[0]["AutoAttack"] == "40.00"


def test_evaluations_on_other_images_say_so(study: Path) -> None:
    write_evaluation(study / "at-0", {"clean": 80}, sha256="11" * 32, name="a")
    write_evaluation(study / "at-1", {"clean": 70}, sha256="22" * 32, name="b")
    (only,) = sections(study / "at-0", study / "at-1")
    assert [text_rows(one)[0]["clean"] for one in only.tables[1:]] == ["40.00", "35.00"]
    told = [one.notes[0] for one in only.tables[1:]]
    assert told == [f"its images have the hash {digits * 6}" for digits in ("11", "22")]


def test_of_an_attack_done_twice_the_lower_accuracy_counts(study: Path) -> None:
    for name, right in (("a", 90), ("b", 70), ("c", 80)):
        write_evaluation(study / "at-0", {"pgd20": right}, name=name)
    (only,) = sections(study / "at-0")
    assert [row["pgd20"] for row in text_rows(only.tables[1])] == ["35.00"]


def test_evaluations_that_are_not_to_be_believed_have_a_star(study: Path) -> None:
    write_evaluation(study / "at-0", {"autoattack": 80}, doubts=("gate failed: gradients are not masked",))
    assert table(study / "at-0")[0]["AutoAttack"] == "40.00*"
    assert "unreliable: gate failed: gradients are not masked" in notes(study / "at-0")


def test_evaluations_of_earlier_weights_are_left_out(study: Path) -> None:
    write_evaluation(study / "at-0", {"autoattack": 80})
    (study / "at-0" / "model.safetensors").write_bytes(b"trained again")
    assert "AutoAttack" not in table(study / "at-0")[0]
    assert "left out: of other weights than model.safetensors holds now" in notes(study / "at-0")


def test_attacks_of_other_parameters_do_not_share_a_column(study: Path) -> None:
    write_evaluation(study / "at-0", {"pgd20": 90}, restarts=1, name="one")
    write_evaluation(study / "at-0", {"pgd20": 70}, restarts=5, name="five")
    write_evaluation(study / "at-1", {"pgd20": 80}, restarts=1, name="one")
    (only,) = sections(study / "at-0", study / "at-1")
    (row,) = text_rows(only.tables[1])
    assert {name: row[name] for name in row if "pgd20" in name} == {
        "pgd20 (1)": "35.00 (1 of 2)",
        "pgd20 (2)": "42.50 ± 3.54",
    }
    assert any(note.startswith('pgd20 (1): {"restarts": 5') for note in only.tables[1].notes)


def test_differences_are_paired_by_seed(study: Path) -> None:
    write_finished(study / "at-5", seed=5, robust=0.99)
    (only,) = sections(*sorted(study.glob("at-*")), *sorted(study.glob("awp-*")))
    found = only.tables[-1]
    assert found.title == "difference: AT-AWP, gamma 0.005 minus AT"
    robust = next(row["difference"] for row in found.rows if row[""] == "PGD-20")
    assert isinstance(robust, Difference)
    # 3 and 5 points, whatever seed 5 has, which one side lacks
    assert robust.values == pytest.approx((3, 5))
    assert (robust.mean, robust.spread) == pytest.approx((4, math.sqrt(2) / math.sqrt(2)))
    assert robust.text() == "+4.00 ± 1.00"
    # whatever was named first, as a whole folder of runs names at-awp before at
    (turned,) = sections(*sorted(study.glob("awp-*")), *sorted(study.glob("at-*")))
    assert (turned.tables[-1].title, turned.tables[-1].rows) == (found.title, found.rows)
    assert "seeds 0 1" in found.notes[0]
    assert "of two seeds that error says little" in found.notes[-1]


def test_without_a_common_seed_there_is_no_difference(study: Path) -> None:
    (only,) = sections(study / "at-0", study / "awp-1")
    assert len(only.tables) == 1
    (one_seed,) = sections(study / "at-0", study / "awp-0")
    assert "one seed does not tell" in one_seed.tables[-1].notes[-1]
    assert "±" not in "".join(cell for row in text_rows(one_seed.tables[-1]) for cell in row.values())


def test_directories_patterns_and_what_lies_below(study: Path) -> None:
    write_finished(study / "at-0" / "without-awp", gamma=0.7)
    runs, _, left_out = read_runs([str(study / "a*-0"), str(study), str(study / "at-0")])
    assert [run.name for run in runs] == [
        str(study / name) for name in ("at-0", "at-0/without-awp", "awp-0", "at-1", "awp-1")
    ]
    assert left_out == []
    (study / "awp-0" / "config.json").write_text("{}")
    runs, _, left_out = read_runs([str(study)])
    assert len(runs) == 4
    assert "awp-0: left out: " in left_out[0]
    with pytest.raises(ConfigError, match=r"awp-0/config\.json: preset: missing key"):
        read_runs([str(study), str(study / "awp-0")])
    (study / "link").symlink_to(study / "at-0")
    assert len(read_runs([str(study / "link"), str(study / "at-0")])[0]) == 2


@pytest.mark.parametrize("name", ["nothing", "no*thing", "empty", "a\0b", "config.json", None])
def test_what_holds_no_run_is_named_in_one_line(tmp_path: Path, name: str | None, monkeypatch, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert run_command("compare", monkeypatch, "" if name is None else tmp_path / name) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("compare.py: error: ")


JUNK = [
    b"", b"null", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"finished": true}', b'{"finished": 1}',
    b'{"clean_accuracy": NaN}', b'{"config_hash": null}',
]  # fmt: skip


@pytest.mark.parametrize("junk", JUNK, ids=range(len(JUNK)))
def test_strange_files_cost_a_line(study: Path, junk: bytes) -> None:
    (study / "at-0" / "report.json").write_bytes(junk)
    write_evaluation(study / "at-1", {"clean": 1}).write_bytes(junk)
    assert table(study / "at-0")[0]["PGD-20"] == "-"
    assert "report.json is not used: " in notes(study / "at-0")
    assert "evaluation-one.json: left out: " in notes(study / "at-1")


@pytest.mark.parametrize(
    "change",
    [
        {"clean_accuracy": 2}, {"pgd20_accuracy": "0.5"}, {"seconds": -1}, {"test_images": 0}, {"selected_epoch": 1.5},
        {"last": []}, {"data": {"test_sha256": 3}}, {"device": None}, {"pgd20_accuracy": None},
    ],
    ids=str,
)  # fmt: skip
def test_every_number_of_a_report_has_its_type(study: Path, change: dict) -> None:
    path = study / "at-0" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert read_run(study / "at-0").result is None


def test_files_larger_than_any_report_are_not_read(study: Path) -> None:
    (study / "at-0" / "report.json").write_bytes(b" " * (1 << 24) + b"{}")
    assert "more than 16777216 bytes" in notes(study / "at-0")


@pytest.mark.timeout(20)
def test_pipes_are_not_waited_for(study: Path) -> None:
    for name in ("report.json", "metrics.jsonl"):
        (study / "at-0" / name).unlink()
        os.mkfifo(study / "at-0" / name)
    assert read_run(study / "at-0").result is None


def test_formats_hold_the_same_numbers(study: Path) -> None:
    found = sections(study / "at-0", study / "at-1", study / "awp-0", study / "awp-1")
    assert "| AT | 0 | 2 | 90.00 ± 0.00 | 51.00 ± 1.41 |" in formatted(found, "markdown", [])
    assert r"AT & 0 & 2 & 90.00 $\pm$ 0.00 & 51.00 $\pm$ 1.41 &" in formatted(found, "latex", [])
    rows = list(csv.DictReader(io.StringIO(formatted(found, "csv", []))))
    (row,) = [row for row in rows if row["method"] == "AT" and row["measure"] == "PGD-20"]
    assert (float(row["mean"]), float(row["deviation"]), row["runs"]) == (51, pytest.approx(2**0.5), "2")
    # a third of 43.5 is no 14.499999999999998
    write_finished(study / "third", robust=0.435 / 3, last=0.4)
    text = formatted(sections(study / "third"), "csv", [])
    assert ",14.5," in text
    assert "99999" not in text
    document = json.loads(formatted(found, "json", ["x"]))
    cell = document["sections"][0]["tables"][0]["rows"][0]["PGD-20"]
    assert (cell["mean"], cell["values"]) == (51, [50, 52])
    assert document["left_out"] == ["x"]
    assert document["sections"][0]["runs"][0]["result"]["test_sha256"] == IMAGES_SHA256


def test_text_is_escaped_in_every_format(study: Path) -> None:
    name = "=1|<b>_$%\x1b[31m"
    (study / "at-0").rename(study / name)
    write_unfinished(study / name / "without-awp", seed=8)
    found = sections(study / name)
    assert "\x1b" not in "".join(formatted(found, kind, []) for kind in ("markdown", "latex", "csv", "json"))
    assert r"\|\<b>\_" in formatted(found, "markdown", [])
    write(study, found, [], print)
    page = (study / "compare.html").read_text()
    assert "<b>" not in page
    assert "=1|&lt;b&gt;_$%" in page


def test_tables_wider_than_a_terminal_are_turned() -> None:
    numbers = dict.fromkeys(("clean", "PGD-20", "gap"), "90.00 ± 1.00")
    rows = [{"method": name, **numbers} for name in ("AT", "TRADES", "MART")]
    # 9 + 15 + 15 + 15 characters and the right edge
    assert fitted(rows, 55) == [rows]
    turned = fitted(rows, 42)
    assert [list(table[0]) for table in turned] == [["", "1", "2"], ["", "3"]]
    assert turned[0][1] == {"": "clean", "1": "90.00 ± 1.00", "2": "90.00 ± 1.00"}
    assert [len(fitted(rows, width)) for width in (54, 40, 39, 1)] == [2, 2, 3, 3]


def test_statistics_by_hand() -> None:
    assert Statistic((1.0, 2.0, 4.0), 3).text() == "2.33 ± 1.53"
    assert Statistic((1.0,), 2, doubted=True).text() == "1.00* (1 of 2)"
    assert Statistic((), 2).text() == "-"
    assert Difference((1.0, 2.0, 4.0), 3).text() == "+2.33 ± 0.88"


def test_the_command_writes_the_same_files_every_time(study: Path, monkeypatch, capsys) -> None:
    outputs = []
    for name in ("one", "two"):
        assert run_command("compare", monkeypatch, study, "--output", study / name) == 0
        outputs.append({path.name: path.read_bytes() for path in (study / name).iterdir()})
    assert outputs[0] == outputs[1]
    assert set(outputs[0]) == {"compare.html", "compare.json", "curves.png"}
    out = capsys.readouterr().out
    assert "51.00 ± 1.41" in out
    assert "AT-AWP" in out
    page = outputs[0]["compare.html"].decode()
    # its four panels lie within
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page.replace("http-equiv", "")


def test_a_file_is_no_directory_for_what_is_written(study: Path, monkeypatch, capsys) -> None:
    (study / "file").write_text("mine")
    assert run_command("compare", monkeypatch, study / "at-0", "--output", study / "file") == 2
    assert f"--output: {study / 'file'} is a file; expected a directory" in capsys.readouterr().err


def test_the_command_needs_no_torch(study: Path) -> None:
    code = (
        "import sys; sys.argv[1:] = [sys.argv[1], '--format', 'csv']\n"
        "from awp_engine.cli.compare import main; main(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(study)], check=True, capture_output=True, timeout=60)


def test_curves_of_any_runs_are_drawn(study: Path) -> None:
    write_unfinished(study / "at-0" / "inner", epochs=0, gamma=0.3)
    lines = [{"epoch": 1, "loss": 1e200, "lr": 0}, {"epoch": 3, "held_out_pgd_accuracy": 1e118}]
    (study / "at-1" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_runs([study / "at-0", study / "at-0" / "inner", study / "at-1"], study)
    assert (study / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
