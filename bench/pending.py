"""UNTIL THE MERGE: operations that are being written. Then remove this file, and import them from awp_kernels."""

import inspect
from typing import Any

import awp_kernels
from awp_kernels import _backend

sgd_step_: Any = getattr(awp_kernels, "sgd_step_", None)
total_norm: Any = getattr(awp_kernels, "total_norm", None)


def _missing(there: bool, reason: str) -> dict[str, str]:
    """By implementation, why it is left out."""
    return {} if there else dict.fromkeys(_backend.BACKENDS, reason)


MISSING = _missing(sgd_step_ is not None, "awp_kernels has no sgd_step_ and total_norm yet")
_takes_norms = "weight_norms" in inspect.signature(awp_kernels.perturb_into_).parameters
MISSING_NORMS = _missing(_takes_norms, "perturb_into_ takes no weight_norms yet")
