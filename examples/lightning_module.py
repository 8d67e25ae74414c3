"""AWP, SAM, ASAM or bounded AWP in a Lightning module, with gradient accumulation and bfloat16.

    python examples/lightning_module.py --method asam

Two passes a step need manual optimization. The micro-batches of a window are kept; the ascent gradient is accumulated
over all of them, the weights move once, and the descent gradient is accumulated over the same ones.
"""

import argparse
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from methods import METHODS, perturbation_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class PerturbedClassifier(lightning.LightningModule):
    """A small classifier.

    Args:
        method: as for `perturbation_of`.
        accumulate: micro-batches a step; an epoch's last step may have fewer.
    """

    def __init__(self, method: str, accumulate: int = 4) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate = accumulate
        self.network = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 5))
        self.perturbation = perturbation_of(method, self.network)
        self.window: list[list[Tensor]] = []
        self.losses: list[float] = []

    def _accumulate_gradient(self) -> float:
        total = 0.0
        for x, y in self.window:
            loss = F.cross_entropy(self.network(x), y) / len(self.window)
            self.manual_backward(loss)
            total += loss.item()
        return total

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Keep a micro-batch; at the end of a window, update the weights."""
        self.window.append(batch)
        if len(self.window) < self.accumulate and not self.trainer.is_last_batch:
            return
        optimizer: Any = self.optimizers()  # Lightning's wrapper, which knows of the precision
        self.losses.append(self._accumulate_gradient())  # ascent gradient, at w
        with self.perturbation.perturbed():
            self._accumulate_gradient()  # descent gradient, at w + v
        optimizer.step()  # at w
        optimizer.zero_grad()
        self.window.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over all parameters."""
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(method: str, epochs: int = 8) -> tuple[PerturbedClassifier, list[float]]:
    """Fit random points; returns the module and the loss before every step."""
    torch.manual_seed(0)
    module = PerturbedClassifier(method)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(72, 20, generator=generator), torch.randint(0, 5, (72,), generator=generator)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=8))
    return module, module.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="asam")
    _, losses = train(parser.parse_args().method)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
