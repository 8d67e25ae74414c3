"""Batches out of arrays: gathered from memory-mapped files by a thread, ahead of the step."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from awp_engine.data.loaders.ahead import ahead
from awp_engine.data.loaders.framing import Images, Requests
from awp_engine.data.sets.store import ImageArrays

_AHEAD = 2


class ArrayLoader:
    """Images of an `ImageArrays`, as they are.

    Args:
        device: where they are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stream(self, store: ImageArrays, requests: Requests) -> Images:
        """uint8 [n, C, H, W] for each request, on the device."""
        pinned = self.device.type == "cuda"

        def gathered() -> Iterator[Tensor]:
            for request in requests.make():
                images = store.gather(request.rows)
                yield images.pin_memory() if pinned else images

        with contextlib.closing(ahead(gathered(), _AHEAD, name="gather")) as ready:
            for images in ready:
                yield images.to(self.device, non_blocking=pinned)
