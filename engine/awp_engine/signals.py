"""Requests to stop, from Slurm, a terminal, a user or torchrun's end, heeded between steps."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# os.EX_TEMPFAIL: "try again"; what a scheduler that preempts looks for
PREEMPTED = 75
INTERRUPTED = 130
# beside the numbers of signals
TORCHRUN_ENDED = -1


class StoppedError(RuntimeError):
    """A run that stopped because it was asked to; the message is one line that says what was kept.

    Attributes:
        code: what the process is to exit with.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class StopRequest:
    """Whether, and why, this process was asked to stop.

    Attributes:
        reason: the number of a signal, `TORCHRUN_ENDED`, or 0 for none.
    """

    def __init__(self) -> None:
        self.reason = 0


def reason_name(reason: int) -> str:
    """A `StopRequest.reason` in words."""
    return "the end of torchrun" if reason == TORCHRUN_ENDED else signal.Signals(reason).name


def exit_code(reason: int) -> int:
    """The exit code that goes with a `StopRequest.reason`: 130 for SIGINT, else 75."""
    return INTERRUPTED if reason == signal.SIGINT else PREEMPTED


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A block in which SIGTERM, SIGUSR1 and SIGINT are noted and end nothing; a second SIGINT interrupts at once.

    To be entered in the main thread.
    """
    request = StopRequest()

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and request.reason:
            raise KeyboardInterrupt
        request.reason = number

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
