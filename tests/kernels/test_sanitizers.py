"""The compiled operations under the address and undefined-behaviour sanitizers, and without leaks.

The C++ is built anew with -fsanitize=address,undefined; a process of its own, with the sanitizers' libraries loaded
before python, runs the fuzzer and the table of samples with it, once for each instruction set.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT, SOAK, SUPPORT

FLAGS = ["-fsanitize=address,undefined", "-O1", "-g1"]

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(shutil.which("g++") is None or shutil.which("cmake") is None, reason="needs g++ and cmake"),
    pytest.mark.timeout(600),
]


def _environment(package: Path | None, **variables: str) -> dict[str, str]:
    """The sanitizers before python; torch and python keep memory to the end, so leaks are told by bytes in use."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    paths = [str(path) for path in (package, SUPPORT, SOAK) if path]
    return os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(paths),
        **variables,
    }


def _python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import awp_kernels from, whose library was built with the sanitizers."""
    folder = tmp_path_factory.mktemp("sanitizers")
    shutil.copytree(
        ROOT / "kernels" / "awp_kernels",
        folder / "awp_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    options = [f"-DAWP_TORCH_DIR={Path(torch.__file__).parent}", "-DAWP_CUDA_ARCHS=", f"-DAWP_SANITIZE={sanitize()}"]
    for command in (
        ["cmake", "-S", ROOT, "-B", folder / "build", *options],
        ["cmake", "--build", folder / "build", "--parallel", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy2(folder / "build" / "libawp_kernels.so", folder / "awp_kernels")
    return folder


def sanitize() -> str:
    """CMakeLists.txt puts -fsanitize= before it; what follows are options after its own."""
    return ";".join(FLAGS).removeprefix("-fsanitize=")


RUN = """
import ctypes, sys, fuzz, torch
from awp_kernels import _backend, use_backend
from operations import OPERATIONS, arguments_of, cases, run

assert ctypes.CDLL(None).__asan_region_is_poisoned and str(_backend._LIBRARY).startswith({package!r})
torch.set_num_threads(2)
image_operations = torch.ops.awp_cpp.bn_act_available()
for name, variant, sample, dtype in cases():
    if image_operations or name not in fuzz.IMAGE_OPERATIONS:
        others = name in fuzz.IMAGE_OPERATIONS or _backend.problem("cpp", "cpu", name.rstrip("_")) is not None
        with use_backend(None if others else "cpp"):
            run(OPERATIONS[name], arguments_of(name, variant, sample, dtype))
failures, outcomes = fuzz.fuzz(22, range({cases}))
print(torch.ops.awp_cpp.instruction_set(), sum(outcomes.values()), "cases")
sys.exit("\\n\\n".join(failures) or 0)
"""


@pytest.mark.parametrize("processor", ["", "avx2", "baseline"], ids=["widest", "avx2", "baseline"])
def test_samples_and_fuzz(package, processor):
    code = RUN.format(package=str(package), cases=150)
    done = _python(code, _environment(package, AWP_CPU=processor))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 cases" in done.stdout
    assert "runtime error" not in done.stderr


LEAKS = """
import ctypes, gc, torch
from awp_kernels import conv3x3_forget
from operations import OPERATIONS, arguments_of, run

library = ctypes.CDLL(None)
in_use = library.__sanitizer_get_current_allocated_bytes
in_use.restype = ctypes.c_size_t
CALLS = 20

def after(arguments, operation, rounds, leak):
    for _ in range(rounds):
        run(operation, arguments)
        leak()
    conv3x3_forget()
    gc.collect()
    return in_use()

def kept(name, variant, leak=lambda: None):
    arguments = arguments_of(name, variant, "primes", torch.float32)
    before = after(arguments, OPERATIONS[name], 3, leak)
    return after(arguments, OPERATIONS[name], CALLS, leak) - before

torch.set_num_threads(1)
gc.freeze()  # what the modules hold needs no looking through at every collection
for name, operation in OPERATIONS.items():
    for variant in operation.variants:
        # the smallest of its tensors, kept by every call, would be more
        assert (grown := kept(name, variant)) < CALLS * 64, f"{name} {variant}: {grown} bytes more"
print(kept("restore_", "", lambda: library.malloc(100)), "bytes of a leak")
"""


def test_no_memory_is_kept(package):
    done = _python(LEAKS, _environment(package))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 20 * 100


WRONG = {
    "read past the end": ("float f(float* p, long n) { return p[n]; }", "heap-buffer-overflow"),
    "write before the start": ("float f(float* p, long n) { return p[-1] = 1; }", "heap-buffer-overflow"),
    "signed overflow": ("float f(float* p, long n) { return int(n) * 2147483647; }", "signed integer overflow"),
    "shift": ("float f(float* p, long n) { return 1 << (n + 40); }", "shift exponent"),
}


@pytest.mark.parametrize("fault", list(WRONG))
def test_the_sanitizers_find_what_is_wrong(fault, tmp_path):
    """In a line of C++ built with the same flags, on a tensor's memory."""
    source, message = WRONG[fault]
    (tmp_path / "wrong.cpp").write_text(f'extern "C" {source}\n')
    build = ["g++", *FLAGS, "-shared", "-fPIC", tmp_path / "wrong.cpp", "-o", tmp_path / "libwrong.so"]
    subprocess.run(build, check=True)
    code = (
        "import ctypes; p = (ctypes.c_float * 5)\n"
        "m = ctypes.CDLL(None); m.malloc.restype = ctypes.c_void_p\n"
        f"ctypes.CDLL({str(tmp_path / 'libwrong.so')!r}).f(ctypes.c_void_p(m.malloc(20)), ctypes.c_long(5))"
    )
    done = _python(code, _environment(None))
    assert done.returncode != 0
    assert message in done.stderr
