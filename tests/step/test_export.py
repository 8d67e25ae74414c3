"""Exported models: graphs of torch's own operations, whose files serve where this package is not installed."""

import functools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from awp_engine.config import ConfigError
from awp_engine.models import build_model
from awp_engine.models.import_timm import import_timm
from awp_engine.models.layers import ActivatedBatchNorm, Conv3x3
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
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx(tmp_path: Path, name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, images = made(name)
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (images[:2],), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=batch, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-5, atol=1e-5)
