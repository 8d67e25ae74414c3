"""Random rotations of training images."""

from torch import Tensor

from awp_engine.data.augment.image_operations import rotate
from awp_kernels.philox import mix_seed, sample_words

_STREAM = 17


def draw_rotation(ids: Tensor, *, seed: int, epoch: int, degrees: float) -> Tensor:
    """Degrees against the clock, fp64 [B], uniform in [-degrees, degrees) by a word of stream 17 for ids int64 [B]."""
    words = sample_words(ids, 1, seed=mix_seed(seed, epoch), stream=_STREAM).squeeze(1)
    return degrees * (words * 2.0**-31 - 1)


def random_rotation(levels: Tensor, ids: Tensor, *, seed: int, epoch: int, degrees: float) -> Tensor:
    """Levels, int32 [B, C, H, W], turned around the middle: the nearest pixel, and 0 from outside.

    What torchvision's RandomRotation does to Pillow's images. On a GPU ids may be on the CPU.
    """
    return rotate(levels, draw_rotation(ids, seed=seed, epoch=epoch, degrees=degrees), fill=0)
