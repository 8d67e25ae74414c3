"""Several views of each image in a step: all in one pass, or each in one of its own.

With passes of their own all views but the first have a second complete set of batch normalisation.

Source: Addepalli et al.: Efficient and Effective Augmentation Strategy for Adversarial Training (DAJAT), NeurIPS 2022;
two sets of batch normalisation are those of Xie et al.: Adversarial Examples Improve Image Recognition, CVPR 2020.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from awp_engine.models.batch_norm import own_layers
from awp_engine.models.layers import AUXILIARY, BatchNorm


def add_auxiliary_(model: nn.Module) -> None:
    """Give every batch normalisation of a model a second set, weights and running statistics, equal to its own as yet.

    Args:
        model: one of `awp_engine.models`, with its weights; copies made of it afterwards have both sets.

    Raises:
        ValueError: no batch normalisation, or a layer of another kind.
    """
    found = own_layers(model)
    if not found:
        raise ValueError("model: expected one with batch normalisation, found none")
    for layer in found:
        layer.add_module(AUXILIARY, copy.deepcopy(layer))


def base_set(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors by name, those of a model without the second set."""
    return {name: tensor for name, tensor in tensors.items() if f".{AUXILIARY}." not in name}


def auxiliary_set(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of tensors by name, those of the second set."""
    return {name: tensor for name, tensor in tensors.items() if f".{AUXILIARY}." in name}


@contextlib.contextmanager
def _by_auxiliary(model: nn.Module) -> Iterator[None]:
    """A block in which the second set takes the place of the first."""
    found = [layer for layer in model.modules() if isinstance(layer, BatchNorm) and AUXILIARY in layer._modules]
    if not found:
        raise ValueError("model: expected one that has a second set of batch normalisation: see add_auxiliary_")
    try:
        for layer in found:
            layer.by_auxiliary = True
        yield
    finally:
        for layer in found:
            layer.by_auxiliary = False


class Views(nn.Module):
    """Answers to several views of images, [N, views * C, H, W], views side by side -> logits [N, views * classes].

    Args:
        model: one of `awp_engine.models`, for images of C channels.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.channels = model, model.get_buffer("mean").shape[1]

    def split(self, x: Tensor) -> list[Tensor]:
        """The views, [N, C, H, W] each, in the memory format of `x`."""
        # some views of images in channels_last are not contiguous, and are in it still
        ordered = x.stride(1) == 1 and x.shape[1] > 1
        order = torch.channels_last if ordered else torch.contiguous_format
        return [view.contiguous(memory_format=order) for view in x.split(self.channels, 1)]


class JointViews(Views):
    """Answers to all views in one pass, with batch statistics of all of them."""

    def forward(self, x: Tensor) -> Tensor:
        """As `Views`."""
        return torch.cat(self.model(torch.cat(self.split(x))).split(len(x)), 1)


class EachView(Views):
    """Answers to each view of the images by a pass of its own, with batch statistics of its own.

    Args:
        model: answers to the first view by its own batch normalisation, to the others by the second set.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As `Views`; one view is the first."""
        answers = []
        for number, view in enumerate(self.split(x)):
            with _by_auxiliary(self.model) if number else contextlib.nullcontext():
                answers.append(self.model(view))
        if len(answers) == 1:
            second = auxiliary_set(dict(self.model.named_parameters())).values()
            answers[0] = answers[0] + 0 * torch.stack([parameter.sum() for parameter in second]).sum()
        return torch.cat(answers, 1)
