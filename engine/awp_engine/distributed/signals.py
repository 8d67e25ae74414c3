"""Requests to stop, from Slurm, a terminal, a user or torchrun's end: at once, or heeded between steps.

Imports little: a command calls `begin_command` before it imports the rest.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from awp_engine.files.output import begin_output

# os.EX_TEMPFAIL: "try again"; what a scheduler that preempts looks for
PREEMPTED = 75
INTERRUPTED = 130
# beside the numbers of signals
TORCHRUN_ENDED = -1

# what `stop_requests` notes at present
_noted: frozenset[signal.Signals] = frozenset()


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


def _numbers(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those that are not ignored: a shell starts what runs in its background so, or nohup does, and means it."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def begin_command(prog: str) -> None:
    """To be the first thing that a command does, before it imports what takes seconds.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 end the process with one line and 128 + their number until something else is
    said, and output goes as `begin_output` has it.
    """
    # nobody has to read it 8 times
    said = os.environ.get("RANK", "0") == "0"

    def end(number: int, _: FrameType | None) -> None:
        # no exception: it would be caught, or shown, by whatever is being imported
        if said:
            with contextlib.suppress(OSError):
                os.write(2, f"{prog}: error: interrupted by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    for number in _numbers(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, end)
    begin_output()


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """A block in which SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that what was begun is put in order.

    To be entered in the main thread; `interrupted_code` says what to exit with.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    before = {
        number: signal.signal(number, interrupt) for number in _numbers(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code that goes with an interrupt: 128 and the signal's number, 130 where it is not known."""
    return 128 + interrupt.args[0] if interrupt.args else INTERRUPTED


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """A block in which SIGTERM, SIGUSR1, SIGHUP and SIGINT are noted and end nothing; a second SIGINT interrupts.

    To be entered in the main thread.
    """
    request = StopRequest()

    def note(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and request.reason:
            raise KeyboardInterrupt
        request.reason = number

    global _noted
    handled = {signal.SIGTERM, signal.SIGUSR1, *_numbers(signal.SIGINT, signal.SIGHUP)}
    before = {number: signal.signal(number, note) for number in handled}
    _noted = frozenset(handled)
    try:
        yield request
    finally:
        _noted = frozenset()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """A block whose child processes never receive what this one notes as a request to stop.

    A terminal and Slurm send it to all of them, and this process needs its children until it has stopped.
    """
    from multiprocessing import resource_tracker

    before = signal.pthread_sigmask(signal.SIG_BLOCK, _noted)
    try:
        # starting it unblocks two of them
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _noted)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
