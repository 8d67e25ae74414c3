"""Exported models: graphs of torch's own operations, whose files serve where this package is not installed."""

import functools
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from commands import run_command
from torch import Tensor, nn

from awp_engine import load_model
from awp_engine.config import ConfigError
from awp_engine.files.digest import sha256_of
from awp_engine.models import WrappedClassifier, build_model
from awp_engine.models.import_timm import import_timm
from awp_engine.models.layers import ActivatedBatchNorm, Conv3x3
from awp_engine.models.onnx_file import write_onnx
from awp_engine.models.timm_models import TimmConvNeXt, TimmResNet
from awp_kernels import bn_act_available, conv3x3_available

_NORMALISATION = (10, [0.5, 0.4, 0.3], [0.25, 0.2, 0.3])
_FULL = "preact-resnet-18", "wrn-28-10", "resnet-50", "convnext-tiny", "convnext-tiny-convstem"
# small models of every family with layers that would be fused, and the side of their images
MODELS = {
    "preact": (lambda: build_model("preact-resnet-digits", *_NORMALISATION, width=32), 8),
    "wide": (lambda: build_model("wrn-10-2", *_NORMALISATION), 8),
    "resnet": (lambda: TimmResNet(*_NORMALISATION, depths=(1, 1, 1, 1), width=32), 32),
    "convnext": (lambda: TimmConvNeXt(*_NORMALISATION, depths=(1, 1, 1, 1), width=16), 32),
    "convstem": (lambda: TimmConvNeXt(*_NORMALISATION, depths=(1, 1, 1, 1), width=16, conv_stem=True), 32),
} | {name: (functools.partial(build_model, name, *_NORMALISATION), 64) for name in _FULL}
FULL = [pytest.param(name, marks=pytest.mark.long) for name in _FULL]


def made(name: str) -> tuple[nn.Module, Tensor]:
    build, size = MODELS[name]
    if name not in ("preact", "wide", "preact-resnet-18", "wrn-28-10"):
        try:
            import_timm()
        except ConfigError as error:
            pytest.skip(str(error))
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
    return model.eval(), torch.rand(3, 3, size, size)


def traced(model: nn.Module, images: Tensor) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        # torch 2.13 and 2.14 call it deprecated
        warnings.filterwarnings("ignore", message=".*torch.jit.trace.* is deprecated")
        return torch.jit.trace(model, images)


def exported(model: nn.Module, images: Tensor, strict: bool) -> torch.export.ExportedProgram:
    batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(model, (images,), dynamic_shapes=batch, strict=strict)


# what reads the files: no module of this project may be found there
READER = """
import importlib.util, pathlib, sys, warnings
import torch
warnings.simplefilter("ignore")
for name in ("awp_kernels", "awp_engine", "timm"):
    sys.modules[name] = None
folder = pathlib.Path(sys.argv[1])
images = torch.load(folder / "images.pt")
with torch.no_grad():
    found = {"export": torch.export.load(folder / "model.pt2").module()(images)}
    found["trace"] = torch.jit.load(folder / "model.ts")(images)
torch.save(found, folder / "found.pt")
"""


@pytest.mark.parametrize("name", ["preact", "wide", "resnet", "convnext", "convstem", *FULL])
def test_graphs_are_of_torchs_own_operations(name):
    model, images = made(name)
    with torch.no_grad():
        logits = model(images)
        for strict in (False, True) if name != "convnext" else (False,):
            program = exported(model, images[:2], strict)
            called = {node.target for node in program.graph.nodes if node.op == "call_function"}
            assert {t.namespace for t in called if isinstance(t, torch._ops.OpOverload)} == {"aten"}
            torch.testing.assert_close(program.module()(images), logits, rtol=1e-5, atol=1e-5)
        script = traced(model, images[:2])
        assert {n.kind().split("::")[0] for n in script.inlined_graph.nodes()} <= {"aten", "prim"}
        torch.testing.assert_close(script(images), logits, rtol=1e-5, atol=1e-5)


def test_the_models_have_layers_that_would_be_fused():
    model, images = made("wide")
    if not conv3x3_available(torch.rand(1, 32, 8, 8), torch.rand(32, 32, 3, 3)):
        pytest.skip("needs AVX2 with FMA")
    assert any(isinstance(m, Conv3x3) and m.in_channels >= 32 for m in model.modules())
    assert any(isinstance(m, ActivatedBatchNorm) and bn_act_available(images, m.weight) for m in model.modules())


def test_files_serve_without_this_package(tmp_path):
    model, images = made("wide")
    with torch.no_grad():
        logits = model(images)
        torch.export.save(exported(model, images[:2], False), tmp_path / "model.pt2")
        traced(model, images[:2]).save(tmp_path / "model.ts")
    torch.save(images, tmp_path / "images.pt")
    subprocess.run([sys.executable, "-c", READER, tmp_path], check=True, cwd=tmp_path, timeout=120)
    found = torch.load(tmp_path / "found.pt")
    assert set(found) == {"export", "trace"}
    for found_logits in found.values():
        torch.testing.assert_close(found_logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["wide", "resnet", "convstem", *FULL])
def test_onnx(tmp_path: Path, name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, images = made(name)
    told = []
    model.train()
    write_onnx(model, tuple(images.shape[1:]), tmp_path / "model.onnx", metadata={"key": "ä"}, say=told.append)
    assert all(module.training for module in model.modules())
    assert "checked by onnxruntime" in told[0]
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model.eval()(images), rtol=1e-5, atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map["key"] == "ä"
    # all in one file
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


class Otherwise(nn.Module):
    """Answers otherwise while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) + torch.compiler.is_exporting()


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


@pytest.mark.parametrize(
    ("network", "message"),
    [(Otherwise(), "the file's logits differ from the model's by"), (Branching(), "torch cannot export this model")],
)
def test_onnx_files_that_would_be_wrong_are_not_written(tmp_path: Path, network: nn.Module, message: str):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = WrappedClassifier(network, 3, (0.5,) * 3, (0.25,) * 3, name="mine")
    with pytest.raises(ConfigError, match=message):
        write_onnx(model, (3, 8, 8), tmp_path / "model.onnx", metadata={})
    assert not list(tmp_path.iterdir())


def test_onnx_in_one_step(tmp_path: Path, monkeypatch, capsys, caplog):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    run = tmp_path / "run"
    run_command("train", monkeypatch, "--epochs", 1, "--model.width", 4, "--data.train-limit", 40, "--run-dir", run)
    file = tmp_path / "model.onnx"
    # as if it were not installed
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert run_command("export", monkeypatch, run, "--onnx", file) == 0
    assert "torchvision" not in caplog.text
    monkeypatch.delitem(sys.modules, "torchvision")
    assert "images, fp32 [batch, 1, 8, 8] in [0, 1]" in capsys.readouterr().out
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert facts["weights_sha256"] == sha256_of(run / "model.safetensors")
    assert json.loads(facts["class_names"]) == list("0123456789")
    images = torch.rand(3, 1, 8, 8)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), load_model(run)(images), rtol=1e-4, atol=1e-4)
    assert run_command("export", monkeypatch, run, "--onnx", file) == 2
    assert f"--onnx: {file} is there already" in capsys.readouterr().err
