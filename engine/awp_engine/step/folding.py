"""Batch normalisation folded into the convolution before it, for attacks in eval mode.

With running statistics bn2(conv1(x)) is one convolution with other weights and a bias. They are computed once a step
and serve all of the attack's passes, which then neither read nor keep the activation between the two.
"""

import torch
from torch import Tensor, nn

from awp_engine.models import PreActBlock, WideBlock


class FoldedView:
    """Folds the batch normalisation inside every block of a frozen view, in place.

    Args:
        view: from `frozen_view`: its blocks' `conv1` get weights of their own and a bias, `bn2` becomes its activation.
        model: the masters, of the same structure; read at every `refresh_`.
    """

    def __init__(self, view: nn.Module, model: nn.Module) -> None:
        self._pairs: list[tuple[nn.Conv2d, nn.Conv2d, nn.BatchNorm2d]] = []
        # the layers as they are before any is replaced
        for block, source in zip(list(view.modules()), list(model.modules()), strict=True):
            if isinstance(block, (PreActBlock, WideBlock)) and isinstance(source, (PreActBlock, WideBlock)):
                folded = nn.Parameter(torch.empty_like(block.conv1.weight), requires_grad=False)
                bias = torch.empty(len(folded), dtype=folded.dtype, device=folded.device)
                block.conv1.weight, block.conv1.bias = folded, nn.Parameter(bias, requires_grad=False)
                self._pairs.append((block.conv1, source.conv1, source.bn2))
                block.add_module("bn2", block.bn2.activation)
        self.refresh_()

    @torch.no_grad()
    def refresh_(self) -> None:
        """Take the masters' weights and statistics in as they are now."""
        for folded, convolution, norm in self._pairs:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert folded.bias is not None
            scale: Tensor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            torch.mul(convolution.weight, scale.view(-1, 1, 1, 1), out=folded.weight)
            folded.bias.copy_(norm.bias - norm.running_mean * scale)
