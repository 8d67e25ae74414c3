"""Requests to stop, from Slurm, a terminal or a user, heeded between steps."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# os.EX_TEMPFAIL: "try again"; what a scheduler that preempts looks for
PREEMPTED = 75
INTERRUPTED = 130


class StoppedError(RuntimeError):
    """A run that stopped because it was asked to; the message is one line that says what was kept.

    Attributes:
        code: what the process is to exit with.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopRequest:
    """Whether, and by which signal, this process was asked to stop."""

    def __init__(self) -> None:
        self.signal = 0

    @property
    def code(self) -> int:
        """The exit code that goes with the signal: 130 for SIGINT, else 75."""
        return INTERRUPTED if self.signal == signal.SIGINT else PREEMPTED


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A block in which SIGTERM, SIGUSR1 and SIGINT are noted and end nothing; a second SIGINT interrupts at once.

    To be entered in the main thread.
    """
    request = StopRequest()

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and request.signal:
            raise KeyboardInterrupt
        request.signal = number

    handled = [signal.SIGTERM, signal.SIGUSR1]
    # a shell starts what runs in its background with SIGINT ignored, and means it
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        handled.append(signal.SIGINT)
    before = {number: signal.signal(number, note) for number in handled}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
