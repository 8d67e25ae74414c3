"""Counter-based random numbers in plain PyTorch: the definition that every implementation repeats to the last bit.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011). The words depend on
the seed and the counter alone, so noise keyed by sample id is the same whatever the batch order, the number of ranks
or the device.
"""

import math

import torch
from torch import Tensor

STREAM_UNIFORM = 0
STREAM_NORMAL = 1
STREAM_AUGMENT = 2
STREAM_CUTOUT = 6

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# log(m) = 2 s (1 + s^2/3 + s^4/5 + s^6/7 + s^8/9), s = (m - 1) / (m + 1), for m in [sqrt(1/2), sqrt(2)]
_LOG_COEFFICIENTS = (1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0)
# Taylor's series of sin(a)/a and cos(a) in a^2, for |a| <= pi/4
_SIN_COEFFICIENTS = (1 / 362880, -1 / 5040, 1 / 120, -1 / 6, 1.0)
_COS_COEFFICIENTS = (1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0)


def mix_seed(seed: int, *values: int) -> int:
    """Derive an independent 63-bit seed from a seed and further numbers, by the splitmix64 finaliser.

    Args:
        seed: the run's seed.
        values: what the new seed is for, such as an epoch and a step.

    Returns:
        A number in [0, 2^63).
    """
    mask = (1 << 64) - 1
    state = seed & mask
    for value in (len(values), *values):
        state = (state + 0x9E3779B97F4A7C15 + (value & mask)) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of broadcastable shape holding 32-bit words.
        key: two 32-bit words, or int64 tensors of one.

    Returns:
        Four int64 tensors holding 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, which leaves their low 64 bits right; the mask undoes the shift's sign extension
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def sample_words(sample_ids: Tensor, count: int, *, seed: int | Tensor, stream: int) -> Tensor:
    """The first `count` random words of every sample.

    Args:
        sample_ids: int64 [N].
        count: words a sample.
        seed: in [0, 2^63); an int64 tensor of one number, where a captured step is to read it anew.
        stream: which of a sample's independent sequences.

    Returns:
        int64 [N, count], values in [0, 2^32).
    """
    blocks = torch.arange(-(-count // 4), device=sample_ids.device).unsqueeze(0)
    ids = sample_ids.unsqueeze(1)
    counter = (blocks, torch.full_like(blocks, stream), ids & _WORD, (ids >> 32) & _WORD)
    words = philox4x32(counter, (seed & _WORD, seed >> 32))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :count]


def uniform_integers(sample_ids: Tensor, count: int, *, seed: int | Tensor) -> Tensor:
    """Odd integers in (-2^24, 2^24), uniform and symmetric; times 2^-24 they are uniform in (-1, 1).

    Returns:
        int64 [N, count].
    """
    words = sample_words(sample_ids, count, seed=seed, stream=STREAM_UNIFORM)
    return 2 * (words >> 8) + 1 - (1 << 24)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def normals(sample_ids: Tensor, count: int, *, seed: int) -> Tensor:
    """Standard normal fp32 numbers by Box-Muller, as a fixed sequence of single IEEE operations.

    Returns:
        fp32 [N, count].
    """
    words = sample_words(sample_ids, count + count % 2, seed=seed, stream=STREAM_NORMAL)
    radius_words, angle_words = words[:, 0::2], words[:, 1::2]

    number = ((radius_words >> 8) + 1).to(torch.float32)  # exact, in [1, 2^24]
    bits = number.view(torch.int32)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    upper = mantissa > math.sqrt(2)
    mantissa = torch.where(upper, mantissa * 0.5, mantissa)
    exponent = exponent + upper
    s = (mantissa - 1) / (mantissa + 1)
    logarithm = (exponent - 24).to(torch.float32) * math.log(2) + (s * 2) * _horner(s * s, _LOG_COEFFICIENTS)
    # through fp64, whose rounded root rounds right: torch's fp32 root (MKL's) is off by an ulp for one number in five
    radius = (logarithm * -2).double().sqrt().to(torch.float32)

    angle_bits = angle_words >> 8
    quadrant = angle_bits >> 22
    angle = ((angle_bits & 0x3FFFFF).to(torch.float32) * 2.0**-22 - 0.5) * (math.pi / 2)
    square = angle * angle
    sine, cosine = angle * _horner(square, _SIN_COEFFICIENTS), _horner(square, _COS_COEFFICIENTS)
    swap = (quadrant & 1) == 1
    first, second = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    first = torch.where((quadrant == 1) | (quadrant == 2), -first, first)
    second = torch.where(quadrant >= 2, -second, second)
    return torch.stack((radius * first, radius * second), dim=-1).flatten(1)[:, :count]
