"""TensorBoard events, written beside the training."""

import os
import socket
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from awp_engine.observe.lane import Lane


class _Events:
    """One TensorBoard event file, written synchronously.

    SummaryWriter hands its bytes to a thread that dies of a full disk with a traceback, and then waits for it for ever.
    """

    def __init__(self, file: BinaryIO, start_epoch: int, config_text: str) -> None:
        # on the events' thread: slow, and a missing package is only a warning
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._records = RecordWriter(file)
        self._write(file_version="brain.Event:2")
        if start_epoch:
            # readers drop what an earlier file says from this epoch on
            self._write(step=start_epoch + 1, session_log=SessionLog(status=SessionLog.START))
        self._write(step=start_epoch, summary=text_pb("config", f"```json\n{config_text}\n```"))

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def write(self, epoch: int, values: Mapping[str, float], files: Sequence[Path] = ()) -> None:
        summaries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        for path in files:
            if path.suffix == ".png":
                image = self._summary.Image(encoded_image_string=path.read_bytes())
                summaries.append(self._summary.Value(tag=path.stem, image=image))
        self._write(step=epoch, summary=self._summary(value=summaries))


class TensorBoard:
    """Events on a lane of their own, so that a slow or broken disk neither delays nor stops the training.

    Args:
        directory: of the event files; made if it is missing.
        start_epoch: epochs done before.
        config_text: shown beside the curves.
        warn: is told, in a line, that events are lost, and may be told again.
    """

    def __init__(self, directory: Path, start_epoch: int, config_text: str, warn: Callable[[str], None]) -> None:
        self._directory, self._warn = directory, warn
        late = f"TensorBoard events in {directory} are not written in time; the last ones are left out"
        self._lane = Lane("tensorboard", lambda _: warn(late))
        self._writer = self._write(start_epoch, config_text)
        self._lane.put(next, self._writer)

    def _write(self, start_epoch: int, config_text: str) -> Generator[None, tuple[Any, ...], None]:
        """Takes epochs until it is closed, or until the first error."""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 1000:017}.{socket.gethostname()}.{os.getpid()}"
            with (self._directory / name).open("xb") as file:
                events = _Events(file, start_epoch, config_text)
                while True:
                    events.write(*(yield))
        except Exception as error:
            self._warn(
                f"TensorBoard events in {self._directory} stop here, training goes on: {type(error).__name__}: {error}"
            )

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Scalars of an epoch; never waits."""
        self._lane.put(self._writer.send, (epoch, values))

    def finish(self, epoch: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Scalars of the report, and its pictures; never waits."""
        self._lane.put(self._writer.send, (epoch, values, files))

    def close(self, seconds: float) -> None:
        """Waits for what is still to be written, `seconds` at most."""
        self._lane.put(self._writer.close)
        self._lane.close(seconds)
