"""Adversarial weight perturbation for any trainer."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from awp_kernels import _checks
from awp_kernels._ball import round_toward_zero, within, working_dtype
from awp_kernels._sharded import Shards, is_sharded, local_norms
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


class AdversarialWeightPerturbation:
    """Moves a model's weights along their gradient for one forward and backward pass, and back.

    By default to w + gamma * ||w|| * g / ||g||, tensor by tensor, as AWP does; `sam` and `asam` configure it as those
    methods do, and `bound` keeps every weight within a fraction of itself, as fine-tuners of language models do.

    Between the ascent's backward pass and the optimizer's step:

        loss_fn(model(x_adv), y).backward()          # ascent gradient
        with awp.perturbed():                        # gradients cleared on entry
            loss_fn(model(x_adv), y).backward()      # descent gradient
        optimizer.step()                             # weights are back, bit for bit

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
        parameters: what is perturbed, by name, in the model's order.
        found_inf: float32 scalar on the device, None before the first perturbation: 1 if a direction of the last one
            (or of a step with `again` after it) was not finite, and so was not followed, else 0; on all ranks alike.
        weight_norms: their norms, fp64, if they are known (of a sharded model, this rank's): `take_weight_norms`.

    Raises:
        ValueError: a number out of range, an unknown scope or scale, a model without a parameter to perturb or
            with some sharded otherwise than by `fully_shard`, or a working copy that lacks one, stores it in bfloat16,
            or belongs to a sharded model.

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
        _checks.finite("gamma", gamma, minimum=0)
        _checks.finite("eps", eps, minimum=0)
        _checks.one_of("scope", scope, _checks.SCOPES)
        _checks.scaling(scale, eta, bound)
        if adaptive is not None and scale != "elementwise":
            raise ValueError(f"adaptive: scale 'elementwise' alone takes it, got scale {scale!r}")
        self.model, self.gamma, self.scope, self.eps = model, gamma, scope, eps
        self.scale, self.eta, self.bound = scale, eta, bound
        # named_parameters lists a tied weight once
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and select(name, p)}
        if not self.parameters:
            raise ValueError(
                "model: no trainable parameter that `select` takes (by default ndim > 1 and 'weight' in the name)"
            )
        self.working = working
        self._targets: Mapping[str, Tensor] = self.parameters if working is None else self._found_in(working)
        # what this rank holds of them: all, where the model is not sharded
        self._rows: Mapping[str, Tensor] = self.parameters
        self._measured: dict[str, Tensor] = {}
        self._everything: list[nn.Parameter] = []
        self._shards = self._sharding()
        # empty where nothing is normalised element by element
        self._adaptive = {name: adaptive(name, p) for name, p in self.parameters.items()} if adaptive else {}
        self.weight_norms: Tensor | None = None
        self.found_inf: Tensor | None = None
        self._saved: dict[str, Tensor] = {}
        self._active: list[str] = []

    def _sharding(self) -> Shards | None:
        """How the model is sharded; None: it is not."""
        everything = list(self.model.parameters())
        if not any(map(is_sharded, everything)):
            return None
        if self.working is not None:
            raise ValueError(
                "working: not for a sharded model; fully_shard's MixedPrecisionPolicy(param_dtype=...) makes 16-bit "
                "weights of w + v"
            )
        for name, parameter in self.parameters.items():
            if self.scale == "elementwise" and working_dtype(parameter.dtype) != parameter.dtype:
                raise ValueError(
                    f"model: {name} is sharded {parameter.dtype}; scale 'elementwise' takes float32 or float64 shards"
                )
        # module.parameters() gives other tensors while they are gathered
        self._everything = everything
        return Shards("model", everything)

    @torch.no_grad()
    def take_weight_norms(self, stepped: Sequence[tuple[Sequence[Tensor], Tensor]]) -> None:
        """Be told the weights' norms, so that the next perturbation need not read the weights for them.

        They hold until the weights change again; copied, always into the same memory.

        Args:
            stepped: `awp_kernels.SGD.weight_norms`; unless an entry begins with just the perturbed parameters, nothing
                is known.
        """
        weights = list(self.parameters.values())
        for parameters, norms in stepped:
            # strict=False: biases and normalisation may follow
            if len(parameters) >= len(weights) and all(a is b for a, b in zip(parameters, weights, strict=False)):
                if self.weight_norms is None:
                    self.weight_norms = torch.empty_like(norms[: len(weights)])
                self.weight_norms.copy_(norms[: len(weights)])
                return
        self.weight_norms = None

    def _found_in(self, working: nn.Module) -> dict[str, nn.Parameter]:
        found = dict(working.named_parameters())
        for name, parameter in self.parameters.items():
            if name not in found or found[name].shape != parameter.shape:
                raise ValueError(f"working: expected a parameter {name} of shape {tuple(parameter.shape)}")
            if found[name].dtype == torch.bfloat16 and parameter.dtype != torch.bfloat16:
                raise ValueError(
                    f"working: {name} is bfloat16, whose rounding is 23% to 46% of a perturbation; use float16"
                )
        return {name: found[name] for name in self.parameters}

    def _groups(self, gradients: Mapping[str, Tensor]) -> list[list[str]]:
        """Names of parameters that have a gradient, by dtypes: an operation takes one dtype a list."""
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, gradient in gradients.items():
            key = (self.parameters[name].dtype, self._targets[name].dtype, gradient.dtype, name in self._measured)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _measure(self, shards: Shards, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Finds the rows to move, their lengths over all ranks, and their gradients, which are returned.

        An operation sees this rank's rows only. It multiplies a gradient h by gamma * length / (||h|| + eps), ||h|| of
        these rows: a `length` that holds ||h|| + eps as a factor leaves what was measured over all ranks.
        """
        self._rows = {name: p.to_local() for name, p in self.parameters.items()}  # type: ignore
        for name, gradient in gradients.items():
            shards.check(f"gradient of {name}", gradient)
        directions = {name: gradient.to_local() for name, gradient in gradients.items()}  # type: ignore
        # filters are whole within a rank, so that nothing is to be measured over ranks
        names = [n for n, p in self.parameters.items() if self.scope != "filter" or p.ndim < 2]
        self._measured = {}
        if not names:
            return directions
        squares = self._rows[names[0]].new_zeros((2, len(names)), dtype=torch.float64)
        moved = [name for name in names if name in directions]
        # on every rank the same vector, even if one lacks a gradient
        where = torch.tensor([names.index(name) for name in moved], device=squares.device, dtype=torch.int64)
        if self.scale == "relative" and moved:
            known = self.weight_norms if not self._active and len(moved) == len(self.parameters) else None
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

    @torch.no_grad()
    def perturb_(self, *, again: bool = False, gradients: Mapping[str, Tensor] | None = None) -> None:
        """Save the weights, move them along their gradients, and clear all gradients.

        Where a gradient is not finite nothing moves that shares its norm (see `perturb_`), and `found_inf` says so.

        Args:
            again: take a further step from where the weights are, by a length that is measured there; `restore_`
                brings back what the first step saved, and a bound holds around that.
            gradients: to follow in place of the parameters' own `.grad`, by name; of any floating-point dtype.

        Raises:
            RuntimeError: perturbed already without `again`, not yet perturbed with it, `again` with a working copy,
                no gradient to follow, or a sharded model while its shards are gathered.
        """
        if self._active and not again:
            raise RuntimeError("weights are perturbed already: leave the perturbed() block first, or pass again=True")
        if again and not self._active:
            raise RuntimeError(
                "weights are not perturbed: again=True takes a further step inside the perturbed() block"
            )
        if again and self.working is not None:
            raise RuntimeError("again=True: not with a working copy; add the ascents' gradients up and pass the sum")
        if gradients is None:
            sources = self._targets if self._shards is None else self.parameters
            gradients = {name: p.grad for name, p in sources.items() if p.grad is not None}
        if self._shards is not None:
            if any(p is not q for p, q in zip(self.model.parameters(), self._everything, strict=True)):
                raise RuntimeError(
                    "model: its shards are gathered, and passes would not see them move: reshard() first"
                )
            gradients = self._measure(self._shards, gradients)
            self._targets = self._rows
        groups = self._groups(gradients)
        if not groups:
            raise RuntimeError("no gradients to perturb along: call backward() on the ascent loss first")
        if self.scope == "global" and len(groups) > 1:
            raise RuntimeError("scope 'global' needs all perturbed parameters to be of one dtype")
        found_inf = self._flag(next(iter(gradients.values())).device)
        if not again:
            found_inf.zero_()
        try:
            for names in groups:
                if again:
                    self._move_on(names, gradients)
                else:
                    self._move(names, gradients)
        except BaseException:
            self.restore_()
            raise
        if self._shards is not None:
            # the rank that holds what is not finite says so
            self._shards.add_up_(found_inf)
            found_inf.clamp_(max=1.0)
        for module in (self.model, self.working) if self._shards is None else ():
            for parameter in () if module is None else module.parameters():
                parameter.grad = None
        for parameter in () if self._shards is None else self._everything:
            parameter.grad = None
        # casts made before the move would hide it inside an autocast block
        torch.clear_autocast_cache()

    def _flag(self, device: torch.device) -> Tensor:
        """`found_inf`, in the same memory from step to step, as captured graphs need it."""
        if self.found_inf is None or self.found_inf.device != device:
            self.found_inf = torch.zeros((), device=device)
        return self.found_inf

    def _buffer(self, name: str) -> Tensor:
        """Where a weight's bits are kept; the same memory from step to step."""
        weight, saved = self._rows[name], self._saved.get(name)
        layout = (weight.dtype, weight.device, weight.stride())
        if saved is None or (saved.dtype, saved.device, saved.stride()) != layout:
            saved = self._saved[name] = torch.empty_like(weight)
        return saved

    def _options(self, names: list[str], bound: float | None) -> dict[str, Any]:
        if names[0] in self._measured:
            lengths = torch.stack([self._measured[name] for name in names])
            return {
                "weight_norms": lengths,
                "bound": bound,
                "eps": _EPS_OF_SHARDS,
                "found_inf": self.found_inf,
            }
        known = self.scale == "relative" and self.scope != "filter" and len(names) == len(self.parameters)
        return {
            "weight_norms": self.weight_norms if known and not self._active else None,
            "scope": self.scope,
            "scale": self.scale,
            "eta": self.eta,
            "adaptive": [self._adaptive[name] for name in names] if self._adaptive else None,
            "bound": bound,
            "eps": self.eps,
            "found_inf": self.found_inf,
        }

    def _run(
        self, names: list[str], gradients: Mapping[str, Tensor], saved: list[Tensor] | None, bound: float | None
    ) -> None:
        weights = [self._rows[name] for name in names]
        grads = [gradients[name].to(weight.dtype) for name, weight in zip(names, weights, strict=True)]
        perturb_(weights, grads, self.gamma, saved=saved, **self._options(names, bound))

    def _move(self, names: list[str], gradients: Mapping[str, Tensor]) -> None:
        if self.working is None:
            self._run(names, gradients, [self._buffer(name) for name in names], self.bound)
        else:
            perturb_into_(
                [self._targets[name] for name in names],
                [self.parameters[name] for name in names],
                [gradients[name] for name in names],
                self.gamma,
                **self._options(names, self.bound),
            )
        self._active += names

    def _move_on(self, names: list[str], gradients: Mapping[str, Tensor]) -> None:
        """A further step; weights that had no gradient before are saved now."""
        active = set(self._active)
        for name in names:
            if name not in active:
                self._buffer(name).copy_(self._rows[name])
                self._active.append(name)
        self._run(names, gradients, None, None)
        if self.bound is not None:
            for name in names:
                weight, saved = self._rows[name], self._saved[name]
                dtype = working_dtype(weight.dtype)
                weight.copy_(within(weight.to(dtype), saved.to(dtype), round_toward_zero(self.bound, dtype)))

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the weights back, bit for bit (a working copy: from the masters); nothing happens if none is moved."""
        sources = self._saved if self.working is None else self.parameters
        groups: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
        for name in self._active:
            groups.setdefault((self._targets[name].dtype, sources[name].dtype), []).append(name)
        for (dtype, source_dtype), names in groups.items():
            targets: list[Tensor] = [self._targets[name] for name in names]
            originals = [sources[name] for name in names]
            if dtype == source_dtype:
                restore_(targets, originals)
            else:
                torch._foreach_copy_(targets, originals)  # pyright: ignore[reportPrivateImportUsage]
        self.forget_()

    def forget_(self) -> None:
        """Say that the weights are back by other means: an update that wrote the working copy anew."""
        self._active = []
        torch.clear_autocast_cache()

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """A block with w + v in place of w; on leaving it, also by an exception, w is back bit for bit.

        Raises:
            RuntimeError: no gradient to follow, or the blocks are nested.
        """
        self.perturb_()
        try:
            yield
        finally:
            self.restore_()

    @torch.no_grad()
    def displacement(self) -> dict[str, Tensor]:
        """What the weights were moved by, inside `perturbed()`: name to tensor of the weight's shape."""
        if self.working is None:
            moved = {name: self._rows[name] - self._saved[name] for name in self._active}
            if self._shards is None:
                return moved
            return {name: self._shards.joined(rows, self.parameters[name]) for name, rows in moved.items()}
        return {name: self._targets[name] - self.parameters[name] for name in self._active}


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
    _checks.finite("rho", rho, minimum=0)
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
    _checks.finite("rho", rho, minimum=0)
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
