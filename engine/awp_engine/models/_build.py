"""Models by name, and published weights into them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from awp_engine.models._common import Activation
from awp_engine.models.preact_resnet import PreActResNet
from awp_engine.models.wide_resnet import WideResNet

model_names = ("preact-resnet-18", "preact-resnet-digits", "wrn-28-10", "wrn-34-10", "wrn-70-16")
"""The models the field compares; `wrn-D-K` is understood for every depth D = 6 n + 4 and widen factor K."""


def build_model(
    name: str,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    width: int | None = None,
    activation: Activation = "relu",
) -> nn.Module:
    """Builds a freshly initialised classifier of images in [0, 1].

    Weights are drawn from torch's global generator as in the public code; seed it for a repeatable start.

    Args:
        name: one of `model_names`, or `wrn-D-K`. `preact-resnet-digits` is for 8x8 images: one block in each of three
            stages.
        num_classes: number of logits.
        mean: one value a channel; their number is the number of input channels.
        std: likewise; images become (x - mean) / std inside.
        width: channels of a PreActResNet's first stage; None means 64, and 16 for `preact-resnet-digits`.
        activation: "relu" or "silu".

    Raises:
        ValueError: unknown name or activation, a width for a WideResNet, or an argument out of range.
    """
    if name == "preact-resnet-18":
        return PreActResNet(num_classes, mean, std, width=64 if width is None else width, activation=activation)
    if name == "preact-resnet-digits":
        width = 16 if width is None else width
        return PreActResNet(num_classes, mean, std, num_blocks=(1, 1, 1), width=width, activation=activation)
    wide = re.fullmatch(r"wrn-(\d{1,4})-(\d{1,4})", name)
    if wide is None:
        raise ValueError(
            f"model: unknown name {name!r}; expected one of {', '.join(model_names)}, or wrn-DEPTH-WIDENFACTOR"
        )
    if width is not None:
        raise ValueError(f"width: {width} given for {name}; a WideResNet's width is the last number of its name")
    return WideResNet(int(wide[1]), int(wide[2]), num_classes, mean, std, activation=activation)


def load_public_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads published weights by name, strictly, into a model of `build_model`.

    Accepts names with or without `module.`, and the weights themselves or a dictionary that holds them under
    `state_dict` or `model`. `sub_block1.*` of TRADES' WideResNet, which its forward never uses, and a missing
    `num_batches_tracked`, which PyTorch before 0.4.1 did not have, are no mismatch. On error the model is unchanged.

    Raises:
        ValueError: names or shapes differ; the message names the first few.
    """
    outer = state_dict
    for key in ("state_dict", "model"):
        if isinstance(outer.get(key), Mapping):
            outer = outer[key]
    weights = {name.removeprefix("module."): value for name, value in outer.items()}
    if isinstance(model, WideResNet):
        weights = {name: value for name, value in weights.items() if not name.startswith("sub_block1.")}

    expected = model.state_dict()
    for name in expected:
        if name.endswith(".num_batches_tracked"):
            weights.setdefault(name, expected[name])
    problems = [
        *_describe("missing", [name for name in expected if name not in weights]),
        *_describe("unexpected", [name for name in weights if name not in expected]),
        *_describe(
            "wrong shape",
            [
                _shapes(n, weights[n], expected[n])
                for n in expected
                if n in weights and _differs(weights[n], expected[n])
            ],
        ),
    ]
    if problems:
        raise ValueError(f"state_dict does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(weights, strict=True)


def _differs(value: Any, expected: Tensor) -> bool:
    return not isinstance(value, Tensor) or value.shape != expected.shape


def _shapes(name: str, value: Any, expected: Tensor) -> str:
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    return f"{name} {found}, expected {list(expected.shape)}"


def _describe(kind: str, names: Sequence[str], shown: int = 3) -> list[str]:
    if not names:
        return []
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return [f"{kind}: {', '.join(names[:shown])}{rest}"]
