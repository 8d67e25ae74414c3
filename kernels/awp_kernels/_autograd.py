"""What the autograd functions of this package share."""

from typing import Any

import torch


def needed(ctx: Any, index: int) -> bool:
    """Whether the running backward pass wants the gradient of input `index`.

    `ctx.needs_input_grad` is what the forward pass knew: with `torch.autograd.grad(loss, images)` the weights would get
    gradients that nobody asked for.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node = ctx.next_functions[index][0]
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # RuntimeError: a leaf that torch.autograd.grad was asked for
        return True
