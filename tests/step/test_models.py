import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from awp_engine.models import build_model, load_public_state_dict, model_names

_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
_LAYOUTS = {"preact-resnet-18": "preact_resnet_18.json", "wrn-34-10": "wrn_34_10.json"}


def _layout(name: str) -> dict[str, list[int]]:
    """Names and shapes of the public state dict for 10 classes, written down from the public code."""
    return json.loads((Path(__file__).parent / "public_layouts" / _LAYOUTS[name]).read_text())


def _random_weights(layout: dict[str, list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in layout.items():
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif len(shape) > 1:
            weights[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        else:
            weights[name] = torch.rand(shape, generator=generator) + 0.5
    return weights


def _images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(("name", "millions"), [("preact-resnet-18", 11.17), ("wrn-34-10", 46.16)])
def test_public_layout_loads_by_name(name: str, millions: float) -> None:
    model, weights = build_model(name, 10, _MEAN, _STD), _random_weights(_layout(name))
    assert list(model.state_dict()) == list(weights)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions

    model.load_state_dict(weights, strict=True)
    load_public_state_dict(model, {"state_dict": {f"module.{key}": value for key, value in weights.items()}})
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    logits = model.eval()(_images(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


def test_parameter_counts_of_the_other_wide_networks() -> None:
    with torch.device("meta"):
        counts = {d: sum(p.numel() for p in build_model(d, 10, _MEAN, _STD).parameters()) for d in model_names[2:]}
    assert [round(count / 1e6, 1) for count in counts.values()] == [36.5, 46.2, 266.8]


def test_preact_resnet_18_computes_the_public_function() -> None:
    """The forward spelled out from the state dict, with the public code's fixed 4x4 pooling."""
    model = build_model("preact-resnet-18", 10, _MEAN, _STD, width=4).double().eval()
    weights = {k: v + 0.1 if v.ndim == 1 else v for k, v in model.state_dict().items()}
    model.load_state_dict(weights)

    def norm_relu(x: Tensor, n: str) -> Tensor:
        stats = (weights[f"{n}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return nn.functional.batch_norm(x, *stats).relu()

    images = _images(2, 3, 32, 32, dtype=torch.float64)
    x = (images - torch.tensor(_MEAN).view(1, 3, 1, 1)) / torch.tensor(_STD).view(1, 3, 1, 1)
    x = nn.functional.conv2d(x, weights["conv1.weight"], padding=1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            n = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = norm_relu(x, f"{n}.bn1")
            shortcut = weights.get(f"{n}.shortcut.0.weight")
            x = x if shortcut is None else nn.functional.conv2d(out, shortcut, stride=stride)
            out = nn.functional.conv2d(out, weights[f"{n}.conv1.weight"], stride=stride, padding=1)
            out = norm_relu(out, f"{n}.bn2")
            x = x + nn.functional.conv2d(out, weights[f"{n}.conv2.weight"], padding=1)
    x = nn.functional.avg_pool2d(norm_relu(x, "bn"), 4).flatten(1)
    torch.testing.assert_close(model(images), x @ weights["linear.weight"].T + weights["linear.bias"])


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("name", ["preact-resnet-18", "preact-resnet-digits", "wrn-10-1"])
def test_trains_in_both_precisions_and_layouts(name: str, activation: Any) -> None:
    torch.manual_seed(0)
    width = None if name.startswith("wrn") else 8
    model = build_model(name, 10, _MEAN, _STD, width=width, activation=activation).double()
    images = _images(3, 3, 16, 16, dtype=torch.float64).requires_grad_()
    logits = model(images)
    nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    assert logits.dtype == torch.float64
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert images.grad is not None

    other = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(other(images.detach().to(memory_format=torch.channels_last)), logits)
    torch.testing.assert_close(model.float()(images.detach().float()).double(), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["preact-resnet-18", "preact-resnet-digits", "wrn-10-2"])
def test_gradient_with_respect_to_the_input(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 3, (0.5,), (0.3,), width=None if name.startswith("wrn") else 2, activation="silu")
    model = model.double().eval()
    assert torch.autograd.gradcheck(model, (_images(1, 1, 5, 6, dtype=torch.float64).requires_grad_(),))


@settings(deadline=None, max_examples=15)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(1, 4))
def test_any_size_and_number_of_channels(height: int, width: int, channels: int) -> None:
    for name in ("preact-resnet-18", "preact-resnet-digits"):
        model = build_model(name, 7, (0.5,) * channels, (0.2,) * channels, width=2).eval()
        assert model(_images(2, channels, height, width)).shape == (2, 7)
    assert (
        build_model("wrn-10-1", 7, (0.5,) * channels, (0.2,) * channels)(_images(2, channels, height, width))
        .isfinite()
        .all()
    )


def test_normalisation_is_inside_and_not_in_the_state_dict() -> None:
    torch.manual_seed(0)
    model = build_model("preact-resnet-digits", 10, (0.3,), (0.4,))
    plain = build_model("preact-resnet-digits", 10, (0.0,), (1.0,))
    plain.load_state_dict(model.state_dict(), strict=True)
    images = _images(4, 1, 8, 8)
    torch.testing.assert_close(model(images), plain((images - 0.3) / 0.4))
    assert not {"mean", "std"} & set(model.state_dict())
    assert model.get_buffer("mean").shape == (1, 1, 1, 1)


def test_initialisation_is_the_public_one_and_repeatable() -> None:
    torch.manual_seed(3)
    first = build_model("wrn-10-4", 10, _MEAN, _STD).state_dict()
    torch.manual_seed(3)
    again = build_model("wrn-10-4", 10, _MEAN, _STD).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    weight = first["block3.layer.0.conv2.weight"]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * weight.shape[0])), rel=0.01)
    assert not first["fc.bias"].any()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("resnet-99", 10, _MEAN, _STD), {}, "unknown name 'resnet-99'.*preact-resnet-18.*wrn-34-10"),
        (("wrn-30-10", 10, _MEAN, _STD), {}, "depth: 30.*6 n \\+ 4"),
        (("wrn-4-10", 10, _MEAN, _STD), {}, "depth: 4"),
        (("wrn-28-0", 10, _MEAN, _STD), {}, "widen_factor: 0"),
        (("wrn-28-10", 10, _MEAN, _STD), {"width": 32}, "width: 32 given for wrn-28-10"),
        (("preact-resnet-18", 10, _MEAN, _STD), {"width": 0}, "width: 0"),
        (("preact-resnet-18", 10, _MEAN, _STD), {"activation": "gelu"}, "unknown name 'gelu'.*relu, silu"),
        (("preact-resnet-18", 1, _MEAN, _STD), {}, "num_classes: 1"),
        (("preact-resnet-18", 10, _MEAN, (1.0,)), {}, "3 and 1 values"),
        (("preact-resnet-18", 10, (), ()), {}, "0 and 0 values"),
        (("preact-resnet-18", 10, (0.5,), (0.0,)), {}, "positive finite deviations"),
        (("preact-resnet-18", 10, (math.nan,), (1.0,)), {}, "finite means"),
    ],
)
def test_wrong_arguments(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        build_model(*arguments, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("nest", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_forms_load(nest: Any, prefix: str) -> None:
    source, target = (build_model("wrn-10-1", 10, _MEAN, _STD) for _ in range(2))
    weights = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    # TRADES' network holds a block that its forward never uses; RST-AWP's published WRN-28-10 has it.
    weights["sub_block1.layer.0.bn1.weight"] = torch.ones(16)
    load_public_state_dict(target, nest({prefix + name: value for name, value in weights.items()}))
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_mismatch_is_named_in_one_line_and_changes_nothing() -> None:
    source, model = (build_model("preact-resnet-digits", 10, (0.5,), (0.5,)) for _ in range(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights: dict[str, Any] = dict(source.state_dict())
    del weights["bn.weight"]
    weights |= {f"extra{i}": torch.ones(1) for i in range(5)}
    weights |= {"linear.weight": torch.ones(4, 64), "linear.bias": None}
    with pytest.raises(ValueError, match="does not fit PreActResNet") as raised:
        load_public_state_dict(model, weights)
    message = str(raised.value)
    assert "\n" not in message
    assert "missing: bn.weight" in message
    assert "unexpected: extra0, extra1, extra2 and 2 more" in message
    assert "linear.weight [4, 64], expected [10, 64]" in message
    assert "linear.bias NoneType" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["preact-resnet-18", "wrn-10-2"])
def test_autocast_mixes_dtypes_of_sum_and_residual(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10, _MEAN, _STD)
    images = _images(4, 3, 16, 16).requires_grad_()
    (expected,) = torch.autograd.grad(model(images).square().sum(), images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    (found,) = torch.autograd.grad(logits.float().square().sum(), images)
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.8
