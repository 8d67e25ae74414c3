"""What the machine can do at most: a large matrix product, and a large copy, through torch."""

import statistics
from dataclasses import asdict, dataclass

import torch

from bench.clocks import seconds

# matrices of at most so many rows and columns; bytes of a copied block, several times the last cache
_SIZE = {"cpu": 2048, "cuda": 8192}
# CPUs without instructions for 16-bit numbers take seconds for what others do in milliseconds
_ENOUGH_SECONDS = 0.1
_COPY_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_REPEATS = {"cpu": 7, "cuda": 20}


@dataclass(frozen=True)
class Ceilings:
    """Medians of a few repeats on random data.

    Attributes:
        matmul_tflops: by number format, TFLOP/s of a square product.
        copy_gb_per_s: bytes read plus bytes written.
        method: what was measured.
    """

    matmul_tflops: dict[str, float]
    copy_gb_per_s: float
    method: str

    def to_json(self) -> dict[str, object]:
        """For the result file."""
        return asdict(self)


def _matmul(device: str, dtype: torch.dtype, precision: str) -> tuple[float, int]:
    """TFLOP/s, and of matrices of what size: the largest that does not take long."""
    torch.set_float32_matmul_precision(precision)
    size, times = 128, [0.0]
    while size < _SIZE[device] and times[-1] < _ENOUGH_SECONDS:
        size *= 2
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty(size, size, dtype=dtype, device=device)
        times = [seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device) for _ in range(2)]
    times = [seconds(lambda: torch.mm(a, b, out=out), device) for _ in range(1 + _REPEATS[device])]
    torch.set_float32_matmul_precision("highest")
    return 2 * size**3 / statistics.median(times[1:]) / 1e12, size


def measure_ceilings(device: str) -> Ceilings:
    """Measures both; a few seconds."""
    formats = {"bf16": (torch.bfloat16, "highest"), "fp32": (torch.float32, "highest")}
    if device == "cuda":
        formats = {"fp16": (torch.float16, "highest"), "tf32": (torch.float32, "high"), **formats}
    matmul = {name: _matmul(device, dtype, precision) for name, (dtype, precision) in formats.items()}
    source = torch.rand(_COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(3 + _REPEATS[device])]
    copied = 2 * source.nbytes / statistics.median(times[3:]) / 1e9
    sizes = ", ".join(f"{name} {size}" for name, (_, size) in matmul.items())
    block, repeats = _COPY_BYTES[device] >> 20, _REPEATS[device]
    method = f"medians of {repeats}: products of square matrices ({sizes}), copy of {block} MiB, random data"
    return Ceilings({name: rate for name, (rate, _) in matmul.items()}, copied, method)
