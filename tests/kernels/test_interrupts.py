"""Interrupts between any two lines of a perturbed block: the weights are back, whoever catches them."""

import contextlib
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import SOAK
from steps import make_step
from torch import nn

import awp_kernels
from awp_engine.config import AttackConfig, OptimizerConfig
from awp_engine.models import build_model
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step import awp_step, passes
from awp_engine.step.objectives import build_objective
from awp_kernels import AdversarialWeightPerturbation

OWN = {str(Path(awp_kernels.__file__).parent / name) for name in ("awp.py", "_block.py", "_leftover.py")}


class Interrupt(BaseException):
    """Neither KeyboardInterrupt nor an Exception: nobody expects it."""


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def backward(model: nn.Module) -> None:
    model(torch.arange(6.0).view(2, 3)).square().sum().backward()


def plain(model, awp):
    backward(model)
    with awp.perturbed():
        backward(model)


def further(model, awp):
    backward(model)
    with awp.perturbed():
        backward(model)
        awp.perturb_(again=True)
        backward(model)


def raising(model, awp):
    backward(model)
    with pytest.raises(ZeroDivisionError), awp.perturbed():
        raise ZeroDivisionError


def by_hand(model, awp):
    backward(model)
    try:
        awp.perturb_()
        backward(model)
    finally:
        # what is interrupted is called again
        try:
            awp.restore_()
        finally:
            awp.restore_()


def interrupted_at(number: int, run) -> bool:
    """Raises in the package's code before its `number`-th instruction; whether there was one."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in OWN:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and not last_instructions(frame):
            count += 1
            if count == number:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
    return count >= number


def last_instructions(frame) -> bool:
    """Whether a block is entered and `__enter__` only returns: no signal is looked at there, nor before the body."""
    return frame.f_code.co_name == "__enter__" and frame.f_lineno == ENTERED


ENTERED = next(
    number
    for number, line in enumerate((Path(awp_kernels.__file__).parent / "_block.py").read_text().splitlines(), 1)
    if line.strip() == "return self"
)


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("working", [False, True], ids=["in place", "working copy"])
@pytest.mark.parametrize("block", [plain, further, raising, by_hand])
def test_an_exception_between_any_two_instructions_leaves_no_weight_moved(block, working, every):
    if working and block is further:
        return  # refused with a working copy
    model = network()
    copied = copy.deepcopy(model) if working else None
    model.double() if working else None
    followed = copied or model
    awp = AdversarialWeightPerturbation(model, 0.5, bound=None if working else 0.4, working=copied)
    before = [p.detach().clone() for module in (model, followed) for p in module.parameters()]
    number = 1 + len(block.__name__)
    while interrupted_at(number, lambda: block(followed, awp)):
        after = [p.detach() for module in (model, followed) for p in module.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), number
        # no_grad() may have been left half way
        torch.set_grad_enabled(True)
        followed.zero_grad()
        if number % 3 == 0:
            # and it goes on as if nothing had been
            block(followed, awp)
            followed.zero_grad()
        number += every
    assert number > 400


def test_of_1000_interrupts_spread_over_a_perturbed_block_none_leaves_a_weight_moved():
    """Real signals to a loop that only catches them, in a process of its own; in every second one another follows."""
    script = SOAK / "interrupted_loop.py"
    result = subprocess.run([sys.executable, script, "1000"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    counted = json.loads(result.stdout)
    assert counted["inside"] == 1000
    assert counted["moved"] == 0
    assert counted["twice"] >= 50


class FailingUpdate:
    """As where the descent fails: the update is not reached."""

    average = None

    def prepare(self, phase):
        pass

    def __call__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize("fails", [True, False], ids=["in the descent", "done"])
def test_an_interrupt_at_the_end_of_a_training_step(fails):
    """At every instruction of what puts weights and statistics back; looked at while the frames still live."""
    guards = ("steps", "put_back", "__exit__")
    files = {
        awp_step.__file__,
        passes.__file__,
        contextlib.__file__,
        str(Path(awp_kernels.__file__).parent / "_block.py"),
    }
    torch.manual_seed(3)
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).train()
    x, y = torch.rand(2, 1, 4, 4), torch.arange(2)

    def state(net):
        weights, statistics = [*map(torch.clone, net.parameters())], [*map(torch.clone, net.buffers())]
        return weights, statistics, [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]

    def same(a, b):
        return all(map(torch.equal, a, b))

    count, number, where = 0, 0, ""

    def trace(frame, event, argument):
        nonlocal count, where
        if frame.f_code.co_filename not in files or frame.f_code.co_name not in guards:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and not last_instructions(frame):
            count += 1
            if count == number:
                where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise Interrupt
        return trace

    def once():
        """The state before, and where it was left."""
        nonlocal count
        net, count = copy.deepcopy(model), 0
        step = make_step(
            net,
            optimizer=build_optimizer(net, OptimizerConfig()),
            objective=build_objective("at"),
            attack=AttackConfig(steps=1),
            awp=AdversarialWeightPerturbation(net, 0.5),
        )
        if fails:
            step.step.update = FailingUpdate()
        before, traced = state(net), sys.gettrace()
        sys.settrace(trace)
        try:
            step(x, y, sample_ids=torch.arange(2), seed=0)
        except (Interrupt, ZeroDivisionError):
            sys.settrace(None)
            return before, state(net)
        finally:
            sys.settrace(traced)
            torch.set_grad_enabled(True)
        return before, state(net)

    ends = once()
    assert same(ends[0][0], ends[1][0]) == fails
    while True:
        number += 1
        _, (weights, statistics, modes) = once()
        if count < number:
            break
        assert any(same(weights, end[0]) for end in ends), where
        assert any(same(statistics, end[1]) for end in ends), where
        assert modes == ends[0][2], where
    assert number > 40
