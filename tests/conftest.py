import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from awp_kernels import _backend

# a fixed seed: what fails in CI fails again
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("ci")

# each of several processes takes one core, and so do the processes that tests start
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# a shell's background ignores them, and so would all processes that tests start and send them to
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# matplotlib, git and torch write below HOME at times
os.environ.setdefault("MPLCONFIGDIR", str(Path(os.environ.get("TMPDIR", "/tmp")) / "awp-matplotlib"))

# states of evaluations are authenticated by a key of the user's, which tests have of their own
if "AWP_TEST_STATE" not in os.environ:
    os.environ["AWP_TEST_STATE"] = os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="awp-state-")


@pytest.fixture(autouse=True)
def _no_code_of_other_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Code that a test's files import is not found by the next one, as it is not by the next process."""
    path, known, files = list(sys.path), set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - known:
        # of a package without an __init__.py the path alone is known; torch's own answer getattr with errors
        own = getattr(sys.modules[name], "__dict__", {})
        inner = own.get("__path__", ())
        places = [own.get("__file__", ""), *(inner if isinstance(inner, Iterable) else ())]
        if any(str(place).startswith(files) for place in places):
            del sys.modules[name]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process a core, hyperthreads included; GPU tests and selections of a few tests run in one."""
    gpu = "gpu" in (config.getoption("-m") or "").replace("not gpu", "")
    return 0 if gpu else min(os.cpu_count() or 1, 8)


# minutes each; begun last, one of them would leave all processes but one idle
LONGEST = (
    "test_torchrun",
    "test_training",
    "test_presets",
    "test_evaluation",
    "test_sanitizers",
    "test_resume",
    "test_triton_interpreter",
    "test_kills",
    "test_data_kills",
    "test_bench_step",
    "test_bench_suite",
    "test_evaluation_attacks",
    "test_distributed",
    "test_examples",
)

# what else `just test-fast` leaves out: it starts processes, or trains, for seconds each
SLOW = (
    "test_bad_files_training",
    "test_bench_gpu",
    "test_bench_launches",
    "test_checkpoint_writer",
    "test_class_names",
    "test_concepts",
    "test_config_fuzz",
    "test_data_scan",
    "test_export",
    "test_fuzz",
    "test_interrupts",
    "test_landscape_command",
    "test_loaders",
    "test_locking",
    "test_replicas",
    "test_sharding",
    "test_signals",
    "test_strange_names",
    "test_sync_batch_norm",
    "test_timm_models",
    "test_trainer_interrupts",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if item.path.stem in (*LONGEST, *SLOW):
            item.add_marker("slow")


def device_backends() -> list:
    """Every (device, backend) pair that can run here; the CUDA ones are marked gpu."""
    pairs = []
    for device, backends in (("cpu", ("reference", "cpp")), ("cuda", ("reference", "cuda", "triton"))):
        for backend in backends:
            marks = [pytest.mark.gpu] if device == "cuda" else []
            pairs.append(pytest.param((device, backend), marks=marks, id=f"{device}-{backend}"))
    return pairs


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN, so that what is not written shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])


@pytest.fixture(params=device_backends())
def target(request):
    """(device, backend), with the backend forced for the test."""
    device, backend = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    why = _backend.problem(backend, device)
    if why is not None:
        # the C++ library is part of the installation that README describes: its absence is a failure
        pytest.fail(f"backend {backend}: {why}")
    with _backend.use_backend(backend):
        yield device, backend
