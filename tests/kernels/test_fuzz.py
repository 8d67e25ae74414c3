"""The fuzzer of all operations: its cases of one seed, and proof that it finds what is wrong.

Other seeds, more cases, other devices: python tests/soak/fuzz.py --help
"""

import functools
import shlex
import subprocess
import sys

import fuzz
import pytest
import torch
from conftest import device_backends
from places import ROOT

import awp_kernels.perturb as perturb_module
from awp_kernels import _backend

PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_cases_of_a_fixed_seed(part):
    failures, outcomes = fuzz.fuzz(20, range(part, fuzz.CASES, PARTS))
    assert not failures, "\n\n".join(failures)
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("refused")) >= 10
    # every operation gave results, and was refused something
    assert {outcome.split()[0] for outcome in outcomes if outcome.endswith("equal")} == set(fuzz.OPERATIONS)


@pytest.mark.parametrize("target", [p for p in device_backends() if p.values[0][0] == "cuda"], indirect=True)
def test_cases_on_the_device(target):
    device, backend = target
    failures, _ = fuzz.fuzz(21, range(200), device=device, backend=backend)
    assert not failures, "\n\n".join(failures)


def _one_ulp_off(tensors: list[torch.Tensor]) -> None:
    tensors[0].mul_(1.001)


def _writes_past_the_end(tensors: list[torch.Tensor]) -> None:
    flat = tensors[0].as_strided((1,), (1,), tensors[0].storage_offset() + tensors[0].numel())
    flat.fill_(0)


def _leaves_a_value(tensors: list[torch.Tensor]) -> None:
    if tensors[0].numel():
        tensors[0].view(-1)[0] = float("nan")


WRONG = {
    "inexact": (_one_ulp_off, "times the error that is allowed"),
    "outside": (_writes_past_the_end, "was changed outside of it"),
    "not written": (_leaves_a_value, "times the error that is allowed"),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_what_is_wrong_is_found_and_repeated_by_its_command(wrong, monkeypatch, capsys):
    """A kernel that is wrong in one way fails in its own cases, and the printed command runs the same case."""
    harm, message = WRONG[wrong]
    select = _backend.select

    def selected(operation, *arguments, **options):
        def run(out, *rest):
            result = right(out, *rest)
            harm(out)
            return result

        right = select(operation, *arguments, **options)
        return run if operation == "perturb" else right

    monkeypatch.setattr(perturb_module._backend, "select", selected)
    index = _plain_case()
    (failure,), _ = fuzz.fuzz(0, [index])
    assert message in failure
    monkeypatch.undo()

    repeat = shlex.split(failure.rsplit("repeat: ", 1)[1])
    assert repeat[:2] == ["python", "tests/soak/fuzz.py"]
    assert fuzz.main(repeat[2:]) == 0
    assert "1 of 1 cases passed" in capsys.readouterr().out


def test_the_command_repeats_a_case():
    """In a process of its own."""
    repeat = shlex.split(fuzz.command(7, 42, "cpu", "reference"))
    done = subprocess.run([sys.executable, *repeat[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "1 of 1 cases passed" in done.stdout


@functools.cache
def _plain_case() -> int:
    return next(i for i in range(1000) if _is_plain(fuzz.Case.drawn(0, i)))


def _is_plain(case: fuzz.Case) -> bool:
    """One whose results are compared with the definition, in numbers that may be compared."""
    return (
        case.name == "perturb_into_"
        and case.fault is None
        and case.values == "as drawn"
        and not fuzz.to_be_refused(case.name, case.operation, case.arguments)
        and case.dtype == torch.float32
        and case.arguments["gamma"] != 0
        and case.arguments["out"][0].is_contiguous()
        and case.arguments["out"][0].numel() > 64
    )


def test_a_refusal_that_does_not_come_is_found(monkeypatch):
    index = next(i for i in range(500) if (case := fuzz.Case.drawn(0, i)).name == "restore_" and case.fault == "shape")
    monkeypatch.setitem(fuzz.OPERATIONS["restore_"].__dict__, "call", lambda weights, saved: None)
    (failure,), _ = fuzz.fuzz(0, [index])
    assert failure.startswith("was not refused")


def test_a_failure_shows_in_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "fuzz", lambda *arguments, **options: (["wrong"], fuzz.Counter()))
    assert fuzz.main(["--case", "3"]) == 1
    assert "0 of 1 cases passed" in capsys.readouterr().out
