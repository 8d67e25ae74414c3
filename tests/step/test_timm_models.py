"""ResNets and ConvNeXt around timm's networks: the same function, and all that the engine asks of a model."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file
from samples import images
from steps import build_step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional

from awp_engine.checkpoint import CheckpointError, export_model
from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, ModelConfig, PrecisionConfig
from awp_engine.distributed.sharding import gather, shard
from awp_engine.models import (
    NormalizedImages,
    TimmConvNeXt,
    TimmResNet,
    WrappedClassifier,
    blocks,
    build_model,
    load_pretrained,
    load_public_state_dict,
    timm_names,
)
from awp_engine.models.batch_norm import batch_norm_mode, layers, synchronize
from awp_engine.models.import_timm import import_timm, import_torchvision
from awp_engine.models.normalisation import published_normalisation
from awp_engine.models.trained import MODEL_FILE, ModelDescription, load_model
from awp_engine.observe.throughput import forward_flops
from awp_engine.step.precision import working_copy
from awp_kernels import AdversarialWeightPerturbation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ["resnet", "resnet-silu", "resnet-basic", "convnext", "convstem"]
X, Y = images((4, 3, 32, 40)), torch.tensor([3, 0, 6, 2])


def small(kind: str, dtype: torch.dtype = torch.float64, classes: int = 7) -> nn.Module:
    """One or two blocks a stage, with no weight at the value it starts from."""
    torch.manual_seed(0)
    if kind.startswith("resnet"):
        activation = "silu" if kind == "resnet-silu" else "relu"
        kinds = {"activation": activation, "bottleneck": kind != "resnet-basic"}
        model = TimmResNet(classes, MEAN, STD, depths=(1, 2, 1, 1), width=8, **kinds)
    else:
        model = TimmConvNeXt(classes, MEAN, STD, depths=(1, 2, 1, 1), width=8, conv_stem=kind == "convstem")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def plain(kind: str) -> nn.Module:
    """What timm itself builds."""
    models = import_timm().models
    if kind.startswith("resnet"):
        act = nn.SiLU if kind == "resnet-silu" else nn.ReLU
        block = models.resnet.BasicBlock if kind == "resnet-basic" else models.resnet.Bottleneck
        return models.resnet.ResNet(block, (1, 2, 1, 1), 7, channels=(8, 16, 32, 64), act_layer=act)
    model = models.convnext.ConvNeXt(num_classes=7, depths=(1, 2, 1, 1), dims=(8, 16, 32, 64))
    if kind == "convstem":
        norm = models.convnext.LayerNorm2d
        layers = [nn.Conv2d(3, 4, 3, 2, 1), norm(4), nn.GELU(), nn.Conv2d(4, 8, 3, 2, 1), norm(8), nn.GELU()]
        model.stem = nn.Sequential()
        model.stem.stem = nn.Sequential(*layers)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_computes_what_timm_computes_by_its_own_names(kind):
    model = small(kind).train()
    theirs = plain(kind).double().train()
    theirs.load_state_dict({n.removeprefix("network."): v for n, v in model.state_dict().items()}, strict=True)
    mean, std = (torch.tensor(v, dtype=torch.float32).double().view(1, 3, 1, 1) for v in (MEAN, STD))
    x = X.double()
    for mode in (True, False):
        ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours = model.train(mode)(ours_x)
        expected = theirs.train(mode)((theirs_x - mean) / std)
        torch.testing.assert_close(ours, expected)
        for logits in (ours, expected):
            functional.cross_entropy(logits, Y).backward()
        torch.testing.assert_close(ours_x.grad, theirs_x.grad)
    for (name, a), (_, b) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stem_with_room_for_more_channels_computes_the_same(kind):
    model = small(kind).eval()
    filled = copy.deepcopy(model)
    filled.narrow_input_(torch.float64)
    found = []
    for module in (model, filled):
        x = X.double().requires_grad_()
        logits = module(x)
        found.append([logits, *torch.autograd.grad(functional.cross_entropy(logits, Y), [x, *module.parameters()])])
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(filled(NormalizedImages(filled.normalize(X.double()))), filled(X.double()))


@pytest.mark.parametrize("kind", KINDS)
def test_serves_the_rest_of_the_engine(kind):
    model = small(kind, torch.float32).eval()
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(
            model.to(memory_format=torch.channels_last)(X.contiguous(memory_format=torch.channels_last)), expected
        )
        # the working copy's biases and norms stay fp32, and so do the logits
        copied = working_copy(model, torch.bfloat16)
        rounded = copied(X)
    assert rounded.dtype == torch.float32
    assert {p.dtype for n, p in copied.named_parameters() if p.ndim > 1} == {torch.bfloat16}
    assert {p.dtype for n, p in copied.named_parameters() if p.ndim == 1} == {torch.float32}
    assert (rounded - expected).norm() < 0.1 * expected.norm()
    functional.cross_entropy(copied(X), Y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in copied.parameters())

    # twice the multiplications of all convolutions and linear layers, counted by their outputs
    flops = []
    hooks = [
        m.register_forward_hook(
            lambda module, _, out: flops.append(2 * out.numel() * module.weight[0].numel())  # per output, its inputs
        )
        for m in model.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    total = forward_flops(model, (3, 64, 64))
    for hook in hooks:
        hook.remove()
    assert total == sum(flops) > 0

    moved = AdversarialWeightPerturbation(model, 0.01).parameters
    weights = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(moved) == {f"{name}.weight" for name in weights}
    assert len(blocks(model)) == 5
    with pytest.raises(ConfigError, match="images of 16x64 pixels; this one takes 32x32 and more"):
        model(torch.rand(1, 3, 16, 64))


def test_batch_norm_modes():
    model = small("resnet").train()
    found = layers(model)
    assert len(found) == 1 + 5 * 3 + 4
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with batch_norm_mode(model, "train", update_statistics=False):
        model(X.double())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(X.double())
    moved = {
        name.rpartition(".")[2] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert moved == {"running_mean", "running_var", "num_batches_tracked"}
    # one rank: nothing changes, and nothing is refused
    copied = copy.deepcopy(model)
    synchronize(copied)
    torch.testing.assert_close(copied(X.double()), model(X.double()))


@pytest.mark.parametrize("name", timm_names)
def test_a_description_rebuilds_what_was_exported(name, tmp_path):
    description = ModelDescription(name=name, num_classes=12, mean=MEAN, std=STD, width=8, activation="relu")
    model = description.build().eval()
    export_model(tmp_path / MODEL_FILE, model.state_dict(), description.to_metadata())
    loaded = load_model(tmp_path)
    assert loaded(X).shape == (4, 12)
    assert torch.equal(loaded(X), model(X))


def test_sizes_are_the_published_ones():
    with torch.device("meta"):
        counts = [sum(p.numel() for p in build_model(n, 1000, MEAN, STD).parameters()) for n in timm_names]
    # timm's own counts of the first three; the stem's two convolutions and norms in place of one
    assert counts[:3] == [11_689_512, 25_557_032, 28_589_128]
    patch, stem = 96 * 48 + 96 + 192, 48 * 27 + 48 + 96 + 96 * 48 * 9 + 96 + 192
    assert counts[3] == counts[2] - patch + stem


def step_config(kind: str, **changes) -> Config:
    return Config(
        attack=AttackConfig(epsilon="4/255", step_size="2/255", steps=1, bn_mode="eval"),
        awp=AwpConfig(gamma=0.005),
        precision=PrecisionConfig(attack="bf16", ascent="fp32", descent="fp32"),
        **changes,
    )


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_a_step_attacks_in_16_bits_and_trains_every_weight(kind):
    model = small(kind, torch.float32).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = build_step(step_config(kind), model)
    result = step(X, Y, sample_ids=torch.arange(4), seed=0)
    assert result.loss.isfinite()
    assert not result.skipped
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


# -- pretrained weights


def bare(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n.removeprefix("network."): v.clone() for n, v in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "base_model.", "module.base_model."])
def test_pretrained_weights_load_by_timms_names(prefix, tmp_path):
    source, target = small("convstem", torch.float32), small("convstem", torch.float32)
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(0.5)
    save_file({prefix + n: v for n, v in bare(source).items()}, tmp_path / "weights.safetensors")
    assert load_pretrained(target, tmp_path / "weights.safetensors").kept == ()
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in target.state_dict().items())


@pytest.mark.parametrize("kind", ["resnet", "convnext"])
def test_the_classifier_of_other_classes_is_left_out_and_nothing_else(kind, tmp_path):
    source, target = small(kind, torch.float32, classes=20), small(kind, torch.float32)
    fresh = {name: target.state_dict()[name].clone() for name in target.classifier_names}
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(0.5)
    path = tmp_path / "weights.safetensors"
    save_file(bare(source), path)
    assert load_pretrained(target, path).kept == target.classifier_names
    for name, value in target.state_dict().items():
        assert torch.equal(value, fresh[name] if name in fresh else source.state_dict()[name]), name

    weights = bare(source)
    weights.pop("fc.bias" if kind == "resnet" else "head.fc.bias")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    for broken, message in (
        (weights, "missing"),
        (bare(source) | {"other.weight": torch.ones(2)}, "unexpected: other.weight"),
        ({n: v[:1] if n.endswith("norm.weight") or n == "bn1.weight" else v for n, v in bare(source).items()}, "shape"),
    ):
        save_file({n: v.contiguous() for n, v in broken.items()}, path)
        with pytest.raises(CheckpointError, match=message) as raised:
            load_pretrained(target, path)
        assert "\n" not in str(raised.value)
        assert str(path) in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_state_dicts_load_with_and_without_the_prefix():
    source, target = small("resnet"), small("resnet")
    load_public_state_dict(target, {"state_dict": bare(source)})
    load_public_state_dict(target, source.state_dict())


# -- what is refused


@pytest.mark.parametrize("missing", ["timm", "torchvision"])
def test_a_missing_package_is_named_with_the_command(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=f"package {missing}, which is not installed: pip install timm ") as raised:
        build_model("resnet-50", 10, MEAN, STD)
    # without it pip would take the newest torchvision, and the torch that this one was built for
    assert str(raised.value).endswith(f"torch=={torch.__version__.partition('+')[0]}")
    assert "\n" not in str(raised.value)


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match=r"--model\.activation: expected relu.*GELU"):
        ModelConfig(name="convnext-tiny", activation="silu")
    assert ModelConfig(name="resnet-50", activation="silu").pretrained is None
    assert ModelConfig(name="convnext-tiny-convstem", pretrained="a/b").pretrained == Path("a/b")
    with pytest.raises(ValueError, match="width: 7; expected a multiple of 2"):
        build_model("convnext-tiny", 10, MEAN, STD, width=7)
    with pytest.raises(ValueError, match="activation: 'silu' given for convnext-tiny"):
        build_model("convnext-tiny", 10, MEAN, STD, activation="silu")


# -- shards


def _sharded(rank: int, world: int) -> list[float]:
    return [_difference(rank, world, kind) for kind in ("resnet", "convnext")]


def _difference(rank: int, world: int, kind: str) -> float:
    """A training pass, a perturbation and a second pass on shards, against one process; the largest difference."""
    whole, model = small(kind), small(kind)
    shard(model, init_device_mesh("cpu", (world,)))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    rows = slice(2 * rank, 2 * rank + 2)
    modes = {"mode": "eval", "update_statistics": False}
    for net, x, y in ((whole, X, Y), (model, X[rows], Y[rows])):
        x = x.double()
        awp = AdversarialWeightPerturbation(net, 0.01)
        with batch_norm_mode(net, **modes):
            functional.cross_entropy(net(x), y).backward()
            with awp.perturbed():
                functional.cross_entropy(net(x), y).backward()
    gradients = gather({n: p.grad for n, p in model.named_parameters()}, every_rank=True)
    worst = max(float((gradients[n] - p.grad).abs().max()) for n, p in whole.named_parameters())

    lowered = small(kind, torch.float32)
    shard(lowered, init_device_mesh("cpu", (world,)), param_dtype=torch.bfloat16)
    logits = lowered(X[rows])
    assert logits.dtype == torch.float32
    functional.cross_entropy(logits, Y[rows]).backward()
    assert all(p.grad is not None for p in lowered.parameters())
    return worst


def test_shards_compute_what_one_process_computes():
    assert max(max(found) for found in run_ranks(_sharded, 2)) < 1e-10


def test_any_model_of_timms_is_known_by_its_name(tmp_path: Path) -> None:
    model = build_model("timm:test_vit", 7, MEAN, STD, image_size=(32, 48))
    assert isinstance(model, WrappedClassifier)
    assert model.notes == ("made for images of 32x48 pixels",)
    assert model.classifier_names == ("network.head.weight", "network.head.bias")
    plain = import_timm().create_model("test_vit", num_classes=7, img_size=(32, 48)).eval()
    plain.load_state_dict({n.removeprefix("network."): v for n, v in model.state_dict().items()})
    x = images((2, 3, 32, 48))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(model.eval()(x), plain((x - mean) / std))
    # a name of timm's is no code of anybody's
    description = ModelDescription(
        name="timm:test_vit", num_classes=7, mean=MEAN, std=STD, width=None, activation="relu", image_size=(32, 48)
    )
    export_model(tmp_path / MODEL_FILE, model.state_dict(), description.to_metadata())
    assert torch.equal(load_model(tmp_path)(x), model(x))
    with pytest.raises(ConfigError, match="was made for images of 32x48 pixels, got 32x32"):
        load_model(tmp_path)(x[:, :, :, :32])
    # timm's own weights of another number of classes
    tensors = {n: v for n, v in plain.state_dict().items() if not n.startswith("head.")}
    tensors |= {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}
    save_file(tensors, tmp_path / "timm.safetensors")
    fresh = build_model("timm:test_vit", 7, MEAN, STD, image_size=(32, 48))
    assert load_pretrained(fresh, tmp_path / "timm.safetensors").kept == ("network.head.weight", "network.head.bias")
    assert torch.equal(fresh.network.pos_embed, plain.pos_embed)
    assert published_normalisation(fresh) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ConfigError, match=r"no model 'test_vitt'; did you mean timm:test_vit"):
        build_model("timm:test_vitt", 7, MEAN, STD)


def test_any_classifier_of_torchvisions_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("torchvision:mobilenet_v3_small", 7, MEAN, STD)
    assert model.classifier_names == ("network.classifier.3.weight", "network.classifier.3.bias")
    assert build_model("torchvision:vit_b_32", 2, MEAN, STD, image_size=(64, 64)).network.image_size == 64
    with pytest.raises(ConfigError, match=r"no classifier 'resnet19'; did you mean torchvision:resnet18"):
        build_model("torchvision:resnet19", 7, MEAN, STD)
    with pytest.raises(ConfigError, match="takes images of 3 channels, the data have 1"):
        build_model("torchvision:resnet18", 7, MEAN[:1], STD[:1])
    # as a download leaves them
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    models = import_torchvision().models
    published = models.get_model("mobilenet_v3_small", num_classes=1000).state_dict()
    file = tmp_path / "hub" / "checkpoints" / Path(models.MobileNet_V3_Small_Weights.DEFAULT.url).name
    file.parent.mkdir(parents=True)
    torch.save(published, file)
    started = build_model("torchvision:mobilenet_v3_small", 7, MEAN, STD, published=True)
    assert started.notes == ("its layer classifier.3, of 1000 classes, is replaced by a new one of 7",)
    assert torch.equal(started.network.features[0][0].weight, published["features.0.0.weight"])
    assert published_normalisation(started) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
