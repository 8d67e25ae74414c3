"""A training loop under signals: `python tests/interrupted_loop.py 1000` prints what they left, as JSON."""

import json
import random
import signal
import sys
import time
from types import FrameType

import torch
from torch import nn

from awp_kernels import AdversarialWeightPerturbation


def main(number: int) -> dict[str, int]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    awp = AdversarialWeightPerturbation(model, 0.5)
    x = torch.randn(4, 40)
    inside = 0

    def step() -> None:
        nonlocal inside
        optimizer.zero_grad()
        model(x).square().mean().backward()
        inside = 1
        with awp.perturbed():
            model(x).square().mean().backward()
        inside = 0

    again = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal again
        if again:
            again = False
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, interrupt)
    took = 1.0
    for _ in range(20):
        began = time.perf_counter()
        step()
        took = min(took, time.perf_counter() - began)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    generator = random.Random(0)
    counted = {"interrupts": 0, "inside": 0, "late": 0, "moved": 0, "without gradients": 0}
    while counted["interrupts"] < number:
        inside, again = 0, counted["interrupts"] % 2 == 1
        try:
            signal.setitimer(signal.ITIMER_REAL, took * generator.uniform(0.2, 1.0))
            step()
            again = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            # the second one, where it has not come yet
            try:
                time.sleep(1e-3 * (counted["interrupts"] % 2))
            except KeyboardInterrupt:
                counted["late"] += 1
            counted["interrupts"] += 1
            counted["inside"] += inside
        moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        counted["moved"] += moved
        awp.restore_()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), before)
        counted["without gradients"] += not torch.is_grad_enabled()
        torch.set_grad_enabled(True)
    return counted


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
