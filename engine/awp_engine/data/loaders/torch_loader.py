"""Image files decoded by Pillow in the worker processes of torch's DataLoader."""

import atexit
import multiprocessing
import multiprocessing.process
import os
import signal
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from awp_engine.data.dataset import DataError
from awp_engine.data.loaders.files_loader import Reader
from awp_engine.data.loaders.framing import Framing, Images, Request, Requests, Window
from awp_engine.data.loaders.workers import apart_from_main
from awp_engine.data.sets.inspect import decode
from awp_engine.data.sets.store import EncodedImages
from awp_engine.distributed.signals import kept_from_children


class TorchLoader:
    """Images of an `EncodedImages`.

    Args:
        reader: what a file has to be and becomes.
        device: where the images are wanted.
        workers: processes; 0 decodes in this one.
    """

    def __init__(self, reader: Reader, device: torch.device, workers: int) -> None:
        self._reader, self.device, self._workers = reader, device, workers

    def stream(self, store: EncodedImages, requests: Requests) -> Images:
        """uint8 [n, C, H, W] for each request, on the device.

        Raises:
            DataError: naming the file that cannot be used, or saying that a process died.
        """
        pinned = self.device.type == "cuda"
        options = {}
        if self._workers:
            # fresh processes: those forked from one with threads or a CUDA context can hang
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            options = {"multiprocessing_context": context, "worker_init_fn": _begin_worker}
        loader = DataLoader(
            _Decoded(store, self._reader),
            batch_size=None,
            sampler=requests.make(),
            num_workers=self._workers,
            pin_memory=pinned,
            # else each epoch takes a number of the process's own generator
            generator=torch.Generator(),
            **options,
        )
        others = set(multiprocessing.active_children())
        # the server that they are forked from, too, or no epoch could be begun after a signal to all
        with kept_from_children(), apart_from_main():
            items = iter(loader)
        workers = set(multiprocessing.active_children()) - others

        def kill() -> None:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()

        # before multiprocessing's own handler, which sends them SIGTERM, and waits
        atexit.register(kill)
        died = ""
        try:
            for images, error in items:
                if error:
                    raise DataError(error)
                yield images.permute(0, 3, 1, 2).to(self.device, non_blocking=pinned)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            died = " ".join(str(error).split())
        finally:
            # asks them to end
            del items
            kill()
            atexit.unregister(kill)
        # here, where nothing holds on to what was raised, and that to `items`
        if died:
            raise DataError(
                f"a process that decodes images died ({died}), perhaps for want of memory: try fewer --data.workers"
            )


class _Decoded(Dataset):
    """A request's images, uint8 [n, H, W, C], or what is wrong with one of them."""

    def __init__(self, store: EncodedImages, reader: Reader) -> None:
        self._store, self._reader = store, reader

    def __getitem__(self, request: Request) -> tuple[Tensor, str]:
        reader = self._reader
        channels, height, width = reader.shape
        pixels = torch.empty(len(request.rows), height, width, channels, dtype=torch.uint8)
        words = reader.framing.words(request)
        try:
            for k, row in enumerate(request.rows.tolist()):
                picture = reader.read(self._store, row, None if words is None else words[k])
                image = decode(picture.content, self._store.name(row))
                pixels[k] = torch.from_numpy(framed(image, reader.shape[0], reader.framing, picture.window))
        # as a value: an exception of a worker comes back as text with its traceback
        except DataError as error:
            return pixels[:0], str(error)
        return pixels, ""


def framed(image: NDArray[np.uint8], channels: int, framing: Framing, window: Window) -> NDArray[np.uint8]:
    """[H, W, C], of the wanted size and number of channels."""
    if image.shape[2] < channels:
        image = np.repeat(image, channels, axis=2)
    if framing.size is None:
        return image
    top, left, height, width = window
    # a crop of its own: with `box` Pillow's filter would see beyond it
    crop = np.ascontiguousarray(image[top : top + height, left : left + width])
    size = (framing.size, framing.size)
    resized = Image.fromarray(crop[:, :, 0] if channels == 1 else crop).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(*size, channels).copy()


def _begin_worker(_: int) -> None:
    # who asks the run to stop asks its main process, though a terminal and Slurm tell all of them
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # torch looks for the server that forked this process, which in turn waits for this process
    if (main := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_after, args=(main,), daemon=True).start()


def _end_after(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)
