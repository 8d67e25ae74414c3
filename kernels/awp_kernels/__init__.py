"""Fused operations for adversarial training: weight perturbation, restoration, and the attack's steps.

`python -m awp_kernels` calls each implementation and prints which of them serves which operation.
"""

import sys
from pathlib import Path

if sys.argv[:1] == ["-m"] and "awp_kernels" in sys.orig_argv:
    # `python -m awp_kernels` imports this, and torch, before the command's own first line
    from awp_kernels._interrupted import end_in_one_line

    end_in_one_line()

from awp_kernels._backend import use_backend as use_backend
from awp_kernels.augment import augment as augment
from awp_kernels.awp import AdversarialWeightPerturbation as AdversarialWeightPerturbation
from awp_kernels.awp import asam as asam
from awp_kernels.awp import every_parameter as every_parameter
from awp_kernels.awp import sam as sam
from awp_kernels.bn_act import Ranks as Ranks
from awp_kernels.bn_act import add_bn_act as add_bn_act
from awp_kernels.bn_act import bn_act as bn_act
from awp_kernels.bn_act import bn_act_available as bn_act_available
from awp_kernels.conv import conv3x3 as conv3x3
from awp_kernels.conv import conv3x3_available as conv3x3_available
from awp_kernels.conv import conv3x3_forget as conv3x3_forget
from awp_kernels.conv import conv3x3_held_bytes as conv3x3_held_bytes
from awp_kernels.conv import stem3x3 as stem3x3
from awp_kernels.conv import stem3x3_available as stem3x3_available
from awp_kernels.perturb import perturb_ as perturb_
from awp_kernels.perturb import perturb_into_ as perturb_into_
from awp_kernels.pgd_init import pgd_init_ as pgd_init_
from awp_kernels.pgd_init import pgd_init_normal_ as pgd_init_normal_
from awp_kernels.pgd_step import pgd_step_ as pgd_step_
from awp_kernels.pgd_step_normalize import pgd_step_normalize_ as pgd_step_normalize_
from awp_kernels.pooled_linear import pooled_linear as pooled_linear
from awp_kernels.pooled_linear import pooled_linear_available as pooled_linear_available
from awp_kernels.restore import restore_ as restore_
from awp_kernels.sgd import SGD as SGD
from awp_kernels.sgd_step import sgd_step_ as sgd_step_
from awp_kernels.total_norm import total_norm as total_norm

# that of the whole distribution
__version__ = (Path(__file__).parent / "VERSION").read_text().strip()

__all__ = [
    "SGD",
    "AdversarialWeightPerturbation",
    "Ranks",
    "add_bn_act",
    "asam",
    "augment",
    "bn_act",
    "bn_act_available",
    "conv3x3",
    "conv3x3_available",
    "conv3x3_forget",
    "conv3x3_held_bytes",
    "every_parameter",
    "perturb_",
    "perturb_into_",
    "pgd_init_",
    "pgd_init_normal_",
    "pgd_step_",
    "pgd_step_normalize_",
    "pooled_linear",
    "pooled_linear_available",
    "restore_",
    "sam",
    "sgd_step_",
    "stem3x3",
    "stem3x3_available",
    "total_norm",
    "use_backend",
]
