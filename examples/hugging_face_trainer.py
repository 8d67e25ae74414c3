"""AWP, SAM, ASAM or bounded AWP in a Hugging Face `Trainer`, with gradient accumulation and bfloat16.

    python examples/hugging_face_trainer.py --method bounded

`Trainer` calls `training_step` once a micro-batch. The micro-batches of a window are kept; after the last one has added
to the ascent gradient, the weights move once, and the descent gradient is taken over all of them. Sharded parameters
(FSDP, DeepSpeed's stage 3) are not whole tensors, so this is for one device or data parallelism.
"""

import argparse
import contextlib
import tempfile
from typing import Any

import torch
from methods import METHODS, perturbation_of
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments


class PerturbedTrainer(Trainer):
    """A `Trainer` whose descent gradient is taken at perturbed weights.

    Args:
        model: what is trained.
        method: as for `perturbation_of`.
        options: as for `Trainer`.
    """

    def __init__(self, *, model: nn.Module, method: str, **options: Any) -> None:
        super().__init__(model=model, **options)
        self.perturbation = perturbation_of(method, model)
        self.window: list[dict[str, Any]] = []

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch; at the end of a window also the descent."""
        self.window.append(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)  # ascent gradient, at w
        if self.accelerator.sync_gradients:  # the last of the window: the optimizer steps after it
            with self.perturbation.perturbed():
                for index, batch in enumerate(self.window):
                    last = index == len(self.window) - 1
                    # ranks add up their gradients once, with the last micro-batch
                    with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                        super().training_step(model, batch, num_items_in_batch)  # descent gradient, at w + v
            self.window.clear()
        return loss


class Sentences(Dataset):
    """Random token ids; the class is whether the first token is small."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 50, (count, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": (tokens[0] < 25).long()}


def train(method: str, epochs: int = 6) -> tuple[nn.Module, list[float]]:
    """Train a tiny BERT from scratch; returns the model and the mean loss of every epoch."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            learning_rate=1e-2,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = PerturbedTrainer(method=method, model=model, args=arguments, train_dataset=Sentences(72))
        trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="bounded")
    _, losses = train(parser.parse_args().method)
    print(f"loss {float(losses[0]):.3f} -> {float(losses[-1]):.3f}")
