"""The examples: every method in every loop, and that a loop does what its text says."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from places import EXAMPLES
from samples import perturbed_fp64, randn
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from awp_engine.models.import_timm import declare_operators

METHODS = ("awp", "sam", "asam", "bounded")
# other people's packages warn of other people's packages
pytestmark = pytest.mark.filterwarnings("ignore")


def example(name: str) -> ModuleType:
    declare_operators()
    sys.path.insert(0, str(EXAMPLES))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


class Watch:
    """What an optimizer and a model's forward passes saw.

    Attributes:
        windows: for every step, the forward passes before it: whether the weights were perturbed, and the input.
        moved_back: whether all weights were at every step, bit for bit, what the step before had left.
    """

    def __init__(self) -> None:
        self.windows: list[list[tuple[bool, Tensor]]] = [[]]
        self.moved_back = True
        self.parameters: list[Tensor] = []
        self.left: list[Tensor] = []

    def _as_left(self) -> bool:
        return all(torch.equal(p, old) for p, old in zip(self.parameters, self.left, strict=True))

    def start(self, module: nn.Module) -> None:
        if not self.left:
            self.parameters = list(module.parameters())
            self.left = [p.detach().clone() for p in self.parameters]

    def forward(self, inputs: Tensor) -> None:
        self.windows[-1].append((not self._as_left(), inputs.clone()))

    def before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.moved_back &= self._as_left()

    def after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.left = [p.detach().clone() for p in self.parameters]
        self.windows.append([])


@contextmanager
def watched(kind: type[nn.Module], reads: Callable[[nn.Module], bool] | None = None) -> Iterator[Watch]:
    """Watch all steps, and the forward passes of a module of this class; `reads` tells which module sees the input."""
    watch = Watch()

    def forward(module: nn.Module, arguments: tuple) -> None:
        if type(module) is kind:
            watch.start(module)
        if reads(module) if reads else type(module) is kind:
            watch.forward(arguments[0])

    hooks = [
        register_module_forward_pre_hook(forward),
        register_optimizer_step_pre_hook(watch.before_step),
        register_optimizer_step_post_hook(watch.after_step),
    ]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def is_vocabulary(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.num_embeddings == 50


def assert_accumulate_then_descend(watch: Watch, sizes: list[int]) -> None:
    """Each step: all micro-batches at w, the same ones at w + v, then the update at w."""
    assert watch.windows.pop() == []
    assert watch.moved_back
    assert [len(window) for window in watch.windows] == [2 * size for size in sizes]
    for window, size in zip(watch.windows, sizes, strict=True):
        assert [perturbed for perturbed, _ in window] == [False] * size + [True] * size
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(window[:size], window[size:], strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_plain_loop(method):
    with watched(nn.Sequential) as watch:
        model, losses = example("plain_loop").train(method)
    assert_accumulate_then_descend(watch, [4] * 20)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_hugging_face_trainer(method):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers accelerate")
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install transformers accelerate")
    module = example("hugging_face_trainer")
    # the model itself is called by keywords, which the hook does not see
    with watched(module.BertForSequenceClassification, is_vocabulary) as watch:
        model, losses = module.train(method)
    # 72 samples are 9 micro-batches of 8, four a step
    assert_accumulate_then_descend(watch, [4, 4, 1] * 6)
    assert float(losses[-1]) < 0.8 * float(losses[0])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_lightning_module(method):
    pytest.importorskip("lightning", reason="lightning is not installed: pip install lightning")
    module = example("lightning_module")
    with watched(nn.Sequential) as watch:
        trained, losses = module.train(method)
    assert_accumulate_then_descend(watch, [4, 4, 1] * 8)
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert all(p.isfinite().all() for p in trained.parameters())


DEFINITIONS = {
    "awp": {"gamma": 0.01, "scope": "layer"},
    "sam": {"gamma": 0.05, "scope": "global", "scale": "absolute", "eps": 1e-12},
    "asam": {"gamma": 0.5, "scope": "global", "scale": "elementwise", "eta": 0.01, "eps": 1e-16},
    "bounded": {"gamma": 0.1, "scope": "layer", "bound": 0.01},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "loss-scaled"])
def test_a_step_of_the_plain_loop_is_the_step_of_the_whole_batch(method, scaled):
    """Three fp64 steps in four micro-batches against the definitions on the whole batch; also with a scaled loss."""
    loop = example("plain_loop")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3)).double()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = randn((24, 6), torch.float64), torch.arange(24) % 3
    batches = list(zip(x.chunk(4), y.chunk(4), strict=True))
    perturbation = example("methods").perturbation_of(method, model)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    options = DEFINITIONS[method]
    chosen = [n for n, p in weights.items() if method in ("sam", "asam") or p.ndim > 1]
    adaptive = ["weight" in name for name in chosen] if method == "asam" else None

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        loss = F.cross_entropy(torch.func.functional_call(model, leaves, (x,)), y)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    for _ in range(3):
        loop.train_step(model, optimizer, perturbation, batches, scaler, None)
        ascent = gradient(weights)
        moved, _ = perturbed_fp64(
            [weights[n] for n in chosen], [ascent[n] for n in chosen], **options, adaptive=adaptive
        )
        descent = gradient(weights | dict(zip(chosen, moved, strict=True)))
        weights = {name: value - 0.1 * descent[name] for name, value in weights.items()}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-10, atol=1e-12, msg=name)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="method: expected one of awp, sam, asam, bounded, got 'adam'"):
        example("methods").perturbation_of("adam", nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("plain_loop", "torch"),
        pytest.param("hugging_face_trainer", "transformers", marks=pytest.mark.compile),
        pytest.param("lightning_module", "lightning", marks=pytest.mark.compile),
    ],
)
def test_as_a_command(name, package, tmp_path):
    declare_operators()
    pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    # packages import torchvision where it is installed; timm's tests need it, and it does not load beside a CPU build
    prelude = (
        "import runpy, sys; from awp_engine.models.import_timm import declare_operators; declare_operators(); "
        "sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", prelude, str(EXAMPLES / f"{name}.py"), "--method", "sam"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, last = (float(value) for value in done.stdout.strip().splitlines()[-1].removeprefix("loss ").split(" -> "))
    assert last < first
