"""A trained model as an ONNX file, which serves where neither PyTorch nor this package is installed."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from awp_engine.config import ConfigError
from awp_engine.files.atomic import naming, replace_file
from awp_engine.models.layers import NormalizedClassifier

_INSTALL = "pip install onnx onnxruntime onnxscript"
# one file holds no more: https://protobuf.dev/programming-guides/proto-limits
_MOST_BYTES = 2**31 - 2**20
# of the largest logit; what compilers change in the order of sums is far below
_TOLERANCE = 1e-3
_CHECKED = (1, 5)


def require_onnx() -> None:
    """Raises `ConfigError` where a package is missing that `write_onnx` needs."""
    missing = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"--onnx: needs {' and '.join(missing)}, which this environment lacks: {_INSTALL}")


def write_onnx(
    model: NormalizedClassifier,
    shape: tuple[int, int, int],
    path: Path,
    *,
    metadata: Mapping[str, str],
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Writes a model in eval mode, with its normalisation, for batches of any size.

    The file's input is `images`, fp32 [batch, C, H, W] in [0, 1], its output `logits`, fp32 [batch, classes]. Where
    onnxruntime is installed, the file's logits are compared with the model's before it is written.

    Args:
        model: in any mode, in which it is left.
        shape: channels, height and width of its images.
        path: of the file.
        metadata: goes into the file's properties.
        say: is told whether the file was checked.

    Raises:
        ConfigError: a package is missing, or the model cannot be exported, or answers otherwise in the file.
        OSError: the file cannot be written.
    """
    require_onnx()
    size = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
    if size > _MOST_BYTES:
        raise ConfigError(f"--onnx: the weights take {size / 2**30:.1f} GiB; one ONNX file holds less than 2")
    training = {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(count, *shape, generator=generator) for count in _CHECKED]
    try:
        model.eval()
        content = _exported(model, images[-1], metadata)
        with torch.no_grad():
            logits = [model(batch) for batch in images]
    finally:
        for module, mode in training.items():
            module.training = mode
    if importlib.util.find_spec("onnxruntime") is None:
        say(f"{path}: not checked, as onnxruntime is not installed: {_INSTALL}")
    else:
        worst = max(_deviation(found, own) for found, own in zip(_answers(content, images), logits, strict=True))
        # a NaN is no agreement
        if not worst <= _TOLERANCE:
            raise ConfigError(
                f"--onnx: the file's logits differ from the model's by {worst:.1e} of the largest one; expected at "
                f"most {_TOLERANCE:g}, so nothing was written: report this, with the model's name"
            )
        say(f"{path}: checked by onnxruntime: logits differ by at most {worst:.1e} of the largest one")
    with naming(path):
        replace_file(path, content)


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """A block in which torch does not tell of each operation of torchvision that it is not there: none is needed."""

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("torchvision is not installed")

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _exported(model: NormalizedClassifier, images: Tensor, metadata: Mapping[str, str]) -> bytes:
    batch = ({0: torch.export.Dim("batch")},)
    try:
        with warnings.catch_warnings(), _without_torchvision():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=batch,
                verbose=False,
            )
    # whatever a model of somebody's own code brings
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--onnx: torch cannot export this model: {type(error).__name__}: {reason}") from None
    assert program is not None
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def _answers(content: bytes, images: list[Tensor]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0]) for batch in images]


def _deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
