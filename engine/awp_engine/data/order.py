"""In which order samples come: functions of a seed and their ids, or their places."""

import math

import torch
from torch import Tensor

from awp_kernels.philox import mix_seed, sample_words

_STREAM_EPOCH = 3
_STREAM_EXTRA = 8
_STREAM_DRAWN = 30
_ROUNDS = 6


def random_order_key(ids: Tensor, *, seed: int, stream: int) -> Tensor:
    """63 random bits for every sample id, int64 [N]; sorting by them shuffles."""
    words = sample_words(ids, 2, seed=seed, stream=stream)
    return (words[:, 0] << 31) | (words[:, 1] >> 1)


def epoch_order(ids: Tensor, *, seed: int, epoch: int) -> Tensor:
    """The places of the samples with these ids in the order of an epoch, int64 [N]."""
    return torch.argsort(random_order_key(ids, seed=mix_seed(seed, epoch), stream=_STREAM_EPOCH), stable=True)


def own_rows(ids: Tensor, *, count: int, seed: int, epoch: int) -> Tensor:
    """The first `count` places of an epoch's shuffled passes over the samples with these ids, int64 [count]."""
    passes = range(-(-count // max(len(ids), 1)))
    orders = [epoch_order(ids, seed=mix_seed(seed, number) if number else seed, epoch=epoch) for number in passes]
    return torch.cat([torch.empty(0, dtype=torch.int64), *orders])[:count]


def extra_rows(size: int, *, first: int, count: int, seed: int) -> Tensor:
    """Places `first` to `first + count - 1` of an endless sequence of shuffled passes over `size` rows."""
    pieces = [torch.empty(0, dtype=torch.int64)]
    for number in range(first // size, -(-(first + count) // size)):
        start = number * size
        places = torch.arange(max(first - start, 0), min(first + count - start, size))
        pieces.append(shuffled(places, size, seed=mix_seed(seed, number)))
    return torch.cat(pieces)


def drawn_rows(size: int, *, count: int, seed: int) -> Tensor:
    """`count` of `size` rows, each drawn from all of them, int64 [count]."""
    # of 63 random bits: no row is favoured by more than 2^-30 of its chance
    return random_order_key(torch.arange(count), seed=seed, stream=_STREAM_DRAWN) % size


def shuffled(places: Tensor, size: int, *, seed: int) -> Tensor:
    """Which of `size` rows, shuffled by the seed, stand at these places, int64 [n]: no table of all of them is needed.

    A Feistel network on pairs of digits (l, r) of bases a and b, a * b just above size: a round adds a random function
    of one digit to the other one. What falls outside goes through it again.

    Source: Black, Rogaway: Ciphers with Arbitrary Finite Domains, CT-RSA 2002.

    >>> sorted(shuffled(torch.arange(10), 10, seed=3).tolist()) == list(range(10))
    True
    """
    a = math.isqrt(max(size - 1, 0)) + 1
    b = -(-size // a)
    values, left = places.clone(), torch.arange(len(places))
    while len(left):
        digits = [values[left] // b, values[left] % b]
        for number in range(_ROUNDS):
            which, base = number % 2, (a, b)[number % 2]
            word = sample_words(digits[1 - which], 1, seed=mix_seed(seed, number), stream=_STREAM_EXTRA)[:, 0]
            digits[which] = (digits[which] + (word * base >> 32)) % base
        values[left] = digits[0] * b + digits[1]
        left = left[values[left] >= size]
    return values
