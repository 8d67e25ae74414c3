"""Whose mean and deviation images are normalised by, and whether a network does it itself."""

import copy

import numpy as np
import own_models
import pytest
import torch
from torch import nn

from awp_engine.config import ConfigError
from awp_engine.models import build_model
from awp_engine.models.factories import wrap
from awp_engine.models.normalisation import choose_normalisation, find_normaliser, own_normalisation
from awp_engine.models.wrapped import fitted

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


class Normalize(nn.Module):
    """By what it holds, whatever kind of numbers that is; of pixels up to `unit`."""

    def __init__(self, mean, std, names=("mean", "std"), unit=1.0):
        super().__init__()
        self.names, self.unit = names, unit
        for name, value in zip(names, (mean, std), strict=True):
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(self, x):
        shape = (-1, 1, 1) if x.ndim == 4 else (-1,)
        mean, std = (torch.as_tensor(getattr(self, name)).float().view(shape) for name in self.names)
        return (x * self.unit - mean) / std


class Noise(nn.Module):
    """Adds to images what has this mean and this deviation."""

    def __init__(self):
        super().__init__()
        self.mean, self.std = 0.05, 0.1

    def forward(self, x):
        return x + self.mean + self.std * torch.randn_like(x)


class Unused(Normalize):
    """As data sets' constants that were written down and forgotten."""

    def forward(self, x):
        return x


def body(zero: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten())
    last = nn.Linear(3 * 36, 10)
    if zero:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return layers.append(last)


T = torch.tensor
OWN = {
    "buffers": Normalize(T(MEAN), T(STD)),
    "parameters": Normalize(nn.Parameter(T(MEAN).view(1, 3, 1, 1), False), nn.Parameter(T(STD), False)),
    "lists": Normalize([*MEAN], [*STD], ("mu", "sigma")),
    "arrays": Normalize(np.array(MEAN), np.array(STD), ("image_mean", "image_std")),
    "one number for all": Normalize(0.5, 0.25),
    "up to 255": Normalize(T(MEAN) * 255, T(STD) * 255, unit=255.0),
}


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero logits"])
def test_what_a_network_subtracts_from_images_is_found(kind: str, zero: bool) -> None:
    network = nn.Sequential(nn.Sequential(nn.Identity(), nn.Sequential(OWN[kind])), body(zero))
    before = copy.deepcopy(network.state_dict())
    drawn = torch.random.get_rng_state()
    model = wrap(network, "own", 10, [0.3] * 3, [0.4] * 3, (8, 8))
    found = own_normalisation(model)
    assert found is not None
    assert found[0] == "0.1.0"
    scale = 255 if kind == "up to 255" else 1
    wanted = ([0.5] * 3, [0.25] * 3) if kind == "one number for all" else (MEAN, STD)
    torch.testing.assert_close([*found[1]], [value * scale for value in wanted[0]])
    torch.testing.assert_close([*found[2]], [value * scale for value in wanted[1]])
    # trying changed nothing
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert torch.equal(torch.random.get_rng_state(), drawn)
    chosen = choose_normalisation(model, "own", "some data", data=([0.1] * 3, [0.2] * 3))
    assert (chosen.mean, chosen.std, chosen.whose) == ((0, 0, 0), (1, 1, 1), "the network's own")


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(Noise(), body()),
        nn.Sequential(Unused(T(MEAN), T(STD)), body()),
        nn.Sequential(body()[0], Normalize(T(MEAN), T(STD)), body()[1:]),
        nn.Sequential(body(), Normalize(0.5, 0.25)),
        nn.Sequential(nn.Conv2d(3, 3, 1), Normalize(T(MEAN), T(STD)), body()),
    ],
    ids=["noise", "unused", "features", "logits", "after a layer"],
)
def test_other_numbers_of_that_name_are_no_normalisation(network: nn.Module) -> None:
    assert find_normaliser(network.train(), 3, (8, 8)) is None
    model = wrap(nn.Sequential(network, nn.LazyLinear(10)), "other", 10, [0.3] * 3, [0.4] * 3, (8, 8))
    chosen = choose_normalisation(model, "other", "some data", data=([0.1] * 3, [0.2] * 3))
    assert (chosen.mean, chosen.whose) == ((0.1,) * 3, "the data set's")


def test_published_weights_come_before_the_data_and_after_the_file() -> None:
    model = build_model("timm:test_vit", 10, [0.3] * 3, [0.4] * 3, image_size=(32, 32))
    data, file = ([0.1] * 3, [0.2] * 3), ([0.7] * 3, [0.8] * 3)

    def chosen(**given):
        found = choose_normalisation(model, "timm:test_vit", "some data", **{"data": data, **given})
        return found.mean[0], found.whose, found.is_guess

    assert chosen() == (0.1, "the data set's", False)
    assert chosen(source="timm") == (0.5, "the published weights'", False)
    assert chosen(source="w.pt") == (0.5, "the published weights'", True)
    assert chosen(source="w.pt", file=file) == (0.7, "the file's", False)
    assert chosen(source="w.pt", file=file, normalize="model") == (0.5, "the published weights'", False)
    assert chosen(source="w.pt", file=file, normalize="data") == (0.1, "the data set's", False)
    assert chosen(source="w.pt", file=file, normalize="none") == (0.0, "none, as given", False)
    assert chosen(source="w.pt", file=file, given=([0.9], [0.9]))[:2] == (0.9, "as given")
    with pytest.raises(ConfigError, match="no training images of some data are read here, to compute them of"):
        chosen(source="w.pt", normalize="data", data=None)
    with pytest.raises(ConfigError, match=r"--model\.std: expected finite means and deviations > 0"):
        chosen(given=([0.9], [0.0]))


def test_normalising_twice_is_said() -> None:
    model = wrap(nn.Sequential(OWN["buffers"], body()), "own", 10, [0.3] * 3, [0.4] * 3, (8, 8))
    chosen = choose_normalisation(model, "own", "some data", normalize="data", data=([0.1] * 3, [0.2] * 3))
    assert chosen.words.endswith("those of some data; own normalises them once more, in 0")


def test_a_module_is_tried_where_it_is() -> None:
    """On a device where nothing is computed: an image of the CPU would be refused there."""
    network = own_models.Net(17).to("meta")
    heads, notes = fitted(network, 10, 1, name="elsewhere", image_size=(8, 8))
    assert (heads, len(notes)) == (["fc"], 1)
    assert network.fc.weight.is_meta
