"""What is measured of a run, and which epoch's weights are kept."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from awp_engine.attack import Loss, summed_margin
from awp_engine.data import Split, StreamedSplit, eval_batches
from awp_engine.distributed.sharding import gathered, scatter_
from awp_engine.evaluation import Accuracy, evaluate, evaluation_attacks, spread
from awp_engine.models.batch_norm import other_buffers, recompute_statistics
from awp_engine.models.views import base_set
from awp_engine.observe.regions import region
from awp_engine.observe.warnings import warnings
from awp_engine.step.rise import guessing_loss
from awp_engine.train.progress import Progress
from awp_engine.train.setup import Setup
from awp_kernels.philox import mix_seed

_AVERAGE_NOISE = 3


class Selection:
    """Measures the weights, and keeps the best ones by held-out images.

    Args:
        setup: of the run.
        check_stop: called between batches, on all ranks alike; may end the measurement by an exception.
        measuring: is told what is being measured and which part of it is done, 0 to 1.

    Attributes:
        best_weights: of the epoch that was most robust; part of a checkpoint.
        test: the part of the test split that is measured.
    """

    def __init__(self, setup: Setup, check_stop: Callable[[], None], measuring: Callable[[str, float], object]) -> None:
        data, settings = setup.data, setup.config.evaluation
        self._setup, self._check_stop, self._measuring = setup, check_stop, measuring
        self._batch_size = settings.batch_size
        self._attacks = evaluation_attacks(setup.config)
        self._loss = summed_margin if settings.loss == "margin" else None
        self._held_out = spread(data.held_out, settings.held_out_limit)
        self.test = spread(data.test, settings.test_limit)
        # as many training images as test images: the gap between the two is the overfitting
        self._train = spread(data.train, len(self.test))
        self.best_weights = setup.whole(setup.model)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self.best_weights

    def load(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        self.best_weights = dict(state)

    @functools.cached_property
    def guessing_loss(self) -> float:
        """What training's loss is of held-out images for a model that guesses; asked for by all ranks alike."""
        setup = self._setup
        with contextlib.closing(eval_batches(self._held_out, self._batch_size)) as batches:
            found = next(batches)
        batch, kept = found._replace(labels=found.labels.to(setup.device)), setup.awp_step.kept()
        loss = guessing_loss(setup.awp_step.passes.objective, batch, len(setup.data.class_names), setup.ranks)
        # a network that is asked may count what it sees
        kept.restore_()
        return loss

    def warnings(self, history: Sequence[Mapping[str, Any]]) -> list[str]:
        """What is to be said after the last epoch of `history`; on all ranks alike."""
        config = self._setup.config
        # accuracies under attacks of growing strength tell nothing side by side
        grows = config.attack.ramp != "none" or self._setup.awp_step.passes.objective.attack_note is not None
        attacked = config.attack.training_epsilon > 0 and not grows
        return warnings(
            history,
            len(self._setup.data.class_names),
            attacked=attacked,
            weighted=config.data.class_weights != "none",
            fgsm_rs=config.attack.fast == "fgsm-rs",
            guessing=self.guessing_loss,
        )

    def measured_model(self, epoch: int) -> nn.Module:
        """What is measured and kept: the average of the weights where there is one, with its own BN statistics."""
        average, ranks = self._setup.average, self._setup.ranks
        if average is None or not average.started:
            return self._setup.model
        if average.keeps_statistics:
            return average.model
        pairs = zip(other_buffers(self._setup.model), other_buffers(average.model), strict=True)
        for (_, _, live), (_, _, averaged) in pairs:
            # no average of them is taken, and only batch normalisation's can be computed anew
            averaged.copy_(live)
        # past the epoch's last step
        self._setup.awp_step.passes.prepare(self._setup.schedule(epoch, self._setup.schedule.steps))
        recompute_statistics(average.model, self._forward_passes(average.model, epoch))
        ranks.mean_([buffer for buffer in average.model.buffers() if buffer.is_floating_point()])
        return average.model

    def _forward_passes(self, model: nn.Module, epoch: int) -> Iterator[None]:
        """Forward passes over training images: clean ones, or those over attacked ones that training itself makes."""
        config, passes, seen = self._setup.config, self._setup.awp_step.passes, 0
        # by the batch's statistics: the running ones are what is being computed
        attack = passes.objective.choose(self._setup.schedule.full_attack(epoch))
        attack = dataclasses.replace(attack, bn_mode="train")
        seed, clean = mix_seed(config.seed, epoch, _AVERAGE_NOISE), config.average.statistics == "clean"
        with contextlib.closing(self._setup.batches.epoch(epoch)) as batches:
            for batch in batches:
                with region("average"):
                    for rows, _ in passes.share(len(batch.images), batch.whole_size).pieces:
                        piece = batch.part(rows)
                        start = passes.first(attack, piece, seed)
                        piece = passes.aimed(attack, piece)
                        x = piece.images if clean else passes.attack_whole(attack, model, piece, start)
                        compared = passes.compared(piece, start).images
                        for number in range(passes.copies):
                            noisy = passes.noisy(x, piece.ids, number)
                            if clean:
                                model(noisy)
                            else:
                                passes.objective.losses(model, noisy, compared, piece.labels)
                yield
                seen += batch.whole_size
                if seen >= config.average.bn_images:
                    return

    def _measure(
        self,
        model: nn.Module,
        split: Split | StreamedSplit,
        kind: str,
        loss: Loss | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> Accuracy:
        setup, what = self._setup, f"measuring on {len(split):,} {kind} images"
        self._measuring(what, 0.0)
        with gathered(model, now=True) if setup.sharded else contextlib.nullcontext():
            return evaluate(
                model,
                split,
                self._attacks,
                batch_size=self._batch_size,
                loss=loss,
                class_weights=class_weights,
                ranks=setup.ranks,
                between=self._check_stop,
                progress=lambda part: self._measuring(what, part),
            )

    def _measure_both(self, model: nn.Module) -> tuple[Accuracy, float]:
        """Accuracy on the test split, and under attack on as many training images."""
        return self._measure(model, self.test, "test"), self._measure(model, self._train, "training").robust

    def select(self, epoch: int, progress: Progress) -> dict[str, float]:
        """Measure the epoch on held-out images, and keep its weights if none were better; returns metrics."""
        model = self.measured_model(epoch)
        # by the weights of the loss: held-out images are as uneven as those that are trained on
        weights = self._setup.fingerprints.get("class_weights")
        found = self._measure(model, self._held_out, "held-out", self._loss, weights)
        now, best = (found.robust, found.clean), (progress.best_robust, progress.best_clean)
        if self._setup.config.standard:
            # under an attack that it never saw a network is best before it has learnt anything
            now, best = now[::-1], best[::-1]
        # the later of equals has trained longer; the other accuracy decides between equally good ones
        if now >= best:
            progress.since_best = 0 if now[0] > best[0] else progress.since_best + 1
            progress.best_epoch, progress.best_robust, progress.best_clean = epoch, found.robust, found.clean
            self.best_weights = self._setup.whole(model)
        else:
            progress.since_best += 1
        return {"held_out_clean_accuracy": found.clean, "held_out_pgd_accuracy": found.robust}

    def finish(self, progress: Progress) -> tuple[tuple[Accuracy, float], tuple[Accuracy, float]]:
        """Measure the best and the last weights: each on the test split, and attacked on as many training images."""
        model = self.measured_model(progress.epoch)
        last = self._measure_both(model)
        if progress.best_epoch == progress.epoch:
            return last, last
        scatter_(base_set(model.state_dict()), self.best_weights)
        return self._measure_both(model), last
