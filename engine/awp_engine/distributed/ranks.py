"""The ranks of a run: which one this is, what part of the work is its own, and what they tell each other.

torchrun starts a process a rank. Everything here is nothing at all where there is one rank.
"""

import contextlib
import datetime
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from awp_engine.config import ConfigError
from awp_engine.distributed.share import rank_share

Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number on its machine.
        store: where ranks can leave word for each other without taking part in anything; None for one rank.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> tuple[slice, float]:
        """This rank's part of `count` samples: see `rank_share`."""
        return rank_share(count, self.rank, self.world)

    @torch.no_grad()
    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over the ranks, in one all-reduce a dtype; all ranks get the same bits."""
        if self.world == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor)
        for same in groups.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            dist.all_reduce(flat)
            pieces = flat.split([tensor.numel() for tensor in same])
            for tensor, piece in zip(same, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their means over the ranks."""
        if self.world > 1:
            self.sum_(tensors)
            for tensor in tensors:
                tensor.div_(self.world)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is true on any rank."""
        if self.world == 1:
            return flag
        told = torch.tensor([flag], dtype=torch.int32, device=device)
        dist.all_reduce(told)
        return bool(told.item())

    @torch.no_grad()
    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by those of the first rank."""
        if self.world == 1:
            return
        for tensor in tensors:
            plain = tensor.detach().contiguous()
            dist.broadcast(plain, 0)
            if plain.data_ptr() != tensor.data_ptr():
                tensor.copy_(plain)

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of equal shape of all ranks, [world, ...]."""
        if self.world == 1:
            return tensor.unsqueeze(0)
        gathered = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(gathered, tensor.contiguous())
        return torch.stack(gathered)

    def broadcast_json(self, value: Any, device: torch.device) -> Any:
        """The first rank's `value`, which JSON can hold; as text, since unpickling runs what it is sent."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode() if self.is_first else b""
        length = torch.tensor([len(text)], device=device)
        self.broadcast_([length])
        payload = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
        if self.is_first:
            payload.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.broadcast_([payload])
        return json.loads(bytes(payload.tolist()))

    def broadcast_groups(self, groups: Groups, device: torch.device) -> Groups:
        """The first rank's tensors, on the CPU: group -> name -> tensor."""
        if self.world == 1:
            return groups
        layout = {
            group: {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in members.items()}
            for group, members in groups.items()
        }
        layout = self.broadcast_json(layout, device)
        if not self.is_first:
            groups = {
                group: {
                    name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in members.items()
                }
                for group, members in layout.items()
            }
        for group, members in layout.items():
            self.broadcast_([groups[group][name] for name in members])
        return groups

    def require_equal(self, values: Sequence[str], what: str, device: torch.device) -> None:
        """Make sure that every rank was given the same.

        Raises:
            ConfigError: naming the ranks that differ.
        """
        first = self.broadcast_json(list(values), device)
        differs = torch.tensor([list(values) != first], dtype=torch.int64, device=device)
        others = self.gather(differs).flatten().nonzero().flatten().tolist()
        if others:
            raise ConfigError(f"{what}: expected the same on every rank; other than rank 0's on ranks {others}")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"{name}: expected the whole number that torchrun sets, got {text!r}")
    return int(text)


def _agree(store: Store, rank: int, world: int, seconds: float) -> str:
    """A name that the processes of this start alone have.

    torchrun keeps one store over all its restarts, in which words of ranks that were killed would be taken for those of
    the ones that came after them: each process therefore shows a number of its own, and the first rank repeats them.

    Raises:
        RuntimeError: naming the ranks that did not come.
    """
    number, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    life = number
    if rank == 0:
        store.set("life", life)
    while time.monotonic() < deadline:
        if rank == 0:
            names = [f"{life}/rank{other}" for other in range(1, world)]
            if store.check(names):
                store.set(f"{life}/ranks", json.dumps([store.get(name).decode() for name in names]))
                return life
        elif store.check(["life"]):
            life = store.get("life").decode()
            store.set(f"{life}/rank{rank}", number)
            if store.check([f"{life}/ranks"]) and json.loads(store.get(f"{life}/ranks"))[rank - 1] == number:
                return life
        time.sleep(0.02)
    missing = [other for other in range(1, world) if not store.check([f"{life}/rank{other}"])] if rank == 0 else [0]
    raise RuntimeError(f"ranks {missing} did not come within {seconds:g} s; see what they say, and start again")


@contextlib.contextmanager
def joined(device: str, timeout: float) -> Iterator[Ranks]:
    """A block in which the ranks that torchrun started can talk; alone where it started one.

    Args:
        device: as `--device`: NCCL serves GPUs, gloo CPUs.
        timeout: seconds without progress until the watchdog names the rank that hangs; a rank that waits for another
            gives up some time after that, when nobody watches.

    Raises:
        ConfigError: more ranks on this machine than GPUs.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        yield Ranks()
        return
    local_rank = _number("LOCAL_RANK", 0)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"--nproc-per-node: expected at most {torch.cuda.device_count()}, a rank a GPU; got more on this machine"
        )
    if on_gpu:
        torch.cuda.set_device(local_rank)
    store, rank, world = next(rendezvous("env://"))
    # some ranks are a minute later than others where many import from one disk
    life = _agree(store, rank, world, 2 * timeout + 60)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=PrefixStore(f"{life}/collectives", store),
        rank=rank,
        world_size=world,
        # the watchdog takes at most 1.75 timeouts; one that gave up before it would be blamed for the one that hangs
        timeout=datetime.timedelta(seconds=2 * timeout + 10),
    )
    # a client of its own: a rank that waits for the first one would keep it
    another = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
    yield Ranks(rank=rank, world=world, local_rank=local_rank, store=PrefixStore(f"{life}/words", another))
    # not after an error: it would wait for ranks that are gone
    dist.destroy_process_group()


def tell_torchrun(error: BaseException) -> None:
    """Have torchrun's summary show `error` as what ended this rank."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    # torchrun dies of a file that is half written, as by a rank that it kills meanwhile
    os.environ["TORCHELASTIC_ERROR_FILE"] = partial = f"{path}.{os.getpid()}"
    try:
        get_error_handler().record_exception(error)
        Path(partial).replace(path)
    finally:
        os.environ["TORCHELASTIC_ERROR_FILE"] = path


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """A block whose errors torchrun's summary shows, as `torch.distributed.elastic`'s `record` has it.

    That one knows nothing of errors that end in an exit code.
    """
    try:
        yield
    except Exception as error:
        tell_torchrun(error)
        raise
