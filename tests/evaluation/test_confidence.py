"""How sure an accuracy is, and which attack's number stands first."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from awp_engine.evaluation.reports.confidence import interval, stronger_attack
from awp_engine.evaluation.reports.results import BlackBox, Measurement


@given(st.integers(1, 10_000).flatmap(lambda images: st.tuples(st.integers(0, images), st.just(images))))
def test_intervals_are_those_of_clopper_and_pearson(counts: tuple[int, int]) -> None:
    theirs = binomtest(*counts).proportion_ci(0.95, method="exact")
    assert interval(*counts) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def adaptive(**found: Any) -> dict[str, Any]:
    hidden = {"white_box": 30, "bpda": found.get("bpda"), "square": found.get("square", 40)}
    eot = None if "eot" not in found else {"images": 50, "curve": [{"draws": n, "mean": m} for n, m in found["eot"]]}
    decision = {"adapted": found.get("adapted")}
    return {"randomness": {"images": 100, "eot": eot}, "hidden_gradients": hidden, "decision": decision}


@pytest.mark.parametrize(
    ("found", "attack", "accuracy"),
    [
        ({"bpda": 12}, "BPDA", 0.12),
        ({"bpda": 31, "square": 20}, "Square", 0.2),
        ({"adapted": 25, "square": 26}, "logits that decide", 0.25),
        ({"eot": [(1, 14.0), (20, 10.5)], "bpda": 25}, "over 20 draws", 0.21),
        # no more than one image in a hundred, which may go either way
        ({"bpda": 29, "adapted": 30, "eot": [(1, 15.0)]}, None, None),
    ],
)
def test_the_strongest_fitting_attack_stands_first(found: dict[str, Any], attack: str | None, accuracy: float) -> None:
    strongest = stronger_attack(adaptive(**found))
    assert (strongest is None) == (attack is None)
    if strongest is not None:
        assert attack is not None
        assert attack in strongest.attack
        assert strongest.accuracy == pytest.approx(accuracy)


def measured(*clean: int) -> Measurement:
    """Of ten images a class, so many of which are right."""
    classes = [
        {"class": f"class {number}", "images": 10, "clean": right, "attacked": {}, "worst": right}
        for number, right in enumerate(clean)
    ]
    counts = {"clean": sum(clean), "worst": sum(clean), "images": 10 * len(clean), "not_finite": 0}
    return Measurement(
        rows=(), worst_over=("clean",), gates=None, pictures=(), per_class=classes, per_image=None, **counts
    )


@given(st.integers(0, 60), st.integers(0, 60))
def test_square_above_gradients_is_a_doubt_where_it_is_no_chance(alone: int, others: int) -> None:
    found = BlackBox(gradients=("pgd20",), square_alone=alone, gradients_alone=others)
    done = dataclasses.replace(measured(5, 5), black_box=found)
    chance = binomtest(alone, alone + others, alternative="greater").pvalue if alone else 1.0
    assert found.chance == pytest.approx(chance, abs=1e-12)
    doubted = chance < 0.01
    assert [len(done.doubts()), len(done.notes())] == [doubted, alone > others and not doubted]
    for said in (*done.doubts(), *done.notes()):
        assert said.startswith(
            f"square broke {alone} images that pgd20 did not, and these {others} that square did not"
        )


def test_one_answer_for_every_image_is_a_doubt() -> None:
    (doubt,) = measured(0, 10, 0).doubts()
    assert doubt.startswith("only images of class 1 are right, and all of them")
    assert [measured(*clean).doubts() for clean in ((10,), (0, 9, 0), (1, 10, 0))] == [[], [], []]
    # a few images of a model that is right on some of them
    few = dataclasses.replace(measured(0, 10, 0), images=9)
    assert few.doubts() == []
