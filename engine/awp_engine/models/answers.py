"""Which answers of a classifier count: one rule for training, attacks and evaluation."""

from torch import Tensor

NO_CLASS = -1
"""What `predicted` says where there is no answer; equal to no label."""


def predicted(logits: Tensor) -> Tensor:
    """The class of the largest logit, int64 [N]; `NO_CLASS` where any logit of [N, classes] is NaN or infinite.

    So a model that answers NaN is right nowhere, whatever argmax makes of NaN.
    """
    # max, as AutoAttack does: where logits tie the two may differ on a GPU
    return logits.max(1).indices.masked_fill(~logits.isfinite().all(1), NO_CLASS)
