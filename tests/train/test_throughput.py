"""What a step costs: counted operations, units of the methods, ceilings, and traces."""

import json

import pytest
import torch

from awp_engine.config import AttackConfig, AwpConfig, Config
from awp_engine.models import build_model
from awp_engine.observe.profiler import StepProfiler
from awp_engine.observe.regions import listening, region
from awp_engine.observe.throughput import forward_flops, matmul_ceiling, peak_memory
from awp_engine.train.cost import forward_units


@pytest.mark.parametrize(
    ("name", "gigaflops"), [("preact-resnet-18", 1.111), ("wrn-28-10", 10.49), ("wrn-34-10", 13.32)]
)
def test_operations_of_a_forward_pass(name, gigaflops):
    """Published sizes: 2 a multiplication and addition, at 32x32."""
    with torch.device("meta"):
        model = build_model(name, 10, (0.5,) * 3, (0.25,) * 3)
    model.train()
    assert forward_flops(model, (3, 32, 32)) == pytest.approx(gigaflops * 1e9, rel=2e-3)
    assert all(module.training for module in model.modules())


def test_fused_convolutions_are_counted():
    arguments = ("preact-resnet-18", 10, (0.5,) * 3, (0.25,) * 3)
    with torch.device("meta"):
        expected = forward_flops(build_model(*arguments, width=32), (3, 32, 32))
    assert forward_flops(build_model(*arguments, width=32), (3, 32, 32)) == expected


def test_units_of_the_methods():
    attack = AttackConfig(steps=10)
    on, off = AwpConfig(gamma=0.005), AwpConfig(gamma=0.0)
    assert forward_units(Config(attack=attack, awp=on)) == 26
    assert forward_units(Config(attack=attack, awp=off)) == 23
    assert forward_units(Config(attack=attack, awp=on, method="trades")) == 33
    assert forward_units(Config(attack=attack, awp=on, method="mart")) == 32
    assert forward_units(Config(attack=attack, awp=AwpConfig(gamma=0.005, ascent="shared"))) == 24
    assert forward_units(Config(attack=attack, awp=AwpConfig(gamma=0.005, every=2))) == 24.5
    assert forward_units(Config(attack=AttackConfig(epsilon="0"), awp=off)) == 3


def test_ceilings_are_of_this_machine():
    cpu = torch.device("cpu")
    assert 1e8 < matmul_ceiling(cpu, torch.float32) < 1e14
    before = peak_memory(cpu)
    held = torch.ones(64 << 20)  # 256 MiB
    assert peak_memory(cpu) >= before > 2e7
    assert peak_memory(cpu) > held.nbytes


def test_regions_are_heard_and_nest():
    heard = []
    with listening(lambda name, begins: heard.append((name, begins))), region("attack"), region("inner"):
        pass
    with region("nobody"):
        pass
    assert heard == [("attack", True), ("inner", True), ("inner", False), ("attack", False)]
    listener = listening(lambda name, begins: heard.append((name, begins)))
    with pytest.raises(ValueError, match="x"), listener, region("descent"):
        raise ValueError("x")
    assert heard[-1] == ("descent", False)


def test_a_trace_holds_the_steps_after_the_first_five(tmp_path):
    profiler = StepProfiler(2, tmp_path / "trace.json")
    messages = []
    for index in range(9):
        with region(f"step {index}"):
            torch.ones(4).sum()
        messages.append(profiler.step())
    assert [message for message in messages if message] == [f"trace of 2 steps in {tmp_path / 'trace.json'}"]
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"step 5", "step 6"} <= names
    assert not {"step 4", "step 7"} & names
    assert profiler.close() is None


def test_a_short_run_writes_what_there_is_and_a_bad_path_is_only_a_warning(tmp_path):
    short = StepProfiler(100, tmp_path / "short.json")
    for _ in range(7):
        short.step()
    assert short.close() == f"trace of 2 steps in {tmp_path / 'short.json'}"
    lost = StepProfiler(1, tmp_path / "nowhere" / "trace.json")
    messages = [lost.step() for _ in range(6)]
    assert messages[-1].startswith("warning: ")
    none = StepProfiler(0, tmp_path / "none.json")
    assert [none.step() for _ in range(9)] == [None] * 9
    assert not (tmp_path / "none.json").exists()
