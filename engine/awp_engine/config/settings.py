"""What a run is: frozen dataclasses, checked when they are made.

The string under each field is the help that the command line shows. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from awp_engine.config.data_sets import DATA_SETS, OWN, is_own, where_to_get
from awp_engine.config.model_names import BUILT_IN, EXPECTED, Source, in_file, is_code, optimizer_source, source_of
from awp_engine.config.rules import TAUGHT, require_combinations
from awp_engine.config.schema import (
    Amount,
    Checked,
    ConfigError,
    Count,
    Fading,
    OptionalAmount,
    OptionalCount,
    Part,
    Probability,
    Range,
    Share,
    Switch,
    did_you_mean,
    flag,
    nearest,
    parse_amount,
    parse_arguments,
)

_PRESET_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_METHODS = (
    *("at", "trades", "mart", "rst", "ikl", "gkl", "adr", "adr-trades", "rebat", "dajat", "liet", "e-at", "msd"),
    *("score", "score-trades", *TAUGHT, "lbgat", "oaat"),
)
_Pixels = Annotated[int, Range("a whole number of pixels, 0 to 1024", ge=0, le=1024)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Checked, section="data."):
    """Images to train on."""

    name: str = "digits"
    """Data set: digits (ships with scikit-learn), cifar10, cifar100, svhn, mnist, fashion-mnist, tiny-imagenet,
    imagenet, folder (ROOT/train/CLASS/*.jpg|png|... and ROOT/test/CLASS/*), webdataset, shards, huggingface; or Python
    of your own: package.module:factory or file.py:factory."""
    root: Path | None = None
    """Directory that holds the data set; digits needs none, a factory only if it asks for one."""
    loader: Literal["auto", "resident", "dali", "torch"] = "auto"
    """Keep all images in the device's memory, or make batches ahead by DALI or torch; auto: as they fit."""
    resident_share: Share = 0.25
    """Part of the device's free memory that auto fills with images."""
    workers: Annotated[int | None, Range("a whole number, 0 to 1024, or none", ge=0, le=1024)] = None
    """Threads (dali) or processes (torch; 0: none) that decode; none means one a core, shared by a machine's ranks."""
    bad_files: Literal["refuse", "skip"] = "refuse"
    """What to do about the files that `awp data scan` listed."""
    bad_list: Path | None = None
    """The scan's list, where it is not ROOT/awp-scan.jsonl."""
    image_size: Annotated[int | None, Range("a whole number of pixels, 1 to 4096, or none", ge=1, le=4096)] = None
    """Side in pixels that images of files are resized to; none takes them as they are, all of one size."""
    center_crop: Share = 1.0
    """Part of the shorter side that the central square spans, which is resized for evaluation."""
    crop: Literal["pad", "resized"] = "pad"
    """Random crops of training: of the padded image (--data.pad), or of any size and place, resized."""
    crop_scale: Share = 0.08
    """Smallest part of an image's area that a resized crop takes."""
    held_out_fraction: Part = 0.1
    """Part of the training images kept aside to choose the epoch by."""
    pad: _Pixels = 0
    """Random crops are taken after padding by this many pixels a side; 0 means no crops."""
    flip: bool = False
    """Flip training images left to right at random."""
    cutout: _Pixels = 0
    """Side in pixels of a square that is blanked at a random place of every training image; 0 means none."""
    cutmix: Probability = 0.0
    """Probability that a box of another training image is pasted over an image, and its label mixed in."""
    mixup: float = 0.0
    """Probability that an image, unless it has such a box, is blended with another one, and their labels."""
    mixup_alpha: Annotated[float, Range("a number > 0", gt=0)] = 0.8
    """Both parameters of the Beta distribution that MixUp's shares come from."""
    rand_augment: Annotated[float | None, Range("a magnitude, 0 to 10, or none", ge=0, le=10)] = None
    """Magnitude of RandAugment's two operations on every training image; none means no RandAugment."""
    policy: Literal["none", "idbh-weak", "idbh-strong", "idbh-svhn", "autoaugment-cifar10", "autoaugment-svhn"] = "none"
    """Augmentation that is named as a whole: IDBH (CropShift, ColorShape, erasing), or a policy of AutoAugment; with
    --method dajat that of all views but the first."""
    policy_first: bool = False
    """Do AutoAugment before crops and mirroring, not after them."""
    policy_part: Share = 1.0
    """Part of the images, drawn one by one in every epoch, that AutoAugment changes."""
    rotate: Annotated[float, Range("degrees, 0 to 180", ge=0, le=180)] = 0.0
    """Turn every training image by up to as many degrees, to either side; 0 means no rotation."""
    erase: Probability = 0.0
    """Probability that a rectangle of a training image is filled with noise."""
    train_limit: OptionalCount = None
    """Train on this many images, evenly spread over the classes; none means all that are not held out."""
    class_weights: str = "none"
    """Weights of the classes in the loss: none, balanced (rare classes count more) or FILE.json, {"CLASS": WEIGHT}."""
    extra: Path | None = None
    """Further images, synthetic or pseudo-labelled: .npz with `image`, uint8 [N, H, W, C], and `label`, or shards."""
    extra_fraction: Share = 0.5
    """Part of every batch that is taken from the extra images."""
    extra_replacement: bool = False
    """Draw every extra image anew from all of them, not each once before any comes again."""
    extra_alone: Annotated[int, Range("a whole number of epochs >= 0", ge=0)] = 0
    """Epochs at the beginning that have extra images alone; with --data.epoch-images."""
    epoch_images: OptionalCount = None
    """Make an epoch of this many images, own and extra ones together, in full batches; a short end of the own images is
    filled up with extra ones. None: an epoch is one pass over the own images."""

    def _check(self) -> None:
        known = self.name in DATA_SETS or is_own(self.name)
        hint = "" if known else in_file(self.name) or did_you_mean(self.name, DATA_SETS, "")
        self.require(known, "name", f"one of {', '.join(DATA_SETS)}, or {OWN}", hint)
        weights = self.class_weights in ("none", "balanced") or self.class_weights.endswith(".json")
        self.require(weights, "class_weights", "none, balanced or the path of a .json file")
        sized, resized = self.image_size is not None, self.crop == "resized"
        self.require(sized or self.center_crop == 1, "center_crop", "1 without --data.image-size")
        self.require(not resized or sized, "crop", "pad, unless --data.image-size is given")
        self.require(
            not resized or self.loader != "resident", "crop", "pad, unless --data.loader is another than resident"
        )
        self.require(not resized or self.pad == 0, "crop", "pad, unless --data.pad is 0")
        self.require(resized or self.crop_scale == 0.08, "crop_scale", "0.08, unless --data.crop is resized")
        self._check_policy()
        whole = self.epoch_images is not None
        self.require(whole or self.extra_alone == 0, "extra_alone", "0 without --data.epoch-images")
        self.require(whole or self.extra_fraction < 1, "extra_fraction", "less than 1 without --data.epoch-images")
        self.require(0 <= self.mixup <= 1 - self.cutmix, "mixup", "a probability, 0 to 1 less --data.cutmix")

    def _check_policy(self) -> None:
        reason = f"with --data.policy {self.policy}"
        if self.policy != "none":
            self.require(self.rand_augment is None, "rand_augment", f"none {reason}: one policy at a time")
        if self.policy.startswith("idbh"):
            for name, value in (("pad", 0), ("crop", "pad"), ("cutout", 0), ("erase", 0)):
                self.require_value(name, value, f"{reason}, which crops and erases by itself")
            self.require_value("flip", True, f"{reason}, which begins by mirroring")
        if self.policy != "none" or self.rand_augment is not None:
            why = reason if self.policy != "none" else "with --data.rand-augment"
            self.require_value("rotate", 0, f"{why}, which rotates by itself")
        useful = self.policy.startswith("autoaugment") and (self.pad > 0 or self.flip)
        expected = "false, unless --data.policy is one of AutoAugment, and --data.pad or --data.flip is given"
        self.require(useful or not self.policy_first, "policy_first", expected)
        useful = self.policy.startswith("autoaugment")
        like = "1, unless --data.policy is one of AutoAugment"
        self.require(useful or self.policy_part == 1, "policy_part", like)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked, section="model."):
    """The classifier."""

    name: str = "preact-resnet-digits"
    """Architecture: preact-resnet-18, preact-resnet-digits, wrn-DEPTH-WIDTH such as wrn-34-10, DeepMind's
    dm-wrn-DEPTH-WIDTH; for larger images resnet-18, resnet-50, convnext-tiny, convnext-tiny-convstem; timm:NAME;
    torchvision:NAME; or a function of your own that makes the model: file.py:factory or package.module:factory."""
    width: Annotated[int | None, Range("a whole number from 1 to 65536, or none", ge=1, le=65536)] = None
    """Channels of the first stage of a built-in model; none means the architecture's own number."""
    activation: Literal["relu", "silu"] = "relu"
    """Nonlinearity of a built-in model; ConvNeXt has its own, GELU."""
    pretrained: Path | None = None
    """Weights to start from: .safetensors, .pt, .pth or .bin of any usual layout (the last layer is new for other
    classes); or timm, torchvision: the published weights of a model of theirs."""
    normalize: Literal["auto", "data", "model", "none"] = "auto"
    """Mean and deviation that images are normalised by: the data set's, the model's own or none; auto: the given ones,
    else those of the weights to start from, else none where the model normalises by itself, else the data set's."""
    mean: tuple[float, ...] = ()
    """Mean of every channel, on pixels in [0, 1]; nothing means as --model.normalize says."""
    std: tuple[float, ...] = ()
    """Deviation of every channel, likewise."""
    bn_momentum: Annotated[float | None, Range("a number > 0, at most 1, or none", gt=0, le=1)] = None
    """Part of a batch's statistics in the running ones of batch normalisation. Where it is given, the first step of the
    run takes those of its batch whole. None: the model's own, 0.1 in built-in ones."""
    checkpoint_activations: bool = False
    """Keep the inputs of the model's blocks alone, and compute what is inside anew in backward passes: the same
    numbers with less memory, in up to half more time."""

    @property
    def source(self) -> Source:
        """What builds the model."""
        found = source_of(self.name)
        assert found is not None  # checked
        return found

    @property
    def published(self) -> bool:
        """Whether training starts from the weights that timm or torchvision publish."""
        return str(self.pretrained) in ("timm", "torchvision")

    def _check(self) -> None:
        source = source_of(self.name)
        hint = "" if source else in_file(self.name) or did_you_mean(self.name, BUILT_IN, "")
        self.require(source is not None, "name", EXPECTED, hint)
        wide = self.name.startswith(("wrn-", "dm-wrn-"))
        self.require(not wide or self.width is None, "width", f"none with {self.name}, whose width is in its name")
        own = self.activation == "relu" or not self.name.startswith("convnext")
        self.require(own, "activation", f"relu, the default, with --model.name {self.name}, whose own is GELU")
        for name, default in (("width", None), ("activation", "relu")):
            fits = source == "built-in" or getattr(self, name) == default
            self.require(fits, name, f"nothing with --model.name {self.name}, which is built without it")
        fits = not self.published or str(self.pretrained) == source
        self.require(fits, "pretrained", f"a file, or --model.name {self.pretrained}:NAME")
        self.require(len(self.mean) == len(self.std), "std", f"as many numbers as --model.mean has, {len(self.mean)}")
        self.require(all(value > 0 for value in self.std), "std", "numbers > 0")
        self.require(not self.mean or self.normalize == "auto", "normalize", "auto where --model.mean is given")
        fits = source != "built-in" or self.normalize != "model"
        self.require(fits, "normalize", f"another with --model.name {self.name}, which has no normalisation of its own")


_FURTHER = re.compile(r"(linf|l2|l1)=([^=,]*)(?:,([^=,]*))?")


def _is_length(*texts: str | None) -> bool:
    """Whether all of them are amounts > 0, or None."""
    try:
        return all(text is None or parse_amount(text) > 0 for text in texts)
    except ValueError:
        return False


class FurtherBall(NamedTuple):
    """A ball beside the first one, on pixels in [0, 1]."""

    norm: Literal["linf", "l2", "l1"]
    epsilon: Fraction
    step_size: Fraction


class StrongerAttack(NamedTuple):
    """What training attacks by after so many epochs; epsilon on pixels in [0, 1]."""

    after: int
    epsilon: float
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(Checked, section="teacher."):
    """The frozen network that ARD, RSLAD, AdaAD and HAT learn from."""

    weights: str | None = None
    """Run directory (the weights that it selected), checkpoint, .safetensors file or hf://OWNER/NAME; with
    --teacher.name weights of any usual layout."""
    name: str | None = None
    """Architecture of weights that are no run's, as --model.name, but for code of your own."""
    key: str | None = None
    """Which weights of several in that file."""
    activation: Literal["relu", "silu"] = "relu"
    """Nonlinearity of a built-in model of that name."""
    normalize: Literal["auto", "data", "model", "none"] = "auto"
    """Mean and deviation that it expects images to be normalised by, as in --model.normalize; auto: as the file says.
    A run says it."""
    mean: tuple[float, ...] = ()
    """Mean of every channel, on pixels in [0, 1], where the file does not say it."""
    std: tuple[float, ...] = ()
    """Deviation of every channel, likewise."""

    def _check(self) -> None:
        fits = self.weights is None or (self.weights != "" and "\0" not in self.weights)
        self.require(fits, "weights", "a path, hf://OWNER/NAME or none")
        if self.name is None:
            for name in ("key", "activation", "normalize", "mean", "std"):
                default = getattr(TeacherConfig, name)
                fits = getattr(self, name) == default
                self.require(fits, name, "nothing without --teacher.name; weights of a run say it themselves")
        else:
            known = source_of(self.name) in ("built-in", "timm", "torchvision")
            hint = "" if known else did_you_mean(self.name, BUILT_IN, "")
            self.require(known, "name", "a built-in model, timm:NAME or torchvision:NAME", hint)
            self.require(self.weights is not None, "name", "none without --teacher.weights")
        self.require(len(self.mean) == len(self.std), "std", f"as many numbers as --teacher.mean has, {len(self.mean)}")
        self.require(all(value > 0 for value in self.std), "std", "numbers > 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackConfig(Checked, section="attack."):
    """Projected gradient descent that makes the training images."""

    kind: Literal["pgd", "apgd", "none"] = "pgd"
    """Steps of one length; Auto-PGD (Croce, Hein 2020), which chooses its own, for AT and MART; or no attack: epsilon
    is then that of the evaluation alone."""
    norm: Literal["linf", "l2", "l1"] = "linf"
    """Norm of the ball around an image; l1 with --attack.kind apgd, or --method msd."""
    epsilon: Amount = "0.2"
    """Radius of the ball, on pixels in [0, 1], as an exact fraction or a decimal: 8/255, 0.2."""
    also: tuple[str, ...] = ()
    """Further balls of --method e-at and msd: NORM=EPSILON, such as l1=12; or NORM=EPSILON,STEP, where steps of msd are
    not the same part of epsilon."""
    step_size: Amount = "0.05"
    """Length of one step of PGD, in epsilon's units and at most 2 epsilon, exact as well: 2/255, 0.05."""
    steps: Annotated[int, Range("a whole number >= 1 (--attack.epsilon 0 trains without an attack)", ge=1)] = 10
    """Number of steps."""
    bn_mode: Literal["train", "eval"] = "train"
    """Mode of batch normalisation during the attack: by the batch's statistics, or by the running ones."""
    start: Literal["uniform", "normal", "none"] = "uniform"
    """First iterate: a uniform random point of the ball, the image plus 0.001 N(0, 1), or the image itself."""
    ramp: Literal["none", "linear"] = "none"
    """Epsilon and step size of training are these throughout, or grow to these in proportion to the epoch (Addepalli
    2022); the evaluation keeps the whole ball."""
    step_warmup: Annotated[int, Range("a whole number of epochs >= 0", ge=0)] = 0
    """Epochs in which PGD's step grows in proportion to the epochs before, from 0 in the first one (ARES: 5)."""
    stronger_after: OptionalCount = None
    """Epochs before training attacks in a larger ball and with more steps (ReBAT++: 100); none: never."""
    stronger_epsilon: OptionalAmount = None
    """Radius of that ball, at least --attack.epsilon, which the evaluation keeps (ReBAT++: 10/255)."""
    stronger_steps: OptionalCount = None
    """Steps of that attack, each as long as before (ReBAT++: 12)."""
    fast: Literal["none", "fgsm-rs", "n-fgsm", "free"] = "none"
    """Cheap attack in the first epochs: one step (Wong 2020; de Jorge 2022), or replayed batches (Shafahi 2019)."""
    fast_epochs: OptionalCount = None
    """Epochs of the cheap attack before the full one; none means all."""
    replays: Count = 8
    """Updates that --attack.fast free makes from one batch."""
    noise: Annotated[float, Range("a number from 0 to 10", ge=0, le=10)] = 0.0
    """Deviation of Gaussian noise on the images that are trained on, unclipped, for awp certify: with --attack.kind
    none (Cohen 2019), or under an attack (SmoothAdv, Salman 2019); 0: no noise."""
    noise_samples: Count = 1
    """Noisy copies of each image: the weights learn from all, and the attack climbs against their mean probability."""

    def _check(self) -> None:
        epsilon = parse_amount(self.epsilon)
        if self.norm == "linf" and epsilon > 1:
            hint = f" (did you mean {epsilon}/255?)" if epsilon <= 255 and epsilon.denominator == 1 else ""
            self.require(False, "epsilon", f"at most 1 for linf, as pixels lie in [0, 1]{hint}")
        self._check_balls()
        self.require(self.fast == "none" or self.norm == "linf", "fast", f"none with --attack.norm {self.norm}")
        noise = "at most 1/2 with --attack.fast n-fgsm, whose noise reaches twice as far"
        self.require(self.fast != "n-fgsm" or epsilon <= Fraction(1, 2), "epsilon", noise)
        alone = self.fast == "none" or (self.kind != "none" and self.noise == 0)
        self.require(alone, "fast", "none with --attack.kind none or --attack.noise")
        grows = self.fast == "none" and self.training_epsilon > 0
        self.require(self.ramp == "none" or grows, "ramp", "none with --attack.fast, or where training does not attack")
        grows = self.kind == "pgd" and self.fast == "none" and self.training_epsilon > 0
        self.require(self.step_warmup == 0 or grows, "step_warmup", "0, unless training attacks by --attack.kind pgd")
        self.require(self.noise > 0 or self.noise_samples == 1, "noise_samples", "1 without --attack.noise")
        self._check_stronger()

    def _check_stronger(self) -> None:
        given = {value is not None for value in (self.stronger_after, self.stronger_epsilon, self.stronger_steps)}
        together = "epochs, --attack.stronger-epsilon and --attack.stronger-steps together, or none of them"
        self.require(len(given) == 1, "stronger_after", together)
        if self.stronger is None:
            return
        alone = self.fast == "none" and self.training_epsilon > 0 and not self.also
        like = "none with --attack.fast or --attack.also, or where training does not attack"
        self.require(alone, "stronger_after", like)
        same = self.ramp == "none" and self.step_warmup == 0
        self.require(same, "stronger_after", "none with --attack.ramp or --attack.step-warmup")
        most = 1 if self.norm == "linf" else math.inf
        fits = self.epsilon_value <= self.stronger.epsilon <= most
        like = f"at least --attack.epsilon {self.epsilon}" + ", at most 1 for linf" * (self.norm == "linf")
        self.require(fits, "stronger_epsilon", like)

    def _check_balls(self) -> None:
        read = [_FURTHER.fullmatch(word) for word in self.also]
        fits = all(match is not None and _is_length(match[2], match[3]) for match in read)
        self.require(fits, "also", "NORM=EPSILON of linf, l2 or l1, EPSILON > 0 such as 8/255, or NORM=EPSILON,STEP")
        norms = [self.norm, *(ball.norm for ball in self.further)]
        self.require(len({*norms}) == len(norms), "also", "every norm once, and not that of --attack.norm again")
        small = all(ball.norm != "linf" or ball.epsilon <= 1 for ball in self.further)
        self.require(small, "also", "at most 1 for linf, as pixels lie in [0, 1]")
        fits = all(ball.step_size <= 2 * ball.epsilon for ball in self.further)
        self.require(fits, "also", "steps of at most twice their epsilon")
        if "l1" in norms and self.kind != "none":
            self.require(self.start == "none", "start", "none with an attack in l1, which begins at the image")

    @property
    def further(self) -> list[FurtherBall]:
        """The balls of `also`; steps are the same part of epsilon where none is given."""
        part = parse_amount(self.step_size) / (parse_amount(self.epsilon) or 1)
        found = []
        for word in self.also:
            match = _FURTHER.fullmatch(word)
            assert match is not None  # checked
            norm: Any = match[1]
            radius = parse_amount(match[2])
            found.append(FurtherBall(norm, radius, parse_amount(match[3]) if match[3] else part * radius))
        return found

    @property
    def stronger(self) -> StrongerAttack | None:
        """The attack of the later epochs, where it is another one."""
        after, epsilon, steps = self.stronger_after, self.stronger_epsilon, self.stronger_steps
        if after is None or epsilon is None or steps is None:
            return None
        return StrongerAttack(after, float(parse_amount(epsilon)), steps)

    @property
    def balls(self) -> str:
        """The ball or balls in words: "linf epsilon 8/255"."""
        own = f"{self.norm} epsilon {self.epsilon}"
        words = (word.partition(",")[0].replace("=", " epsilon ") for word in self.also)
        return " and ".join(["union of " * bool(self.also) + own, *words])

    @property
    def has_l1(self) -> bool:
        """Whether one of the balls is an L1 ball."""
        return "l1" in (self.norm, *(ball.norm for ball in self.further))

    @property
    def epsilon_value(self) -> float:
        """epsilon, on pixels in [0, 1]."""
        return float(parse_amount(self.epsilon))

    @property
    def training_epsilon(self) -> float:
        """epsilon_value, or 0 where training does not attack."""
        return 0.0 if self.kind == "none" else self.epsilon_value

    @property
    def step_size_value(self) -> float:
        """step_size, in the same units."""
        return float(parse_amount(self.step_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AwpConfig(Checked, section="awp."):
    """Adversarial Weight Perturbation (Wu, Xia, Wang, NeurIPS 2020)."""

    gamma: Annotated[float, Range("a number from 0 to 1000", ge=0, le=1000)] = 0.002
    """Size of the weight perturbation relative to the weights' norm; 0 turns it off."""
    warmup: Annotated[int, Range("a whole number of epochs >= 0", ge=0)] = 0
    """Epochs trained before the perturbation begins."""
    every: Annotated[int, Range("a whole number of steps >= 1", ge=1)] = 1
    """Perturb the weights in one step of this many."""
    scope: Literal["layer", "global", "filter"] = "layer"
    """What one norm is taken over: a tensor (as in the paper), the whole model, or a filter."""
    scale: Literal["relative", "absolute", "elementwise"] = "relative"
    """gamma * ||w|| over weights (AWP), or gamma over all parameters: itself (SAM's rho), or in each |w| (ASAM)."""
    ascent: Literal["exact", "shared"] = "exact"
    """Ascent gradient: of the training loss at the attacked images, or of the attack's last pass (cheaper)."""
    ascent_steps: Count = 1
    """Ascent passes whose gradients are added up, each at the weights that the ones before it moved to (RWP: 10)."""
    c_min: Annotated[float | None, Range("a number > 0, or none", gt=0)] = None
    """Perturb the weights by the samples whose loss is below this alone (RWP: 1.7); none means by all."""
    max_rise: Annotated[float | None, Range("a number > 0, at most 1, or none", gt=0, le=1)] = None
    """Make gamma smaller where the loss would rise farther, as a part of the way to that of guessing; none: never."""
    layers: tuple[str, ...] = ()
    """Patterns such as 'blocks.*.weight' of the parameters to perturb; nothing means the paper's rule: tensors of two
    or more dimensions named weight (AWP), or all (SAM, ASAM)."""

    @property
    def enabled(self) -> bool:
        """Whether the weights are perturbed at all."""
        return self.gamma > 0

    def _check(self) -> None:
        whole = self.ascent == "exact" or (self.ascent_steps == 1 and self.c_min is None)
        self.require(whole, "ascent", "exact with --awp.ascent-steps > 1 or --awp.c-min")
        known = self.ascent == "exact" and self.c_min is None and self.scale == "relative" and self.scope != "filter"
        expected = "none, unless the ascent is exact, without --awp.c-min, its scale relative and its scope not filter"
        self.require(self.max_rise is None or known, "max_rise", expected)
        self.require("" not in self.layers, "layers", "patterns of parameters' names, such as 'layer1.*'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Checked, section="optimizer."):
    """The optimizer and its learning rate."""

    kind: str = "sgd"
    """sgd, with momentum; adamw (Loshchilov, Hutter 2019) with epsilon 1e-8; or another: torch:NAME such as
    torch:RMSprop, timm:NAME such as timm:lion, or a torch.optim.Optimizer of your own: file.py:Class or
    package.module:Class."""
    args: tuple[str, ...] = ()
    """NAME=VALUE, such as betas=0.9,0.99: what such another optimizer is made with, beside its learning rate and weight
    decay."""
    lr: Annotated[float, Range("a finite number > 0", gt=0)] = 0.1
    """Learning rate at the start."""
    momentum: Fading = 0.9
    """Momentum; AdamW's beta1."""
    beta2: Fading = 0.999
    """How much of the mean of squared gradients AdamW keeps in a step."""
    weight_decay: Annotated[float, Range("a finite number >= 0", ge=0)] = 5e-4
    """L2 penalty added to the gradient; AdamW takes this times the learning rate off the weights themselves; optimizers
    of others have their own rules."""
    nesterov: bool = False
    """Nesterov's momentum."""
    schedule: Literal["piecewise", "cosine", "linear", "one-cycle", "one-cycle-cosine", "constant"] = "piecewise"
    """How the learning rate changes: x0.1 at each milestone, down to 0 by half a cosine or a line, or up and down; by
    cosines as torch's OneCycleLR does, from lr / 25 up to lr over --optimizer.warmup and down to lr / 250000."""
    per_epoch: bool = False
    """Change the rate, and a momentum in a cycle, as an epoch begins, not at every step."""
    cycle_momentum: bool = False
    """Have the momentum go from 0.95 down to 0.85 as the rate of one-cycle-cosine rises, and up again as that falls."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Where the piecewise schedule multiplies the rate by --optimizer.drop: fractions of the epochs (0.5), or epochs
    (100)."""
    drop: Annotated[float, Range("a number > 0, at most 1", gt=0, le=1)] = 0.1
    """What the piecewise schedule multiplies the rate by at every milestone."""
    warmup: Annotated[float, Range("a finite number of epochs >= 0", ge=0)] = 0.0
    """Epochs in which the learning rate rises from 0 along a line, or by one-cycle-cosine; cosine and linear begin to
    fall after them."""
    warmup_lr: Annotated[float, Range("a finite number >= 0", ge=0)] = 0.0
    """Where the rate of that line begins, in place of 0."""
    min_lr: Annotated[float, Range("a finite number >= 0", ge=0)] = 0.0
    """Where cosine and linear end, in place of 0."""
    clip_norm: Annotated[float | None, Range("a finite number > 0, or none", gt=0)] = None
    """Largest norm of the whole gradient; a longer one is scaled down to it; none means no clipping."""
    decay_all: bool = True
    """Apply weight decay to biases and normalisation weights as well, as the papers do."""
    decay_norms: bool = True
    """Apply it to weights and biases of normalisation layers, too; biases of other layers are not concerned."""
    no_decay: tuple[str, ...] = ()
    """Patterns such as '*pos_embed' of the parameters that weight decay leaves alone, beside those above."""
    layer_decay: Annotated[float, Range("a number > 0, at most 1", gt=0, le=1)] = 1.0
    """Each layer learns at this times the rate of the layer after it, the last one at the full rate (BEiT); 1: all do.
    For fine-tuning: 0.65 to 0.9 are usual."""

    def _check(self) -> None:
        near = nearest(self.kind, ("sgd", "adamw"))
        meant = f" ({near})" if near else ""
        known = "sgd, adamw, torch:NAME such as torch:Adam, timm:NAME, file.py:Class or package.module:Class"
        self.require(optimizer_source(self.kind) is not None, "kind", known + meant)
        self.require(self.kind != "adamw" or not self.nesterov, "nesterov", "false with --optimizer.kind adamw")
        if self.by_name:
            for name, default in (("momentum", 0.9), ("beta2", 0.999), ("nesterov", False)):
                self.require_value(name, default, f"with --optimizer.kind {self.kind}, which takes --optimizer.args")
        fits = self.by_name or not self.args
        self.require(fits, "args", f"nothing with --optimizer.kind {self.kind}, which has flags of its own")
        self.require(parse_arguments(self.args) is not None, "args", "NAME=VALUE, every name once")
        self.require(not self.nesterov or self.momentum > 0, "nesterov", "a momentum > 0 to go with it")
        rising = all(a < b for a, b in itertools.pairwise((0.0, *self.milestones)))
        fractions = max(self.milestones, default=1) <= 1
        epochs = min(self.milestones, default=2) > 1 and all(m == int(m) for m in self.milestones)
        expected = "rising fractions, more than 0, at most 1, or rising numbers of epochs from 2"
        self.require(rising and (fractions or epochs), "milestones", expected)
        own = self.warmup == 0 or self.schedule != "one-cycle"
        self.require(own, "warmup", "0 with --optimizer.schedule one-cycle, which has its own")
        cycle = self.schedule == "one-cycle-cosine"
        from_zero = self.schedule == "one-cycle" or (self.warmup > 0 and not cycle and self.warmup_lr == 0)
        expected = "false where the rate begins at 0, which would be that of a whole epoch"
        self.require(not (self.per_epoch and from_zero), "per_epoch", expected)
        expected = "0, or less than --optimizer.lr with --optimizer.warmup > 0, and no one-cycle-cosine"
        begins = self.warmup_lr == 0 or (self.warmup > 0 and not cycle and self.warmup_lr < self.lr)
        self.require(begins, "warmup_lr", expected)
        ends = self.min_lr == 0 or (self.schedule in ("cosine", "linear") and self.min_lr < self.lr)
        self.require(ends, "min_lr", "0, or less than --optimizer.lr with --optimizer.schedule cosine or linear")
        self.require("" not in self.no_decay, "no_decay", "patterns of parameters' names, such as '*pos_embed'")
        expected = "false without --optimizer.kind sgd and --optimizer.schedule one-cycle-cosine"
        self.require(not self.cycle_momentum or (cycle and self.kind == "sgd"), "cycle_momentum", expected)
        if self.cycle_momentum:
            self.require_value("momentum", 0.9, "with --optimizer.cycle-momentum, which has its own")

    @property
    def by_name(self) -> bool:
        """Whether it is one of torch, timm or the user, and not fused."""
        return optimizer_source(self.kind) != "built-in"

    @property
    def arguments(self) -> dict[str, Any]:
        """`args` by name, as Python's values."""
        return parse_arguments(self.args) or {}

    def milestone_epochs(self, epochs: int) -> list[int]:
        """How many epochs of a run of `epochs` come before each milestone: rates change as an epoch begins."""
        # 1e-9: a milestone such as 0.7 of 30 must not land an epoch late for a rounding error
        return [math.ceil((m if m > 1 else m * epochs) - 1e-9) for m in self.milestones]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageConfig(Checked, section="average."):
    """Average of the weights over training, which is then what is measured, selected and exported."""

    kind: Literal["none", "ema", "swa", "epochs"] = "none"
    """Exponential moving average of every step's weights, equal average of every epoch's, or exponential one of every
    epoch's from the first on (IKL: decay 0.9, statistics averaged)."""
    decay: Fading = 0.995
    """Share of the average that an exponential one keeps in a step, or epoch."""
    ramp: bool = True
    """Keep less in the first steps: (1 + n) / (10 + n) in step n, from 0, where that is smaller."""
    warmup: Annotated[float, Range("a finite number of epochs >= 0", ge=0)] = 0.0
    """Epochs in which an EMA is a copy of the weights; it begins after them."""
    start: Fading = 0.5
    """Fraction of the epochs after which SWA begins to average."""
    bn_images: Count = 2048
    """Training images that the average's BN statistics are computed anew from."""
    statistics: Literal["attacked", "clean", "averaged", "live"] = "attacked"
    """The average's BN statistics: computed anew over attacked training images or clean ones, averaged as weights are,
    or those of the model in training."""

    def _check(self) -> None:
        if self.kind in ("swa", "epochs"):
            for name, value in (("ramp", True), ("warmup", 0)):
                self.require_value(name, value, f"with --average.kind {self.kind}, which takes epochs in, not steps")
        if self.kind == "swa":
            anew = self.statistics in ("attacked", "clean")
            self.require(anew, "statistics", "attacked or clean with --average.kind swa")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig(Checked, section="precision."):
    """What the parts of a step compute in; masters, batch normalisation and images are fp32 throughout."""

    attack: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the attack; auto is fp16 on a GPU, and on a CPU bf16 where the processor multiplies it, else fp32."""
    ascent: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the gradient that the weights climb; auto is fp16 on a GPU (fp32 for SAM and ASAM), fp32 on a CPU."""
    descent: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the pass at the perturbed weights; auto is fp16 on a GPU (fp32 for SAM and ASAM), fp32 on a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Checked, section="evaluation."):
    """PGD on held-out images while training, and on the test split at the end, with the attack's norm and epsilon."""

    steps: Count = 20
    """Number of steps."""
    step_size: OptionalAmount = None
    """Length of one step, at most 2 epsilon, as an exact fraction or a decimal; none means epsilon / 4."""
    loss: Literal["ce", "margin"] = "ce"
    """What is climbed on the held-out images that choose the epoch: cross-entropy, or the largest wrong logit less the
    right one (Carlini, Wagner 2017). What the report says of the test split is by cross-entropy."""
    batch_size: Count = 512
    """Images in a batch."""
    evaluate_every: Annotated[int, Range("a whole number of epochs >= 1", ge=1)] = 1
    """Epochs between evaluations on the held-out images."""
    held_out_limit: OptionalCount = None
    """Evaluate while training on at most this many held-out images; none means all."""
    test_limit: OptionalCount = None
    """Measure the trained model on at most this many test images, also by --limit; none means all."""
    patience: OptionalCount = None
    """Stop after this many evaluations without a better held-out PGD accuracy; none means never."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedConfig(Checked, section="distributed."):
    """Several ranks; torchrun says how many."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Every rank holds the whole model (DDP), or a share of every layer (FSDP2), for models that do not fit."""
    ascent_sync: Literal["global", "local"] = "global"
    """Perturb the weights by the gradient of the whole batch, as the paper does, or every rank by that of its share."""
    sync_batch_norm: bool = False
    """Normalise by the statistics of the whole batch, not of each rank's share; not in the attack's passes."""
    check_every: Annotated[int, Range("a whole number of steps >= 1", ge=1)] = 100
    """Steps between comparisons of the ranks' weights, which must be equal to the bit; also done at checkpoints."""
    timeout: Annotated[float, Range("a number of seconds from 1 to 1e6", ge=1, le=1e6)] = 600.0
    """Seconds without any progress after which the rank that hangs is named and the run is stopped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """Everything that a training run is told."""

    preset: str = "digits"
    """Preset that the other settings start from; giving it as the first argument says the same."""
    method: str = "at"
    """Loss: at, cross-entropy on the attacked images; trades; mart; rst, TRADES with pseudo-labelled images; ikl, gkl,
    with weights by class for its divergence; adr, adr-trades, rebat, which learn from the weights' average too; ard,
    rslad, adaad, hat, which learn from a frozen network; lbgat, from one trained along; score, score-trades, AT and
    TRADES by squared errors; dajat, TRADES on several views of each image; oaat, TRADES in a ball that grows; liet, for
    attacks of one step; e-at, msd, at against several balls (--attack.also); or an Objective of your own: file.py:Class
    or package.module:Class."""
    beta: Annotated[float, Range("a finite number >= 0", ge=0)] = 6.0
    """Weight of the divergence between attacked and clean images: beta of TRADES, RST and LBGAT, of OA-AT up to its
    last quarter (1.5), of the squared error in IKL and GKL, lambda of MART; of that from the average in ReBAT, whose
    paper has 1; of the error between both in score-trades (3); of the divergence from the teacher in ard, rslad and
    adaad (0.1); of that in LIET's last epoch (100)."""
    label_smoothing: Fading = 0.0
    """Part of a label that is spread over all classes, in AT's loss and in TRADES' clean one, and in SCORE's; in LIET
    at random over the wrong ones."""
    method_args: tuple[str, ...] = ()
    """NAME=VALUE, such as tau=2.5,2.0: what a method, also one of your own, is made with beside these."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig = TeacherConfig()
    attack: AttackConfig = AttackConfig()
    awp: AwpConfig = AwpConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    average: AverageConfig = AverageConfig()
    precision: PrecisionConfig = PrecisionConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run_dir: Path | None = None
    """Directory for everything that the run leaves; a run found there goes on; none means runs/PRESET-seedSEED."""
    seed: Annotated[int, Range("a whole number >= 0", ge=0)] = 0
    """Seed of the weights, the order of the images, augmentation and noise."""
    epochs: Count = 30
    """Passes over the training images."""
    global_batch_size: Count = 128
    """Images in a batch, over all ranks together."""
    micro_batch_size: OptionalCount = None
    """Most images that a rank computes at once; gradients of the pieces are added up. None means its whole share."""
    deterministic: bool = False
    """Use only operations that give the same bits every time; slower on a GPU."""
    device: Literal["auto", "cpu", "cuda", "xpu", "npu", "hpu", "mtia", "mps"] = "auto"
    """Where to train; auto takes a CUDA GPU if there is one. The others are torch's names of further accelerators, on
    which the project has never run; they have to compute in fp64, which mps cannot."""
    threads: Annotated[int | None, Range("a whole number from 1 to 1024, or none", ge=1, le=1024)] = None
    """CPU threads of each rank; none means as many as torch takes, or OMP_NUM_THREADS says."""
    compile: Switch = "auto"
    """Compile the model's passes by torch.compile, which takes minutes; results then differ by rounding. auto: off."""
    cuda_graphs: Switch = "auto"
    """Capture the whole step in a CUDA graph, on one GPU; auto: where that is possible."""
    profile: Annotated[int, Range("a whole number of steps >= 0", ge=0)] = 0
    """Write a torch.profiler trace of this many steps, after the first five, into the run directory; 0 writes none."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept, beside that of the best epoch."""
    keep_every: OptionalCount = None
    """Keep every checkpoint whose epoch is a multiple of this as well; none means no others."""
    checkpoint_every: Annotated[int, Range("a whole number of epochs >= 1", ge=1)] = 1
    """Epochs between checkpoints."""
    checkpoint_steps: OptionalCount = None
    """Steps between checkpoints within an epoch; none writes one only when the run is stopped."""
    log_interval: Annotated[float, Range("a finite number of seconds > 0", gt=0)] = 10.0
    """Seconds between lines of progress where the output is not a terminal."""
    log: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio", "none"], ...] = ("tensorboard",)
    """Where the numbers go beside metrics.jsonl: one or more services, or none; wandb also offline (WANDB_MODE)."""
    compare_without_awp: bool = False
    """Train a second time without the weight perturbation, and show both in the table."""

    def _check(self) -> None:
        known = self.method in _METHODS or is_code(self.method)
        own = f"{', '.join(_METHODS)}, or a class of your own, file.py:Class"
        near = in_file(self.method) or nearest(self.method, _METHODS)
        # AWP goes with every one of them
        self.require(known, "method", own, "did you mean --awp.gamma?" if "awp" in self.method.lower() else near)
        given = parse_arguments(self.method_args) is not None
        self.require(given, "method_args", "NAME=VALUE, every name once")
        named = _PRESET_NAME.fullmatch(self.preset) is not None
        self.require(named, "preset", "a name of small letters, digits and '-'")
        alone = "none" not in self.log or self.log == ("none",)
        self.require(alone, "log", "none alone, or services")
        require_combinations(self)

    def require_files(self) -> None:
        """Make sure that every file the settings need is named.

        Raises:
            ConfigError: naming the flag that is missing.
        """
        if self.data.name != "digits" and self.data.root is None and not is_own(self.data.name):
            where = where_to_get(self.data.name)
            what = self.data.name if where else f"the images (--data.name {self.data.name})"
            raise ConfigError(f"--data.root: expected the directory that holds {what}, got nothing{where}")
        if self.method == "rst" and self.data.extra is None:
            raise ConfigError(
                "--data.extra: expected an .npz, or a directory of shards, of pseudo-labelled or generated images for "
                "--method rst, got nothing; to train without such images use --method trades"
            )
        if self.method in TAUGHT and self.teacher.weights is None:
            raise ConfigError(
                f"--teacher.weights: expected a run, a checkpoint or a file of the network that --method {self.method} "
                "learns from, got nothing"
            )
        for key, default in (
            ("extra_fraction", 0.5),
            ("extra_replacement", False),
            ("extra_alone", 0),
            ("epoch_images", None),
        ):
            if self.data.extra is None and (value := getattr(self.data, key)) != default:
                shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
                raise ConfigError(
                    f"--data.extra: expected an .npz, or a directory of shards, for {flag('data.' + key)} {shown}, "
                    "got nothing"
                )

    @property
    def standard(self) -> bool:
        """Whether training sees clean images alone; the epoch is then chosen by accuracy on such."""
        return self.attack.kind == "none" and not self.attack.noise and not is_code(self.method)

    @property
    def title(self) -> str:
        """What is trained, in the field's words: "TRADES-AWP"."""
        perturbed = {"relative": "AWP", "absolute": "SAM", "elementwise": "ASAM"}[self.awp.scale]
        method = self.method.rpartition(":")[2] if is_code(self.method) else self.method.upper()
        if self.attack.noise and not is_code(self.method):
            method = "SmoothAdv" if self.attack.training_epsilon else "Noise"
        elif self.standard:
            method = "Standard"
        return method + (f"-{perturbed}" if self.awp.enabled else "")

    @property
    def resolved_run_dir(self) -> Path:
        """The run directory, with the default filled in."""
        return self.run_dir or Path("runs") / f"{self.preset}-seed{self.seed}"

    @property
    def evaluation_step_size(self) -> float:
        """The evaluation's step, on pixels in [0, 1]: its own, or epsilon / 4."""
        given = self.evaluation.step_size
        return float(parse_amount(self.attack.epsilon) / 4 if given is None else parse_amount(given))
