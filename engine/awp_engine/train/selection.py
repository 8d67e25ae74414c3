"""What is measured of a run, and which epoch's weights are kept."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from awp_engine.attack import Attack
from awp_engine.data import Batches, Dataset, Split, StreamedSplit
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.sharding import gathered, scatter_
from awp_engine.evaluation import Accuracy, evaluate, spread
from awp_engine.observe.regions import region
from awp_engine.optim.average import WeightAverage
from awp_engine.step.passes import Passes
from awp_engine.train.progress import Progress
from awp_kernels.philox import mix_seed

_AVERAGE_NOISE = 3


class AverageStatistics:
    """Batch-normalisation statistics of an average of weights: of attacked training images, as training sees them.

    Args:
        passes: of the model in training.
        batches: what it is trained on.
        attack: how, by the batch's statistics: the running ones are what is being computed.
        images: how many, at least.
        seed: of the run.
    """

    def __init__(self, passes: Passes, batches: Batches, attack: Attack, *, images: int, seed: int) -> None:
        self._passes, self._batches, self._attack, self._images, self._seed = passes, batches, attack, images, seed

    def refresh_(self, average: WeightAverage, epoch: int) -> None:
        """Compute them anew; all ranks have to call it."""
        average.refresh_statistics(self._forward_passes(average.model, epoch))
        self._passes.ranks.mean_([buffer for buffer in average.model.buffers() if buffer.is_floating_point()])

    def _forward_passes(self, model: nn.Module, epoch: int) -> Iterator[None]:
        seen = 0
        with contextlib.closing(self._batches.epoch(epoch)) as batches:
            for batch in batches:
                with region("average"):
                    seed = mix_seed(self._seed, epoch, _AVERAGE_NOISE)
                    x_adv = self._passes.attack_whole(self._attack, model, batch, seed=seed)
                    self._passes.objective.losses(model, x_adv, batch.images, batch.labels)
                yield
                seen += batch.whole_size
                if seen >= self._images:
                    return


class Selection:
    """Measures the weights, and keeps the best ones by held-out images.

    Args:
        data: whose splits are measured on.
        attack: that measures.
        ranks: that share the images.
        model: in training.
        average: measured in its place once it has begun; or None.
        statistics: of the average; None without one.
        whole: gives copies on the CPU of a model's tensors, on every rank.
        sharded: whether models are.
        heed: called between batches, on all ranks alike; may end the measurement by an exception.
        batch_size: images a batch.
        held_out_limit, test_limit: most images of these splits, or None.

    Attributes:
        best_weights: of the epoch that was most robust; part of a checkpoint.
    """

    def __init__(
        self,
        *,
        data: Dataset,
        attack: Attack,
        ranks: Ranks,
        model: nn.Module,
        average: WeightAverage | None,
        statistics: AverageStatistics | None,
        whole: Callable[[nn.Module], dict[str, Tensor]],
        sharded: bool,
        heed: Callable[[], None],
        batch_size: int,
        held_out_limit: int | None,
        test_limit: int | None,
    ) -> None:
        self._attack, self._ranks, self._heed, self._batch_size = attack, ranks, heed, batch_size
        self._model, self._average, self._statistics = model, average, statistics
        self._whole, self._sharded = whole, sharded
        self._held_out = spread(data.held_out, held_out_limit)
        self.test = spread(data.test, test_limit)
        # as many training images as test images: the gap between the two is the overfitting
        self._train = spread(data.train, len(self.test))
        self.best_weights = whole(model)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self.best_weights

    def load(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        self.best_weights = dict(state)

    def measured_model(self, epoch: int) -> nn.Module:
        """What is measured and kept: the average of the weights where there is one, with its own BN statistics."""
        if self._average is None or self._statistics is None or not self._average.started:
            return self._model
        self._statistics.refresh_(self._average, epoch)
        return self._average.model

    def _measure(self, model: nn.Module, split: Split | StreamedSplit) -> Accuracy:
        with gathered(model, now=True) if self._sharded else contextlib.nullcontext():
            return evaluate(
                model, split, self._attack, batch_size=self._batch_size, ranks=self._ranks, between=self._heed
            )

    def select(self, epoch: int, progress: Progress) -> dict[str, float]:
        """Measure the epoch on held-out images, and keep its weights if none were better; returns metrics."""
        model = self.measured_model(epoch)
        found = self._measure(model, self._held_out)
        # the later of equals has trained longer; clean accuracy decides between equally robust ones
        if (found.robust, found.clean) >= (progress.best_robust, progress.best_clean):
            progress.since_best = 0 if found.robust > progress.best_robust else progress.since_best + 1
            progress.best_epoch, progress.best_robust, progress.best_clean = epoch, found.robust, found.clean
            self.best_weights = self._whole(model)
        else:
            progress.since_best += 1
        return {"held_out_clean_accuracy": found.clean, "held_out_pgd_accuracy": found.robust}

    def finish(self, progress: Progress) -> tuple[tuple[Accuracy, float], tuple[Accuracy, float]]:
        """Measure the best and the last weights: each on the test split, and attacked on as many training images."""
        model = self.measured_model(progress.epoch)
        last = self._measure(model, self.test), self._measure(model, self._train).robust
        if progress.best_epoch == progress.epoch:
            return last, last
        scatter_(model.state_dict(), self.best_weights)
        return (self._measure(model, self.test), self._measure(model, self._train).robust), last
