"""What an operation refuses, and what torch asks of a custom operation."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from samples import randn

from awp_kernels import __main__ as summary
from awp_kernels import (
    _backend,
    augment,
    perturb_,
    perturb_into_,
    pgd_init_,
    pgd_init_normal_,
    pgd_step_,
    pgd_step_normalize_,
    restore_,
    use_backend,
)


def w(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return randn(shape, dtype)


ROWS = torch.zeros(2, 8, 4, 5).contiguous(memory_format=torch.channels_last)


def rows() -> torch.Tensor:
    """What a network reads of two images of three channels."""
    return ROWS.clone()


def normalized(**changes: torch.Tensor) -> None:
    given = {"x_adv": w(2, 3, 4, 5), "grad": rows(), "x": w(2, 3, 4, 5), "out": rows(), "mean": w(3), "std": w(3)}
    pgd_step_normalize_(**given | changes, step_size=0.1, epsilon=0.1, norm="linf")


OVERLAPPING = torch.zeros(10)
META = torch.zeros(3, device="meta")
PIXELS = torch.zeros((3, 2, 4, 4), dtype=torch.uint8)
IDS = torch.arange(3)

BAD_CALLS = {
    "unequal lists": (
        lambda: perturb_([w(3), w(4)], [w(3)], 0.1),
        "grads: expected 2 tensors like weights, got 1",
    ),
    "empty list": (lambda: perturb_([], [], 0.1), "weights: expected at least one tensor, got an empty list"),
    "shape": (
        lambda: perturb_([w(3), w(4)], [w(3), w(5)], 0.1),
        "grads[1]: expected shape (4,) like weights[1], got (5,)",
    ),
    "device": (lambda: perturb_([w(3)], [META], 0.1), "grads[0]: expected device cpu like weights[0], got meta"),
    "devices in one list": (
        lambda: perturb_([w(3), META], [w(3), META], 0.1),
        "weights[1]: expected device cpu like weights[0], got meta",
    ),
    "dtypes in one list": (
        lambda: perturb_([w(3), w(3).half()], [w(3), w(3)], 0.1),
        "weights[1]: expected torch.float32 like weights[0], got torch.float16",
    ),
    "gradient dtype": (
        lambda: perturb_([w(3)], [w(3).half()], 0.1),
        "grads[0]: expected torch.float32 like weights, got torch.float16",
    ),
    "saved dtype": (
        lambda: perturb_([w(3)], [w(3)], 0.1, saved=[w(3).half()]),
        "saved[0]: expected torch.float32 like weights, got torch.float16",
    ),
    "integers": (
        lambda: perturb_([torch.ones(3, dtype=torch.int64)], [w(3)], 0.1),
        "weights[0]: expected float64, float32, float16 or bfloat16, got torch.int64",
    ),
    "expanded": (
        lambda: perturb_([torch.zeros(1).expand(4)], [w(4)], 0.1),
        "weights[0]: expected elements that fill one block of memory",
    ),
    "sliced": (
        lambda: perturb_([w(4, 6)[:, ::2]], [w(4, 3)], 0.1),
        "weights[0]: expected elements that fill one block of memory",
    ),
    "sparse": (
        lambda: perturb_([w(3)], [w(3).to_sparse()], 0.1),
        "grads[0]: expected a strided tensor, got layout torch.sparse_coo",
    ),
    "same tensor twice": (
        lambda: perturb_([OVERLAPPING, OVERLAPPING], [w(10), w(10)], 0.1),
        "weights[1]: shares memory with weights[0]",
    ),
    "overlapping views": (
        lambda: perturb_([OVERLAPPING[:6], OVERLAPPING[5:]], [w(6), w(5)], 0.1),
        "weights[1]: shares memory with weights[0]",
    ),
    "gradient is the weight": (lambda: perturb_([OVERLAPPING], [OVERLAPPING], 0.1), "shares memory with"),
    "saved is the weight": (
        lambda: perturb_([OVERLAPPING], [w(10)], 0.1, saved=[OVERLAPPING]),
        "shares memory with",
    ),
    "saved strides": (
        lambda: perturb_([w(3, 4)], [w(3, 4)], 0.1, saved=[w(4, 3).t()]),
        "saved[0]: expected strides (4, 1) like weights[0], got (1, 3)",
    ),
    "scope": (
        lambda: perturb_([w(3)], [w(3)], 0.1, scope="x"),
        "scope: expected one of layer, global, filter, got 'x'",
    ),
    "filter order": (
        lambda: perturb_([w(3, 4).t()], [w(4, 3)], 0.1, scope="filter"),
        "weights[0]: scope 'filter' needs dimension 0 outermost",
    ),
    "gamma": (lambda: perturb_([w(3)], [w(3)], float("nan")), "gamma: expected a finite number, got nan"),
    "eps": (lambda: perturb_([w(3)], [w(3)], 0.1, eps=-1), "eps: expected a finite number >= 0, got -1.0"),
    "found_inf, dtype": (
        lambda: perturb_([w(3)], [w(3)], 0.1, found_inf=torch.tensor(False)),
        "found_inf: expected float32, got torch.bool",
    ),
    "found_inf, shape": (
        lambda: perturb_into_([w(3)], [w(3)], [w(3)], 0.1, found_inf=w(2)),
        "found_inf: expected a tensor of one element, got shape (2,)",
    ),
    "scale": (
        lambda: perturb_([w(3)], [w(3)], 0.1, scale="sam"),
        "scale: expected one of relative, absolute, elementwise, got 'sam'",
    ),
    "eta": (
        lambda: perturb_([w(3)], [w(3)], 0.1, scale="elementwise", eta=-1),
        "eta: expected a finite number >= 0, got -1.0",
    ),
    "eta without elementwise": (
        lambda: perturb_([w(3)], [w(3)], 0.1, eta=0.01),
        "eta: scale 'elementwise' alone takes it, got 0.01 with scale 'relative'",
    ),
    "eta into without elementwise": (
        lambda: perturb_into_([w(3)], [w(3)], [w(3)], 0.1, scale="absolute", eta=0.01),
        "eta: scale 'elementwise' alone takes it, got 0.01 with scale 'absolute'",
    ),
    "bound": (
        lambda: perturb_([w(3)], [w(3)], 0.1, bound=-0.5),
        "bound: expected a finite number >= 0, got -0.5",
    ),
    "bound infinite": (
        lambda: perturb_([w(3)], [w(3)], 0.1, bound=float("inf")),
        "bound: expected a finite number >= 0, got inf",
    ),
    "adaptive without elementwise": (
        lambda: perturb_([w(3)], [w(3)], 0.1, adaptive=[True]),
        "adaptive: scale 'elementwise' alone takes it, got scale 'relative'",
    ),
    "adaptive length": (
        lambda: perturb_([w(3)], [w(3)], 0.1, scale="elementwise", adaptive=[True, False]),
        "adaptive: expected 1 flags like weights, got 2",
    ),
    "std": (
        lambda: pgd_init_normal_(w(3, 2), w(3, 2), std=-0.1, sample_ids=torch.arange(3), seed=1),
        "std: expected a finite number >= 0, got -0.1",
    ),
    "normal seed": (
        lambda: pgd_init_normal_(w(3, 2), w(3, 2), std=0.1, sample_ids=torch.arange(3), seed=-1),
        "seed: expected a number in [0, 2^63), got -1",
    ),
    "normal is not a norm": (
        lambda: pgd_init_(w(3, 2), w(3, 2), epsilon=0.1, norm="normal", sample_ids=torch.arange(3), seed=1),
        "norm: expected one of linf, l2, got 'normal'",
    ),
    "out shape": (
        lambda: perturb_into_([w(4)], [w(3)], [w(3)], 0.1),
        "weights[0]: expected shape (4,) like out[0], got (3,)",
    ),
    "out is the weight": (
        lambda: perturb_into_([OVERLAPPING], [OVERLAPPING], [w(10)], 0.1),
        "shares memory with",
    ),
    "restore lengths": (lambda: restore_([w(3)], []), "saved: expected 1 tensors like weights, got 0"),
    "restore dtype": (
        lambda: restore_([w(3)], [w(3).half()]),
        "saved[0]: expected torch.float32 like weights, got torch.float16",
    ),
    "ids shape": (
        lambda: pgd_init_(w(3, 2), w(3, 2), epsilon=0.1, norm="linf", sample_ids=torch.arange(2), seed=0),
        "sample_ids: expected int64 of shape (3,), got torch.int64 of shape (2,)",
    ),
    "ids dtype": (
        lambda: pgd_init_(w(3, 2), w(3, 2), epsilon=0.1, norm="linf", sample_ids=torch.arange(3).int(), seed=0),
        "sample_ids: expected int64 of shape (3,), got torch.int32 of shape (3,)",
    ),
    "seed": (
        lambda: pgd_init_(w(3, 2), w(3, 2), epsilon=0.1, norm="linf", sample_ids=torch.arange(3), seed=-1),
        "seed: expected a number in [0, 2^63), got -1",
    ),
    "epsilon": (
        lambda: pgd_init_(w(3, 2), w(3, 2), epsilon=-0.1, norm="linf", sample_ids=torch.arange(3), seed=1),
        "epsilon: expected a finite number >= 0, got -0.1",
    ),
    "epsilon of a step": (
        lambda: pgd_step_(w(3, 2), w(3, 2), w(3, 2), step_size=0.1, epsilon=-0.1, norm="linf"),
        "epsilon: expected a finite number >= 0, got -0.1",
    ),
    "norm": (
        lambda: pgd_step_(w(3, 2), w(3, 2), w(3, 2), step_size=0.1, epsilon=0.1, norm="l1"),
        "norm: expected one of linf, l2, got 'l1'",
    ),
    "step nan": (
        lambda: pgd_step_(w(3, 2), w(3, 2), w(3, 2), step_size=float("nan"), epsilon=0.1, norm="l2"),
        "step_size: expected a finite number, got nan",
    ),
    "clip": (
        lambda: pgd_step_(w(3, 2), w(3, 2), w(3, 2), step_size=0.1, epsilon=0.1, norm="l2", clip=(1, 0)),
        "clip: expected (low, high) with low <= high, got (1.0, 0.0)",
    ),
    "x dtype": (
        lambda: pgd_step_(w(3, 2), w(3, 2), w(3, 2).half(), step_size=0.1, epsilon=0.1, norm="l2"),
        "x: expected torch.float32 like x_adv, got torch.float16",
    ),
    "x shape": (
        lambda: pgd_step_(w(3, 2), w(3, 2), w(2, 3), step_size=0.1, epsilon=0.1, norm="l2"),
        "x: expected shape (3, 2) like x_adv, got (2, 3)",
    ),
    "x is x_adv": (
        lambda: pgd_step_(OVERLAPPING, w(10), OVERLAPPING, step_size=0.1, epsilon=0.1, norm="linf"),
        "shares memory with",
    ),
    "mask dtype": (
        lambda: pgd_step_(w(3, 2), w(3, 2), w(3, 2), step_size=0.1, epsilon=0.1, norm="l2", mask=w(3, 2)),
        "mask: expected torch.bool, got torch.float32",
    ),
    "mask shape": (
        lambda: pgd_step_(
            w(3, 2), w(3, 2), w(3, 2), step_size=0.1, epsilon=0.1, norm="l2", mask=torch.ones(3, dtype=torch.bool)
        ),
        "mask: expected a shape that broadcasts to (3, 2) like x_adv, got (3,)",
    ),
    "batch innermost": (
        lambda: pgd_step_(w(2, 3).t(), w(3, 2), w(3, 2), step_size=0.1, epsilon=0.1, norm="l2"),
        "x_adv: expected dimension 0 outermost in memory, got strides (1, 3)",
    ),
    "images in 16 bits": (
        lambda: normalized(x_adv=w(2, 3, 4, 5).half(), x=w(2, 3, 4, 5).half()),
        "x_adv: expected float32 or float64 images [N, C, H, W], got torch.float16 of shape (2, 3, 4, 5)",
    ),
    "images of another shape": (
        lambda: normalized(x_adv=w(2, 3), x=w(2, 3)),
        "x_adv: expected float32 or float64 images [N, C, H, W], got torch.float32 of shape (2, 3)",
    ),
    "fewer channels": (
        lambda: normalized(out=w(2, 2, 4, 5)),
        "out: expected shape (2, at least 3, 4, 5) as x_adv has, got (2, 2, 4, 5)",
    ),
    "other pixels": (
        lambda: normalized(out=w(2, 8, 5, 4)),
        "out: expected shape (2, at least 3, 4, 5) as x_adv has, got (2, 8, 5, 4)",
    ),
    "planes": (
        lambda: normalized(out=w(2, 8, 4, 5)),
        "out: expected channels_last order without gaps, got strides (160, 20, 5, 1)",
    ),
    "out dtype": (
        lambda: normalized(out=rows().int()),
        "out: expected float64, float32, float16 or bfloat16, got torch.int32",
    ),
    "a gradient for the images": (
        lambda: normalized(grad=w(2, 3, 4, 5)),
        "grad: expected shape (2, 8, 4, 5) like out, got (2, 3, 4, 5)",
    ),
    "a gradient in another precision": (
        lambda: normalized(grad=rows().half()),
        "grad: expected torch.float32 like out, whose gradient it is, got torch.float16",
    ),
    "mean of another shape": (
        lambda: normalized(mean=w(1, 3, 1, 1)),
        "mean: expected torch.float32 of shape (3,), one value a channel of x_adv, got torch.float32 of shape (1, 3,",
    ),
    "std dtype": (
        lambda: normalized(std=w(3).double()),
        "std: expected torch.float32 of shape (3,), one value a channel of x_adv, got torch.float64 of shape (3,)",
    ),
    "out is the gradient": (
        lambda: normalized(out=ROWS, grad=ROWS),
        "shares memory with",
    ),
    "more than 2^31 values": (
        lambda: normalized(x_adv=w(1, 1, 1, 2), x=w(1, 1, 1, 2), out=torch.zeros(1).expand(1, 1 << 30, 1, 2)),
        "out: expected less than 2^31 values a sample, got 2147483648",
    ),
    "image dtype": (
        lambda: augment(PIXELS.float(), sample_ids=IDS, seed=1),
        "images: expected uint8, got torch.float32",
    ),
    "image shape": (
        lambda: augment(PIXELS[0], sample_ids=IDS, seed=1),
        "images: expected a batch [N, C, H, W], got shape (2, 4, 4)",
    ),
    "large images": (
        lambda: augment(torch.zeros((), dtype=torch.uint8).expand(1, 2, 2**15, 2**14), sample_ids=IDS[:1], seed=1),
        "images: expected fewer than 2^30 values an image, got 1073741824",
    ),
    "augment ids": (
        lambda: augment(PIXELS, sample_ids=IDS[:2], seed=1),
        "sample_ids: expected 3 like images, got 2",
    ),
    "augment ids of rows": (
        lambda: augment(PIXELS, sample_ids=IDS, rows=IDS[:2], seed=1),
        "sample_ids: expected 2 like rows, got 3",
    ),
    "rows dtype": (
        lambda: augment(PIXELS, sample_ids=IDS, rows=IDS.int(), seed=1),
        "rows: expected int64 [B], got torch.int32 of shape (3,)",
    ),
    "rows device": (
        lambda: augment(PIXELS, sample_ids=IDS, rows=IDS.to("meta"), seed=1),
        "rows: expected device cpu like images, got meta",
    ),
    "row too large": (
        lambda: augment(PIXELS, sample_ids=IDS, rows=IDS + 1, seed=1),
        "rows: expected rows of 3 images, got 3",
    ),
    "negative row": (
        lambda: augment(PIXELS, sample_ids=IDS, rows=IDS - 1, seed=1),
        "rows: expected rows of 3 images, got -1",
    ),
    "augment seed": (
        lambda: augment(PIXELS, sample_ids=IDS, seed=2**63),
        "seed: expected a number in [0, 2^63), got 9223372036854775808",
    ),
    "pad": (
        lambda: augment(PIXELS, sample_ids=IDS, seed=1, pad=-1),
        "pad: expected a number of pixels in [0, 2^30), got -1",
    ),
    "cutout": (
        lambda: augment(PIXELS, sample_ids=IDS, seed=1, cutout=2**30),
        "cutout: expected a number of pixels in [0, 2^30), got 1073741824",
    ),
    "no fill": (
        lambda: augment(PIXELS, sample_ids=IDS, seed=1, cutout=2),
        "fill: expected 2 values in [0, 1], one a channel, with cutout 2, got None",
    ),
    "fill": (
        lambda: augment(PIXELS, sample_ids=IDS, seed=1, cutout=2, fill=(0.5, 1.5)),
        "fill: expected 2 values in [0, 1], one a channel of images, got [0.5, 1.5]",
    ),
    "memory format": (
        lambda: augment(PIXELS, sample_ids=IDS, seed=1, memory_format=torch.preserve_format),
        "memory_format: expected torch.channels_last or torch.contiguous_format, got torch.preserve_format",
    ),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_bad_arguments_are_named_in_one_line(name):
    call, message = BAD_CALLS[name]
    before = OVERLAPPING.clone()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert torch.equal(OVERLAPPING, before)


def test_a_refused_call_writes_nothing():
    weights, saved = [w(3), w(4)], [torch.zeros(3), torch.zeros(4)]
    before = [t.clone() for t in weights]
    with pytest.raises(ValueError):
        perturb_(weights, [w(3), w(5)], 0.1, saved=saved)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert not any(t.any() for t in saved)


def test_compiles_without_graph_breaks():
    def move(weight, grad, saved):
        scales = perturb_([weight * 1.0], [grad], 0.1)
        moved = weight.clone()
        perturb_([moved], [grad], 0.1, saved=[saved])
        back = moved.clone()
        restore_([back], [saved])
        return scales, moved, back

    weight, grad = w(5, 4), w(5, 4)
    # "aot_eager" traces and functionalises as every backend does, and needs no C++ compilation of its own
    compiled = torch.compile(move, fullgraph=True, backend="aot_eager")
    expected, result = move(weight, grad, torch.zeros(5, 4)), compiled(weight, grad, torch.zeros(5, 4))
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


def test_writes_are_seen_by_autograd():
    weight = w(3).requires_grad_()
    loss = (weight**2).sum()
    perturb_([weight], [w(3)], 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backend_by_environment(monkeypatch):
    for name in _backend.BACKENDS:
        monkeypatch.setenv("AWP_BACKEND", name)
        assert _backend._forced_by_environment() == name
    monkeypatch.setenv("AWP_BACKEND", "")
    assert _backend._forced_by_environment() is None
    code = "from awp_kernels import perturb_; import torch; perturb_([torch.ones(3)], [torch.ones(3)], 0.1)"
    environment = os.environ | {"AWP_BACKEND": "fast"}
    wrong = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert wrong.returncode != 0
    assert "AWP_BACKEND: expected one of reference, cpp, cuda, triton, got 'fast'" in wrong.stderr
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "needs TRITON_INTERPRET=1" in _backend._triton_problem("cpu")


def test_use_backend_nests_and_refuses():
    with use_backend("reference"):
        with use_backend("cpp"):
            assert _backend.backend_for("cpu", {torch.float32}) == "cpp"
        assert _backend.backend_for("cpu", {torch.float32}) == "reference"
    assert _backend.backend_for("cpu", {torch.float64}) == "reference"
    with pytest.raises(ValueError, match="use_backend: expected one of"), use_backend("rust"):
        pass
    with use_backend("cuda"), pytest.raises(ValueError, match="backend 'cuda' was forced but cannot serve cpu tensors"):
        perturb_([w(3)], [w(3)], 0.1)


def test_a_backend_without_the_operation_says_so():
    """On any device."""
    with use_backend("cuda"), pytest.raises(ValueError, match="augment has no CUDA C"):
        augment(PIXELS, sample_ids=IDS, seed=1)
    assert _backend.problem("cuda", "cuda", "augment") != _backend.problem("cuda", "cuda", "perturb")
    with use_backend("cpp"), pytest.raises(ValueError, match="pgd_step_normalize has no C"):
        normalized()


def test_summary_names_every_operation():
    result = subprocess.run([sys.executable, "-m", "awp_kernels"], capture_output=True, text=True, check=True)
    for name in (
        "perturb_",
        "perturb_into_",
        "restore_",
        "sgd_step_",
        "total_norm",
        "pgd_init_",
        "pgd_init_normal_",
        "pgd_step_",
        "pgd_step_normalize_          cpu float32, float16, bfloat16     reference",
        "augment                      cpu uint8                          cpp",
        "cpp        available: called, and right",
    ):
        assert name in result.stdout
    line = f"set -o pipefail; {sys.executable} -m awp_kernels | head -1"
    cut = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    # it may have written all before `head` is gone
    assert cut.returncode in (0, 128 + signal.SIGPIPE)
    assert cut.stderr == ""
    assert cut.stdout.startswith("awp_kernels with torch")
    if not torch.cuda.is_available():
        assert "cuda       not needed, as torch finds no GPU (" in result.stdout


def test_neighbours_in_one_block_of_memory_share_nothing():
    """Views of a flat buffer, as bucketed gradients and flat parameters are."""
    flat, saved = torch.arange(1.0, 11.0), torch.empty(10)
    perturb_([flat[:4], flat[4:]], [w(4), w(6)], 0.1, saved=[saved[:4], saved[4:]])
    assert torch.equal(saved, torch.arange(1.0, 11.0))
    assert (flat != saved).all()


@pytest.mark.parametrize("told", ["a result is wrong by nan", "RuntimeError: cannot be launched"])
def test_summary_tells_what_an_implementation_did_when_it_was_called(told, monkeypatch, capsys):
    def broken(*arguments, **options):
        if told.startswith("RuntimeError"):
            raise RuntimeError("cannot be launched")
        return torch.zeros(1)

    monkeypatch.setitem(_backend._cache, ("cpp", "perturb"), broken)
    assert summary.main() == 1
    assert f"  cpp        FAILS when called: {told}\n" in capsys.readouterr().out
