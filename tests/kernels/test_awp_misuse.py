"""AdversarialWeightPerturbation in loops that do something else than they should: refused, and nothing is lost."""

import copy
import pickle
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from awp_kernels import SGD, AdversarialWeightPerturbation, asam, sam
from awp_kernels.awp import is_perturbed

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
Y = torch.arange(6) % 3


@pytest.fixture
def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def backward(model: nn.Module) -> None:
    F.cross_entropy(model(X.to(next(model.parameters()).dtype)), Y).backward()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def moves(model: nn.Module, awp: AdversarialWeightPerturbation) -> set[str]:
    """What a block moves; afterwards all is as it was, without gradients."""
    before = bits(model)
    model.zero_grad()
    backward(model)
    with awp.perturbed():
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert same(model, before)
    return moved


# ---- writes inside the block

OPTIMIZERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD, one by one": lambda ps: torch.optim.SGD(ps, lr=0.1, foreach=False),
    "AdamW, fused": lambda ps: torch.optim.AdamW(ps, fused=True),
    "awp_kernels.SGD": lambda ps: SGD(ps, lr=0.1),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("make", [lambda m: AdversarialWeightPerturbation(m, 0.1), sam], ids=["awp", "sam"])
def test_a_step_inside_the_block_is_refused_before_it_is_taken(net, kind, make):
    awp, optimizer, before = make(net), OPTIMIZERS[kind](net.parameters()), bits(net)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    backward(net)
    refused = pytest.raises(RuntimeError, match=r"weight: written to while perturbed.*step after the block")
    with refused, awp.perturbed():
        other.step()
        backward(net)
        optimizer.step()
    assert same(net, before)
    assert not optimizer.state or kind == "SGD"
    optimizer.step()
    assert not same(net, before)
    net.zero_grad()
    assert "0.weight" in moves(net, awp)


def assign(net):
    net[0].weight = nn.Parameter(torch.ones(8, 5))


def with_closed_eyes(net):
    torch.nn.utils.vector_to_parameters(torch.ones(sum(p.numel() for p in net.parameters())), net.parameters())


WRITES = {
    "load_state_dict": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "in place": lambda net: nn.init.ones_(net[0].weight),
    "vector_to_parameters": with_closed_eyes,
    "another parameter": assign,
    "another layer": lambda net: net.__setitem__(0, nn.Linear(5, 8)),
    "another type": lambda net: net.double(),
}


@pytest.mark.parametrize("kind", list(WRITES))
def test_writes_inside_the_block_are_refused_and_undone(net, kind):
    awp, before, weight = AdversarialWeightPerturbation(net, 0.1), bits(net), net[0].weight
    backward(net)
    with pytest.raises(RuntimeError, match=r"0\.weight: written to while perturbed"), awp.perturbed():
        backward(net)
        WRITES[kind](net)
    assert torch.equal(weight, before["0.weight"])
    assert torch.equal(net[3].weight, before["3.weight"])
    net.float().zero_grad()
    assert moves(net, awp) == {"0.weight", "3.weight"}


def test_what_was_given_to_a_parameter_inside_the_block_is_not_written_to(net):
    awp, before, given = AdversarialWeightPerturbation(net, 0.1), bits(net), torch.ones(8, 5)
    backward(net)
    with pytest.raises(RuntimeError, match=r"0\.weight: written to"), awp.perturbed():
        net[0].weight.data = given
    assert torch.equal(given, torch.ones(8, 5))
    assert same(net, before)


def test_an_error_on_its_way_is_not_replaced(net):
    """Also where the block stands in the handler of another error."""
    awp, before = AdversarialWeightPerturbation(net, 0.1), bits(net)

    def failing():
        backward(net)
        with awp.perturbed():
            nn.init.zeros_(net[0].weight)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert same(net, before)
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        with pytest.raises(KeyboardInterrupt):
            failing()
        net.zero_grad()
        backward(net)
        with pytest.raises(RuntimeError, match="written to"), awp.perturbed():
            nn.init.zeros_(net[0].weight)
    assert same(net, before)
    net.zero_grad()
    backward(net)
    with pytest.raises(ZeroDivisionError):
        try:
            awp.perturb_()
            nn.init.zeros_(net[0].weight)
            raise ZeroDivisionError
        finally:
            awp.restore_()
    assert same(net, before)


def test_writes_before_a_further_step_are_refused(net):
    awp, before = AdversarialWeightPerturbation(net, 0.1), bits(net)
    backward(net)
    with pytest.raises(RuntimeError, match="written to"), awp.perturbed():
        backward(net)
        nn.init.zeros_(net[0].weight)
        awp.perturb_(again=True)
    assert same(net, before)


def test_the_update_of_a_working_copy_may_come_inside_the_block(net):
    """It writes the copy from the masters, which is what restoring does; a write to the copy alone is lost."""
    copied = copy.deepcopy(net)
    awp = AdversarialWeightPerturbation(net, 0.1, working=copied)
    masters = dict(net.named_parameters())
    optimizer = SGD(net.parameters(), lr=0.1, working={masters[n]: p for n, p in copied.named_parameters()})
    before = bits(net)
    backward(copied)
    with awp.perturbed():
        backward(copied)
        optimizer.step()
    assert not same(net, before)
    assert same(copied, bits(net))
    before = bits(net)
    copied.zero_grad()
    backward(copied)
    with pytest.raises(RuntimeError, match=r"0\.weight: written to"), awp.perturbed():
        nn.init.zeros_(copied[0].weight)
    assert same(copied, before)
    with pytest.raises(RuntimeError, match="no gradients"):
        awp.perturb_()
    backward(copied)
    with pytest.raises(RuntimeError, match="written to"), awp.perturbed():
        torch.optim.SGD(copied.parameters(), lr=0.1).step()


# ---- a model that changes


def test_layers_that_are_frozen_unfrozen_replaced_or_converted(net):
    net[0].requires_grad_(False)
    awp = AdversarialWeightPerturbation(net, 0.1)
    assert moves(net, awp) == {"3.weight"} == set(awp.parameters)
    net[0].requires_grad_(True)
    assert moves(net, awp) == {"0.weight", "3.weight"} == set(awp.parameters)
    # of the same strides, and of the same shape
    net[3] = nn.Linear(8, 7)
    assert moves(net, awp) == {"0.weight", "3.weight"}
    net[0].weight = nn.Parameter(torch.randn(8, 5))
    assert moves(net, awp) == {"0.weight", "3.weight"}
    assert awp.parameters["0.weight"] is net[0].weight
    net.double()
    assert moves(net, awp) == {"0.weight", "3.weight"}
    net.append(nn.Linear(7, 4).double())
    assert moves(net, awp) == {"0.weight", "3.weight", "4.weight"}
    del net[4]
    nn.utils.parametrizations.weight_norm(net[0])
    originals = {f"0.parametrizations.weight.original{i}" for i in (0, 1)}
    assert moves(net, awp) == {"3.weight"} | originals
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="model: no trainable parameter"):
        awp.perturb_()


def test_norms_of_weights_that_changed_are_not_used(net):
    """Known norms hold for the parameters, and the values, that the step left."""

    def lengths(awp):
        net.zero_grad()
        backward(net)
        with awp.perturbed():
            return {name: (v.norm() / awp.parameters[name].norm()).item() for name, v in awp.displacement().items()}

    def step():
        net.zero_grad()
        backward(net)
        groups = [[p for p in net.parameters() if p.ndim > 1], [p for p in net.parameters() if p.ndim < 2]]
        optimizer = SGD([{"params": group} for group in groups], lr=0.01)
        optimizer.step()
        awp.take_weight_norms(optimizer.weight_norms)

    awp = AdversarialWeightPerturbation(net, 1e-3)
    right = pytest.approx({"0.weight": 1e-3, "3.weight": 1e-3}, rel=2e-3)
    step()
    assert awp.weight_norms is not None
    # they are what is used
    awp.weight_norms *= 10
    assert lengths(awp) == pytest.approx({"0.weight": 1e-2, "3.weight": 1e-2}, rel=2e-2)
    awp.weight_norms /= 10
    # restoring leaves the values
    assert lengths(awp) == right
    assert awp.weight_norms is not None
    with torch.no_grad():
        net[0].weight *= 5
    assert lengths(awp) == right
    assert awp.weight_norms is None
    step()
    net[3] = nn.Linear(8, 3)
    nn.init.constant_(net[3].weight, 3.0)
    assert lengths(awp) == right
    step()
    # one of them alone has a gradient, and a further step finds other weights than the norms are of
    net.zero_grad()
    backward(net)
    head = net[3].weight.grad
    assert awp.weight_norms is not None
    awp.perturb_(gradients={"3.weight": head})
    assert awp.displacement()["3.weight"].norm() == pytest.approx(1e-3 * net[3].weight.norm().item(), rel=2e-3)
    awp.restore_()
    # a list that does not begin with just these parameters tells nothing
    awp.take_weight_norms([([net[0].weight], torch.ones(1, dtype=torch.float64))])
    assert awp.weight_norms is None


def test_a_further_step_measures_the_weights_where_they_are(net):
    awp = AdversarialWeightPerturbation(net, 4.0)
    optimizer = SGD([[p for p in net.parameters() if p.ndim > 1][i] for i in (0, 1)], lr=1e-3)
    backward(net)
    optimizer.step()
    awp.take_weight_norms(optimizer.weight_norms)
    assert awp.weight_norms is not None
    net.zero_grad()
    backward(net)
    with awp.perturbed():
        before = net[0].weight.detach().clone()
        backward(net)
        awp.perturb_(again=True)
        assert (net[0].weight - before).norm().item() == pytest.approx(4 * before.norm().item(), rel=1e-4)


def test_a_working_copy_is_looked_at_again(net):
    copied = copy.deepcopy(net).to(torch.float16)
    awp = AdversarialWeightPerturbation(net, 0.1, working=copied)
    backward(copied.float())
    net[3] = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"working: expected a parameter 3\.weight of shape \(5, 8\)"):
        awp.perturb_()
    # bfloat16 beside bfloat16 masters rounds no more than they do
    halves = copy.deepcopy(net).bfloat16()
    with pytest.raises(ValueError, match=r"working: 0\.weight is bfloat16"):
        AdversarialWeightPerturbation(net, 0.1, working=halves)
    AdversarialWeightPerturbation(net.bfloat16(), 0.1, working=halves)


def test_wrapped_models(net):
    wrapped = torch.compile(net, backend="eager")
    assert moves(wrapped, AdversarialWeightPerturbation(wrapped, 0.1)) == {"_orig_mod.0.weight", "_orig_mod.3.weight"}


# ---- parameters that cannot be moved


def unfit() -> dict[str, tuple[nn.Module, str]]:
    expanded, cut = nn.Linear(5, 3), nn.Linear(5, 3)
    expanded.weight.data = torch.zeros(3, 1).expand(3, 5)
    cut.weight.data = torch.zeros(3, 8)[:, :5]
    complex_one = nn.Linear(5, 3, dtype=torch.complex64)
    eighth = nn.Linear(5, 3)
    eighth.weight = nn.Parameter(torch.zeros(3, 5).to(torch.float8_e4m3fn))
    sparse = nn.Linear(5, 3)
    sparse.weight = nn.Parameter(torch.eye(3, 5).to_sparse())
    return {
        "lazy": (nn.LazyLinear(3), "belongs to a lazy layer that is not initialised; pass a batch through first"),
        "lazy convolution": (nn.LazyConv2d(3, 3), "belongs to a lazy layer that is not initialised"),
        "meta": (nn.Linear(5, 3, device="meta"), "is on the meta device, without values"),
        "complex": (complex_one, r"is torch\.complex64; expected dense float64"),
        "float8": (eighth, r"is torch\.float8_e4m3fn; expected dense float64"),
        "sparse": (sparse, r"is torch\.sparse_coo; expected dense float64"),
        "expanded": (expanded, "has gaps or shares elements"),
        "cut": (cut, "has gaps or shares elements"),
    }


@pytest.mark.parametrize("kind", list(unfit()))
def test_parameters_that_cannot_be_moved_are_named(net, kind):
    layer, message = unfit()[kind]
    with pytest.raises(ValueError, match=rf"model: 0\.weight {message}"):
        AdversarialWeightPerturbation(nn.Sequential(layer), 0.1)
    awp, before = AdversarialWeightPerturbation(net, 0.1), bits(net)
    net.append(layer)
    net[0].weight.grad = torch.ones(8, 5)
    with pytest.raises(ValueError, match=rf"model: 4\.weight {message}"), awp.perturbed():
        pass
    del net[4]
    assert same(net, before)
    assert moves(net, awp)
    if "lazy" not in kind:
        net.append(layer)
        leaving_out = AdversarialWeightPerturbation(net, 0.1, select=lambda n, p: is_perturbed(n, p) and n[0] != "4")
        assert list(leaving_out.parameters) == ["0.weight", "3.weight"]


def test_a_lazy_layer_takes_part_once_it_is_initialised():
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3))
    net(X)
    assert moves(net, AdversarialWeightPerturbation(net, 0.1)) == {"0.weight", "2.weight"}


# ---- numbers


@pytest.mark.parametrize("value", [1e38, 1e300, 10**400, float("inf"), -1.0, "0.1", None])
def test_numbers_out_of_range_are_named(net, value):
    expected = r"expected (a finite number >= 0|at most 1e\+06), got"
    for name, make in {
        "gamma": lambda: AdversarialWeightPerturbation(net, value),
        "eps": lambda: AdversarialWeightPerturbation(net, 0.1, eps=value),
        "eta": lambda: asam(net, 0.1, eta=value),
        "rho": lambda: sam(net, value),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: {expected}"):
            make()
    awp, before = AdversarialWeightPerturbation(net, 0.1), bits(net)
    backward(net)
    # a schedule may have set it
    awp.gamma = value
    with pytest.raises(ValueError, match=f"^gamma: {expected}"), awp.perturbed():
        pass
    awp.gamma, awp.bound = 0.1, value
    if value is not None:
        with pytest.raises(ValueError, match=f"^bound: {expected}"), awp.perturbed():
            pass
    awp.bound = None
    assert same(net, before)
    with awp.perturbed():
        assert not same(net, before)


def test_gradients_of_other_parameters_are_refused(net):
    awp = AdversarialWeightPerturbation(net, 0.1)
    with pytest.raises(ValueError, match=r"gradients: 0\.bias is not a parameter that is perturbed"):
        awp.perturb_(gradients={"0.bias": torch.ones(8)})


# ---- ascents on top of descents


def zero_by_data(net, optimizer):
    for p in net.parameters():
        if p.grad is not None:
            p.grad.data.zero_()


ZEROING = {
    "to none": lambda net, optimizer: optimizer.zero_grad(),
    "in place": lambda net, optimizer: optimizer.zero_grad(set_to_none=False),
    "the model's": lambda net, optimizer: net.zero_grad(),
    "through .data": zero_by_data,
}


@pytest.mark.parametrize("kind", list(ZEROING))
@pytest.mark.parametrize("first", [True, False], ids=["before the ascent", "after the step"])
def test_loops_that_zero_their_gradients_are_not_refused(net, kind, first):
    """With micro-batches, a scaler and clipping, which write gradients in place, and passes of other kinds."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    awp = AdversarialWeightPerturbation(net, 0.1)
    for step in range(6):
        if first:
            ZEROING[kind](net, optimizer)
        for _ in range(2):
            scaler.scale(F.cross_entropy(net(X), Y)).backward()
        if step != 3:
            with awp.perturbed():
                for _ in range(2):
                    scaler.scale(F.cross_entropy(net(X), Y)).backward()
        torch.autograd.grad(net(X).sum(), list(net.parameters()))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        if not first:
            ZEROING[kind](net, optimizer)


@pytest.mark.parametrize("method", ["awp", "sam", "working"])
def test_an_ascent_on_top_of_a_descent_is_refused(net, method):
    """A loop without zero_grad, and an ascent and a descent for every micro-batch."""
    copied = copy.deepcopy(net) if method == "working" else None
    awp = sam(net) if method == "sam" else AdversarialWeightPerturbation(net, 0.1, working=copied)
    followed = net if copied is None else copied
    before = bits(net)
    backward(followed)
    with awp.perturbed():
        backward(followed)
    nn.utils.clip_grad_norm_(followed.parameters(), 0.1)
    backward(followed)
    refused = pytest.raises(RuntimeError, match=r"they hold the last perturbed\(\) block's descent; zero_grad\(\)")
    with refused, awp.perturbed():
        pass
    assert same(net, before)
    assert followed[3].weight.grad is not None
    # the descent's gradient itself
    followed.zero_grad()
    backward(followed)
    with awp.perturbed():
        backward(followed)
    with pytest.raises(RuntimeError, match="zero_grad"):
        awp.perturb_()
    # what is given by hand is followed
    awp.perturb_(gradients={"3.weight": followed[3].weight.grad})
    awp.restore_()
    backward(followed)
    for p in followed.parameters():
        p.grad = torch.ones_like(p)
    awp.perturb_()
    awp.restore_()
    assert same(net, before)


# ---- threads, copies, blocks


def test_threads_that_share_an_object_are_refused_and_nothing_stays_moved(net):
    """Each with its own model and object they work."""
    awp, before, barrier = AdversarialWeightPerturbation(net, 0.1), bits(net), threading.Barrier(4)
    gradients = {name: torch.ones_like(p) for name, p in awp.parameters.items()}
    outcomes, wrong = [], []

    def shared():
        for _ in range(50):
            barrier.wait()
            try:
                awp.perturb_(gradients=gradients)
            except RuntimeError as error:
                outcomes.append(str(error))
                barrier.wait()
                try:
                    awp.restore_()
                except RuntimeError as error:
                    outcomes.append(str(error))
                barrier.wait()
                continue
            moved = bits(net)
            barrier.wait()
            barrier.wait()
            if not same(net, moved):
                wrong.append("restored by another thread")
            awp.restore_()

    def own(model):
        mine, was = AdversarialWeightPerturbation(model, 0.1), bits(model)
        for _ in range(20):
            model.zero_grad()
            backward(model)
            with mine.perturbed():
                backward(model)
            if not same(model, was):
                wrong.append("moved")

    for target, arguments in ((shared, [()] * 4), (own, [(copy.deepcopy(net),) for _ in range(4)])):
        threads = [threading.Thread(target=target, args=each) for each in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert same(net, before)
    assert set(outcomes) == {
        "weights are perturbed by another thread: make an object and a model for each",
        "weights are perturbed by another thread, which has to restore them",
    }


def test_a_block_that_came_too_late_does_not_end_another_threads(net):
    """It saw nothing moved, waited for the other one to move the weights, and was refused."""
    refused, late = [], []

    def enter():
        try:
            with awp.perturbed():
                pass
        except RuntimeError as error:
            refused.append(str(error))

    def select(name, parameter):
        if late and not late[0].is_alive():
            late[0].start()
            time.sleep(0.3)
        return is_perturbed(name, parameter)

    awp, before = AdversarialWeightPerturbation(net, 0.1, select=select), bits(net)
    backward(net)
    late.append(threading.Thread(target=enter))
    with awp.perturbed():
        late.pop().join()
        assert refused == ["weights are perturbed by another thread: make an object and a model for each"]
        assert not same(net, before)
    assert same(net, before)


def test_weights_that_a_dead_thread_left_moved_can_be_restored(net):
    awp, before = AdversarialWeightPerturbation(net, 0.1), bits(net)
    gradients = {name: torch.ones_like(p) for name, p in awp.parameters.items()}
    thread = threading.Thread(target=lambda: awp.perturb_(gradients=gradients))
    thread.start()
    thread.join()
    assert not same(net, before)
    awp.restore_()
    assert same(net, before)


def test_copies_and_pickles(net):
    awp = AdversarialWeightPerturbation(net, 0.1)
    backward(net)
    with awp.perturbed():
        backward(net)
        for make in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="copy or pickle after the perturbed"):
                make(awp)
    net.zero_grad()
    for other in (copy.deepcopy(awp), pickle.loads(pickle.dumps(awp))):
        assert other.model is not net
        assert moves(other.model, other) == {"0.weight", "3.weight"}


def test_blocks_inside_blocks_end_none_but_themselves(net):
    awp, before = AdversarialWeightPerturbation(net, 0.1), bits(net)
    backward(net)
    with awp.perturbed():
        moved = bits(net)
        backward(net)
        with pytest.raises(RuntimeError, match="perturbed already"), awp.perturbed():
            pass
        assert same(net, moved)
    assert same(net, before)
    block = awp.perturbed()
    for _ in range(2):
        net.zero_grad()
        backward(net)
        with block:
            assert not same(net, before)
        assert same(net, before)


def test_an_operation_that_fails_half_way_leaves_nothing_moved(net):
    """Two types of weights make two calls; the second one's gradient does not fit."""
    net[3].double()
    awp, before = AdversarialWeightPerturbation(net, 0.1), bits(net)
    gradients = {"0.weight": torch.ones(8, 5), "3.weight": torch.ones(4, 8)}
    with pytest.raises(ValueError, match="grads"):
        awp.perturb_(gradients=gradients)
    assert same(net, before)
    awp.perturb_(gradients=gradients | {"3.weight": torch.ones(3, 8)})
    assert not same(net, before)
    awp.restore_()
    assert same(net, before)
