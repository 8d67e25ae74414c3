"""Image files and arrays by NVIDIA DALI: read ahead by a thread, decoded and resized by its pipeline.

Nothing in the pipeline has a state or draws random numbers: which images come and what is taken of them is decided
here, by seed, epoch and sample id. So any number of ranks, another loader, and a run that goes on in the middle of an
epoch see the same images, and DALI's own checkpoints are not needed.
"""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from awp_engine.data.dataset import DataError
from awp_engine.data.loaders.ahead import ahead
from awp_engine.data.loaders.files_loader import Picture, Reader
from awp_engine.data.loaders.framing import Images, Request, Requests, split_evenly
from awp_engine.data.sets.inspect import decode, for_every_decoder
from awp_engine.data.sets.store import EncodedImages, ImageArrays

_AHEAD = 2


def dali_problem() -> str | None:
    """Why DALI cannot be used; None if it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return f"NVIDIA DALI is not installed ({error}); run: pip install nvidia-dali-cuda130"
    return None


class DaliLoader:
    """Images of an `EncodedImages` or `ImageArrays`.

    Args:
        reader: what a file has to be and becomes; not used for arrays.
        device: where the images are wanted; on a GPU, JPEG files are decoded there.
        workers: threads of the pipeline, and as many that read files.
    """

    def __init__(self, reader: Reader, device: torch.device, workers: int) -> None:
        if problem := dali_problem():
            raise DataError(f"--data.loader dali: {problem}")
        self._reader, self.device, self._workers = reader, device, max(1, workers)

    def stream(self, store: EncodedImages | ImageArrays, requests: Requests) -> Images:
        """uint8 [n, C, H, W] for each request, on the device; not to be written.

        Raises:
            DataError: naming the file that cannot be used.
        """
        if not requests.largest:
            return
        failed: list[Exception] = []
        in_pipeline: deque[Request] = deque()
        with ThreadPoolExecutor(self._workers, thread_name_prefix="read") as pool:
            inputs = ((request, self._read(store, request, pool)) for request in requests.make())
            reading = ahead(inputs, _AHEAD, name="read-ahead")

            def source() -> Iterator[tuple[Any, ...]]:
                # raised later: what was read before it is still wanted
                try:
                    for request, fields in reading:
                        in_pipeline.append(request)
                        yield fields
                except Exception as error:
                    failed.append(error)

            with contextlib.closing(reading):
                pipeline = self._pipeline(source(), requests.largest, encoded=isinstance(store, EncodedImages))
                yield from self._run(pipeline, store, in_pipeline)
        if failed:
            raise failed[0]

    def _run(self, pipeline: Any, store: EncodedImages | ImageArrays, asked: deque[Request]) -> Iterator[Tensor]:
        on_gpu, in_use = self.device.type == "cuda", deque[tuple[Tensor, torch.Event]]()
        try:
            while True:
                try:
                    (images,) = pipeline.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    raise _culprit(error, store, asked) from error
                asked.popleft()
                batch = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
                yield batch
                if on_gpu:
                    # DALI uses memory again that nobody refers to: not before what was queued has read it
                    in_use.append((batch, torch.cuda.current_stream(self.device).record_event()))
                    let_go(in_use, _AHEAD)
        finally:
            if on_gpu:
                torch.cuda.current_stream(self.device).synchronize()

    def _read(
        self, store: EncodedImages | ImageArrays, request: Request, pool: ThreadPoolExecutor
    ) -> tuple[list[NDArray[Any]], ...]:
        """The inputs of a pipeline: arrays; or files, and with a size [top, left] and [height, width] of each."""
        if isinstance(store, ImageArrays):
            return (list(store.gather(request.rows).permute(0, 2, 3, 1).contiguous().numpy()),)
        rows, words = request.rows.tolist(), self._reader.framing.words(request)

        def read(part: range) -> list[Picture]:
            pictures = [self._reader.read(store, rows[k], None if words is None else words[k]) for k in part]
            names = [store.name(rows[k]) for k in part]
            return [
                picture._replace(content=for_every_decoder(picture.content, name))
                for picture, name in zip(pictures, names, strict=True)
            ]

        parts = pool.map(read, split_evenly(len(rows), self._workers))
        pictures = [picture for part in parts for picture in part]
        files = [np.frombuffer(picture.content, np.uint8) for picture in pictures]
        if self._reader.framing.size is None:
            return (files,)
        windows = np.array([picture.window for picture in pictures], np.int32)
        return files, list(windows[:, :2]), list(windows[:, 2:])

    def _pipeline(self, source: Iterator[Any], largest: int, *, encoded: bool) -> Any:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        on_gpu, size = self.device.type == "cuda", self._reader.framing.size
        pipeline = Pipeline(
            batch_size=largest,
            num_threads=self._workers,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=_AHEAD,
            # outputs live as long as somebody refers to them, so no copy is needed
            exec_dynamic=True,
        )
        decoding = {
            "device": "mixed" if on_gpu else "cpu",
            "output_type": types.DALIImageType.GRAY if self._reader.shape[0] == 1 else types.DALIImageType.RGB,
            # as Pillow, which leaves images as they lie in the file
            "adjust_orientation": False,
        }
        with pipeline:
            if not encoded:
                (images,) = fn.external_source(source=source, num_outputs=1, batch=True, layout="HWC")
                images = images.gpu() if on_gpu else images
            elif size is None:
                (files,) = fn.external_source(source=source, num_outputs=1, batch=True)
                images = fn.decoders.image(files, **decoding)
            else:
                files, begin, extent = fn.external_source(source=source, num_outputs=3, batch=True)
                places = {"axis_names": "HW", "normalized_anchor": False, "normalized_shape": False}
                part = fn.decoders.image_slice(files, begin, extent, **places, **decoding)
                images = fn.resize(
                    part,
                    resize_x=size,
                    resize_y=size,
                    interp_type=types.DALIInterpType.INTERP_TRIANGULAR,
                    antialias=True,
                )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline


def let_go(in_use: deque[tuple[Tensor, torch.Event]], most: int) -> None:
    """Leaves the `most` latest batches; each of the others is held until its event has come."""
    while len(in_use) > most:
        in_use[0][1].synchronize()
        in_use.popleft()


def _culprit(error: RuntimeError, store: EncodedImages | ImageArrays, requests: Iterable[Request]) -> Exception:
    """The file that a pipeline failed for, which it does not tell."""
    if isinstance(store, EncodedImages):
        for request in requests:
            for row in request.rows.tolist():
                try:
                    decode(store.read(row), store.name(row))
                except DataError as found:
                    return found
    reason = next((line for line in str(error).splitlines() if "failure" in line or "Error in" in line), "")
    return DataError(
        f"DALI could not make a batch ({reason or str(error).splitlines()[0]}), though Pillow decodes all of its "
        "files: use --data.loader torch"
    )
