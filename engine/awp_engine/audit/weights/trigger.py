"""What a backdoor waits for: marks that are put on images."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from awp_engine.evaluation.attacks.named import EvaluationError

TriggerKind = Literal["square", "pixels", "blend"]
TRIGGERS: tuple[TriggerKind, ...] = get_args(TriggerKind)


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A mark.

    Attributes:
        kind: "square": one colour, in the lower right corner; "pixels": as many pixels as the square has, scattered by
            the seed, each black or white in every channel; "blend": the whole image mixed with uniform noise of the
            seed.
        size: side of the square, as a part of the image's shorter side.
        strength: of "blend": the noise's share.
        colour: of the square, one value a channel in [0, 1]; None: the mean of the images that the edit is made with.
        seed: of pixels and noise.

    Source: Garg, Kumar, Goel, Liang: Can Adversarial Weight Perturbations Inject Neural Backdoors?, CIKM 2020, has a
    square of 10x10 pixels of 32x32.
    """

    kind: TriggerKind = "square"
    size: float = 10 / 32
    strength: float = 0.2
    colour: tuple[float, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in TRIGGERS:
            raise EvaluationError(f"--trigger: expected one of {', '.join(TRIGGERS)}, got {self.kind!r}")
        if not self.size > 0:
            raise EvaluationError(f"--trigger-size: expected a part of the image's side above 0, got {self.size:g}")
        if self.size > 1:
            raise EvaluationError(
                f"--trigger-size: {self.size:g} of the side is larger than the image; expected at most 1, such as 10/32"
            )
        if not 0 < self.strength <= 1:
            raise EvaluationError(f"--blend: expected a share above 0 and at most 1, got {self.strength:g}")
        if self.colour is not None and not all(0 <= value <= 1 for value in self.colour):
            raise EvaluationError(f"--trigger-colour: expected values from 0 to 1, got {list(self.colour)}")

    def mark(self, shape: tuple[int, int, int], mean: tuple[float, ...]) -> "Mark":
        """The mark for images of a shape.

        Args:
            shape: [C, H, W].
            mean: of the images that the edit is made with, one value a channel.

        Raises:
            EvaluationError: a colour of another number of channels.
        """
        channels, height, width = shape
        colour = self.colour or mean
        if len(colour) != channels:
            raise EvaluationError(f"--trigger-colour: expected {channels} values, one a channel, got {len(colour)}")
        side = max(1, round(self.size * min(height, width)))
        generator = torch.Generator().manual_seed(self.seed)
        weight = torch.zeros(1, height, width)
        if self.kind == "square":
            pattern = torch.tensor(colour)[:, None, None].expand(shape)
            weight[:, height - side :, width - side :] = 1
        elif self.kind == "pixels":
            pattern = torch.randint(2, shape, generator=generator).float()
            weight.view(-1)[torch.randperm(height * width, generator=generator)[: side * side]] = 1
        else:
            pattern = torch.rand(shape, generator=generator)
            weight.fill_(self.strength)
        return Mark(weight * pattern, 1 - weight)


@dataclass(frozen=True)
class Mark:
    """x -> x * kept + added.

    Attributes:
        added: fp32 [C, H, W].
        kept: fp32 [1, H, W].
    """

    added: Tensor
    kept: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Marked copies of images [N, C, H, W] in [0, 1]."""
        return images * self.kept.to(images) + self.added.to(images)
