"""Attacks beside torch alone, as README's loop uses them where nothing else is installed."""

import os
import subprocess
import sys

from places import ROOT

PROGRAM = """
import sys
for name in ("numpy", "safetensors", "rich", "matplotlib", "PIL", "scipy", "yaml"):
    sys.modules[name] = None
import torch
from awp_engine.attack import pgd
from awp_kernels import AdversarialWeightPerturbation
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
x_adv = pgd(model, torch.rand(4, 3, 2, 2), torch.arange(4) % 3, epsilon=0.1, step_size=0.05, steps=2)
assert x_adv.shape == (4, 3, 2, 2)
import awp_engine
try:
    awp_engine.load_model
except ImportError as error:
    assert str(error).startswith("awp_engine.load_model needs more packages: pip install numpy safetensors"), error
else:
    raise AssertionError
"""


def test_attacks_need_torch_alone():
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "engine")])
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
