"""Saving beside the training."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from awp_engine.checkpoint.files import CheckpointError
from awp_engine.checkpoint.write import Groups, Retention, state_bytes, write


class Writer:
    """Saves into one directory from a thread: the caller waits for a copy of its tensors, not for the disk.

    A context manager. The copies' memory is kept from save to save. At most one checkpoint is being written; the
    interpreter does not exit before it is whole, and a kill leaves the one before.

        with Writer(run_dir / "checkpoints") as writer:
            ...
            writer.save("epoch-1", {"model": model.state_dict()}, {"epoch": 1}, Retention(last=2))
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._copies: dict[str, dict[str, torch.Tensor]] = {}
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        self._path: Path | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as lost:
            if error is None:
                raise
            # What ended the block is what the user must see first.
            error.add_note(str(lost))

    def save(self, name: str, tensors: Groups, state: Mapping[str, Any], retention: Retention) -> None:
        """As `awp_engine.checkpoint.write`, but returns once the tensors are copied; they may be changed at once.

        Waits for the save before, if that is still being written. Tensors on a GPU are read in the order of its
        current stream.

        Raises:
            CheckpointError: the save before failed; this one was not begun.
            ValueError: for a name, group, state or retention that cannot be used, and after `close`.
        """
        if self._closed:
            raise ValueError("writer: closed; make another one")
        payload = state_bytes(name, tensors, state, retention)
        self.wait()
        self._copy(tensors)
        # Not a daemon: the interpreter waits for it before it exits.
        self._thread = threading.Thread(
            target=self._write, args=(name, self._copies, payload, retention), name="checkpoint"
        )
        try:
            self._thread.start()
        except BaseException:
            # Interrupted: it may be running, and then the copies are its own.
            self._thread, self._copies = None, {}
            raise

    def wait(self) -> Path | None:
        """Waits until the last save is on disk.

        Returns:
            The checkpoint that was written last, None where there was none.

        Raises:
            CheckpointError: it could not be written; said once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._path

    def close(self) -> None:
        """Waits as `wait` does, and lets go of the copies' memory."""
        self._closed = True
        try:
            self.wait()
        finally:
            self._copies = {}

    def _copy(self, tensors: Groups) -> None:
        """Every tensor to contiguous CPU memory of its own, that of the save before where it fits."""
        before, self._copies = self._copies, {}
        devices: set[torch.device] = set()
        # A buffer made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for group, members in tensors.items():
                self._copies[group] = copies = {}
                for name, tensor in members.items():
                    copy = before.get(group, {}).get(name)
                    on_gpu = tensor.device.type == "cuda"
                    if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=on_gpu)
                    copies[name] = copy.copy_(tensor.detach(), non_blocking=on_gpu)
                    if on_gpu:
                        devices.add(tensor.device)
        for device in devices:
            torch.cuda.synchronize(device)

    def _write(self, name: str, tensors: Groups, state: bytes, retention: Retention) -> None:
        try:
            self._path = write(self.directory, name, tensors, state, retention)
        except CheckpointError as error:
            self._error = error
        except BaseException as error:
            lost = CheckpointError(f"{self.directory / name}: could not be written: {type(error).__name__}: {error}")
            lost.__cause__ = error
            self._error = lost
