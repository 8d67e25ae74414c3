"""The HTML pages as a browser shows them, at two widths, light and dark; `pytest -m browser`.

Without Chromium or playwright these fail: who asks for them wants to know.
"""

from collections.abc import Iterator
from pathlib import Path

import digits_model
import pytest
from browser import WIDTHS, Browser, chromium
from commands import run_command
from finished_runs import write_evaluation, write_finished, write_unfinished

from awp_engine.config import AttackConfig, OptimizerConfig
from awp_engine.evaluation.run import evaluate_checkpoint
from awp_engine.observe.page import document

pytestmark = pytest.mark.browser
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def problems(browser: Browser, page: Path) -> dict[str, list[str]]:
    found = {f"{width} {scheme}": browser.show(page, width, scheme) for width in WIDTHS for scheme in SCHEMES}
    return {where: shown.problems for where, shown in found.items() if shown.problems}


def test_an_evaluation(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # that it is robust does not matter here, and takes longer
    monkeypatch.setattr(digits_model, "robust_model", lambda: digits_model.trained(0.0, 2))
    monkeypatch.setattr(digits_model, "clean_model", digits_model.robust_model)
    run = digits_model.write_run(tmp_path / "a run of a rather long name with-a-word-that-does-not-end-soon")
    attacks = ["clean", "fgsm", "pgd5", "regional-frame-45"]
    done = evaluate_checkpoint(run, attacks=attacks, limit=20, gates_limit=4)
    assert '<div class="pictures"><figure>' in (done.output / "evaluation.html").read_text()
    assert problems(browser, done.output / "evaluation.html") == {}


def test_a_comparison(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(3):
        write_finished(tmp_path / f"at-{seed}", seed=seed, robust=0.5 + seed / 100)
        write_finished(tmp_path / f"awp-{seed}", seed=seed, gamma=0.005)
        write_evaluation(tmp_path / f"at-{seed}", dict.fromkeys(("clean", "fgsm", "pgd20", "cw100", "autoattack"), 90))
    write_finished(tmp_path / "other", attack=AttackConfig(epsilon="0.1"))
    many = OptimizerConfig(lr=0.01, momentum=0.8, schedule="cosine", weight_decay=0.0)
    write_unfinished(tmp_path / "<b>a run of a rather long name with-a-word-that-does-not-end-soon", optimizer=many)
    assert run_command("compare", monkeypatch, tmp_path, "--output", tmp_path / "out") == 0
    assert problems(browser, tmp_path / "out" / "compare.html") == {}


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('<div style="width: 2000px">a</div>', "wider than the window"),
        ('<div style="overflow: hidden"><p>a</p></div><p style="position: relative; left: 99%">word</p>', "sticks out"),
        ('<div style="overflow-x: auto"><p style="width: 600px">a</p></div>', "scrolls sideways"),
        ('<p style="width: 3ch; overflow-wrap: anywhere">passed</p>', "broken within a word: passed"),
        ('<p style="color: #888; background: #777">a</p>', "contrast 1.3"),
        ("<h3>a</h3>", "heading 2 skips a level"),
        ('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">', "no alternative text"),
        ("<script>missing()</script>", "console: error: Executing inline script violates"),
        ('<img alt="a" src="https://127.0.0.1:9/a.png">', "127.0.0.1"),
    ],
)
def test_the_check_can_fail(browser: Browser, tmp_path: Path, body: str, complaint: str) -> None:
    (tmp_path / "page.html").write_text(document("a", [body]))
    told = browser.show(tmp_path / "page.html", 500).problems
    assert complaint in "\n".join(told)


def test_a_script_that_fails_is_told(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text('<html lang="en"><h1>a</h1><script>console.error("no"); missing()</script>')
    assert browser.show(tmp_path / "page.html", 500).problems == [
        "console: error: no",
        "script: missing is not defined",
    ]
