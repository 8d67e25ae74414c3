"""Fused operations for adversarial training: weight perturbation, restoration, and the attack's steps.

`python -m awp_kernels` prints what was found and which implementation serves which operation.
"""

from awp_kernels._backend import use_backend as use_backend
from awp_kernels.awp import AdversarialWeightPerturbation as AdversarialWeightPerturbation
from awp_kernels.perturb import perturb_ as perturb_
from awp_kernels.perturb import perturb_into_ as perturb_into_
from awp_kernels.pgd_init import pgd_init_ as pgd_init_
from awp_kernels.pgd_step import pgd_step_ as pgd_step_
from awp_kernels.restore import restore_ as restore_

__all__ = [
    "AdversarialWeightPerturbation",
    "perturb_",
    "perturb_into_",
    "pgd_init_",
    "pgd_step_",
    "restore_",
    "use_backend",
]
