"""Small checkpoints to damage, and what must be true of them after."""

from pathlib import Path

import torch

Groups = dict[str, dict[str, torch.Tensor]]


def sample(seed: int = 0, size: int = 8) -> Groups:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, size, size, generator=generator)
    return {
        "model": {"conv.weight": weight, "steps": torch.tensor(seed)},
        "optimizer": {"conv.weight": torch.randn(4, 3, size, size, generator=generator)},
    }


def assert_equal(found: Groups, expected: Groups) -> None:
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        assert found[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[group][name].dtype == tensor.dtype
            assert torch.equal(found[group][name], tensor)


def leftovers(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if entry.name.startswith(".")]
