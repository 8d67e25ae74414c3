"""The training step that a configuration describes."""

from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from awp_engine.config import AwpConfig, Config, ConfigError
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.sharding import shard
from awp_engine.models.batch_norm import synchronize
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.cuda_graph import GraphedStep
from awp_engine.step.objectives import build_objective
from awp_engine.step.precision import Copies, choose_precision
from awp_engine.step.training_step import TrainingStep
from awp_kernels import AdversarialWeightPerturbation, asam, sam


def build_step(config: Config, model: nn.Module, ranks: Ranks | None = None) -> TrainingStep:
    """The step for `model`, with an optimizer and working copies of its own.

    Args:
        config: the run's.
        model: in train mode, on its device and in its memory format; equal on all ranks.
        ranks: that train together; by default this process alone.

    Raises:
        ConfigError: a precision that the device does not have, or shards of one rank.
    """
    ranks = ranks or Ranks()
    device = next(model.parameters()).device
    precision = choose_precision(config, device)
    if config.distributed.sync_batch_norm:
        synchronize(model)
    sharded = config.distributed.strategy == "fsdp"
    if sharded:
        shard_model(config, model, ranks)
    copies = Copies(
        model,
        precision,
        shared_ascent=config.awp.gamma > 0 and config.awp.ascent == "shared",
        # on the CPU normalisation is fused with its activation, and as cheap
        fold=device.type == "cuda" and config.attack.bn_mode == "eval",
        sharded=sharded,
    )
    return TrainingStep(
        model=model,
        optimizer=build_optimizer(model, config.optimizer, working=copies.updated),
        objective=build_objective(config.method, beta=config.beta, label_smoothing=config.label_smoothing),
        attack=config.attack,
        awp=_weight_perturbation(config.awp, model, copies.working),
        options=config.awp,
        clip_norm=config.optimizer.clip_norm,
        copies=copies,
        compile=config.compile,
        ranks=ranks,
        distributed=config.distributed,
        micro_batch_size=config.micro_batch_size,
    )


def shard_model(config: Config, model: nn.Module, ranks: Ranks) -> None:
    """Leave every rank its share of the parameters of `model`, in place.

    Raises:
        ConfigError: there is one rank.
    """
    if ranks.world == 1:
        raise ConfigError("--distributed.strategy: expected ddp for one rank, got 'fsdp'; torchrun starts several")
    device = next(model.parameters()).device
    param_dtype = choose_precision(config, device).descent
    shard(model, init_device_mesh(device.type, (ranks.world,)), param_dtype=param_dtype)


def capture_step(config: Config, step: TrainingStep) -> TrainingStep | GraphedStep:
    """`step`, captured in CUDA graphs where device and settings allow.

    Raises:
        ConfigError: graphs with several ranks, whose collectives are not captured.
    """
    if config.cuda_graphs and step.ranks.world > 1:
        raise ConfigError("--cuda-graphs: serves one rank; leave it out when torchrun starts several")
    device = next(step.model.parameters()).device
    return GraphedStep(step) if device.type == "cuda" and config.cuda_graphs and step.capturable else step


def _weight_perturbation(
    awp: AwpConfig, model: nn.Module, working: nn.Module | None
) -> AdversarialWeightPerturbation | None:
    if awp.gamma == 0:
        return None
    if awp.scale == "relative":
        return AdversarialWeightPerturbation(model, awp.gamma, scope=awp.scope, working=working)
    sharpness_aware = sam if awp.scale == "absolute" else asam
    return sharpness_aware(model, awp.gamma, scope=awp.scope)
