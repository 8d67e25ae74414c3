"""What loaders give and steps take."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """A rank's share of a batch; extra images are those with an id of at least the data set's `first_extra_id`.

    Attributes:
        images: fp32 [B, C, H, W] in [0, 1]; of several views of each image [B, views * C, H, W], side by side.
        labels: int64 [B], or fp32 [B, classes] under CutMix and MixUp.
        ids: int64 [B].
        whole_size: images of the whole batch, over all ranks.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    whole_size: int

    def part(self, rows: slice) -> "Batch":
        """Some of the images, as a batch of the same whole."""
        return Batch(self.images[rows], self.labels[rows], self.ids[rows], self.whole_size)
