"""Progress of what takes long: lines in a log, a bar on a terminal, nothing where it is quick."""

import io
import os
import time

import pytest
from rich.console import Console

from awp_engine.files.text import duration
from awp_engine.observe.bars import Bar, NoBar, Part
from awp_engine.observe.terminal import console_of


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=80, highlight=False), text


def test_lines_tell_the_time_left():
    where, text = console(terminal=False)
    with Bar("curves", 100, console=where, quiet=0.0, interval=0.0) as bar:
        bar.advance(25)
        # the last one is the result's business
        bar.advance(75)
    (line,) = text.getvalue().splitlines()
    assert line.startswith("curves: 25%, 0:00 so far, 0:0")
    assert [duration(seconds) for seconds in (5, 75, 4000)] == ["0:05", "1:15", "1:06:40"]


@pytest.mark.parametrize("terminal", [False, True])
def test_too_little_tells_no_time_left(terminal):
    where, text = console(terminal)
    with Bar("pgd100", 100, console=where, quiet=0.0, interval=0.0) as bar:
        bar.set(4, 100)
        assert ("-:--:--" in text.getvalue()) if terminal else (text.getvalue() == "pgd100: 4%, 0:00 so far\n")
        bar.set(5, 100)
    assert terminal or "pgd100: 5%, 0:00 so far, 0:00 left" in text.getvalue()


def test_lines_are_rare():
    where, text = console(terminal=False)
    with Bar("steps", 1000, console=where, quiet=0.02, interval=0.2) as bar:
        began = time.monotonic()
        while time.monotonic() - began < 0.15:
            bar.advance(0 if bar.done else 1)
            time.sleep(0.005)
    assert len(text.getvalue().splitlines()) == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_quick_shows_nothing(terminal):
    where, text = console(terminal)
    with Bar("quick", 10, console=where) as bar:
        for _ in range(10):
            bar.advance()
    assert text.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes_away():
    where, text = console(terminal=True)
    with Bar("[red]pgd20", 10, console=where, quiet=0.0) as bar:
        bar.advance(5)
    shown = text.getvalue()
    assert "[red]pgd20" in shown
    assert "50%" in shown
    # the line is erased at the end
    assert shown.rstrip().endswith("\x1b[2K")


def test_parts_count_in_the_whole():
    whole = NoBar("gates", 30)
    with Part(whole, "pgd", 20) as part:
        part.advance(5)
        assert (whole.done, whole.label) == (5, "pgd")
    # what was not needed is done too
    assert whole.done == 20
    with Part(whole, "square", 10) as part:
        part.set(12, 10)
    assert whole.done == 30
    # one that nobody foresaw
    with Part(whole, "adapted attack", 20) as part:
        part.advance(5)
        assert (whole.done, whole.total) == (35, 50)


def test_what_jupyter_sets_makes_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not console_of(io.StringIO()).is_terminal
    leader, follower = os.openpty()
    with os.fdopen(leader), os.fdopen(follower, "w") as terminal:
        assert console_of(terminal).is_terminal
