"""What AutoAttack has done so far, in one file that is replaced as a whole."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from awp_engine.checkpoint import CheckpointError, atomic_write_text, export_model, read_model, remove_leftovers


@dataclasses.dataclass(kw_only=True)
class AttackState:
    """Where AutoAttack stands.

    Attributes:
        x_adv: fp32 [N, C, H, W], the attacked images; clean ones where no attack has succeeded.
        robust: bool [N], right so far.
        begun: bool [N], right when the current attack began: what its batches are made of.
        counts: images right clean and after every finished attack.
        warnings: what the package has warned of.
        attack, batch: the next to be run.
    """

    x_adv: Tensor
    robust: Tensor
    begun: Tensor
    counts: dict[str, int]
    warnings: list[str] = dataclasses.field(default_factory=list)
    attack: int = 0
    batch: int = 0

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("x_adv", "robust", "begun")}
        return dataclasses.replace(self, **moved)


class StateFile:
    """The saved state of one evaluation, named by a hash of all that its result depends on.

    Args:
        directory: made if it is missing.
        identity: what the result depends on: weights, samples, ball, seed, batch size, versions.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.identity = json.loads(json.dumps(identity))
        key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.path = directory / f"autoattack-{key[:16]}.safetensors"

    def save(self, state: AttackState, *, next_attack: int, next_batch: int) -> None:
        """Replaces the file, so that a kill at any moment leaves the old state or the new one.

        Raises:
            CheckpointError: it could not be written.
        """
        progress = {
            "attack": next_attack,
            "batch": next_batch,
            "counts": state.counts,
            "warnings": state.warnings,
        }
        tensors = {name: getattr(state, name) for name in ("x_adv", "robust", "begun")}
        export_model(self.path, tensors, {"identity": json.dumps(self.identity), "progress": json.dumps(progress)})
        text = json.dumps({"identity": self.identity, "progress": progress}, indent=2)
        try:
            # for people, and for naming what differs; the state itself is the one file above
            atomic_write_text(self.path.with_suffix(".json"), text + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.path.with_suffix('.json')}: cannot be written: {error.strerror}") from error

    def load(self, say: Callable[[str], None]) -> AttackState | None:
        """The saved state, or None where there is none for this very evaluation.

        `say` is told of states of other evaluations, which are left alone, and of a damaged one.
        """
        remove_leftovers(self.path.parent, "autoattack-")
        if not self.path.exists():
            self._name_others(say)
            return None
        try:
            tensors, metadata = read_model(self.path)
            if json.loads(metadata["identity"]) != self.identity:
                raise CheckpointError(f"{self.path}: belongs to another evaluation")
            progress = json.loads(metadata["progress"])
            return AttackState(**{name: tensors[name] for name in ("x_adv", "robust", "begun")}, **progress)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            say(f"autoattack: starting over, the saved state cannot be used: {' '.join(str(error).split())}")
            return None

    def _name_others(self, say: Callable[[str], None]) -> None:
        for other in sorted(self.path.parent.glob("autoattack-*.json")):
            try:
                identity = json.loads(other.read_text())["identity"]
                differing = [key for key, value in self.identity.items() if identity.get(key) != value]
            except (OSError, ValueError, KeyError, AttributeError):
                differing = ["what it says of itself"]
            say(f"autoattack: {other.with_suffix('.safetensors').name} is left alone: other {', '.join(differing)}")
