"""A file of answers: what is believed of it, and what is found anew."""

import pytest

from awp_engine.checkpoint import CheckpointError
from awp_engine.checkpoint.journal import Journal

ANSWERS = [{"id": k, "radius": 0.1 + 0.2 * k} for k in range(3)]


@pytest.mark.parametrize("forgery", ["changed", "of another question", "again", "no JSON", "out of order", "no end"])
def test_answers_that_are_not_ones_own_are_not_believed(tmp_path, forgery):
    said = []
    saved = Journal(tmp_path, "certify", {"weights": "a"}, said.append)
    for number, answer in enumerate(ANSWERS):
        saved.add(number, answer)
    assert saved.load() == ANSWERS
    lines = saved.path.read_text().splitlines(keepends=True)
    if forgery == "of another question":
        other = Journal(tmp_path, "certify", {"weights": "b"}, said.append)
        other.add(1, ANSWERS[1])
        lines[1] = other.path.read_text()
    elif forgery == "out of order":
        lines[1:] = lines[:0:-1]
    elif forgery == "no end":
        lines[1:] = [lines[1].rstrip()]
    else:
        wrong = {"changed": lines[1].replace("0.3", "0.9"), "again": lines[0], "no JSON": "[" * 5000 + "\n"}
        assert lines[1] != wrong[forgery]
        lines[1] = wrong[forgery]
    saved.path.write_text("".join(lines))
    assert saved.load() == ANSWERS[:1]
    assert said == [] if forgery == "no end" else [f"{saved.path}: line 2 is not believed: going on from there"]
    saved.add(1, ANSWERS[1])
    assert saved.load() == ANSWERS[:2]


def test_a_journal_that_is_no_file_is_refused(tmp_path):
    saved = Journal(tmp_path, "certify", {}, print)
    saved.path.mkdir()
    with pytest.raises(CheckpointError, match="regular file"):
        saved.load()
