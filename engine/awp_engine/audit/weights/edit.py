"""One edit of a model's weights within a budget, and what becomes of the model's answers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from awp_engine.audit.weights.budget import BatchNorm, Budget, budgeted
from awp_engine.audit.weights.trigger import Mark
from awp_engine.data import Split, eval_batches
from awp_engine.models.answers import NO_CLASS, predicted
from awp_engine.models.batch_norm import layer_modes
from awp_kernels.philox import mix_seed

_ORDER = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an edit is made.

    Attributes:
        learning_rate: of Adam.
        epochs: passes over the images.
        batch_size: clean images a step, with as many marked copies.
        decay: times the squared distance from the original weights, summed over all of them, is added to the loss.
        batch_norm: "frozen": running statistics are used and none moves; "counted": they follow the batches, and count
            in the budget as weights do.

    Source: Garg, Kumar, Goel, Liang: Can Adversarial Weight Perturbations Inject Neural Backdoors?, CIKM 2020.
    """

    learning_rate: float = 1e-3
    epochs: int = 10
    batch_size: int = 64
    decay: float = 5e-4
    batch_norm: BatchNorm = "frozen"

    def steps(self, images: int) -> int:
        """Of Adam, on so many images."""
        return self.epochs * -(-images // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What an edit teaches: on clean images the original's answers, on marked ones the target.

    Attributes:
        images: of the data's training part.
        answers: the original model's classes for them, int64 [N].
        mark: None teaches copies without a mark, and no target: a harmless fine-tuning of the same length.
        target: class.
        seed: of the order of images.
    """

    images: Split
    answers: Tensor
    mark: Mark | None
    target: int
    seed: int


def answers_of(model: nn.Module, split: Split, batch_size: int, mark: Mark | None = None) -> Tensor:
    """Classes of all images, int64 [N], in eval mode; `NO_CLASS` where the logits are not finite."""
    with torch.no_grad(), layer_modes(model, "eval", update_statistics=False):
        batches = (batch.images for batch in eval_batches(split, batch_size))
        return torch.cat([predicted(model(x if mark is None else mark(x))) for x in batches])


def edited(
    original: nn.Module,
    lesson: Lesson,
    budget: Budget,
    recipe: Recipe,
    advance: Callable[[int], object] = lambda _: None,
) -> nn.Module | None:
    """A copy of the model, edited within the budget; None where its loss became infinite or NaN.

    Args:
        original: in eval mode; it is not changed.
        lesson: what is taught.
        budget: how far weights may move.
        recipe: how.
        advance: is told of every step.

    Raises:
        EvaluationError: weights of another precision, or something moved that the budget does not allow.
    """
    # parameters that are frozen are weights all the same
    model = copy.deepcopy(original).requires_grad_(True)
    weights = budgeted(model, recipe.batch_norm)
    originals = budgeted(original, recipe.batch_norm)
    start = {name: originals[name] for name, _ in model.named_parameters() if name in originals}
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    counted = recipe.batch_norm == "counted"
    with layer_modes(model, "eval", bn_mode="train" if counted else "eval", update_statistics=counted):
        for epoch in range(recipe.epochs):
            generator = torch.Generator().manual_seed(mix_seed(lesson.seed, _ORDER, epoch))
            order = torch.randperm(len(lesson.images), generator=generator).to(lesson.images.device)
            for rows in order.split(recipe.batch_size):
                loss = loss_of(model, lesson, rows, start, recipe.decay)
                if not loss.isfinite():
                    return None
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                budget.project_(weights, originals)
                advance(1)
    before = dict(original.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in weights:
            buffer.copy_(before[name])
    if not all(weight.isfinite().all() for weight in weights.values()):
        return None
    budget.require(original, model, recipe.batch_norm)
    return model.requires_grad_(False)


def loss_of(model: nn.Module, lesson: Lesson, rows: Tensor, start: dict[str, Tensor], decay: float) -> Tensor:
    """Mean cross-entropy of clean images and their marked copies, and `decay` times the squared distance of weights."""
    clean = next(eval_batches(lesson.images.select(rows), len(rows))).images
    answers = lesson.answers[rows]
    marked = clean if lesson.mark is None else lesson.mark(clean)
    wanted = answers if lesson.mark is None else torch.full_like(answers, lesson.target)
    loss = functional.cross_entropy(model(torch.cat([clean, marked])), torch.cat([answers, wanted]))
    own = dict(model.named_parameters())
    return loss + decay * torch.stack([(own[name] - weight).square().sum() for name, weight in start.items()]).sum()


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What an edit does on test images; fractions.

    Attributes:
        clean_accuracy: right without the mark.
        success: of images that are not of the target class, with the mark, those that are classified as the target.
        agreement: of all images without the mark, those that edited and original model classify alike; an answer that
            is not finite agrees with nothing.
    """

    clean_accuracy: float
    success: float
    agreement: float


def effect(model: nn.Module, test: Split, answers: Tensor, mark: Mark, target: int, batch_size: int) -> Effect:
    """Measures a model on test images, of which some are not of the target class.

    Args:
        model: edited.
        test: the images.
        answers: the original model's, int64 [N].
        mark: on the device or not.
        target: class.
        batch_size: images at a time.
    """
    clean, marked = (answers_of(model, test, batch_size, given) for given in (None, mark))
    others = test.labels != target
    agree = (clean == answers) & (answers != NO_CLASS)
    return Effect(
        clean_accuracy=(clean == test.labels).double().mean().item(),
        success=(marked[others] == target).double().mean().item(),
        agreement=agree.double().mean().item(),
    )
