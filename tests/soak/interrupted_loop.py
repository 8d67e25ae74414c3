"""A training loop under signals: `python tests/soak/interrupted_loop.py 1000` prints what they left, as JSON."""

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
    model = nn.Sequential(*(nn.Linear(20, 20) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    awp = AdversarialWeightPerturbation(model, 0.5)
    x = torch.randn(4, 20)
    inside, again = False, False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal again
        if again:
            again = False
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
        signal.raise_signal(signal.SIGINT)

    def step(delay: float) -> float:
        nonlocal inside
        inside = False
        optimizer.zero_grad()
        model(x).square().mean().backward()
        inside, began = True, time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, delay)
        with awp.perturbed():
            model(x).square().mean().backward()
        inside = False
        return time.perf_counter() - began

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, interrupt)
    took = min(step(0) for _ in range(20))
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    generator = random.Random(0)
    counted = {"inside": 0, "twice": 0, "outside": 0, "moved": 0, "without gradients": 0}
    while counted["inside"] < number and counted["outside"] < 10 * number:
        again = counted["inside"] % 2 == 1
        twice = again
        try:
            step(took * generator.uniform(0.0, 1.0))
            # it comes late, as the machine does something else
            time.sleep(1)
        except KeyboardInterrupt:
            counted["inside" if inside else "outside"] += 1
            # the second one, where it has not come yet
            try:
                time.sleep(3e-4 * twice)
                counted["twice"] += twice
            except KeyboardInterrupt:
                pass
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
