"""The CUDA sources: compiled for every architecture, read back as SASS, and run on the host by an emulator."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import sass
import torch
from places import ROOT

from awp_kernels import _backend

# compiling takes a minute on two idle cores, and several where they are shared
pytestmark = [pytest.mark.compile, pytest.mark.timeout(900)]

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("80", "90a", "100")
INCLUDES = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
# what a launch may carry beyond bank 0's own first bytes
PARAMETER_LIMIT = 32764
FUNCTIONS = (
    "perturb_workspace_bytes",
    "perturb",
    "restore",
    "sgd_step_workspace_bytes",
    "sgd_step",
    "total_norm_workspace_bytes",
    "total_norm",
    "pgd_init",
    "pgd_step",
    "pgd_step_normalize",
    "bn_act_workspace_bytes",
    "bn_act_train",
    "bn_act_eval",
    "bn_act_backward",
)
HALVES = r"awp::cuda::(?:Half|BFloat16)"
# kernel name: least LDG.128, least STG.128. Two packs of weights and two of gradients are in flight at once.
WIDE = {
    r"perturb_sums<": (2, 0),
    r"perturb_sums<float, float, ": (4, 0),
    rf"perturb_sums<{HALVES}, {HALVES}, ": (4, 0),
    r"perturb_(move|filter)<": (2, 2),
    r"perturb_(move|filter)<float, float, ": (4, 4),
    rf"perturb_(move|filter)<{HALVES}, {HALVES}, ": (4, 4),
    r"restore_copy": (4, 4),
    # two packs of weights, and of fp32 gradients, where a step is taken, and two of weights where it is left out;
    # written are the weights and, of each dtype, their copy
    r"sgd_update<": (4, 4),
    r"sgd_update<float, ": (6, 4),
    # momentum buffers, or averages, or both
    r"sgd_update<.*(true, false|false, true)>": (6, 6),
    r"sgd_update<.*true, true>": (8, 8),
    r"sgd_update<float, true, true>": (10, 8),
    # four packs of each of three dtypes
    r"norm_sums": (12, 0),
    r"sgd_norms|norm_total": (0, 0),
    r"pgd_init_\w+<float>": (1, 1),
    r"pgd_step_\w+<awp::cuda::Flat<": (1, 0),
    r"pgd_step_\w+<awp::cuda::Flat<float, ": (2, 1),
    rf"pgd_step_\w+<awp::cuda::Flat<{HALVES}, {HALVES}>": (3, 1),
    # of four pixels: x_adv and x, three times 16 bytes each; the rows that are written, and of fp32 those that are read
    r"pgd_step_linf<awp::cuda::Pixels<": (6, 8),
    r"pgd_step_linf<awp::cuda::Pixels<float>": (11, 13),
    # twice x_adv and x; the sums unroll twice
    r"pgd_step_l2<awp::cuda::Pixels<": (12, 8),
    r"pgd_step_l2<awp::cuda::Pixels<float>": (32, 13),
    r"pgd_step_\w+<awp::cuda::Elements<": (0, 0),
    # of eight channels a thread: z or its two parts, in four rows of 16 bytes (fp32: two of 32), and in one row; what
    # is left of them, a row at a time
    rf"bn_statistics<8, {HALVES}, false>": (5, 0),
    rf"bn_statistics<8, {HALVES}, true>": (10, 5),
    r"bn_statistics<8, float, false>": (6, 0),
    r"bn_statistics<8, float, true>": (12, 6),
    rf"bn_normalize<8, {HALVES}, false, ": (5, 5),
    rf"bn_normalize<8, {HALVES}, true, ": (10, 10),
    r"bn_normalize<8, float, false, ": (6, 6),
    r"bn_normalize<8, float, true, ": (12, 12),
    rf"bn_gradient_sums<8, {HALVES}, ": (10, 0),
    r"bn_gradient_sums<8, float, ": (12, 0),
    # two rows of three arrays
    rf"bn_gradient<8, {HALVES}, ": (9, 3),
    r"bn_gradient<8, float, ": (6, 2),
    r"bn_\w+<1, |bn_finish_": (0, 0),
    # four 16-bit elements share a Philox block: 8 bytes
    rf"pgd_init_\w+<{HALVES}>": (0, 0),
}


def _run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def _expect_success(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout}{done.stderr}"


@dataclass(frozen=True, kw_only=True)
class Build:
    objects: list[Path]
    compilations: list[subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc not found on PATH: install the CUDA toolkit to compile the kernels")
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-Wall,-Wextra", "-Werror=all-warnings"]
    flags += ["-Xptxas=-warn-spills,-warn-lmem-usage", *targets, *INCLUDES]

    def compile_one(source: Path) -> subprocess.CompletedProcess[str]:
        return _run([nvcc, *flags, "-c", source, "-o", folder / f"{source.stem}.o"])

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compilations = list(pool.map(compile_one, SOURCES))
    return Build(objects=[folder / f"{source.stem}.o" for source in SOURCES], compilations=compilations)


@pytest.fixture(scope="module")
def kernels(build: Build) -> list[sass.Kernel]:
    if reason := sass.missing_tools():
        pytest.skip(reason)
    return [kernel for path in build.objects if path.exists() for kernel in sass.kernels(path)]


def test_compiles_without_warnings(build: Build) -> None:
    assert SOURCES
    for done in build.compilations:
        _expect_success(done)
        assert not done.stderr.strip(), done.stderr


def test_every_architecture_has_every_kernel(kernels: list[sass.Kernel]) -> None:
    names = {arch: {kernel.name for kernel in kernels if kernel.arch == f"sm_{arch}"} for arch in ARCHS}
    # sums, move and filter, plain and not, for 9 pairs of dtypes, 1 copy, 3 starts for 3 dtypes, 2 steps for 9 pairs,
    # and in two orders for 3 dtypes of the next input; 4 optimizer steps for 3 dtypes, and their norms; 2 of the norm
    # over all; bn_act, for 1 or 8 channels a thread, 3 dtypes: 2 statistics, 4 results, 2 sums, 2 gradients, and what
    # adds up
    assert {arch: len(found) for arch, found in names.items()} == dict.fromkeys(
        ARCHS, 54 + 1 + 9 + 18 + 12 + 13 + 2 + 6 * 10 + 2
    )
    assert names["80"] == names["90a"] == names["100"]


def test_no_spills(kernels: list[sass.Kernel]) -> None:
    assert not [str(kernel) for kernel in kernels if kernel.spills]


def test_wide_accesses(kernels: list[sass.Kernel]) -> None:
    narrow: list[str] = []
    for kernel in kernels:
        matches = [least for pattern, least in WIDE.items() if re.search(pattern, kernel.name)]
        assert matches, f"no expectation for {kernel.name}: add it to WIDE"
        loads, stores = max(least[0] for least in matches), max(least[1] for least in matches)
        if kernel.wide_loads < loads or kernel.wide_stores < stores:
            narrow.append(f"{kernel}: expected {loads} and {stores}")
    assert not narrow


def test_parameters_fit(kernels: list[sass.Kernel]) -> None:
    assert not [str(kernel) for kernel in kernels if kernel.constant_bytes > PARAMETER_LIMIT]


def test_links_and_loads(build: Build, tmp_path: Path) -> None:
    library = tmp_path / "libawp_cuda.so"
    for done in build.compilations:
        _expect_success(done)
    linker = ["-shared", "-cudart=static", "-Xlinker=-z,defs", "-Xcompiler=-fPIC"]
    _expect_success(_run(["nvcc", *linker, *build.objects, "-o", library]))
    ctypes.CDLL(str(library))
    exported = _run(["nm", "-DC", "--defined-only", library]).stdout
    assert not [name for name in FUNCTIONS if f"awp::cuda::{name}(" not in exported]


def test_kernels_on_the_host(tmp_path: Path) -> None:
    """Tails, alignment, chunk maps, tables, barriers and results of every kernel, under the address sanitizer."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ not found on PATH")
    host = Path(__file__).with_name("cuda_host")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    # contraction off: as the kernels are compiled; the pragmas are nvcc's
    flags = [
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
        *sanitizers,
        f"-I{host / 'include'}",
        *INCLUDES,
    ]

    def compile_one(source: Path) -> subprocess.CompletedProcess[str]:
        return _run([compiler, *flags, "-x", "c++", "-c", source, "-o", tmp_path / f"{source.stem}.o"])

    sources = [host / "check.cpp", host / "emulator.cpp", *SOURCES]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for done in pool.map(compile_one, sources):
            _expect_success(done)
    program = tmp_path / "check"
    _expect_success(
        _run([compiler, *sanitizers, *(tmp_path / f"{source.stem}.o" for source in sources), "-o", program])
    )
    _expect_success(_run([program]))


# ---- the library that the installation built, and torch's CUDA stream

# an operation on tensors of a GPU, which the CPU's stand for: nothing is launched without a stream
PROBE = """
import ctypes, sys, torch
import awp_kernels
for path in sys.argv[1:]:
    ctypes.CDLL(path)
print(torch.ops.awp_cuda.stream_bound())
try:
    torch.ops.awp_cuda.total_norm.default.redispatch(
        torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), [torch.ones(3)]
    )
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def library() -> Path:
    if not hasattr(torch.ops.awp_cuda, "stream_bound"):
        pytest.skip("the library was built without CUDA: python -m awp_kernels says why")
    return Path(_backend.__file__).with_name("libawp_kernels.so")


def _probe(*libraries: Path) -> list[str]:
    # all symbols at once, as hardened systems ask for
    environment = os.environ | {"LD_BIND_NOW": "1"}
    command = [sys.executable, "-c", PROBE, *map(str, libraries)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_library_is_tied_to_no_build_of_torch(library: Path) -> None:
    """It neither needs torch's CUDA library nor has weak symbols that would stay null without it."""
    assert "libtorch_cuda" not in _run(["readelf", "-d", library]).stdout
    undefined = [line.split() for line in _run(["nm", "-D", "--undefined-only", library]).stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for _, name in undefined)
    weak = [name for kind, name in undefined if kind in "wv"]
    assert not [name for name in weak if not name.startswith(("_ITM_", "__cxa_finalize", "__gmon_start__"))]


def test_the_stream_is_bound_where_torch_has_one(library: Path, tmp_path: Path) -> None:
    """And is refused elsewhere; .ci/run loads the library with a CUDA build of torch."""
    if torch.version.cuda:
        assert _probe()[0] == "True"
        return
    told = _probe()
    assert told[0] == "False"
    assert told[1].startswith("this torch tells no CUDA stream: expected a CUDA build of torch >= 2.11")
    # loaded locally, as torch loads its own
    source, stand_in = tmp_path / "stream.c", tmp_path / "libtorch_cuda.so"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void **stream) { return 1; }\n")
    _expect_success(_run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{stand_in.name}", source, "-o", stand_in]))
    assert _probe(stand_in)[0] == "True"
