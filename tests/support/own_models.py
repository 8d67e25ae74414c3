"""Models as a user may write them, a file that is given as `--model.name own_models.py:FACTORY`."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm

from awp_engine.models.factories import wrap


class HandNorm(nn.Module):
    """A batch normalisation that assigns its statistics anew, and is no BatchNorm of torch's."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.register_buffer("moving_mean", torch.zeros(channels, 1, 1))
        self.register_buffer("moving_variance", torch.ones(channels, 1, 1))

    def forward(self, x):
        mean, variance = self.moving_mean, self.moving_variance
        if self.training:
            mean, variance = x.mean((0, 2, 3)).view(-1, 1, 1), x.var((0, 2, 3)).view(-1, 1, 1)
            self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
            self.moving_variance = 0.9 * self.moving_variance + 0.1 * variance.detach()
        return self.scale * (x - mean) / (variance + 1e-5).sqrt()


class Net(nn.Module):
    def __init__(self, num_classes=10, in_chans=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(in_chans, 8, 3, padding=1), norm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, stride=2, padding=1), norm(8)
        self.fc = nn.Linear(8 * 4 * 4, num_classes)

    def features(self, x):
        x = functional.relu(self.norm1(self.conv1(x)))
        # no view of channels_last
        return functional.relu(self.norm2(self.conv2(x))).view(x.shape[0], -1)

    def forward(self, x):
        return self.fc(self.features(x))


class Attention(nn.Module):
    def __init__(self, num_classes=10, in_chans=1, image_size=8, dropout=0.2):
        super().__init__()
        self.patches = nn.Conv2d(in_chans, 16, 2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, (image_size // 2) ** 2, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 16, dropout=dropout, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.block(x)).mean(1))


class Odd(Net):
    """Tied weights, a layer that nothing uses, one that is frozen, and a parameter of no dimension."""

    def __init__(self, num_classes=10):
        super().__init__(num_classes, norm=lambda channels: nn.GroupNorm(2, channels))
        self.conv3, self.conv4 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.conv4.weight = self.conv3.weight
        self.unused, self.frozen = nn.Linear(3, 3), nn.Linear(16, 16).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(self.conv4(functional.relu(self.conv3(x)))))
        return self.fc(x.flatten(1).unflatten(1, (-1, 16)).matmul(self.frozen.weight).flatten(1)) * self.scale


def hand_normed(num_classes):
    return Net(num_classes, norm=HandNorm)


def instance_normed(num_classes):
    return Net(num_classes, norm=lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True))


def spectral(num_classes):
    net = Net(num_classes)
    parametrizations.spectral_norm(net.conv2)
    return net


def old_weight_norm(num_classes):
    net = Net(num_classes)
    weight_norm(net.conv2)
    return net


def seventeen():
    return Net(17)


def lazy(num_classes):
    return nn.Sequential(nn.LazyConv2d(4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes))


class Normalizing(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.register_buffer("mean", torch.tensor([0.25]))
        self.std = [0.5]

    def forward(self, x):
        return super().forward((x - self.mean) / 0.5)


class Misnamed(Net):
    """Holds a mean and a deviation of something else."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.register_buffer("mean", torch.tensor(0.25))
        self.register_buffer("std", torch.tensor(0.5))

    def forward(self, x):
        return (super().forward(x) - self.mean) / self.std


def given(num_classes):
    """One of the package's, with its normalisation in front of it."""
    return wrap(Net(num_classes), "given", num_classes, [0.25], [0.5], (8, 8))


class Counting(Net):
    """A buffer that training changes, which may be in no checkpoint."""

    def __init__(self, num_classes, persistent=False):
        super().__init__(num_classes)
        self.register_buffer("seen", torch.zeros(()), persistent=persistent)
        self.register_buffer("table", None, persistent=False)

    def forward(self, x):
        if self.table is None:
            self.table = torch.ones(8, 8)
        if self.training:
            self.seen += x.mean()
        return super().forward(x * self.table + self.seen)


def counting_in_checkpoints(num_classes):
    return Counting(num_classes, persistent=True)


class Broken(Net):
    """What is wrong is named when it is made."""

    def __init__(self, wrong, num_classes=10):
        super().__init__(num_classes)
        self.wrong = wrong

    def forward(self, x):
        logits = super().forward(x)
        if self.wrong == "train" and self.training:
            return logits, logits
        if self.wrong == "image":
            return super().forward(x.detach())
        return {
            "tuple": (logits, logits),
            "dict": {"logits": logits},
            "softmax": logits.softmax(1),
            "nan": logits * torch.nan,
            "pixels": logits[:, :, None],
        }.get(self.wrong, logits)


def broken(wrong):
    return lambda num_classes: Broken(wrong, num_classes)


a_tuple, a_dict, in_training, probabilities = broken("tuple"), broken("dict"), broken("train"), broken("softmax")
not_finite, no_gradient, of_pixels = broken("nan"), broken("image"), broken("pixels")


def nothing(num_classes):
    return None


def needs_depth(num_classes, depth):
    return Net(num_classes)


def fails(num_classes):
    raise OSError("no disk\nof that name")


def unclear():
    """Its logits come from no layer that could be replaced."""
    return nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Flatten(), nn.Softplus())


def half(num_classes):
    """Takes fp32 alone."""

    class Strict(Net):
        def forward(self, x):
            logits = super().forward(x)
            if logits.dtype != torch.float32:
                raise TypeError(f"expected float32, got {logits.dtype}")
            return logits

    return Strict(num_classes)


made = Net()
