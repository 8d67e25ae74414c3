"""Adversarial weight perturbation for any trainer."""

import functools
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from awp_kernels import _checks
from awp_kernels._ball import round_toward_zero, within, working_dtype
from awp_kernels._block import Block
from awp_kernels._leftover import Leftover
from awp_kernels._sharded import Shards, is_sharded, local, local_norms
from awp_kernels.perturb import perturb_, perturb_into_
from awp_kernels.restore import restore_


def is_perturbed(name: str, parameter: Tensor) -> bool:
    """The paper's choice: tensors with two or more dimensions whose name contains "weight"."""
    return parameter.ndim > 1 and "weight" in name


def every_parameter(name: str, parameter: Tensor) -> bool:
    """All trainable parameters, as SAM and ASAM perturb."""
    return True


def is_weight(name: str, parameter: Tensor) -> bool:
    """ASAM's choice of what is normalised element by element: parameters whose name contains "weight"."""
    return "weight" in name


# any number > 0: it cancels
_EPS_OF_SHARDS = 1e-20
# of gamma and the like: float32 and float16 hold little more of a weight
_LARGEST = 1e6
# of putting weights back, if interrupts keep coming
_ATTEMPTS = 100
# backward passes that began on zeros, after which a loop is believed to set its gradients to zero
_BELIEVED = 3


@dataclass
class _Moved:
    """Weights that are moved, or about to be.

    Attributes:
        names: which ones.
        thread: that moved them.
        handled: the exception that was being handled then.
        own_gradients: whether they follow the parameters' `.grad`.
        versions: of the memory that was moved and of the masters', by name; None while they are being moved.
        written: what was written to since, once that was looked for.
    """

    names: list[str]
    thread: threading.Thread
    handled: BaseException | None
    own_gradients: bool
    versions: dict[str, tuple[int, int]] | None = None
    written: list[str] | None = None


# whose weights are moved now
_MOVED: dict[int, "AdversarialWeightPerturbation"] = {}


def _refuse_steps(optimizer: Optimizer, arguments: Any, options: Any) -> None:
    for perturbation in list(_MOVED.values()):
        perturbation._refuse_step(optimizer)


@functools.cache
def _watch_optimizers() -> None:
    """Before every step of every optimizer; version counters do not show those of torch's fused ones."""
    register_optimizer_step_pre_hook(_refuse_steps)


class AdversarialWeightPerturbation:
    """Moves a model's weights along their gradient for one forward and backward pass, and back.

    By default to w + gamma * ||w|| * g / ||g||, tensor by tensor, as AWP does; `sam` and `asam` configure it as those
    methods do, and `bound` keeps every weight within a fraction of itself, as fine-tuners of language models do.

    Between the ascent's backward pass and the optimizer's step:

        optimizer.zero_grad()
        loss_fn(model(x_adv), y).backward()          # ascent gradient
        with awp.perturbed():                        # gradients cleared on entry
            loss_fn(model(x_adv), y).backward()      # descent gradient
        optimizer.step()                             # weights are back, bit for bit

    The model is looked at anew at every perturbation: layers may be frozen, replaced or converted in between. What
    writes to the weights inside the block, where it would be undone, is refused: steps of a torch.optim.Optimizer
    before they are taken, other writes on leaving, seen by the tensors' version counters (which writes to
    `weight.data` in place do not move; of shards, parameters that were replaced are not seen either). So is an ascent
    whose gradient was added to what the last block's descent has left (not seen for shards, nor once three backward
    passes began on gradients that were set to zero in place). One object serves one thread.

    Works with loss scaling (the direction does not depend on the scale, and one that is not finite is not followed:
    the descent then runs at w, see `found_inf`), with gradient accumulation (accumulate the
    ascent, then the descent inside the block) and under autocast (its cache of casts is cleared).

    Several ascent steps, each from where the one before has led:

        loss_fn(model(x_adv), y).backward()
        with awp.perturbed():
            for _ in range(steps - 1):
                loss_fn(model(x_adv), y).backward()
                awp.perturb_(again=True)
            loss_fn(model(x_adv), y).backward()
        optimizer.step()

    With `working`, a second module of the same parameter names whose weights may be stored in 16 bits, the masters in
    `model` are never written: gradients are those of `working`, which takes w + v and has to get its weights anew from
    the masters after the update, as `awp_kernels.SGD(..., working=...)` does, or by `restore_`.

    Parameters may be sharded by FSDP2's `fully_shard` (make this object afterwards): each rank moves its own rows, by
    norms over the rows of all ranks, which take one all-reduce of a vector. Every rank has to perturb at the same time.

    Args:
        model: any module; its parameters may be on any one device.
        gamma: length of the perturbation, >= 0: a fraction of ||w|| for scale "relative", else see `perturb_`.
        scope: what a norm is taken over: "layer" (the paper's), "global" or "filter", as for `perturb_`.
        scale: "relative" (the paper's), "absolute" (SAM's) or "elementwise" (ASAM's), as for `perturb_`.
        eta: added to |w| for scale "elementwise", >= 0.
        adaptive: for scale "elementwise", which parameters are normalised by |w| + eta, by name and tensor; by
            default all.
        bound: if given, every weight stays within bound * |w| of its own value w, >= 0.
        eps: added to ||g||.
        select: which parameters move, by name and tensor; by default `is_perturbed`.
        working: takes the perturbed weights in place of `model`; bfloat16 is refused, whose rounding would be 23% to
            46% of the perturbation at the paper's gamma.

    Attributes:
        found_inf: float32 scalar on the device, None before the first perturbation: 1 if a direction of the last one
            (or of a step with `again` after it) was not finite, and so was not followed, else 0; of shards on all ranks
            alike, else this process's.
        weight_norms: their norms, fp64, if they are known (of a sharded model, this rank's): `take_weight_norms`.
        factor: on gamma, for whoever decides it on the device: a float64 scalar there, >= 0; None: gamma as it is. For
            scale "relative", and not for scope "filter".

    Raises:
        ValueError: a number out of range, an unknown scope or scale, a model without a parameter to perturb, with one
            that is lazy, on the meta device, sparse, complex, or not dense in memory, or with some sharded otherwise
            than by `fully_shard`, or a working copy that lacks one, stores it in bfloat16, or belongs to a sharded
            model.

    Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        gamma: float,
        *,
        scope: str = "layer",
        scale: str = "relative",
        eta: float = 0.0,
        adaptive: Callable[[str, Tensor], bool] | None = None,
        bound: float | None = None,
        eps: float = 1e-20,
        select: Callable[[str, Tensor], bool] = is_perturbed,
        working: nn.Module | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model, self.gamma, self.scope, self.eps = model, gamma, scope, eps
        self.scale, self.eta, self.bound, self.working = scale, eta, bound, working
        self._select, self._adaptive_choice = select, adaptive
        self.factor: Tensor | None = None
        self._check_options()
        self.weight_norms: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._norms_at: list[int] = []
        self._saved: dict[str, Tensor] = {}
        self._found: dict[str, nn.Parameter] = {}
        self._shards: Shards | None = None
        # what this rank holds of them: all, where the model is not sharded
        self._rows: dict[str, Tensor] = {}
        self._measured: dict[str, Tensor] = {}
        self._lock = threading.RLock()
        self._moved: _Moved | None = None
        self._leftover: Leftover | None = None
        self._began_on_zeros = 0
        self._look()

    def _check_options(self) -> None:
        """Options are attributes, which a schedule may set."""
        _checks.finite("gamma", self.gamma, minimum=0, maximum=_LARGEST)
        _checks.finite("eps", self.eps, minimum=0, maximum=_LARGEST)
        _checks.one_of("scope", self.scope, _checks.SCOPES)
        _checks.scaling(self.scale, self.eta, self.bound, maximum=_LARGEST)
        if self.factor is not None and (self.scale != "relative" or self.scope == "filter"):
            raise ValueError(
                f"factor: expected None for scale {self.scale!r} and scope {self.scope!r}; it takes 'relative', and "
                "'layer' or 'global'"
            )
        if self._adaptive_choice is not None and self.scale != "elementwise":
            raise ValueError(f"adaptive: scale 'elementwise' alone takes it, got scale {self.scale!r}")

    def _find(self) -> dict[str, nn.Parameter]:
        found = {}
        # named_parameters lists a tied weight once
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if is_lazy(parameter):
                raise ValueError(
                    f"model: {name} belongs to a lazy layer that is not initialised; pass a batch through first"
                )
            if self._select(name, parameter):
                _check_weight(name, parameter)
                found[name] = parameter
        if not found:
            raise ValueError(
                "model: no trainable parameter that `select` takes (by default ndim > 1 and 'weight' in the name)"
            )
        return found

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is perturbed, by name, in the model's order; of the model as it is now."""
        return dict(self._found) if self._moved is not None else self._find()

    @property
    def _active(self) -> list[str]:
        return [] if self._moved is None else self._moved.names

    def _look(self) -> None:
        """Take the model as it is now: layers may have been frozen, replaced, or moved to another device."""
        if self._shards is not None and not all(map(is_sharded, self.model.parameters())):
            raise RuntimeError("model: its shards are gathered, and passes would not see them move: reshard() first")
        found = self._find()
        # whose gradients are followed, and what takes w + v
        sources = found if self.working is None else self._found_in(self.working, found)
        if [*map(id, found.values())] != [*map(id, self._found.values())] or found.keys() != self._found.keys():
            choice = self._adaptive_choice
            self._shards = self._sharding(found)
            # empty where nothing is normalised element by element
            self._adaptive = {name: choice(name, p) for name, p in found.items()} if choice else {}
            self._saved = {name: saved for name, saved in self._saved.items() if name in found}
            self.weight_norms = None
        self._found, self._sources = found, sources
        # aliases: they keep the memory that moves, whatever becomes of the parameters
        rows = [p.detach() for p in found.values()] if self._shards is None else local(found.values())
        self._rows = dict(zip(found, rows, strict=True))
        self._targets = self._rows if sources is found else {name: p.detach() for name, p in sources.items()}
        if [row._version for row in self._rows.values()] != self._norms_at:
            self.weight_norms = None

    def _sharding(self, found: Mapping[str, nn.Parameter]) -> Shards | None:
        """How the model is sharded; None: it is not."""
        everything = list(self.model.parameters())
        if not any(map(is_sharded, everything)):
            return None
        if self.working is not None:
            raise ValueError(
                "working: not for a sharded model; fully_shard's MixedPrecisionPolicy(param_dtype=...) makes 16-bit "
                "weights of w + v"
            )
        for name, parameter in found.items():
            if self.scale == "elementwise" and working_dtype(parameter.dtype) != parameter.dtype:
                raise ValueError(
                    f"model: {name} is sharded {parameter.dtype}; scale 'elementwise' takes float32 or float64 shards"
                )
        return Shards("model", everything)

    @torch.no_grad()
    def take_weight_norms(self, stepped: Sequence[tuple[Sequence[Tensor], Tensor]]) -> None:
        """Be told the weights' norms, so that the next perturbation need not read the weights for them.

        They hold until the weights are seen to change again; copied, always into the same memory.

        Args:
            stepped: `awp_kernels.SGD.weight_norms`; unless an entry begins with just the perturbed parameters, nothing
                is known.
        """
        weights = list(self._found.values())
        for parameters, norms in stepped:
            # strict=False: biases and normalisation may follow
            if len(parameters) >= len(weights) and all(a is b for a, b in zip(parameters, weights, strict=False)):
                if self.weight_norms is None:
                    self.weight_norms = torch.empty_like(norms[: len(weights)])
                self.weight_norms.copy_(norms[: len(weights)])
                self._norms_at = [row._version for row in local(weights)]
                return
        self.weight_norms = None

    def _found_in(self, working: nn.Module, masters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        found = dict(working.named_parameters())
        for name, parameter in masters.items():
            if name not in found or found[name].shape != parameter.shape:
                raise ValueError(f"working: expected a parameter {name} of shape {tuple(parameter.shape)}")
            if found[name].dtype == torch.bfloat16 and parameter.dtype != torch.bfloat16:
                raise ValueError(
                    f"working: {name} is bfloat16, whose rounding is 23% to 46% of a perturbation; use float16"
                )
        return {name: found[name] for name in masters}

    def _groups(self, gradients: Mapping[str, Tensor]) -> list[list[str]]:
        """Names of parameters that have a gradient, by dtypes: an operation takes one dtype a list."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, gradient in gradients.items():
            key = (self._rows[name].dtype, self._targets[name].dtype, gradient.dtype, name in self._measured)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _measure(self, shards: Shards, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Finds how far the rows move, measured over all ranks, and their gradients, which are returned.

        An operation sees this rank's rows only. It multiplies a gradient h by gamma * length / (||h|| + eps), ||h|| of
        these rows: a `length` that holds ||h|| + eps as a factor leaves what was measured over all ranks.
        """
        for name, gradient in gradients.items():
            shards.check(f"gradient of {name}", gradient)
        directions = {name: gradient.to_local() for name, gradient in gradients.items()}  # type: ignore
        # filters are whole within a rank, so that nothing is to be measured over ranks
        names = [n for n, p in self._found.items() if self.scope != "filter" or p.ndim < 2]
        self._measured = {}
        if not names:
            return directions
        squares = self._rows[names[0]].new_zeros((2, len(names)), dtype=torch.float64)
        moved = [name for name in names if name in directions]
        # on every rank the same vector, even if one lacks a gradient
        where = torch.tensor([names.index(name) for name in moved], device=squares.device, dtype=torch.int64)
        if self.scale == "relative" and moved:
            known = self.weight_norms if not self._active and len(moved) == len(self._found) else None
            weight_norms = local_norms([self._rows[name] for name in moved]) if known is None else known
            squares[0, where] = weight_norms.square()
        scaled = [directions[name] for name in moved]
        if self.scale == "elementwise":
            for index, name in enumerate(moved):
                if self._adaptive.get(name, True):
                    row = self._rows[name]
                    dtype = working_dtype(row.dtype)
                    factor = row.to(dtype).abs() + torch.tensor(self.eta, dtype=dtype).item()
                    scaled[index] = directions[name].to(dtype) * factor
                    directions[name] = scaled[index] * factor
        if moved:
            squares[1, where] = local_norms(scaled).square()
        shards.add_up_(squares)
        if not moved:
            return directions
        if self.scope == "global":
            squares = squares.sum(1, keepdim=True).expand_as(squares)
        weight_norms, grad_norms = squares.sqrt().unbind()
        lengths = (weight_norms if self.scale == "relative" else 1.0) / (grad_norms + self.eps)
        # 0 or NaN where a gradient is not finite on some rank, so that it is followed on none
        lengths = lengths[where] * (local_norms([directions[name] for name in moved]) + _EPS_OF_SHARDS)
        self._measured = dict(zip(moved, lengths.unbind(), strict=True))
        return directions

    def perturb_(self, *, again: bool = False, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Save the weights, move them along their gradients, and clear all gradients.

        Where a gradient is not finite nothing moves that shares its norm (see `perturb_`), and `found_inf` says so.

        Args:
            again: take a further step from where the weights are, by a length that is measured there; `restore_`
                brings back what the first step saved, and a bound holds around that.
            gradients: to follow in place of the parameters' own `.grad`, by name; of any floating-point dtype.

        Raises:
            RuntimeError: perturbed already without `again`, not yet perturbed with it, `again` with a working copy or
                after weights were written to, no gradient to follow, gradients that hold the last block's descent, or
                a sharded model while its shards are gathered.
            ValueError: a number, a model or a working copy that has come to be one of those that the class refuses.
        """
        grad_mode = torch.is_grad_enabled()
        with self._lock:
            try:
                # torch.no_grad() ends by a Python function, which an interrupt could skip
                torch._C._set_grad_enabled(False)
                self._perturb(again, gradients)
            finally:
                torch._C._set_grad_enabled(grad_mode)

    def _perturb(self, again: bool, gradients: Mapping[str, Tensor] | None) -> None:
        moved, own_gradients = self._moved, gradients is None
        if moved is not None and moved.thread is not threading.current_thread():
            raise RuntimeError("weights are perturbed by another thread: make an object and a model for each")
        if moved is not None and not again:
            raise RuntimeError("weights are perturbed already: leave the perturbed() block first, or pass again=True")
        if again and moved is None:
            raise RuntimeError(
                "weights are not perturbed: again=True takes a further step inside the perturbed() block"
            )
        if again and self.working is not None:
            raise RuntimeError("again=True: not with a working copy; add the ascents' gradients up and pass the sum")
        self._check_options()
        if moved is None:
            self._look()
        elif written := self._written(moved):
            raise RuntimeError(_undone(written))
        if gradients is None:
            self._refuse_leftover()
            gradients = {name: p.grad for name, p in self._sources.items() if p.grad is not None}
        elif strange := gradients.keys() - self._found.keys():
            raise ValueError(f"gradients: {min(strange)} is not a parameter that is perturbed")
        if self._shards is not None:
            gradients = self._measure(self._shards, gradients)
        groups = self._groups(gradients)
        if not groups:
            raise RuntimeError("no gradients to perturb along: call backward() on the ascent loss first")
        if self.scope == "global" and len(groups) > 1:
            raise RuntimeError("scope 'global' needs all perturbed parameters to be of one dtype")
        found_inf = self._flag(next(iter(gradients.values())).device)
        if not again:
            found_inf.zero_()
        calls = [self._call(names, gradients, None if again else self.bound) for names in groups]
        # a further step may reach weights that had no gradient before
        first = [name for name in gradients if moved is None or name not in moved.names]
        if first and self.working is None:
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                [self._buffer(name) for name in first], [self._rows[name] for name in first]
            )
        # with their bits saved they count as moved before they are, so that whatever is raised brings them back
        if moved is None:
            _watch_optimizers()
            moved = _Moved(first, threading.current_thread(), sys.exc_info()[1], own_gradients)
            self._moved = moved
        else:
            moved.versions, moved.names = None, moved.names + first
        try:
            _MOVED[id(self)] = self
            for call in calls:
                call()
            if self._shards is not None:
                # the rank that holds what is not finite says so
                self._shards.add_up_(found_inf)
                found_inf.clamp_(max=1.0)
            if again and self.bound is not None:
                self._clamp(gradients)
            for module in (self.model, self.working):
                for parameter in () if module is None else module.parameters():
                    parameter.grad = None
            if self._leftover is not None:
                self._leftover.drop()
                self._leftover = None
            # casts made before the move would hide it inside an autocast block
            torch.clear_autocast_cache()
            moved.versions = {name: self._versions(name) for name in moved.names}
        except BaseException:
            self._restore(quiet=True)
            raise

    def _flag(self, device: torch.device) -> Tensor:
        """`found_inf`, in the same memory from step to step, as captured graphs need it."""
        if self.found_inf is None or self.found_inf.device != device:
            self.found_inf = torch.zeros((), device=device)
        return self.found_inf

    def _buffer(self, name: str) -> Tensor:
        """Where a weight's bits are kept; the same memory from step to step."""
        weight, saved = self._rows[name], self._saved.get(name)
        layout = (weight.dtype, weight.device, weight.shape, weight.stride())
        if saved is None or (saved.dtype, saved.device, saved.shape, saved.stride()) != layout:
            saved = self._saved[name] = torch.empty_like(weight)
        return saved

    def _options(self, names: list[str], bound: float | None) -> dict[str, Any]:
        if names[0] in self._measured:
            lengths = torch.stack([self._measured[name] for name in names])
            lengths = lengths if self.factor is None else lengths * self.factor
            return {"weight_norms": lengths, "bound": bound, "eps": _EPS_OF_SHARDS, "found_inf": self.found_inf}
        known = self.scale == "relative" and self.scope != "filter" and len(names) == len(self._found)
        norms = self.weight_norms if known and not self._active else None
        if self.factor is not None:
            # a length is gamma * ||w||, and operations take gamma from the host
            norms = (local_norms([self._rows[name] for name in names]) if norms is None else norms) * self.factor
        return {
            "weight_norms": norms,
            "scope": self.scope,
            "scale": self.scale,
            "eta": self.eta,
            "adaptive": [self._adaptive[name] for name in names] if self._adaptive else None,
            "bound": bound,
            "eps": self.eps,
            "found_inf": self.found_inf,
        }

    def _call(self, names: list[str], gradients: Mapping[str, Tensor], bound: float | None) -> Callable[[], Tensor]:
        """What moves the weights: all that can be refused before they move is done."""
        weights, options = [self._rows[name] for name in names], self._options(names, bound)
        if self.working is None:
            grads = [gradients[name].to(weight.dtype) for name, weight in zip(names, weights, strict=True)]
            return functools.partial(perturb_, weights, grads, self.gamma, **options)
        out, grads = [self._targets[name] for name in names], [gradients[name] for name in names]
        return functools.partial(perturb_into_, out, weights, grads, self.gamma, **options)

    def _clamp(self, names: Iterable[str]) -> None:
        """The bound of several steps is around the start."""
        for name in names:
            weight, saved = self._rows[name], self._saved[name]
            dtype = working_dtype(weight.dtype)
            weight.copy_(within(weight.to(dtype), saved.to(dtype), round_toward_zero(self.bound, dtype)))

    def _versions(self, name: str) -> tuple[int, int]:
        return self._targets[name]._version, self._rows[name]._version

    def _written(self, moved: _Moved) -> list[str]:
        """Weights that something else was written to after they were moved: it would be undone."""
        if moved.versions is None:
            return []
        present = {id(p) for p in (self.working or self.model).parameters()}
        written = []
        for name in moved.names:
            (target, master), (target_now, master_now) = moved.versions[name], self._versions(name)
            # an update of the masters writes their copy as well, and it stays
            changed = target_now != target and (self.working is None or master_now == master)
            # module.parameters() gives other tensors while shards are gathered
            replaced = self._shards is None and (self._reassigned(name) or id(self._sources[name]) not in present)
            if changed or replaced:
                written.append(name)
        return written

    def _reassigned(self, name: str) -> bool:
        return self._sources[name].data_ptr() != self._targets[name].data_ptr()

    def _refuse_step(self, optimizer: Optimizer) -> None:
        inside = {id(self._sources[name]): name for name in self._active}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in inside:
                    raise RuntimeError(_undone([inside[id(parameter)]]))

    def _refuse_leftover(self) -> None:
        left = self._leftover
        if left is None or not any(left.parameter is parameter for parameter in self._sources.values()):
            return
        if left.remains:
            raise RuntimeError(
                "gradients: they hold the last perturbed() block's descent; zero_grad() before the ascent, and of "
                "several micro-batches take all ascents first, then all descents in one block"
            )
        self._began_on_zeros += left.zeroed

    def restore_(self) -> None:
        """Put the weights back, bit for bit (a working copy: from the masters); nothing happens if none is moved.

        May be called again after it was interrupted, and as often as one likes.

        Raises:
            RuntimeError: weights were written to since they were moved, which is undone (not raised while another
                exception is on its way); or another thread moved them, and lives.
        """
        moved = self._moved
        if moved is None:
            return
        if moved.thread is not threading.current_thread() and moved.thread.is_alive():
            raise RuntimeError("weights are perturbed by another thread, which has to restore them")
        self._restore(quiet=sys.exc_info()[1] is not moved.handled)

    def _restore(self, *, quiet: bool) -> None:
        grad_mode, moved, raised = torch.is_grad_enabled(), self._moved, None
        try:
            for _ in range(_ATTEMPTS):
                try:
                    with self._lock:
                        if moved is not None and moved is self._moved:
                            self._put_back(moved)
                    break
                # whatever interrupted it is raised afterwards
                except BaseException as error:
                    raised = raised or error
        finally:
            torch._C._set_grad_enabled(grad_mode)
        if raised is not None:
            raise raised
        if moved is not None and moved.written and not quiet:
            raise RuntimeError(_undone(moved.written))

    def _put_back(self, moved: _Moved) -> None:
        if moved.written is None:
            # once: what follows writes, too
            moved.written = self._written(moved)
        sources = self._saved if self.working is None else self._rows
        groups: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
        for name in moved.names:
            groups.setdefault((self._targets[name].dtype, sources[name].dtype), []).append(name)
        for (dtype, source_dtype), names in groups.items():
            targets = [self._targets[name] for name in names]
            originals = [sources[name] for name in names]
            if dtype == source_dtype:
                restore_(targets, originals)
            else:
                torch._foreach_copy_(targets, originals)  # pyright: ignore[reportPrivateImportUsage]
        if self._shards is None:
            for name in moved.names:
                if self._reassigned(name):
                    self._sources[name].data = self._targets[name]
        if not moved.written:
            # the same bits again
            self._norms_at = [row._version for row in self._rows.values()]
        if moved.own_gradients and self._shards is None and self._began_on_zeros < _BELIEVED:
            left = [p for p in self._sources.values() if p.grad is not None and p.grad.layout == torch.strided]
            self._leftover = Leftover(left[-1]) if left else None
        self.forget_()

    def forget_(self) -> None:
        """Say that the weights are back by other means: an update that wrote the working copy anew."""
        torch.clear_autocast_cache()
        _MOVED.pop(id(self), None)
        self._moved = None

    def perturbed(self) -> Block:
        """A block with w + v in place of w; on leaving it, also by an exception or an interrupt, w is back bit for bit.

        What is read of the model inside it, such as a state dictionary or a copy, is w + v.

        Raises:
            RuntimeError: as `perturb_` does on entry; on leaving, if weights were written to inside the block, which
                is undone, unless another exception is on its way.
        """
        return Block(self._inside)

    def _inside(self) -> Generator[None]:
        before, handled = self._moved, sys.exc_info()[1]
        try:
            self.perturb_()
            yield
        except GeneratorExit as leaving:
            self._leave(before, quiet=leaving.__context__ is not handled)
        finally:
            # if an interrupt came between the lines above
            self._leave(before, quiet=True)

    def _leave(self, before: _Moved | None, *, quiet: bool) -> None:
        """Ends a block, but not one around it, or another thread's."""
        moved = self._moved
        if moved is not None and moved is not before and moved.thread is threading.current_thread():
            self._restore(quiet=quiet)

    def __getstate__(self) -> dict[str, Any]:
        if self._moved is not None:
            raise RuntimeError("weights are perturbed: copy or pickle after the perturbed() block")
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_leftover", "_saved")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock(), _leftover=None, _saved={})

    @torch.no_grad()
    def displacement(self) -> dict[str, Tensor]:
        """What the weights were moved by, inside `perturbed()`: name to tensor of the weight's shape."""
        if self.working is None:
            moved = {name: self._rows[name] - self._saved[name] for name in self._active}
            if self._shards is None:
                return moved
            return {name: self._shards.joined(rows, self._found[name]) for name, rows in moved.items()}
        return {name: self._targets[name] - self._rows[name] for name in self._active}


def _check_weight(name: str, parameter: Tensor) -> None:
    """Refuse what cannot be moved.

    Raises:
        ValueError: named by parameter.
    """
    if parameter.is_meta:
        raise ValueError(f"model: {name} is on the meta device, without values; initialise it first")
    if parameter.dtype not in _checks.FLOATING or parameter.layout != torch.strided:
        kind = parameter.dtype if parameter.layout == torch.strided else parameter.layout
        raise ValueError(
            f"model: {name} is {kind}; expected dense float64, float32, float16 or bfloat16; leave it out by `select`"
        )
    if not is_sharded(parameter) and not _checks.dense(parameter):
        raise ValueError(
            f"model: {name} has gaps or shares elements (strides {parameter.stride()}); make it contiguous(), "
            "or leave it out by `select`"
        )


def _undone(names: list[str]) -> str:
    return (
        f"{names[0]}: written to while perturbed, by optimizer.step() or the like; that is undone on leaving the "
        "perturbed() block: step after the block"
    )


def sam(
    model: nn.Module,
    rho: float = 0.05,
    *,
    scope: str = "global",
    bound: float | None = None,
    eps: float = 1e-12,
    select: Callable[[str, Tensor], bool] = every_parameter,
) -> AdversarialWeightPerturbation:
    """Sharpness-aware minimisation: every parameter moves by rho * g / ||g||, one norm over all of them.

        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        with perturbation.perturbed():
            loss_fn(model(x), y).backward()
        optimizer.step()

    Args:
        model: any module; its trainable parameters are of one dtype and on one device.
        rho: length of the perturbation, in the units of the weights, >= 0.
        scope: what the norm is taken over; the paper's is "global".
        bound: as for `AdversarialWeightPerturbation`.
        eps: added to ||g||; 1e-12 as public code has it.
        select: which parameters move, by name and tensor; by default all that are trainable.

    Raises:
        ValueError: a number out of range, or a model without a trainable parameter.

    Source: Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization,
    ICLR 2021.
    """
    _checks.finite("rho", rho, minimum=0, maximum=_LARGEST)
    return AdversarialWeightPerturbation(model, rho, scope=scope, scale="absolute", bound=bound, eps=eps, select=select)


def asam(
    model: nn.Module,
    rho: float = 0.5,
    eta: float = 0.01,
    *,
    adaptive: Callable[[str, Tensor], bool] = is_weight,
    scope: str = "global",
    bound: float | None = None,
    eps: float = 1e-16,
    select: Callable[[str, Tensor], bool] = every_parameter,
) -> AdversarialWeightPerturbation:
    """Adaptive SAM: every parameter moves by rho * T^2 g / ||T g||, one norm over all of them.

    As in the authors' code, T = |w| + eta for parameters whose name contains "weight" (normalisation layers' too), and
    T = 1 for all others, such as biases; pass `adaptive=every_parameter` for T = |w| + eta throughout, as the paper
    writes it, with eta=0 for the variant without eta.

    Args:
        model: any module; its trainable parameters are of one dtype and on one device.
        rho: length of T^-1 v, >= 0.
        eta: added to |w|, in the units of the weights, >= 0.
        adaptive: for which parameters T = |w| + eta, by name and tensor; for the others T = 1.
        scope: what the norm is taken over; the paper's is "global".
        bound: as for `AdversarialWeightPerturbation`.
        eps: added to ||T g||; 1e-16 as in the authors' code.
        select: which parameters move, by name and tensor; by default all that are trainable.

    Raises:
        ValueError: a number out of range, or a model without a trainable parameter.

    Source: Kwon, Kim, Park, Choi: ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
    Neural Networks, ICML 2021.
    """
    _checks.finite("rho", rho, minimum=0, maximum=_LARGEST)
    return AdversarialWeightPerturbation(
        model,
        rho,
        scope=scope,
        scale="elementwise",
        eta=eta,
        adaptive=adaptive,
        bound=bound,
        eps=eps,
        select=select,
    )
