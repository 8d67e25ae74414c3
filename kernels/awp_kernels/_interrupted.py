"""Imported before anything else by `python -m awp_kernels`: a signal ends it in one line while torch is imported.

As `awp_engine.distributed.signals.begin_command`, which this package does not know, has it for the engine's commands.
"""

import contextlib
import os
import signal
from types import FrameType


def _end(number: int, _: FrameType | None) -> None:
    # no exception: it would be caught, or shown, by whatever is being imported
    with contextlib.suppress(OSError):
        os.write(2, f"python -m awp_kernels: error: interrupted by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def end_in_one_line() -> None:
    """From here on a signal ends the command in one line, while torch is imported, too."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # ignored by who started this, who means it
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
