"""Where text is shown: on a terminal with bars and colours, elsewhere line by line."""

from typing import Any

from rich.console import Console


def console_of(stream: Any) -> Console:
    """A console for a stream, which is a terminal only if it is one.

    By itself rich also takes what FORCE_COLOR says for one, which Jupyter sets where nobody can draw a bar.
    """
    terminal = hasattr(stream, "isatty") and stream.isatty()
    return Console(file=stream, highlight=False, force_terminal=terminal, force_jupyter=False)
