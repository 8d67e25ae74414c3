"""A classifier that is asked about some of its classes alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from awp_engine.models.layers import NormalizedClassifier, NormalizedImages


class SomeClasses(NormalizedClassifier):
    """The logits of some classes of a model, whose normalisation is that of this one.

    Args:
        model: of more classes.
        kept: numbers of the classes that are left, in the order of the logits here.
    """

    kept: Tensor

    def __init__(self, model: NormalizedClassifier, kept: Sequence[int]) -> None:
        super().__init__(len(kept), model.mean.flatten().tolist(), model.std.flatten().tolist())
        self.model = model
        # the same tensors: whoever changes one changes the other
        self.mean, self.std = model.mean, model.std
        self.register_buffer("kept", torch.tensor(kept, device=model.mean.device), persistent=False)
        if model.class_names is not None:
            self.class_names = tuple(model.class_names[number] for number in kept)

    def forward(self, images: Tensor | NormalizedImages) -> Tensor:
        """Logits [N, len(kept)] of images [N, C, H, W] in [0, 1]."""
        return self.model(images)[:, self.kept]

    def extra_repr(self) -> str:
        """Which classes."""
        return f"kept={self.kept.tolist()}"
