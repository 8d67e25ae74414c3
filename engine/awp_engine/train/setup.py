"""From settings to objects: the one place that knows both. Nothing below the trainer sees a `Config`."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from awp_engine import checkpoint
from awp_engine.attack import Attack, fast_attack
from awp_engine.attack.checks import ball
from awp_engine.checkpoint import Checkpoint, CheckpointError
from awp_engine.config import AttackConfig, Config, ConfigError, choose_speed, config_hash
from awp_engine.config.rules import require_average, require_growing, require_partner, require_views
from awp_engine.config.schema import parse_amount, parse_arguments
from awp_engine.data import (
    Augmentation,
    Batches,
    Dataset,
    data_loading,
    label_notes,
    load_data,
    load_extra,
    place_extra,
)
from awp_engine.device import choose_convolutions, choose_device
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.sharding import gather, shard
from awp_engine.evaluation import evaluation_attacks
from awp_engine.files.run_places import CHECKPOINTS, CONFIG_FILE
from awp_engine.models.batch_norm import set_momentum, synchronize
from awp_engine.models.checkpointing import checkpoint_activations_
from awp_engine.models.depth import layer_numbers
from awp_engine.models.trained import described
from awp_engine.models.views import add_auxiliary_, base_set
from awp_engine.observe.throughput import forward_flops
from awp_engine.observe.trackers import require_trackers
from awp_engine.optim.average import WeightAverage
from awp_engine.optim.by_name import find_optimizer
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.awp_step import Ascent, AwpStep, climbs_another_loss
from awp_engine.step.cuda_graph import GraphedStep
from awp_engine.step.free import FreeStep
from awp_engine.step.objectives import Oaat, Objective, build_objective
from awp_engine.step.precision import PARTS, Precision, WorkingModels, has_fast_bfloat16
from awp_engine.step.rise import RiseLimit
from awp_engine.step.values import Step
from awp_engine.train.inputs import fingerprints, made_by, require_same, require_same_code, said
from awp_engine.train.network import build_network, build_partner
from awp_engine.train.perturbed import choice, perturbed_message
from awp_engine.train.run_dir import known_hashes, prepare_run_dir, require_own_run_dir
from awp_engine.train.schedule import Schedule
from awp_engine.train.teacher import load_teacher
from awp_kernels import AdversarialWeightPerturbation, asam, sam
from awp_kernels.philox import mix_seed

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(config: Config, device: torch.device) -> Precision:
    """The precision that a run computes in.

    Raises:
        ConfigError: fp16 on the CPU, which has no arithmetic for it.
    """
    cuda = device.type == "cuda"
    # one norm over parameters of two precisions: see `Config`
    sharpness_aware = config.awp.enabled and config.awp.scale != "relative"
    chosen: dict[str, torch.dtype | None] = {}
    for part in PARTS:
        name = getattr(config.precision, part)
        if name == "fp16" and not cuda:
            where = "the CPU" if device.type == "cpu" else device.type
            raise ConfigError(f"--precision.{part}: expected fp32 or bf16 on {where}, got 'fp16'")
        if name != "auto":
            chosen[part] = _DTYPES[name]
        elif cuda:
            chosen[part] = None if sharpness_aware and part != "attack" else torch.float16
        else:
            fast = part == "attack" and device.type == "cpu" and has_fast_bfloat16()
            chosen[part] = torch.bfloat16 if fast else None
    if config.awp.enabled and config.awp.ascent == "shared":
        # the ascent's gradient comes out of the attack's last pass
        chosen["attack"] = chosen["ascent"]
    if config.distributed.strategy == "fsdp":
        # there is one model, whose parameters are gathered in one precision
        if config.precision.attack == "auto":
            chosen["attack"] = chosen["descent"]
        if len(set(chosen.values())) > 1:
            raise ConfigError(
                "--precision.attack: expected that of ascent and descent with --distributed.strategy fsdp"
            )
    if config.attack.training_epsilon == 0:
        # no attack, and no copy for it
        chosen["attack"] = chosen["descent"]
    return Precision(**chosen)


def training_attack(settings: AttackConfig) -> Attack:
    """How training attacks, but for the epochs of a cheap attack."""
    own = Attack(
        kind="apgd" if settings.kind == "apgd" else "pgd",
        epsilon=settings.training_epsilon,
        step_size=settings.step_size_value,
        steps=settings.steps,
        norm=settings.norm,
        start=settings.start,
        bn_mode=settings.bn_mode,
    )
    others = (
        replace(own, norm=ball.norm, epsilon=float(ball.epsilon), step_size=float(ball.step_size))
        for ball in settings.further
    )
    return replace(own, others=tuple(others))


def cheap_attack(settings: AttackConfig) -> Attack:
    """How it attacks in those; that of `training_attack` where there is none, or free training."""
    if settings.fast in ("none", "free"):
        return training_attack(settings)
    return fast_attack(settings.fast, settings.epsilon_value, bn_mode=settings.bn_mode)


def build_step(
    config: Config,
    model: nn.Module,
    ranks: Ranks | None = None,
    precision: Precision | None = None,
    largest_batch: int | None = None,
    class_weights: Tensor | None = None,
    objective: Objective | None = None,
) -> AwpStep:
    """The step for `model`, with an optimizer and working copies of its own.

    Args:
        config: the run's.
        model: in train mode, on its device and in its memory format; equal on all ranks.
        ranks: that train together; by default this process alone.
        precision: as `choose_precision` says if not given.
        largest_batch: images of a full batch, over all ranks; None: that is the first.
        class_weights: of the loss, fp32 [classes] on the model's device, or None.
        objective: what is climbed and minimised, with its partner if it has one; None: that of `objective_of`.

    Raises:
        ConfigError: a precision that the device does not have, or as `require_ranks` and `choose_speed`.
    """
    ranks, awp = ranks or Ranks(), config.awp
    device = next(model.parameters()).device
    precision = precision or choose_precision(config, device)
    require_ranks(config, ranks)
    distribute_(config, model, ranks, precision)
    models = WorkingModels(
        model,
        precision,
        shared_ascent=awp.enabled and awp.ascent == "shared",
        sharded=config.distributed.strategy == "fsdp",
    )
    objective = objective or objective_of(config, device)
    trained, copied = model, models.updated
    if (partner := objective.partner) is not None:
        distribute_(config, partner, ranks, precision)
        # parameters and their copies go by name
        trained, copied = nn.ModuleList([model, partner]), None if copied is None else nn.ModuleList([copied])
    perturbation = None
    # none given: each has a rule of its own
    chosen: dict[str, Any] = {"select": choice(model, awp.layers)} if awp.layers else {}
    try:
        if awp.enabled and awp.scale == "relative":
            perturbation = AdversarialWeightPerturbation(
                model, awp.gamma, scope=awp.scope, working=models.working, **chosen
            )
        elif awp.enabled:
            perturbation = (sam if awp.scale == "absolute" else asam)(model, awp.gamma, scope=awp.scope, **chosen)
    except ValueError as error:
        raise ConfigError(f"--awp.{'layers' if awp.layers else 'gamma'}: {error}") from None
    return AwpStep(
        models=models,
        optimizer=build_optimizer(trained, config.optimizer, working=copied, layers=layers_with_rates(config, model)),
        objective=objective,
        awp=perturbation,
        ascent=Ascent(kind=awp.ascent, steps=awp.ascent_steps, c_min=awp.c_min, sync=config.distributed.ascent_sync),
        clip_norm=config.optimizer.clip_norm,
        class_weights=class_weights,
        ranks=ranks,
        sync_batch_norm=config.distributed.sync_batch_norm,
        compile=choose_speed(config, cuda=device.type == "cuda", ranks=ranks.world).compile,
        micro_batch_size=config.micro_batch_size,
        largest_batch=largest_batch,
        rise_limit=RiseLimit(awp.max_rise, device) if awp.enabled and awp.max_rise is not None else None,
    )


def objective_of(
    config: Config,
    device: torch.device,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> Objective:
    """What the settings have a run climb and minimise, on images of that many classes and that shape.

    Raises:
        ConfigError: as `build_objective`; or there is no average of the kind that it needs, or what does not go with
            several views, a partner, copies of the model or an ascent of its own.
    """
    objective = build_objective(
        config.method,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
        average_warmup=config.average.warmup,
        epochs=config.epochs,
        balls=1 + len(config.attack.also),
        run_seed=config.seed,
        arguments=parse_arguments(config.method_args),
        num_classes=num_classes,
        image_shape=image_shape,
        device=device,
    )
    if objective.uses_average:
        require_average(config)
    if objective.views > 1:
        require_views(config)
    if config.awp.enabled and config.awp.max_rise is not None and climbs_another_loss(objective):
        raise ConfigError(
            f"--awp.max-rise: expected none with --method {config.method}, whose ascent climbs another loss than the "
            "descent, so that no rise is known"
        )
    if objective.partner_name is not None:
        require_partner(config)
    if isinstance(objective, Oaat):
        require_growing(config)
    if type(objective).follow is not Objective.follow:
        reason = f"with --method {config.method}, which keeps what it needs of the whole model"
        config.require_value("distributed.strategy", "ddp", reason)
    return objective


def layers_with_rates(config: Config, model: nn.Module) -> dict[str, int] | None:
    """The layer of every parameter, where each layer has a learning rate of its own; else None.

    Raises:
        ConfigError: a model that does not say which layers it has.
    """
    return None if config.optimizer.layer_decay == 1 else layer_numbers(model, config.model.name)


def require_ranks(config: Config, ranks: Ranks) -> None:
    """Make sure that the settings serve as many ranks as there are.

    Raises:
        ConfigError: shards of one rank.
    """
    if config.distributed.strategy == "fsdp" and ranks.world == 1:
        raise ConfigError("--distributed.strategy: expected ddp for one rank, got 'fsdp'; torchrun starts several")


def distribute_(config: Config, model: nn.Module, ranks: Ranks, precision: Precision) -> None:
    """Have `model` normalise over all ranks, and leave each its share of the parameters, if the settings say so."""
    if config.distributed.sync_batch_norm:
        synchronize(model)
    if config.distributed.strategy == "fsdp":
        device = next(model.parameters()).device
        shard(model, init_device_mesh(device.type, (ranks.world,)), param_dtype=precision.descent)


def capture_step(config: Config, step: AwpStep) -> Step:
    """`step`, captured in CUDA graphs where `choose_speed` says so."""
    device = next(step.models.model.parameters()).device
    speed = choose_speed(config, cuda=device.type == "cuda", ranks=step.passes.ranks.world)
    return GraphedStep(step) if speed.cuda_graphs else step


# fewer held-out images say little about which epoch is the best one
_FEW_HELD_OUT = 30
# beyond it no published network withstands attacks on colour images; 8/255 and 4/255 are usual
_LARGE_EPSILON = 0.1
# in L1, of which one value alone may take as much
_SMALL_L1 = 1
# of methods whose papers have another weight than TRADES
_USUAL_BETA = {
    "rebat": 1,
    "ikl": 20,
    "gkl": 20,
    "dajat": 11,
    "score-trades": 3,
    "hat": 2.5,
    "liet": 100,
    "oaat": "1.5 to 4",
}
_USUAL_BETA |= dict.fromkeys(("ard", "rslad", "adaad"), "0.1 for CIFAR-10")


def _doubts(config: Config, data: Dataset) -> list[str]:
    """What a run had better not be started with, one line each."""
    notes, attack, held_out = [], config.attack, len(data.held_out)
    if attack.norm == "linf" and attack.epsilon_value > _LARGE_EPSILON and data.train.shape[0] == 3:
        notes.append(
            f"--attack.epsilon {attack.epsilon} is far more than colour images are usually attacked with: try "
            "--attack.epsilon 8/255 --attack.step-size 2/255"
        )
    for norm, epsilon in ((attack.norm, attack.epsilon), *((more.norm, more.epsilon) for more in attack.further)):
        if norm == "l1" and 0 < parse_amount(str(epsilon)) < _SMALL_L1:
            notes.append(
                f"epsilon {epsilon} in l1 is the sum of all changes, less than one value by the whole range: is it of "
                "another norm? 12 is usual on CIFAR"
            )
    if attack.step_warmup >= config.epochs:
        notes.append(
            f"--attack.step-warmup {attack.step_warmup} leaves none of {config.epochs} epochs whole steps: the first "
            "one does not attack at all"
        )
    if attack.stronger is not None and attack.stronger.after >= config.epochs:
        notes.append(f"--attack.stronger-after {attack.stronger_after} leaves none of {config.epochs} epochs for it")
    if config.average.kind == "ema" and config.average.warmup >= config.epochs:
        notes.append(
            f"--average.warmup {config.average.warmup:g} leaves none of {config.epochs} epochs to average: the average "
            "stays a copy of the weights"
        )
    if config.beta == Config.beta and (usual := _USUAL_BETA.get(config.method)) is not None:
        notes.append(f"--beta {config.beta:g} is TRADES' weight of the divergence; {config.method}'s paper has {usual}")
    if 0 < held_out < _FEW_HELD_OUT:
        notes.append(
            f"only {held_out} held-out images choose the best epoch: --data.held-out-fraction takes more than "
            f"{config.data.held_out_fraction:g}"
        )
    return notes


class Setup:
    """All that a run trains with.

    Args:
        config: the run's settings.
        ranks: that train together.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written, naming what is wrong.

    Attributes:
        found: the checkpoint that the run goes on from; its tensors are on the first rank alone.
        made_by: SHA-256 of the user's own code and files.
    """

    found: Checkpoint | None

    def __init__(self, config: Config, ranks: Ranks) -> None:
        config.require_files()
        if ranks.is_first:
            require_trackers(config.log)
        self.config, self.ranks = config, ranks
        self.run_dir: Path = config.resolved_run_dir
        self.config_hash = config_hash(config)
        self.device = choose_device(config.device, ranks.local_rank)
        if ranks.world > 1 and self.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"--device: expected cpu or cuda with several ranks, got {self.device.type}")
        # before data are read and the run directory is made
        self.precision = choose_precision(config, self.device)
        self.sharded = config.distributed.strategy == "fsdp"
        require_ranks(config, ranks)
        if config.optimizer.by_name:
            find_optimizer(config.optimizer, self.device)
        speed = choose_speed(config, cuda=self.device.type == "cuda", ranks=ranks.world)
        self.messages: list[str] = [] if speed.message is None else [speed.message]
        self._load_data()
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        choose_convolutions(self.device, deterministic=config.deterministic)
        torch.manual_seed(mix_seed(config.seed))
        self._find_checkpoint()
        self._build_model()
        self._find_code()
        if ranks.is_first:
            prepare_run_dir(config)
        self._build_batches()
        self.forward_flops = forward_flops(self.model, self.data.train.shape)
        other = self._objective.partner if self._teacher is None else self._teacher
        # of the network that a method asks or trains along, in the model's passes: an average of it has its size
        self.other_size = 1.0
        if other is not None and self.forward_flops:
            self.other_size = forward_flops(other, self.data.train.shape) / self.forward_flops
        # equal seeds give equal weights, but on processors of two kinds
        for network in (self.model, self._objective.partner):
            if network is not None:
                ranks.broadcast_(network.state_dict().values())
        self._build_step()

    def _announce(self, line: str) -> None:
        """At once: what is said takes a while."""
        if self.ranks.is_first:
            print(line, flush=True)

    def _load_data(self) -> None:
        config, attack = self.config, self.config.attack
        loading = data_loading(config.data, self.device).agreed(self.ranks)
        data = self.data = load_data(config.data, loading, self._announce)
        self.messages += [*data.notes, *label_notes(data, weighted=config.data.class_weights != "none")]
        # further balls have another flag
        balls = [("also", one.norm, one.epsilon) for one in evaluation_attacks(config)]
        balls[0] = ("epsilon", *balls[0][1:])
        if attack.stronger is not None:
            balls.append(("stronger-epsilon", attack.norm, attack.stronger.epsilon))
        for name, norm, epsilon in balls:
            try:
                # a ball is too large for images of a size that the configuration does not know
                ball(math.prod(data.train.shape), epsilon=epsilon, norm=norm, clip=(0.0, 1.0), l1=True)
            except ValueError as error:
                raise ConfigError(f"--attack.{str(error).replace('epsilon', name, 1)}") from None
        if config.deterministic and attack.has_l1 and self.device.type == "cuda":
            raise ConfigError("--deterministic: expected false with an attack in l1 on a GPU, whose sums have no order")
        self.messages += _doubts(config, data)
        self._extra = extra = None
        if config.data.extra is not None:
            images = load_extra(config.data.extra, like=data)
            self._extra = extra = place_extra(images, loading.agreed(self.ranks))
        self.fingerprints = fingerprints(config, data, None if extra is None else extra.fingerprint)
        self._class_weights = None
        if (weights := self.fingerprints.get("class_weights")) is not None:
            self._class_weights = torch.tensor(weights, device=self.device)
            self.messages.append(
                f"class weights from {min(weights):.4g} to {max(weights):.4g}, mean 1 over the training images; "
                "held-out accuracies weigh images by them, too"
            )
        loaders = [data.loader, "" if extra is None else extra.loader]
        given = [self.config_hash, *map(str, self.fingerprints.values()), *loaders]
        self.ranks.require_equal(given, "configuration and data", self.device)
        loader = "" if data.loader == "resident" else f"; loader {data.loader}"
        self.messages.append(
            f"{len(data.train):,} training, {len(data.held_out):,} held-out and {len(data.test):,} test images of "
            f"{len(data.class_names)} classes{loader}"
        )
        if config.global_batch_size > len(data.train) and extra is None:
            self.messages.append(
                f"--global-batch-size {config.global_batch_size}: there are fewer training images; every step takes all"
            )
        if extra is not None:
            self.messages.append(f"{len(extra.split):,} extra images, loader {extra.loader}")
        self._teacher = load_teacher(config, data, self.device, self.messages.append)

    def _find_checkpoint(self) -> None:
        """Read the newest sound checkpoint of this run, if there is one, on the first rank, and tell the others."""
        found = None
        if self.ranks.is_first:
            require_own_run_dir(self.config)
            found = checkpoint.load_latest(self.run_dir / CHECKPOINTS)
            if found is None and (self.run_dir / CONFIG_FILE).exists():
                self.messages.append(f"{self.run_dir} has no checkpoint: the run starts anew")
        if found is not None:
            before = described(found.state, found.path)
            require_same(found.state, self.fingerprints, self.config, self.data, before.class_names)
            if found.state.get("config_hash") not in known_hashes(self.config):
                raise CheckpointError(
                    f"{found.path}: was not written by this run; remove it, or choose another --run-dir"
                )
        state = self.ranks.broadcast_json(None if found is None else found.state, self.device)
        self.found = None if state is None else found or Checkpoint(tensors={}, state=state, path=self.run_dir)

    def _build_model(self) -> None:
        before = None if self.found is None else described(self.found.state, self.found.path)
        # before the run directory is made, as all that may be refused
        self._objective = objective_of(self.config, self.device, len(self.data.class_names), self.data.train.shape)
        if self._objective.uses_teacher != (self._teacher is not None):
            needs = "a run or weights" if self._objective.uses_teacher else "none"
            got = self.config.teacher.weights or "nothing"
            raise ConfigError(f"--teacher.weights: expected {needs} with --method {self.config.method}, got {got}")
        built = build_network(self.config, self.data, self.device, self.precision, before)
        self.model: nn.Module = built.model
        self.description, self._memory_format = built.description, built.memory_format
        self.messages += built.messages
        if (name := self._objective.partner_name) is not None:
            partner, told = build_partner(name, built, self.data, self.device)
            self._objective.partner = partner
            self.messages.append(told)
        if self.config.model.checkpoint_activations:
            checkpoint_activations_(built.model, self.data.train.shape, self.config.model.name)
        if self._objective.views > 1 and not self._objective.joint_views:
            # what the run starts from has one set
            try:
                add_auxiliary_(self.model)
            except ValueError as error:
                raise ConfigError(f"--model.name: {str(error).removeprefix('model: ')}") from None
        # before the run directory is made
        if (momentum := self.config.model.bn_momentum) is not None:
            try:
                set_momentum(self.model, momentum)
            except ValueError as error:
                raise ConfigError(f"--model.bn-momentum: {error}, got {momentum:g}") from None
        choice(self.model, self.config.awp.layers)
        if (layers := layers_with_rates(self.config, self.model)) is not None:
            count, optimizer = max(layers.values()) + 1, self.config.optimizer
            lowest = optimizer.lr * optimizer.layer_decay ** (count - 1)
            self.messages.append(f"learning rates from {lowest:.3g} to {optimizer.lr:.3g} over {count} layers")

    def _find_code(self) -> None:
        """What made this run; after the model was built, whose code may have imported more then."""
        before = None if self.found is None else said(self.found.state)
        self.made_by = made_by(self.config, before)
        given = [f"{part} {digest}" for part, digest in self.made_by.items()]
        self.ranks.require_equal(given, "own code and files", self.device)
        if before is not None:
            require_same_code(before, self.made_by, self.config)

    def _build_batches(self) -> None:
        config, data, extra = self.config, self.data, self._extra
        same = ("pad", "flip", "cutout", "cutmix", "mixup", "mixup_alpha", "rand_augment", "erase")
        same += ("policy", "policy_first", "policy_part", "rotate")
        augmentation = Augmentation(
            **{name: getattr(config.data, name) for name in same},
            fill=data.mean,
            erase_std=data.std,
            num_classes=len(data.class_names),
        )
        try:
            augmentation.require_fit(data.train, "name")
        except ValueError as error:
            raise ConfigError(f"--data.{error}") from None
        views = self._objective.views
        # a policy is that of further views alone
        first = augmentation if views == 1 else replace(augmentation, policy="none", policy_first=False)
        self.batches = Batches(
            data.train,
            first,
            views=[augmentation] * (views - 1),
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            rank=self.ranks.rank,
            ranks=self.ranks.world,
            extra=None if extra is None else extra.split,
            extra_fraction=config.data.extra_fraction,
            extra_replacement=config.data.extra_replacement,
            extra_alone=config.data.extra_alone,
            epoch_images=config.data.epoch_images,
            memory_format=self._memory_format,
        )

    def _build_step(self) -> None:
        config, attack = self.config, self.config.attack
        if self._teacher is not None:
            self._objective.teacher = WorkingModels(self._teacher, self.precision)
        self.awp_step = build_step(
            config,
            self.model,
            self.ranks,
            self.precision,
            self.batches.sizes[0],
            self._class_weights,
            self._objective,
        )
        self.optimizer = self.awp_step.update.optimizer
        if self.awp_step.awp is not None:
            self.messages.append(perturbed_message(config.title, self.awp_step.awp))
        if attack.noise:
            copies = "a noisy copy" if attack.noise_samples == 1 else f"{attack.noise_samples} noisy copies"
            self.messages.append(f"{copies} of every training image, for awp certify --sigma {attack.noise:g}")
        if attack.ramp != "none":
            self.messages.append(
                f"epsilon grows in proportion to the epoch, to {attack.epsilon} in epoch {config.epochs}, and the "
                "attack's steps with it; accuracies under attack in training are those of the epoch's own ball"
            )
        if (note := self._objective.attack_note) is not None:
            self.messages.append(note)
        if attack.step_warmup:
            self.messages.append(
                f"the attack's steps grow from 0 in epoch 1 to {attack.step_size} in epoch {attack.step_warmup + 1}; "
                "accuracies under attack in training are those of the epoch's own steps"
            )
        if (stronger := attack.stronger) is not None:
            self.messages.append(
                f"from epoch {stronger.after + 1} on training attacks in epsilon {attack.stronger_epsilon} by "
                f"{stronger.steps} steps; accuracies under attack in training are of that ball then, all others of "
                f"epsilon {attack.epsilon}"
            )
        self.step = capture_step(config, self.awp_step)
        self.free = None
        if attack.fast == "free":
            self.step = self.free = FreeStep(
                self.awp_step, self.step, replays=attack.replays, memory_format=self._memory_format
            )
        self.average = None
        if config.average.kind != "none":
            twin = None
            if self.sharded:
                # shards cannot be copied
                twin = self.description.build().to(self.device)
                distribute_(config, twin, self.ranks, self.precision)
            self.average = WeightAverage(self.model, config.average, config.epochs, steps=len(self.batches), twin=twin)
            self.average.follow(self.optimizer)
            self.awp_step.update.average = self.average
            self._objective.average = self.average.model
        self.schedule = Schedule(
            config=config, steps=len(self.batches), attack=training_attack(attack), cheap=cheap_attack(attack)
        )

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of a model's tensors on the CPU, without shards or second sets, on every rank; all have to call it."""
        return gather(base_set(model.state_dict()), every_rank=True)
