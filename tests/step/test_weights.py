"""Other people's checkpoint layouts: each is written as a file, and loaded back to the same logits."""

import argparse
import collections
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError, export_model
from awp_engine.models import NormalizedClassifier, build_model, load_pretrained, load_weights
from awp_engine.models.factories import wrap
from awp_engine.models.trained import ModelDescription
from awp_engine.models.weights_file import read_weights

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
HALF, QUARTER = (0.5,) * 3, (0.25,) * 3


class Normalize(nn.Module):
    """As most projects write it."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...] = (3,), names: tuple[str, str] = ("mean", "std")) -> None:
        super().__init__()
        for name, values in zip(names, (MEAN, STD), strict=True):
            self.register_buffer(name, values.view(shape).clone())


class Holder(nn.Module):
    """A module with the parts that are given."""

    def __init__(self, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part) if isinstance(part, nn.Module) else self.register_buffer(name, part)


class Unknown:
    """An object of a class that only the writer has, such as a log."""

    def __init__(self) -> None:
        self.best = np.float64(3.0)


@functools.cache
def network(seed: int = 0, name: str = "wrn-10-1") -> NormalizedClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(name, 10, HALF, QUARTER)
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.copy_(torch.rand_like(value) + 0.5)
    return model.eval()


def weights(seed: int = 0) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network(seed).state_dict().items()}


def behind(prefix: str, seed: int = 0) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights(seed).items()}


def madry() -> dict[str, Any]:
    """robustness: AttackerModel in DataParallel; the attacker holds the network once more."""
    normal = functools.partial(Normalize, (3, 1, 1), ("new_mean", "new_std"))
    attacker = Holder(normalize=normal(), model=network())
    model = nn.DataParallel(Holder(normalizer=normal(), model=network(), attacker=attacker))
    return {"model": model.state_dict(), "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}, "amp": "N/A"}


def old() -> dict[str, Tensor]:
    """PyTorch before 0.4.1 counted no batches; TRADES' network holds a block that it never uses."""
    kept = {name: value for name, value in weights().items() if not name.endswith("num_batches_tracked")}
    return kept | {f"sub_block1.layer.0.{part}": torch.ones(16) for part in ("bn1.weight", "bn1.bias")}


class Layout(tuple[Callable[[], Any], str, str, bool]):
    """How a document is made, where its weights are, what is before their names, and whether it has mean and std."""

    __slots__ = ()

    def __new__(
        cls, make: Callable[[], Any], key: str = "", stripped: str = "", *, normalised: bool = False
    ) -> "Layout":
        return super().__new__(cls, (make, key, stripped, normalised))


LAYOUTS = {
    "bare state dict": Layout(weights),
    "{state_dict}": Layout(lambda: {"state_dict": weights(), "epoch": 3, "best_acc": torch.tensor(0.5)}, "state_dict"),
    "{model}": Layout(lambda: {"model": weights(), "rng_state": torch.get_rng_state()}, "model"),
    "{net}": Layout(lambda: {"net": weights(), "acc": 93.1, "epoch": 7}, "net"),
    "{model_state_dict}": Layout(
        lambda: {"model_state_dict": weights(), "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        "model_state_dict",
    ),
    "{ema_state_dict} beside {state_dict}": Layout(
        lambda: {"state_dict": weights(1), "ema_state_dict": weights()}, "ema_state_dict"
    ),
    "timm, with state_dict_ema and args": Layout(
        lambda: {
            "state_dict": weights(1),
            "state_dict_ema": weights(),
            "arch": "wrn",
            "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.99)),
            "metric": np.float64(76.5),
        },
        "state_dict_ema",
    ),
    "DataParallel": Layout(lambda: nn.DataParallel(network()).state_dict(), "", "module."),
    "compile": Layout(lambda: cast(nn.Module, torch.compile(network())).state_dict()),
    "DataParallel of compile": Layout(
        lambda: nn.DataParallel(cast(nn.Module, torch.compile(network()))).state_dict(), "", "module."
    ),
    "compile of DataParallel": Layout(
        lambda: cast(nn.Module, torch.compile(nn.DataParallel(network()))).state_dict(), "", "module."
    ),
    "model.": Layout(lambda: {"state_dict": behind("model.")}, "state_dict", "model."),
    "Sequential, normalisation first": Layout(
        lambda: nn.Sequential(Normalize(), network()).state_dict(), "", "1.", normalised=True
    ),
    "Sequential of the network alone": Layout(lambda: nn.Sequential(network()).state_dict(), "", "0."),
    "AveragedModel": Layout(lambda: averaged(), "", "module."),
    "mu and sigma": Layout(lambda: weights() | pair("mu", "sigma", (1, 3, 1, 1)), normalised=True),
    "normalize.mean": Layout(lambda: weights() | pair("normalize.mean", "normalize.std"), normalised=True),
    "normalizer.mean": Layout(
        lambda: behind("net.") | pair("normalizer.mean", "normalizer.std"), "", "net.", normalised=True
    ),
    "model.normalize.mean": Layout(
        lambda: {"state_dict": behind("model.") | pair("model.normalize.mean", "model.normalize.std", (1, 3, 1, 1))},
        "state_dict",
        "model.",
        normalised=True,
    ),
    "MadryLab's robustness": Layout(madry, "model", "module.model.", normalised=True),
    "MAIR": Layout(
        lambda: {
            "rmodel": behind("model.") | pair("mean", "std") | {"n_classes": torch.tensor(10)},
            "recordmanager": Unknown(),
            "record_info": collections.OrderedDict(Clean=np.float64(88.0)),
        },
        "rmodel",
        "model.",
        normalised=True,
    ),
    "MAIR after add_normalize": Layout(
        lambda: {"rmodel": behind("model.1.") | pair("model.0.mean", "model.0.std") | {"n_classes": torch.tensor(10)}},
        "rmodel",
        "model.1.",
        normalised=True,
    ),
    "MAIR's own normalisation, which does nothing": Layout(
        lambda: {
            "rmodel": behind("model.1.")
            | pair("model.0.mean", "model.0.std")
            | {"mean": torch.zeros(3), "std": torch.ones(3)}
        },
        "rmodel",
        "model.1.",
        normalised=True,
    ),
    "DM-Improves-AT": Layout(
        lambda: {"model_state_dict": behind("module.0."), "unaveraged_model_state_dict": behind("module.0.", 1)},
        "model_state_dict",
        "module.0.",
    ),
    "TRADES, before counters of batches": Layout(old),
    "RobustBench's last and best": Layout(lambda: {"last": weights(1), "best": weights()}, "best"),
    "Lightning": Layout(
        lambda: {
            "state_dict": behind("backbone.") | {"criterion.weight": torch.ones(10)},
            "pytorch-lightning_version": "2.6.0",
            "hyper_parameters": {"lr": 0.1, "net": Unknown()},
            "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}}],
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
            "loops": collections.defaultdict(list, fit=[1]),
        },
        "state_dict",
        "backbone.",
    ),
    "a teacher beside": Layout(
        lambda: {"state_dict": behind("student.") | behind("teacher.", 1)}, "state_dict", "student."
    ),
    "mean and std beside {state_dict}": Layout(
        lambda: {"state_dict": weights()} | pair("mean", "std"), "state_dict", normalised=True
    ),
    "pixels from 0 to 255": Layout(
        lambda: weights() | {"mean": MEAN.double() * 255, "std": STD.double() * 255}, normalised=True
    ),
}


def pair(mean: str, std: str, shape: tuple[int, ...] = (3,)) -> dict[str, Tensor]:
    return {mean: MEAN.view(shape), std: STD.view(shape)}


def averaged() -> dict[str, Any]:
    average = AveragedModel(network())
    average.update_parameters(network())
    return average.state_dict()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3)))


def expected(*, normalised: bool) -> Tensor:
    model = build_model("wrn-10-1", 10, *((MEAN.tolist(), STD.tolist()) if normalised else (HALF, QUARTER))).eval()
    model.load_state_dict(weights())
    return logits(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_loads_to_the_same_logits(layout: str, tmp_path: Path) -> None:
    make, key, stripped, normalised = LAYOUTS[layout]
    torch.save(make(), path := tmp_path / "weights.pth.tar")
    model = build_model("wrn-10-1", 10, HALF, QUARTER).eval()
    loaded = load_weights(model, path)
    assert (loaded.key, loaded.stripped) == (key, stripped)
    assert torch.equal(logits(model), expected(normalised=normalised))
    assert loaded.mean == (tuple(MEAN.tolist()) if normalised else None)
    notes = "\n".join(loaded.notes)
    for name in ("_orig_mod.", stripped):
        assert (repr(name) in loaded.taken) is (bool(name) if name == stripped else "compile" in layout)
    assert (
        "normalisation of the file: mean (0.4, 0.5, 0.6), std (0.2, 0.3, 0.4), not the model's" in notes
    ) is normalised
    assert "\n".join(loaded.notes).count("\n") == len(loaded.notes) - 1
    assert ("not run: objects of" in notes) is (layout in ("Lightning", "MAIR", "timm, with state_dict_ema and args"))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "old.pt"])
def test_kinds_of_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(behind("model.") | pair("model.normalize.mean", "model.normalize.std"), path)
    else:
        document = nn.DataParallel(nn.Sequential(Normalize(), network())).state_dict()
        torch.save(document, path, _use_new_zipfile_serialization=name != "old.pt")
    model = build_model("wrn-10-1", 10, HALF, QUARTER).eval()
    loaded = load_weights(model, str(path))
    assert torch.equal(logits(model), expected(normalised=True))
    assert loaded.sha256 is not None
    assert len(loaded.sha256) == 64


def test_the_header_of_our_own_file_has_the_normalisation(tmp_path: Path) -> None:
    described = ModelDescription(
        name="wrn-10-1",
        num_classes=10,
        mean=tuple(MEAN.tolist()),
        std=tuple(STD.tolist()),
        width=None,
        activation="relu",
    )
    checkpoint.export_model(path := tmp_path / "model.safetensors", weights(), described.to_metadata())
    model = build_model("wrn-10-1", 10, HALF, QUARTER).eval()
    load_weights(model, path)
    assert torch.equal(logits(model), expected(normalised=True))
    # and of a run that starts from it
    model = build_model("wrn-10-1", 10, HALF, QUARTER).eval()
    assert load_pretrained(model, path).in_front
    assert torch.equal(logits(model), expected(normalised=True))
    with pytest.raises(CheckpointError, match=r"is a run directory; .*: give .*model\.safetensors$"):
        load_pretrained(model, tmp_path)


@pytest.mark.parametrize(
    ("document", "key", "seed", "note"),
    [
        ("{ema_state_dict} beside {state_dict}", None, 0, "not taken: state_dict (--weights-key"),
        ("{ema_state_dict} beside {state_dict}", "state_dict", 1, "weights of 'state_dict'"),
        ("timm, with state_dict_ema and args", "state_dict", 1, "weights of 'state_dict'"),
        ("DM-Improves-AT", None, 0, "not taken: unaveraged_model_state_dict.module.0 (--weights-key"),
        ("DM-Improves-AT", "unaveraged_model_state_dict", 1, "names without 'module.0.'"),
        ("a teacher beside", None, 0, "not taken: state_dict.teacher (--weights-key"),
        ("a teacher beside", "state_dict.teacher", 1, "names without 'teacher.'"),
        ("a teacher beside", "teacher", 1, "names without 'teacher.'"),
        ("AveragedModel", None, 0, "an average over training"),
    ],
)
def test_which_weights_are_taken_is_said_and_can_be_chosen(
    document: str, key: str | None, seed: int, note: str
) -> None:
    model = build_model("wrn-10-1", 10, HALF, QUARTER).eval()
    loaded = load_weights(model, LAYOUTS[document][0](), key=key)
    assert note in "; ".join(loaded.notes)
    assert torch.equal(logits(model), logits(network(seed)))


def test_a_module_pickled_whole_is_read_without_its_code(tmp_path: Path) -> None:
    torch.save({"net": nn.DataParallel(network())}, path := tmp_path / "weights.pt")
    model = build_model("wrn-10-1", 10, MEAN.tolist(), STD.tolist()).eval()
    loaded = load_weights(model, path)
    assert (loaded.key, loaded.stripped) == ("net", "module.")
    # also buffers that are no part of its state dict
    assert loaded.mean == HALF
    assert torch.equal(logits(model), logits(network()))


def test_an_average_that_has_not_begun_is_not_preferred() -> None:
    document = {"model_state_dict": AveragedModel(network(1)).state_dict(), "net": weights()}
    model = build_model("wrn-10-1", 10, HALF, QUARTER)
    assert load_weights(model, document).key == "net"


class Own(nn.Module):
    """Somebody's network with a normalisation inside."""

    def __init__(self, *, norm: str = "norm", classes: int = 5) -> None:
        super().__init__()
        self.add_module(norm, Normalize((1, 3, 1, 1)))
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, classes)


def test_modules_of_others() -> None:
    """Any module: names behind wrappers, mean and std into its own buffers, a new head for other classes."""
    source, target = Own(norm="normalizer"), Own()
    target.norm.get_buffer("mean").zero_()
    loaded = load_weights(target, {"model": {f"module.{n}": v for n, v in source.state_dict().items()}})
    assert torch.equal(target.norm.get_buffer("mean").flatten(), MEAN)
    assert torch.equal(target.head.weight, source.head.weight)
    assert loaded.stripped == "module."
    # in another wrapper, with its normalisation in the same place
    inner = nn.Sequential(Normalize(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    held = {name: value.clone() for name, value in nn.DataParallel(inner).state_dict().items()}
    inner[0].get_buffer("mean").zero_()
    loaded = load_weights(Holder(network=inner), held)
    assert (loaded.stripped, loaded.mean) == ("module.", None)
    assert torch.equal(inner[0].get_buffer("mean"), held["module.0.mean"])
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    loaded = load_weights(bare, {f"net.{n}": v for n, v in bare.state_dict().items()} | pair("mean", "std"))
    assert "the model has no place for it: normalise images by it" in loaded.notes[-1]
    assert loaded.std == tuple(STD.tolist())


def test_a_new_head_for_other_classes(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {f"module.{n}": v for n, v in Own(classes=7).state_dict().items()}}, path := tmp_path / "w.pt"
    )
    target = Own()
    before = target.head.weight.clone()
    assert load_pretrained(target, path).kept == ("head.weight", "head.bias")
    assert torch.equal(target.head.weight, before)


def deepminds(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of DeepMind's WideResNet, as DM-Improves-AT and RobustBench keep them."""
    rules = [
        (r"block(\d)\.layer\.(\d)\.bn(\d)", lambda m: f"layer.{int(m[1]) - 1}.block.{m[2]}.batchnorm_{int(m[3]) - 1}"),
        (r"block(\d)\.layer\.(\d)\.conv(\d)", lambda m: f"layer.{int(m[1]) - 1}.block.{m[2]}.conv_{int(m[3]) - 1}"),
        (r"block(\d)\.layer\.(\d)\.convShortcut", lambda m: f"layer.{int(m[1]) - 1}.block.{m[2]}.shortcut"),
        (r"^conv1", "init_conv"),
        (r"^bn1", "batchnorm"),
        (r"^fc", "logits"),
    ]
    return {
        functools.reduce(lambda name, rule: re.sub(*rule, name), rules, name): value for name, value in model.items()
    }


def test_deepminds_wide_resnet() -> None:
    """Its forward pass spelled out from its own names, at least as far as it differs from the public one."""
    held = {name: value.double() for name, value in deepminds(network(0, "wrn-10-2").state_dict()).items()}
    assert "layer.2.block.0.shortcut.weight" in held
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)

    def norm_silu(x: Tensor, name: str) -> Tensor:
        stats = (held[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.silu(F.batch_norm(x, *stats))

    x = F.conv2d((images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1), held["init_conv.weight"], padding=1)
    for stage in range(3):
        name, stride = f"layer.{stage}.block.0", 1 if stage == 0 else 2
        out = norm_silu(x, f"{name}.batchnorm_0")
        x = F.conv2d(out, held[f"{name}.shortcut.weight"], stride=stride)
        padded = F.pad(out, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
        out = norm_silu(F.conv2d(padded, held[f"{name}.conv_0.weight"], stride=stride), f"{name}.batchnorm_1")
        x = x + F.conv2d(out, held[f"{name}.conv_1.weight"], padding=1)
    pooled = F.avg_pool2d(norm_silu(x, "batchnorm"), 8).flatten(1)
    wanted = F.linear(pooled, held["logits.weight"], held["logits.bias"])

    model = build_model("dm-wrn-10-2", 10, HALF, QUARTER, activation="silu").double().eval()
    document = {
        "model_state_dict": {f"module.0.{n}": v for n, v in held.items()}
        | pair("module.0.mean", "module.0.std", (3, 1, 1))
    }
    loaded = load_weights(model, document)
    assert any("published ones have silu" in note for note in loaded.notes)
    torch.testing.assert_close(model(images), wanted, rtol=0, atol=1e-6)  # mean and std are fp32
    assert (model(images) - wanted).abs().max() < 1e-9 * wanted.abs().max() or model.mean.dtype == torch.float64
    # the same names, but another network: never without a word
    other = build_model("wrn-10-2", 10, HALF, QUARTER, activation="silu").double().eval()
    with pytest.raises(
        ValueError, match=r"pad images at the right and the bottom alone.*--model.name dm-wrn"
    ) as raised:
        load_weights(other, document)
    with pytest.raises(ValueError, match=r"pads on every side, by their names.*--model.name wrn"):
        load_weights(model, dict(network(0, "wrn-10-2").state_dict()))
    assert "\n" not in str(raised.value)


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, place: Path, function: Callable[..., Any]) -> None:
        self.call = function, (f"touch {place}" if function is os.system else f"open({str(place)!r}, 'w')",)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.call


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "weights.pt"
    torch.save({"state_dict": weights(), "log": Hostile(ran, eval)}, path)
    model = build_model("wrn-10-1", 10, HALF, QUARTER).eval()
    assert "left out, and not run: objects of builtins.eval" in load_weights(model, path).notes
    torch.save({"state_dict": weights(), "log": Hostile(ran, os.system)}, path)
    with pytest.raises(CheckpointError, match=r"cannot be read without running code from it.*posix\.system"):
        load_weights(model, path)
    assert not ran.exists()


def _without(*names: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights().items() if name not in names}


BAD = {
    "missing": (lambda: _without("fc.bias"), r"does not fit WideResNet: missing: fc\.bias$"),
    "unexpected": (lambda: weights() | {"head.weight": torch.ones(3, 3)}, "unexpected: head.weight$"),
    # a normalisation by statistics, or a purifier, is no wrapper that may be left out
    "a layer before": (
        lambda: behind("1.") | {"0.weight": torch.ones(3), "0.bias": torch.ones(3)},
        r"unexpected: 0\.weight, 0\.bias; --weights-key 1 takes 1\.\* alone",
    ),
    "shape": (
        lambda: weights() | {"fc.weight": torch.ones(9, 64)},
        r"wrong shape: fc.weight \[9, 64\], expected \[10, 64\]",
    ),
    "quantised": (lambda: weights() | {"fc.weight": torch.ones(10, 64, dtype=torch.int8)}, "fc.weight of torch.int8"),
    "sparse": (lambda: weights() | {"fc.weight": torch.ones(10, 64).to_sparse()}, r"fc.weight torch.sparse_coo"),
    "architecture": (lambda: {"layer1.0.conv1.weight": torch.ones(3), "x.y": torch.ones(2)}, "another architecture?"),
    "optimizer alone": (lambda: {"optimizer": {"state": {0: torch.ones(3)}}}, "holds no tensors by name"),
    "list": (lambda: [torch.ones(3)], "holds no tensors by name"),
    "std of 0": (lambda: weights() | {"mean": MEAN, "std": torch.zeros(3)}, r"mean: .*expected finite means, positive"),
    "two normalisations": (
        lambda: behind("1.") | pair("0.mean", "0.std") | {"1.mu": torch.ones(3), "1.sigma": STD},
        r"2 different normalisations, 0\.mean, 1\.mu,",
    ),
    "mean without its std": (lambda: weights() | {"mean": MEAN, "std": STD[:2]}, "unexpected: mean, std$"),
    "channels": (lambda: weights() | {"mean": torch.ones(5), "std": torch.ones(5)}, "expected 3 channels"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_does_not_fit_is_one_line_and_changes_nothing(bad: str, tmp_path: Path) -> None:
    make, message = BAD[bad]
    torch.save(make(), path := tmp_path / "bad.pt")
    model = build_model("wrn-10-1", 10, HALF, QUARTER).eval()
    before = logits(model)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_weights(model, path)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)
    assert torch.equal(logits(model), before)


def test_a_key_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"--weights-key ema: no such weights that fit; it has state_dict, ema_state_dict"
    ):
        load_weights(network(2), LAYOUTS["{ema_state_dict} beside {state_dict}"][0](), key="ema")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04" + bytes(100), r"cut off: .* its end \(104 bytes are here\); download or copy it again$"),
        (b"PK\x03\x04PK\x05\x06" + bytes(18), "damaged, or neither safetensors nor a file of torch.save"),
        (b"\x80\x02}q", "cannot be read|damaged"),
    ],
)
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    (path := tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_weights(network(2), path)
    assert "\n" not in str(raised.value)


def test_headers_of_any_length_are_told_from_a_pickle(tmp_path: Path) -> None:
    first = set()
    for filling in range(0, 256, 8):
        save_file({"weight": torch.ones(2)}, tmp_path / "w.safetensors", {"filling": "x" * filling})
        first.add((tmp_path / "w.safetensors").read_bytes()[0])
        assert torch.equal(read_weights(tmp_path / "w.safetensors").document["weight"], torch.ones(2))
    assert 0x80 in first


def test_torchscript_is_told_apart(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(path := tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match="a TorchScript program, not weights"):
        load_weights(network(2), path)


def test_a_header_says_what_stands_in_front_of_the_network_and_not_in_it(tmp_path: Path) -> None:
    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.3]).view(1, 1, 1, 1))
            self.register_buffer("std", torch.tensor([0.2]).view(1, 1, 1, 1))
            self.fc = nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(((x - self.mean) / self.std).flatten(1))

    trained = wrap(Normalising(), "own", 3, (0.0,), (1.0,), (8, 8))
    described = ModelDescription(
        name="own.py:make", num_classes=3, mean=(0.0,), std=(1.0,), width=None, activation="relu"
    )
    export_model(tmp_path / "own.safetensors", trained.state_dict(), described.to_metadata())
    fresh = wrap(Normalising(), "own", 3, (0.5,), (0.5,), (8, 8))
    load_weights(fresh, tmp_path / "own.safetensors")
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(fresh(x), trained(x))
