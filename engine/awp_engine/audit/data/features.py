"""What the screening methods see of an image: its pixels, or what a trained network makes of it before its logits."""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from awp_engine.data import Split, StreamedSplit, eval_batches
from awp_engine.evaluation.attacks.named import EvaluationError

# values of an image of 64x64 in colour: beyond, fully connected networks on pixels tell little and take long
MOST_PIXELS = 3 * 64 * 64


def pixels(split: Split) -> Tensor:
    """fp32 [n, C * H * W] in [0, 1]."""
    return split.images.flatten(1).float() / 255


def last_layer(model: nn.Module, image: Tensor) -> tuple[str, nn.Module]:
    """Name and module of the linear layer, or 1x1 convolution, that gives a model's logits: the last to be called.

    Args:
        model: in eval mode.
        image: one that it takes, [1, C, H, W].

    Raises:
        EvaluationError: no such layer gives as many numbers as there are logits.
    """
    called: list[tuple[str, nn.Module, int]] = []

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(lambda _module, _given, out: called.append((name, module, out[0].numel())))

    handles = [
        watch(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    try:
        with torch.no_grad():
            logits = model(image)
    finally:
        for handle in handles:
            handle.remove()
    found = [(name, module) for name, module, values in called if values == logits.shape[1]]
    if not found:
        raise EvaluationError(
            f"the model has no linear layer that gives its {logits.shape[1]} logits, before which features could be "
            "taken; leave out the model to screen pixels"
        )
    return found[-1]


def features(
    model: nn.Module, layer: nn.Module, split: Split | StreamedSplit, device: torch.device, batch_size: int
) -> Tensor:
    """What goes into a layer, its mean over all pixels where it has any; fp32 [n, values].

    Args:
        model: in eval mode; it is not changed.
        layer: of that model.
        split: images, of one class.
        device: of the model, and of the result.
        batch_size: images a batch.
    """
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    found = []
    try:
        with torch.no_grad():
            for x, *_ in eval_batches(split, batch_size):
                seen.clear()
                model(x.to(device))
                values = seen[-1].float()
                found.append(values.flatten(2).mean(2) if values.ndim > 2 else values)
    finally:
        handle.remove()
    return torch.cat(found)


def stretched(values: Tensor, like: Tensor) -> Tensor:
    """Columns of [n, values] so that those of `like` reach from 0 to 1, which a sigmoid can give; 0 where they do not
    differ.
    """
    low, high = like.aminmax(dim=0)
    return ((values - low) / (high - low)).masked_fill(high == low, 0.0)
