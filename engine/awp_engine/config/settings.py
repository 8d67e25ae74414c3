"""What a run is: frozen dataclasses, checked when they are made, and their strict JSON form.

The string under each field is the help that the command line shows. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

_DECIMAL = r"(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,2})?"
_AMOUNT = re.compile(rf"{_DECIMAL}|[0-9]{{1,20}}/[0-9]{{1,20}}")
_WIDE_RESNET = re.compile(r"wrn-([0-9]{1,4})-([0-9]{1,3})")
_TIMM_MODELS = ("resnet-50", "convnext-tiny", "convnext-tiny-convstem")
_PRESET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
# what fp32 holds, and room for a factor
_FLOAT_LIMIT = 1e30

# What a resumed run may change: none of it moves the weights, or the choice of the epoch; images may lie elsewhere, as
# long as their fingerprints are the same.
_FREE_ON_RESUME = frozenset(
    {
        "preset",
        "run_dir",
        "device",
        "data.root",
        "data.extra",
        "data.bad_list",
        "data.loader",
        "data.resident_share",
        "data.workers",
        "keep_checkpoints",
        "keep_every",
        "checkpoint_every",
        "checkpoint_steps",
        "distributed.strategy",
        "distributed.check_every",
        "distributed.timeout",
        "log_interval",
        "compare_without_awp",
        "compile",
        "cuda_graphs",
        "profile",
        "evaluation.batch_size",
        "evaluation.test_limit",
    }
)


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that names it as its flag."""


def flag(key: str) -> str:
    """The flag of a key: `attack.bn_mode` is set by `--attack.bn-mode`."""
    return "--" + key.replace("_", "-")


def parse_amount(text: str) -> Fraction:
    """The exact value of a fraction of whole numbers ("8/255") or a decimal ("0.2", "1e-3").

    Raises:
        ValueError: for anything else, a zero denominator and negative numbers included.
    """
    if not _AMOUNT.fullmatch(text):
        raise ValueError(f"not a fraction or number >= 0: {text!r}")
    _, _, denominator = text.partition("/")
    if denominator and int(denominator) == 0:
        raise ValueError(f"zero denominator: {text!r}")
    return Fraction(text)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def expectation(hint: Any) -> str:
    """A type in the words of an error message."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is types.UnionType:
        return " or ".join("none" if part is type(None) else expectation(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list of finite numbers"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path"}
    return words.get(hint, "a group of settings")


def show(value: object) -> str:
    """A value as messages quote it, long ones cut."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(key: str, expected: str, value: object) -> ConfigError:
    return ConfigError(f"{flag(key)}: expected {expected}, got {show(value)}")


def _coerce(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint` says, where that loses nothing (an int is a float, a list is a tuple)."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        accepted = isinstance(value, str) and value in parts
    elif origin is types.UnionType:
        if value is None:
            return None
        return _coerce(next(part for part in parts if part is not type(None)), value, key)
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(parts[0], item, key) for item in value)
        accepted = False
    elif hint is float:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _FLOAT_LIMIT:
            value = float(value)
        accepted = isinstance(value, float) and math.isfinite(value)
        if accepted and abs(value) > _FLOAT_LIMIT:
            raise _refuse(key, f"a number of at most {_FLOAT_LIMIT:g}", value)
    elif hint is int:
        accepted = isinstance(value, int) and not isinstance(value, bool)
        power = 63 if key == "seed" else 31
        if accepted and abs(value) >= 2**power:
            raise _refuse(key, f"a whole number below 2^{power}", value)
    elif hint is Path:
        if isinstance(value, str) and value:
            value = Path(value)
        accepted = isinstance(value, Path) and "\0" not in str(value)
    else:
        accepted = isinstance(value, hint)
    if not accepted:
        raise _refuse(key, expectation(hint), value)
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Checked:
    """Checks every field's type, then what the class itself demands."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _coerce(hint, getattr(self, name), self.section + name))
        self._check()

    def _check(self) -> None:
        pass

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise _refuse(self.section + name, expected, getattr(self, name))

    def _require_amount(self, name: str) -> Fraction:
        try:
            return parse_amount(getattr(self, name))
        except ValueError:
            expected = "a fraction or number >= 0 such as 8/255"
            raise _refuse(self.section + name, expected, getattr(self, name)) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(_Checked):
    """Images to train on."""

    section: ClassVar[str] = "data."

    name: Literal[
        "digits",
        "cifar10",
        "cifar100",
        "svhn",
        "folder",
        "tiny-imagenet",
        "imagenet",
        "webdataset",
        "shards",
        "huggingface",
    ] = "digits"
    """Data set: digits ships with scikit-learn; folder is ROOT/train/CLASS/*.jpg|png and ROOT/test/CLASS/*."""
    root: Path | None = None
    """Directory that holds the data set; digits needs none."""
    loader: Literal["auto", "resident", "dali", "torch"] = "auto"
    """Keep all images in the device's memory, or make batches ahead by DALI or torch; auto: as they fit."""
    resident_share: float = 0.25
    """Part of the device's free memory that auto fills with images."""
    workers: int | None = None
    """Threads (dali) or processes (torch; 0: none) that decode; none means one a core, shared by a machine's ranks."""
    bad_files: Literal["refuse", "skip"] = "refuse"
    """What to do about the files that `awp data scan` listed."""
    bad_list: Path | None = None
    """The scan's list, where it is not ROOT/awp-scan.jsonl."""
    image_size: int | None = None
    """Side in pixels that images of files are resized to; none takes them as they are, all of one size."""
    center_crop: float = 1.0
    """Part of the shorter side that the central square spans, which is resized for evaluation."""
    crop: Literal["pad", "resized"] = "pad"
    """Random crops of training: of the padded image (--data.pad), or of any size and place, resized."""
    crop_scale: float = 0.08
    """Smallest part of an image's area that a resized crop takes."""
    held_out_fraction: float = 0.1
    """Part of the training images kept aside to choose the epoch by, more than 0 and less than 1."""
    pad: int = 0
    """Random crops are taken after padding by this many pixels a side; 0 means no crops."""
    flip: bool = False
    """Flip training images left to right at random."""
    cutout: int = 0
    """Side in pixels of a square that is blanked at a random place of every training image; 0 means none."""
    cutmix: float = 0.0
    """Probability that a box of another training image is pasted over an image, and its label mixed in."""
    mixup: float = 0.0
    """Probability that an image, unless it has such a box, is blended with another one, and their labels."""
    mixup_alpha: float = 0.8
    """Both parameters of the Beta distribution that MixUp's shares come from."""
    rand_augment: float | None = None
    """Magnitude, 0 to 10, of RandAugment's two operations on every training image; none means no RandAugment."""
    erase: float = 0.0
    """Probability that a rectangle of a training image is filled with noise."""
    train_limit: int | None = None
    """Train on this many images, evenly spread over the classes; none means all that are not held out."""
    extra: Path | None = None
    """Further images, synthetic or pseudo-labelled: .npz with `image`, uint8 [N, H, W, C], and `label`, or shards."""
    extra_fraction: float = 0.5
    """Part of every batch that is taken from the extra images."""

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with others."""
        return self.cutmix + self.mixup > 0

    def _check(self) -> None:
        self._require(0 < self.held_out_fraction < 1, "held_out_fraction", "a number more than 0 and less than 1")
        self._require(0 < self.resident_share <= 1, "resident_share", "a number more than 0, at most 1")
        self._require(
            self.workers is None or 0 <= self.workers <= 1024, "workers", "a whole number, 0 to 1024, or none"
        )
        size = self.image_size
        self._require(size is None or 1 <= size <= 4096, "image_size", "a whole number of pixels, 1 to 4096, or none")
        self._require(0 < self.center_crop <= 1, "center_crop", "a number more than 0, at most 1")
        self._require(size is not None or self.center_crop == 1, "center_crop", "1 without --data.image-size")
        self._require(0 < self.crop_scale <= 1, "crop_scale", "a number more than 0, at most 1")
        resized = self.crop == "resized"
        self._require(not resized or size is not None, "crop", "pad, unless --data.image-size is given")
        self._require(
            not resized or self.loader != "resident", "crop", "pad, unless --data.loader is another than resident"
        )
        self._require(not resized or self.pad == 0, "crop", "pad, unless --data.pad is 0")
        self._require(resized or self.crop_scale == 0.08, "crop_scale", "0.08, unless --data.crop is resized")
        self._require(0 <= self.pad <= 1024, "pad", "a whole number of pixels, 0 to 1024")
        self._require(0 <= self.cutout <= 1024, "cutout", "a whole number of pixels, 0 to 1024")
        self._require(0 <= self.cutmix <= 1, "cutmix", "a probability, 0 to 1")
        self._require(0 <= self.mixup <= 1 - self.cutmix, "mixup", "a probability, 0 to 1 less --data.cutmix")
        self._require(self.mixup_alpha > 0, "mixup_alpha", "a number > 0")
        magnitude = self.rand_augment
        self._require(magnitude is None or 0 <= magnitude <= 10, "rand_augment", "a magnitude, 0 to 10, or none")
        self._require(0 <= self.erase <= 1, "erase", "a probability, 0 to 1")
        limit = self.train_limit
        self._require(limit is None or limit >= 1, "train_limit", "a whole number >= 1, or none")
        self._require(0 < self.extra_fraction < 1, "extra_fraction", "a number more than 0 and less than 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """The classifier."""

    section: ClassVar[str] = "model."

    name: str = "preact-resnet-digits"
    """Architecture: preact-resnet-18, preact-resnet-digits, wrn-DEPTH-WIDTH such as wrn-34-10; by timm, for larger
    images: resnet-50, convnext-tiny, convnext-tiny-convstem."""
    width: int | None = None
    """Channels of the first stage; none means the architecture's own number."""
    activation: Literal["relu", "silu"] = "relu"
    """Nonlinearity; ConvNeXt has its own, GELU."""
    pretrained: Path | None = None
    """Weights to start from: a .safetensors file of timm's names (the classifier of other classes is left out)."""

    def _check(self) -> None:
        wide = _WIDE_RESNET.fullmatch(self.name)
        depth, widen = (int(wide[1]), int(wide[2])) if wide else (0, 0)
        known = self.name in ("preact-resnet-18", "preact-resnet-digits", *_TIMM_MODELS) or (
            depth >= 10 and (depth - 4) % 6 == 0 and widen >= 1
        )
        expected = (
            f"preact-resnet-18, preact-resnet-digits, {', '.join(_TIMM_MODELS)} or wrn-DEPTH-WIDTH with DEPTH = 6n + "
            "4, such as wrn-34-10"
        )
        self._require(known, "name", expected)
        self._require(not wide or self.width is None, "width", f"none with {self.name}, whose width is in its name")
        own = self.activation == "relu" or not self.name.startswith("convnext")
        self._require(own, "activation", f"relu, the default, with --model.name {self.name}, whose own is GELU")
        self._require(
            self.width is None or 1 <= self.width <= 65536, "width", "a whole number from 1 to 65536, or none"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig(_Checked):
    """Projected gradient descent that makes the training images."""

    section: ClassVar[str] = "attack."

    kind: Literal["pgd", "apgd"] = "pgd"
    """Steps of one length, or Auto-PGD (Croce, Hein 2020), which chooses its own, for AT and MART."""
    norm: Literal["linf", "l2"] = "linf"
    """Norm of the ball around an image."""
    epsilon: str = "0.2"
    """Radius of the ball, on pixels in [0, 1], as an exact fraction or a decimal: 8/255, 0.2."""
    step_size: str = "0.05"
    """Length of one step of PGD, in epsilon's units and at most 2 epsilon, exact as well: 2/255, 0.05."""
    steps: int = 10
    """Number of steps, at least 1."""
    bn_mode: Literal["train", "eval"] = "train"
    """Mode of batch normalisation during the attack: by the batch's statistics, or by the running ones."""
    start: Literal["uniform", "normal", "none"] = "uniform"
    """First iterate: a uniform random point of the ball, the image plus 0.001 N(0, 1), or the image itself."""
    fast: Literal["none", "fgsm-rs", "n-fgsm", "free"] = "none"
    """Cheap attack in the first epochs: one step (Wong 2020; de Jorge 2022), or replayed batches (Shafahi 2019)."""
    fast_epochs: int | None = None
    """Epochs of the cheap attack before the full one; none means all."""
    replays: int = 8
    """Updates that --attack.fast free makes from one batch."""

    def _check(self) -> None:
        epsilon = self._require_amount("epsilon")
        self._require(self.norm != "linf" or epsilon <= 1, "epsilon", "at most 1 for linf, as pixels lie in [0, 1]")
        self._require_amount("step_size")
        self._require(self.steps >= 1, "steps", "a whole number >= 1 (--attack.epsilon 0 trains without an attack)")
        self._require(self.fast == "none" or self.norm == "linf", "fast", "none with --attack.norm l2")
        noise = "at most 1/2 with --attack.fast n-fgsm, whose noise reaches twice as far"
        self._require(self.fast != "n-fgsm" or epsilon <= Fraction(1, 2), "epsilon", noise)
        fast_epochs = self.fast_epochs
        self._require(fast_epochs is None or fast_epochs >= 1, "fast_epochs", "a whole number >= 1, or none")
        self._require(self.replays >= 1, "replays", "a whole number >= 1")

    @property
    def epsilon_value(self) -> float:
        """epsilon, on pixels in [0, 1]."""
        return float(parse_amount(self.epsilon))

    @property
    def step_size_value(self) -> float:
        """step_size, in the same units."""
        return float(parse_amount(self.step_size))

    def is_fast(self, epoch: int) -> bool:
        """Whether the cheap attack serves in `epoch`, counted from 1."""
        return self.fast != "none" and (self.fast_epochs is None or epoch <= self.fast_epochs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AwpConfig(_Checked):
    """Adversarial Weight Perturbation (Wu, Xia, Wang, NeurIPS 2020)."""

    section: ClassVar[str] = "awp."

    gamma: float = 0.002
    """Size of the weight perturbation relative to the weights' norm; 0 turns it off."""
    warmup: int = 0
    """Epochs trained before the perturbation begins."""
    every: int = 1
    """Perturb the weights in one step of this many."""
    scope: Literal["layer", "global", "filter"] = "layer"
    """What one norm is taken over: a tensor (as in the paper), the whole model, or a filter."""
    scale: Literal["relative", "absolute", "elementwise"] = "relative"
    """gamma * ||w|| over weights (AWP), or gamma over all parameters: itself (SAM's rho), or in each |w| (ASAM)."""
    ascent: Literal["exact", "shared"] = "exact"
    """Ascent gradient: of the training loss at the attacked images, or of the attack's last pass (cheaper)."""
    ascent_steps: int = 1
    """Ascent passes whose gradients are added up, each at the weights that the ones before it moved to (RWP: 10)."""
    c_min: float | None = None
    """Perturb the weights by the samples whose loss is below this alone (RWP: 1.7); none means by all."""
    public_code: bool = False
    """Do as the paper's public code does: which forwards move the BN statistics, and decay on w + gamma v."""

    def _check(self) -> None:
        self._require(0 <= self.gamma <= 1000, "gamma", "a number from 0 to 1000")
        self._require(self.warmup >= 0, "warmup", "a whole number of epochs >= 0")
        self._require(self.every >= 1, "every", "a whole number of steps >= 1")
        self._require(self.ascent_steps >= 1, "ascent_steps", "a whole number >= 1")
        self._require(self.c_min is None or self.c_min > 0, "c_min", "a number > 0, or none")
        whole = self.ascent == "exact" or (self.ascent_steps == 1 and self.c_min is None and not self.public_code)
        expected = "exact with --awp.ascent-steps > 1, --awp.c-min or --awp.public-code"
        self._require(whole, "ascent", expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(_Checked):
    """The optimizer and its learning rate."""

    section: ClassVar[str] = "optimizer."

    kind: Literal["sgd", "adamw"] = "sgd"
    """Stochastic gradient descent with momentum, or AdamW (Loshchilov, Hutter 2019) with epsilon 1e-8."""
    lr: float = 0.1
    """Learning rate at the start."""
    momentum: float = 0.9
    """Momentum, at least 0 and less than 1; AdamW's beta1."""
    beta2: float = 0.999
    """How much of the mean of squared gradients AdamW keeps in a step, at least 0 and less than 1."""
    weight_decay: float = 5e-4
    """L2 penalty added to the gradient; AdamW takes this times the learning rate off the weights themselves."""
    nesterov: bool = False
    """Nesterov's momentum."""
    schedule: Literal["piecewise", "cosine", "linear", "one-cycle", "constant"] = "piecewise"
    """How the learning rate changes: x0.1 at each milestone, down to 0 by half a cosine or a line, or up and down."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the epochs, rising, at which the piecewise schedule multiplies the rate by 0.1."""
    warmup: float = 0.0
    """Epochs in which the learning rate rises from 0 along a line; cosine and linear begin to fall after them."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; a longer one is scaled down to it; none means no clipping."""
    decay_all: bool = True
    """Apply weight decay to biases and normalisation weights as well, as the papers do."""

    def _check(self) -> None:
        self._require(self.lr > 0, "lr", "a finite number > 0")
        self._require(0 <= self.momentum < 1, "momentum", "a number >= 0 and < 1")
        self._require(0 <= self.beta2 < 1, "beta2", "a number >= 0 and < 1")
        self._require(self.weight_decay >= 0, "weight_decay", "a finite number >= 0")
        plain = self.kind == "sgd" or not self.nesterov
        self._require(plain, "nesterov", "false with --optimizer.kind adamw")
        self._require(not self.nesterov or self.momentum > 0, "nesterov", "a momentum > 0 to go with it")
        rising = all(a < b for a, b in zip((0.0, *self.milestones), (*self.milestones, 2.0), strict=True))
        self._require(
            rising and all(m <= 1 for m in self.milestones), "milestones", "rising fractions, more than 0, at most 1"
        )
        self._require(self.warmup >= 0, "warmup", "a finite number of epochs >= 0")
        own = self.warmup == 0 or self.schedule != "one-cycle"
        self._require(own, "warmup", "0 with --optimizer.schedule one-cycle, which has its own")
        self._require(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "a finite number > 0, or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageConfig(_Checked):
    """Average of the weights over training, which is then what is measured, selected and exported."""

    section: ClassVar[str] = "average."

    kind: Literal["none", "ema", "swa"] = "none"
    """Exponential moving average of every step's weights, or equal average of every epoch's."""
    decay: float = 0.995
    """Share of the average that an EMA keeps in a step; smaller in the first steps."""
    start: float = 0.5
    """Fraction of the epochs after which SWA begins to average."""
    bn_images: int = 2048
    """Training images, attacked, that the average's BN statistics are computed anew from."""

    def _check(self) -> None:
        self._require(0 <= self.decay < 1, "decay", "a number >= 0 and < 1")
        self._require(0 <= self.start < 1, "start", "a number >= 0 and < 1")
        self._require(self.bn_images >= 1, "bn_images", "a whole number >= 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig(_Checked):
    """What the parts of a step compute in; masters, batch normalisation and images are fp32 throughout."""

    section: ClassVar[str] = "precision."

    attack: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the attack; auto is fp16 on a GPU, and on a CPU bf16 where the processor multiplies it, else fp32."""
    ascent: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the gradient that the weights climb; auto is fp16 on a GPU (fp32 for SAM and ASAM), fp32 on a CPU."""
    descent: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the pass at the perturbed weights; auto is fp16 on a GPU (fp32 for SAM and ASAM), fp32 on a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(_Checked):
    """PGD on held-out images while training, and on the test split at the end, with the attack's norm and epsilon."""

    section: ClassVar[str] = "evaluation."

    steps: int = 20
    """Number of steps, at least 1."""
    step_size: str | None = None
    """Length of one step, at most 2 epsilon, as an exact fraction or a decimal; none means epsilon / 4."""
    batch_size: int = 512
    """Images in a batch."""
    evaluate_every: int = 1
    """Epochs between evaluations on the held-out images."""
    held_out_limit: int | None = None
    """Evaluate while training on at most this many held-out images; none means all."""
    test_limit: int | None = None
    """Measure the trained model on at most this many test images; none means all."""
    patience: int | None = None
    """Stop after this many evaluations without a better held-out PGD accuracy; none means never."""

    def _check(self) -> None:
        self._require(self.steps >= 1, "steps", "a whole number >= 1")
        if self.step_size is not None:
            self._require_amount("step_size")
        self._require(self.batch_size >= 1, "batch_size", "a whole number >= 1")
        self._require(self.evaluate_every >= 1, "evaluate_every", "a whole number of epochs >= 1")
        limit = self.held_out_limit
        self._require(limit is None or limit >= 1, "held_out_limit", "a whole number >= 1, or none")
        limit = self.test_limit
        self._require(limit is None or limit >= 1, "test_limit", "a whole number >= 1, or none")
        self._require(self.patience is None or self.patience >= 1, "patience", "a whole number >= 1, or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig(_Checked):
    """Several ranks; torchrun says how many."""

    section: ClassVar[str] = "distributed."

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Every rank holds the whole model (DDP), or a share of every layer (FSDP2), for models that do not fit."""
    ascent_sync: Literal["global", "local"] = "global"
    """Perturb the weights by the gradient of the whole batch, as the paper does, or every rank by that of its share."""
    sync_batch_norm: bool = False
    """Normalise by the statistics of the whole batch, not of each rank's share; not in the attack's passes."""
    check_every: int = 100
    """Steps between comparisons of the ranks' weights, which must be equal to the bit; also done at checkpoints."""
    timeout: float = 600.0
    """Seconds without any progress after which the rank that hangs is named and the run is stopped."""

    def _check(self) -> None:
        self._require(self.check_every >= 1, "check_every", "a whole number of steps >= 1")
        self._require(1 <= self.timeout <= 1e6, "timeout", "a number of seconds from 1 to 1e6")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_Checked):
    """Everything that a training run is told."""

    preset: str = "digits"
    """Preset that the other settings start from; giving it as the first argument says the same."""
    method: Literal["at", "trades", "mart", "rst"] = "at"
    """Loss: cross-entropy on the attacked images, TRADES, MART, or TRADES with pseudo-labelled images (RST)."""
    beta: float = 6.0
    """Weight of the divergence between attacked and clean images: beta of TRADES and RST, lambda of MART."""
    label_smoothing: float = 0.0
    """Part of a label that is spread over all classes, in AT's loss and in TRADES' clean one."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attack: AttackConfig = AttackConfig()
    awp: AwpConfig = AwpConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    average: AverageConfig = AverageConfig()
    precision: PrecisionConfig = PrecisionConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run_dir: Path | None = None
    """Directory for everything that the run leaves; a run found there goes on; none means runs/PRESET-seedSEED."""
    seed: int = 0
    """Seed of the weights, the order of the images, augmentation and noise."""
    epochs: int = 30
    """Passes over the training images."""
    global_batch_size: int = 128
    """Images in a batch, over all ranks together."""
    micro_batch_size: int | None = None
    """Most images that a rank computes at once; gradients of the pieces are added up. None means its whole share."""
    deterministic: bool = False
    """Use only operations that give the same bits every time; slower on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    compile: bool = False
    """Compile the model's passes by torch.compile, which takes minutes; results then differ by rounding."""
    cuda_graphs: bool = False
    """On a GPU, capture the whole step in a CUDA graph where the settings allow; the default once tried there."""
    profile: int = 0
    """Write a torch.profiler trace of this many steps, after the first five, into the run directory; 0 writes none."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, beside that of the best epoch."""
    keep_every: int | None = None
    """Keep every checkpoint whose epoch is a multiple of this as well; none means no others."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints within an epoch; none writes one only when the run is stopped."""
    log_interval: float = 10.0
    """Seconds between lines of progress where the output is not a terminal."""
    compare_without_awp: bool = False
    """Train a second time without the weight perturbation, and show both in the table."""

    def _check(self) -> None:
        self._require(
            _PRESET_NAME.fullmatch(self.preset) is not None, "preset", "a name of small letters, digits and '-'"
        )
        self._require(self.seed >= 0, "seed", "a whole number >= 0")
        self._require(self.epochs >= 1, "epochs", "a whole number >= 1")
        self._require(self.global_batch_size >= 1, "global_batch_size", "a whole number >= 1")
        for name in ("micro_batch_size", "keep_every", "checkpoint_steps"):
            value = getattr(self, name)
            self._require(value is None or value >= 1, name, "a whole number >= 1, or none")
        self._require(self.keep_checkpoints >= 1, "keep_checkpoints", "a whole number >= 1")
        self._require(self.checkpoint_every >= 1, "checkpoint_every", "a whole number of epochs >= 1")
        self._require(self.log_interval > 0, "log_interval", "a finite number of seconds > 0")
        self._require(self.profile >= 0, "profile", "a whole number of steps >= 0")
        self._require(self.beta >= 0, "beta", "a finite number >= 0")
        self._require(0 <= self.label_smoothing < 1, "label_smoothing", "a number >= 0 and < 1")
        self._check_combinations()
        useful = not self.compare_without_awp or self.awp.gamma > 0
        self._require(useful, "compare_without_awp", "--awp.gamma > 0, or there is nothing to compare with")

    def _check_combinations(self) -> None:
        """What one group of settings demands of another."""
        attack, fast_epochs = self.attack, self.attack.fast_epochs
        always_fast = attack.fast != "none" and (fast_epochs is None or fast_epochs >= self.epochs)
        if attack.kind == "pgd" and not always_fast:
            _require_step("attack.step_size", attack.step_size, attack.steps, attack.epsilon)
        if self.evaluation.step_size is not None:
            _require_step("evaluation.step_size", self.evaluation.step_size, self.evaluation.steps, attack.epsilon)
        hard_labels = "0 with --method mart, whose loss needs one right class"
        self._require(self.method != "mart" or self.label_smoothing == 0, "label_smoothing", hard_labels)
        for key in ("cutmix", "mixup"):
            if self.method == "mart" and getattr(self.data, key) > 0:
                raise _refuse(f"data.{key}", hard_labels, getattr(self.data, key))
        if self.awp.public_code and (self.method != "at" or self.attack.fast != "none" or self.data.mixes):
            expected = "false for anything but --method at with PGD and whole labels"
            raise _refuse("awp.public_code", expected, self.awp.public_code)
        size, part = self.global_batch_size, self.data.extra_fraction
        if self.data.extra is not None and not 0 < own_images(size, part) < size:
            expected = f"a part that gives a batch of {size} images of both kinds"
            raise _refuse("data.extra_fraction", expected, part)
        if self.awp.public_code and self.distributed.ascent_sync == "local":
            # its decay acts on w + v, of which there is one a rank then
            raise _refuse("distributed.ascent_sync", "global with --awp.public-code", "local")
        if self.attack.kind == "apgd":
            if self.method in ("trades", "rst"):
                expected = f"pgd with --method {self.method}: apgd climbs cross-entropy"
                raise _refuse("attack.kind", expected, "apgd")
            if self.awp.public_code:
                raise _refuse("awp.public_code", "false with --attack.kind apgd", True)
            if self.awp.gamma > 0 and self.awp.ascent == "shared":
                raise _refuse("awp.ascent", "exact with --attack.kind apgd, whose last pass has no gradient", "shared")
        if self.optimizer.kind == "adamw":
            for key, value in (("awp.public_code", self.awp.public_code), ("cuda_graphs", self.cuda_graphs)):
                if value:
                    raise _refuse(key, "false with --optimizer.kind adamw", value)
        if self.distributed.strategy == "fsdp":
            self._check_sharded()
        for part in ("ascent", "descent"):
            if self.awp.gamma > 0 and getattr(self.precision, part) == "bf16":
                # the perturbation is a few thousandths of a weight, and bfloat16 keeps 8 bits
                expected = "fp32 or fp16: bf16 would blur the weight perturbation by a quarter or more"
                raise _refuse(f"precision.{part}", expected, "bf16")
            if self.awp.gamma > 0 and self.awp.scale != "relative" and getattr(self.precision, part) == "fp16":
                expected = f"fp32 with --awp.scale {self.awp.scale}, whose norm is taken over all parameters"
                raise _refuse(f"precision.{part}", expected, "fp16")
        if self.awp.gamma > 0 and self.awp.ascent == "shared" and self.precision.attack != self.precision.ascent:
            expected = f"{self.precision.ascent} like --precision.ascent with --awp.ascent shared"
            raise _refuse("precision.attack", expected, self.precision.attack)
        if self.awp.ascent_steps > 1 and self.precision.ascent != self.precision.descent:
            expected = f"{self.precision.descent} like --precision.descent with --awp.ascent-steps > 1"
            raise _refuse("precision.ascent", expected, self.precision.ascent)
        fast = self.attack.fast
        if fast != "none" and self.method != "at":
            raise _refuse("attack.fast", f"none with --method {self.method}", fast)
        until = self.epochs if self.attack.fast_epochs is None else self.attack.fast_epochs
        if fast == "free" and self.awp.gamma > 0 and self.awp.warmup < until:
            expected = f"another, or --awp.warmup {until}: one pass for image and weights leaves none for the ascent"
            raise _refuse("attack.fast", expected, fast)

    def _check_sharded(self) -> None:
        """What needs a whole model on every rank."""
        needs = "--distributed.strategy fsdp, where no rank has a whole model"
        if self.distributed.ascent_sync == "local":
            raise _refuse("distributed.ascent_sync", f"global with {needs}", "local")
        for key, value, expected in (
            ("awp.ascent", self.awp.ascent, "exact"),
            ("awp.public_code", self.awp.public_code, False),
            ("compile", self.compile, False),
        ):
            if value != expected:
                raise _refuse(key, f"{str(expected).lower()} with {needs}", value)

    def require_files(self) -> None:
        """Make sure that every file the settings need is named.

        Raises:
            ConfigError: naming the flag that is missing.
        """
        if self.data.name != "digits" and self.data.root is None:
            raise ConfigError(f"--data.root: expected the directory that holds {self.data.name}, got nothing")
        if self.method == "rst" and self.data.extra is None:
            raise ConfigError(
                "--data.extra: expected an .npz, or a directory of shards, of pseudo-labelled or generated images for "
                "--method rst, got nothing; to train without such images use --method trades"
            )
        if self.data.extra is None and self.data.extra_fraction != 0.5:
            raise ConfigError(
                f"--data.extra: expected an .npz, or a directory of shards, for --data.extra-fraction "
                f"{self.data.extra_fraction:g}, got nothing"
            )

    @property
    def title(self) -> str:
        """What is trained, in the field's words: "TRADES-AWP"."""
        perturbed = {"relative": "AWP", "absolute": "SAM", "elementwise": "ASAM"}[self.awp.scale]
        return self.method.upper() + (f"-{perturbed}" if self.awp.gamma > 0 else "")

    @property
    def resolved_run_dir(self) -> Path:
        """The run directory, with the default filled in."""
        return self.run_dir or Path("runs") / f"{self.preset}-seed{self.seed}"

    @property
    def evaluation_step_size(self) -> float:
        """The evaluation's step, on pixels in [0, 1]: its own, or epsilon / 4."""
        given = self.evaluation.step_size
        return float(parse_amount(self.attack.epsilon) / 4 if given is None else parse_amount(given))


def _require_step(key: str, step_size: str, steps: int, epsilon: str) -> None:
    """Refuse steps that no attack in the ball can want: most of them were meant in 255ths, or were left from another.

    Raises:
        ConfigError: naming the flag.
    """
    step, radius = parse_amount(step_size), parse_amount(epsilon)
    if step > 2 * radius > 0:
        expected = f"at most twice --attack.epsilon {epsilon}, as a longer step leaves the ball from wherever it begins"
        raise _refuse(key, expected, step_size)
    if 10 * steps * step < radius:
        expected = f"steps that go farther, {steps} of them, than a tenth of --attack.epsilon {epsilon}"
        raise _refuse(key, expected, step_size)


def own_images(batch_size: int, extra_fraction: float) -> int:
    """How many images of a full batch are the data set's own, the others being extra ones."""
    return math.floor(batch_size * (1 - extra_fraction) + 0.5)


def learning_rate(config: OptimizerConfig, epochs: int, progress_in_epochs: float) -> float:
    """The learning rate `progress_in_epochs` (99.5: halfway through the 100th) into a run of `epochs`.

    The piecewise schedule changes at the start of an epoch only, as the paper's does (x0.1 at 100 and 150 of 200);
    one-cycle rises from 0 to lr in the first 40% and falls to 0 in the rest (Wong, Rice, Kolter, ICLR 2020). During
    warm-up the rate rises from 0 along a line; cosine and linear fall to 0 over the epochs after it.
    """
    done = min(progress_in_epochs / epochs, 1.0)
    fallen = max(progress_in_epochs - config.warmup, 0.0) / max(epochs - config.warmup, 1e-9)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0)))
    elif config.schedule == "linear":
        factor = 1 - min(fallen, 1.0)
    elif config.schedule == "one-cycle":
        factor = done / 0.4 if done < 0.4 else (1 - done) / 0.6
    else:
        # 1e-9: a milestone such as 0.7 of 30 must not land an epoch late for a rounding error.
        passed = sum(math.floor(progress_in_epochs) >= milestone * epochs - 1e-9 for milestone in config.milestones)
        factor = 0.1**passed
    if progress_in_epochs < config.warmup:
        factor *= progress_in_epochs / config.warmup
    return config.lr * factor


def flags(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every flag with its type."""
    found: dict[str, Any] = {}
    for name, hint in _hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= flags(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found[flag(prefix + name)] = hint
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def to_json(config: Config) -> str:
    """`config` as indented JSON, every key written out."""
    return json.dumps(_plain(config), indent=2, allow_nan=False) + "\n"


def _build(cls: type, values: object, prefix: str, source: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: {prefix[:-1] or 'top level'}: expected a group of settings, got {show(values)}")
    hints = _hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(f"{source}: {prefix}{show(key)[1:-1]}: unknown key; expected one of {', '.join(hints)}")
    for key in hints:
        if key not in values:
            raise ConfigError(f"{source}: {prefix}{key}: missing key; add it, or write the file again")
    nested = {
        key: _build(typing.cast(type, hint), values[key], f"{prefix}{key}.", source)
        if dataclasses.is_dataclass(hint)
        else values[key]
        for key, hint in hints.items()
    }
    try:
        return cls(**nested)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(source) else f"{source}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def from_json(text: str, source: str = "config.json") -> Config:
    """Reads what `to_json` wrote; `source` is the file's name for messages.

    Raises:
        ConfigError: naming the file and the key, for unknown and missing keys, wrong types and refused values.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not JSON as this program writes it: {' '.join(str(error).split())}") from None
    return _build(Config, values, "", source)


def load_config(path: Path) -> Config:
    """Reads a `config.json`.

    Raises:
        ConfigError: naming the file, if it cannot be read or does not hold a configuration.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not JSON as this program writes it: not UTF-8 text") from None


def _trajectory(config: Config) -> dict[str, Any]:
    """Dotted key -> value for all that determines the run's weights and its choice of epoch."""
    values: dict[str, Any] = {}
    for key, value in _plain(config).items():
        values |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    values["attack.epsilon"] = str(parse_amount(config.attack.epsilon))
    values["attack.step_size"] = str(parse_amount(config.attack.step_size))
    given = config.evaluation.step_size
    values["evaluation.step_size"] = str(
        parse_amount(config.attack.epsilon) / 4 if given is None else parse_amount(given)
    )
    return {key: value for key, value in values.items() if key not in _FREE_ON_RESUME}


def config_hash(config: Config) -> str:
    """SHA-256 (hex) over all that determines the run's weights and its choice of epoch.

    Left out are the run directory, the device, checkpoint and log settings, and the places of images, which have
    fingerprints; "8/255" and "16/510" count as equal.
    """
    canonical = json.dumps(_trajectory(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def require_same_run(saved: Config, given: Config, run_dir: Path) -> None:
    """Refuses to go on with a run under other settings.

    Raises:
        ConfigError: naming the first key that differs, with both values.
    """
    before, now = _trajectory(saved), _trajectory(given)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"--run-dir: {run_dir} belongs to another configuration: {flag(key)} is {show(before.get(key))} there"
                f" and {show(now.get(key))} here; give the same value or another --run-dir"
            )
