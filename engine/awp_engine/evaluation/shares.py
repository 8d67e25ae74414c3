"""Several ranks that attack the images of one evaluation: which are whose, and how what they found comes together."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from awp_engine.distributed.ranks import Ranks, joined

# until ranks that came at the same time have to give up on each other; as of a training run
_TIMEOUT_S = 600.0
_POLL_S = 0.05


ONE_RANK = Ranks()


class Shares:
    """Which rank attacks which images: the images take turns, as they are often sorted by class.

    An attack takes hours, and one rank longer than another. So ranks meet before they exchange anything: they wait
    without a limit, and can be interrupted meanwhile.

    Args:
        ranks: of the evaluation.
        images: their number; some ranks have none where there are fewer than ranks.
        device: of the images.
        say: is told of this rank's own images, a line at a time.

    Attributes:
        rows: places of this rank's images among all, int64 [n].
    """

    def __init__(
        self, ranks: Ranks, images: int, device: torch.device, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.ranks, self._images, self._device, self._say, self._meetings = ranks, images, device, say, 0
        self.rows = torch.arange(ranks.rank, images, ranks.world, device=device)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes and speaks for all."""
        return self.ranks.is_first

    def say(self, line: str) -> None:
        """Tells something that is of this rank's images alone."""
        self._say(line if self.ranks.world == 1 else f"rank {self.ranks.rank}: {line}")

    def meet(self) -> None:
        """Waits until all ranks are here.

        Raises:
            KeyboardInterrupt: torchrun has ended.
        """
        if self.ranks.world == 1:
            return
        store = self.ranks.store
        assert store is not None
        self._meetings += 1
        names = [f"meeting {self._meetings}, rank {rank}" for rank in range(self.ranks.world)]
        try:
            store.set(names[self.ranks.rank], "here")
            while not store.check(names):
                time.sleep(_POLL_S)
        except RuntimeError as error:
            raise KeyboardInterrupt from error

    def whole(self, own: Tensor, rows: Tensor | None = None) -> Tensor:
        """Values of all images in their order, on every rank; of own ones, [n, ...], where there is one rank.

        Args:
            own: a value for each of this rank's images.
            rows: the places of those that are wanted, int64 [m]; all if not given.
        """
        world, rank = self.ranks.world, self.ranks.rank
        if world == 1:
            return own if rows is None else own[rows]
        self.meet()
        rows = torch.arange(self._images, device=own.device) if rows is None else rows
        mine = rows % world == rank
        # of a flag no sums are made
        kind = torch.uint8 if own.dtype == torch.bool else own.dtype
        found = torch.zeros(len(rows), *own.shape[1:], dtype=kind, device=own.device)
        found[mine] = own[rows[mine] // world].to(kind)
        self.ranks.sum_([found])
        return found.to(own.dtype)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold, on every rank; as text, since unpickling runs what it is sent."""
        if self.ranks.world == 1:
            return [value]
        self.meet()
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self._device)
        lengths = self.ranks.gather(torch.tensor([len(text)], device=self._device)).flatten().tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self._device)
        padded[: len(text)] = text
        texts = self.ranks.gather(padded)
        return [json.loads(bytes(row[:length].tolist())) for row, length in zip(texts, lengths, strict=True)]

    def require_equal(self, value: Any, what: str) -> None:
        """Raises `ConfigError` where a rank has another value, which JSON can hold, than the first."""
        self.meet()
        self.ranks.require_equal([json.dumps(value, sort_keys=True)], what, self._device)


def added(values: list[Any]) -> Any:
    """What parts of the images gave, as of all of them: numbers are added, lists united, dictionaries by their keys.

    >>> added([{"right": 3, "warnings": ["a"]}, {"right": 4, "warnings": ["a", "b"]}, {}])
    {'right': 7, 'warnings': ['a', 'b']}
    """
    if isinstance(values[0], dict):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: added([value[name] for value in values if name in value]) for name in names}
    if isinstance(values[0], list):
        return list(dict.fromkeys(entry for value in values for entry in value))
    return sum(values)


@contextlib.contextmanager
def sharing(device: str) -> Iterator[Ranks]:
    """A block in which the ranks that torchrun started can talk; the first one that ends by an error tells it.

    Args:
        device: as `--device`.

    Raises:
        ConfigError: as `joined`.
        SystemExit: 1, where another rank has told what ends all.
    """
    with joined(device, _TIMEOUT_S) as ranks:
        try:
            yield ranks
        except (Exception, KeyboardInterrupt):
            told = 1
            # gone with torchrun
            with contextlib.suppress(RuntimeError):
                told = 1 if ranks.store is None else ranks.store.add("told what ends all", 1)
            if told > 1:
                raise SystemExit(1) from None
            raise
