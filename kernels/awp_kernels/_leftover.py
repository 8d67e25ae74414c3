"""Whether a gradient still holds what an earlier backward pass left in it."""

import weakref
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge


class Leftover:
    """Follows what becomes of a parameter's gradient, as it is now, until the first backward pass that starts anew.

    Looks at the gradient just before autograd adds to it: at values only where something is there to be added to, as
    where gradients are set to zero in place, or not at all. On a GPU that waits for the device, but while capturing.

    Args:
        parameter: a leaf with a gradient.

    Attributes:
        parameter: as given.
        zeroed: a backward pass began on zeros.
    """

    _handle: Any = None

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.zeroed, self._gradient = parameter, False, parameter.grad
        # torch has but a weak reference to the node, and hooks go with it
        self._node: Any = get_gradient_edge(parameter).node
        watched = weakref.ref(self)

        def before(_: Any) -> None:
            me = watched()
            if me is not None and me._gradient is not None and me._clear():
                me.zeroed = parameter.grad is not None
                me.drop()

        self._handle = self._node.register_prehook(before)

    def drop(self) -> None:
        """Follow it no more."""
        self._gradient = None
        # an interrupt may have come before it was made
        if self._handle is not None:
            self._handle.remove()

    def _clear(self) -> bool:
        gradient = self.parameter.grad
        if gradient is None or (gradient.is_cuda and torch.cuda.is_current_stream_capturing()):
            return True
        return not gradient.any()

    @property
    def remains(self) -> bool:
        """Whether the gradient is the same tensor still, and no backward pass was seen to start anew."""
        if self._gradient is None or self.parameter.grad is not self._gradient:
            return False
        # another data type or device has another node, which is not followed
        return get_gradient_edge(self.parameter).node is self._node and not self._clear()
