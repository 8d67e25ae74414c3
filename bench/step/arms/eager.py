"""What a good engineer gets in an afternoon, without compiling anything and without this package.

Mixed precision by autocast, channels_last, the cudnn benchmark, gradients of the images alone in the attack, no proxy
model, multi-tensor operations for the weights, the fused SGD. No forward pass serves a log alone.

On GPUs fp16 with a loss scale rather than bf16: the matrix units are as fast, and a bf16 cast of w + gamma v keeps too
few digits to tell it from w (the perturbation is off by 46% at gamma 0.005, in fp16 by 6%). On the CPU bf16, and in the
attack alone: gradients of the weights take oneDNN twice as long in it as in fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.data import Batch
from awp_engine.device import choose_convolutions, fast_memory_format
from awp_engine.observe.regions import region

from .common import Arm, PlainArm, Settings, is_moved

# torch's _foreach functions, which are not exported to type checkers
_multi: Any = torch


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _EagerArm(PlainArm):
    def __init__(self, settings: Settings, model: nn.Module, *, autocast: bool = True, compiled: bool = False) -> None:
        super().__init__(settings)
        device = torch.device(settings.device)
        cuda = device.type == "cuda"
        choose_convolutions(device)
        # torch 2.13 crashes on the CPU with some narrow networks in channels_last
        self.memory_format = fast_memory_format(model, device)
        # torch's stub does not know the keyword
        self.model = model.to(device=device, memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]
        # parameters and modes stay the model's
        self.network = torch.compile(self.model, dynamic=False) if compiled else self.model
        dtype = torch.float16 if cuda else torch.bfloat16
        self.autocast = torch.autocast(device.type, dtype, enabled=autocast)
        self.autocast_weights = torch.autocast(device.type, dtype, enabled=autocast and cuda)
        # torch's 65536 overflows in the first steps, and an ascent that does puts NaN into the running statistics
        self.scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=autocast and cuda)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for parameter in self.model.parameters():
            # where a loss scale leaves the first step out, torch's own buffers stay uninitialised
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        named = self.model.named_parameters() if settings.perturbs_weights else ()
        self.moved = [parameter for name, parameter in named if is_moved(name, parameter)]
        self.saved = [torch.empty_like(parameter) for parameter in self.moved]

    def _step(self, batch: Batch) -> None:
        x, y = batch.images, batch.labels
        with region("attack"):
            x_adv = self._attack(x, y)
        if self.moved:
            with region("ascent"):
                self._backward(x_adv, x, y)
                self._perturb()
        with region("descent"):
            self._backward(x_adv, x, y)
        with region("update"):
            if self.moved:
                with torch.no_grad():
                    _multi._foreach_copy_(self.moved, self.saved)
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _attack(self, x: Tensor, y: Tensor) -> Tensor:
        epsilon, step_size = self.settings.ball
        self.model.requires_grad_(False)
        self.model.train(not self.settings.trades)
        with torch.no_grad(), self.autocast:
            clean = F.log_softmax(_at_least_fp32(self.network(x)), dim=1) if self.settings.trades else None
        x_adv = self.start(x)
        for _ in range(self.settings.steps):
            x_adv.requires_grad_()
            with self.autocast:
                logits = _at_least_fp32(self.network(x_adv))
            # a sum: in fp16 the gradients of a mean would vanish
            if clean is None:
                loss = F.cross_entropy(logits, y, reduction="sum")
            else:
                loss = F.kl_div(F.log_softmax(logits, dim=1), clean, reduction="sum", log_target=True)
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach().add_(gradient.sign(), alpha=step_size)
            x_adv = torch.min(torch.max(x_adv, x - epsilon), x + epsilon).clamp_(0, 1)
        self.model.requires_grad_(True).train()
        return x_adv

    def _backward(self, x_adv: Tensor, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        with self.autocast_weights:
            logits = _at_least_fp32(self.network(x_adv))
            clean = _at_least_fp32(self.network(x)) if self.settings.trades else None
        if clean is None:
            loss = F.cross_entropy(logits, y)
        else:
            target = F.log_softmax(clean, dim=1)
            robust = F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean", log_target=True)
            loss = F.cross_entropy(clean, y) + self.settings.beta * robust
        self.scaler.scale(loss).backward()

    @torch.no_grad()
    def _perturb(self) -> None:
        """Saves the weights and moves them; the loss scale cancels in the direction."""
        grads = [parameter.grad for parameter in self.moved]
        _multi._foreach_copy_(self.saved, self.moved)
        norms, grad_norms = _multi._foreach_norm(self.moved), _multi._foreach_norm(grads)
        scales = self.settings.gamma * torch.stack(norms) / (torch.stack(grad_norms) + 1e-20)
        _multi._foreach_mul_(grads, list(scales.unbind()))
        _multi._foreach_add_(self.moved, grads)


def eager_arm(settings: Settings, model: nn.Module, *, autocast: bool = True) -> Arm:
    """The method in plain PyTorch with mixed precision; `autocast` False keeps it in fp32."""
    return _EagerArm(settings, model, autocast=autocast)


def compile_arm(settings: Settings, model: nn.Module, *, autocast: bool = True) -> Arm:
    """The same, with the model under torch.compile."""
    return _EagerArm(settings, model, autocast=autocast, compiled=True)
