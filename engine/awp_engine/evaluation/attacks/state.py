"""What AutoAttack has done so far, in one file that is replaced as a whole, and that is believed only if it is ours.

That an image withstood an attack cannot be checked without attacking it again. So a state carries a code (HMAC) that is
made with this user's secret key: a file that came with a downloaded run, or was changed, is not gone on from. What can
be checked is checked as well, from the images, by `AttackState.require_sound`.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from awp_engine.checkpoint import CheckpointError, content_hash, export_model, read_file, read_model
from awp_engine.evaluation.attacks.named import Trial, folded, in_ball
from awp_engine.files.atomic import atomic_write_text, remove_leftovers
from awp_engine.files.digest import sha256_of_json
from awp_engine.files.signed import Signer
from awp_engine.files.text import one_line
from awp_engine.models.answers import NO_CLASS, predicted

# of the largest logit: how far another order of summation may move an image across the boundary that FAB stops at
_ROUNDING = 1e-3
_TENSORS = ("x_adv", "robust", "begun")
_NOTE = re.compile(r"autoattack-[0-9a-f]{16}\.json")
_NOTE_BYTES = 1 << 20


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
        started: when the first attack began, ISO 8601.
    """

    x_adv: Tensor
    robust: Tensor
    begun: Tensor
    counts: dict[str, int]
    warnings: list[str] = dataclasses.field(default_factory=list)
    attack: int = 0
    batch: int = 0
    started: str = dataclasses.field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return dataclasses.replace(self, **moved)

    @torch.no_grad()
    def require_sound(self, trial: Trial, attacks: Sequence[str]) -> None:
        """Checks all that can be known without an attack, by classifying clean and attacked images again.

        Raises:
            ValueError: naming what cannot be.
        """
        x, y, *_ = trial.whole
        flags = (self.robust, self.begun)
        if (self.x_adv.shape, self.x_adv.dtype) != (x.shape, torch.float32):
            raise ValueError(f"x_adv is {self.x_adv.dtype} {list(self.x_adv.shape)}, expected {list(x.shape)}, fp32")
        if any((flag.shape, flag.dtype) != (y.shape, torch.bool) for flag in flags):
            raise ValueError(f"robust and begun: expected {len(y)} flags each")
        if type(self.attack) is not int or not 0 <= self.attack <= len(attacks):
            raise ValueError(f"next attack {self.attack!r}, expected 0 to {len(attacks)}")
        batches = -(-int(self.begun.sum()) // trial.batch_size)
        last = max(batches - 1, 0) if self.attack < len(attacks) else 0
        if type(self.batch) is not int or not 0 <= self.batch <= last:
            raise ValueError(f"next batch {self.batch!r}, expected 0 to {last}")
        names = ["clean", *attacks[: self.attack]]
        if not isinstance(self.counts, dict) or list(self.counts) != names:
            raise ValueError(f"counts are not those of {', '.join(names)}")
        counts = [*self.counts.values(), int(self.robust.sum())]
        if any(type(n) is not int for n in counts) or counts != sorted(counts, reverse=True) or counts[-1] < 0:
            raise ValueError("counts rise, or are no counts")
        if not isinstance(self.warnings, list) or any(not isinstance(text, str) for text in self.warnings):
            raise ValueError("warnings: expected a list of texts")
        if not isinstance(self.started, str):
            raise ValueError("started: expected a date")
        if counts[-2] != int(self.begun.sum()) or bool((self.robust & ~self.begun).any()):
            raise ValueError("flags do not fit each other or the counts")
        if self.batch == 0 and not torch.equal(self.robust, self.begun):
            raise ValueError("images fell before the attack began")
        if not bool(in_ball(self.x_adv, x, trial.threat).all()):
            raise ValueError("attacked images leave the ball")
        same = (self.x_adv == x).flatten(1).all(1)
        if not bool(same[self.robust].all()):
            raise ValueError("images that withstood all attacks are changed")
        clean, rounding = _margins(trial, x), max(_ROUNDING, trial.rounding)
        fallen = ~self.robust & ~same
        # what is wrong clean was never attacked
        attacked, undecided = self.robust | fallen, clean.abs() <= rounding
        if not torch.equal((clean > 0) | undecided, attacked | undecided) or (
            abs(self.counts["clean"] - int(attacked.sum())) > int(undecided.sum())
        ):
            raise ValueError("flags are not those of the clean images")
        if bool((_margins(trial, self.x_adv)[fallen] > rounding).any()):
            raise ValueError("attacked images that are said to be wrong are right")


def _margins(trial: Trial, images: Tensor) -> Tensor:
    """Label's logit less the largest other one, relative to the largest, [N]; -inf where logits are not finite."""
    margins = []
    labels = trial.whole.labels.unsqueeze(1)
    for part, own in zip(images.split(trial.batch_size), labels.split(trial.batch_size), strict=True):
        logits = folded(trial.model(part), trial.classes)
        margin = logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -torch.inf).amax(1)
        margin = margin / logits.abs().amax(1).clamp_min(torch.finfo(logits.dtype).tiny)
        margins.append(margin.masked_fill(predicted(logits) == NO_CLASS, -torch.inf))
    return torch.cat(margins)


def _content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return content_hash(tensors, {name: metadata[name] for name in ("identity", "progress")})


class StateFile:
    """The saved state of one evaluation, named by a hash of all that its result depends on.

    Args:
        directory: made if it is missing.
        identity: what the result depends on: weights, samples, ball, seed, batch size, versions.

    Raises:
        KeyFileError: there is no key to authenticate states with.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._signer = Signer("autoattack")
        self.identity = json.loads(json.dumps(identity))
        self.path = directory / f"autoattack-{sha256_of_json(self.identity)[:16]}.safetensors"

    def save(self, state: AttackState) -> None:
        """Replaces the file, so that a kill at any moment leaves the old state or the new one.

        Raises:
            CheckpointError: it could not be written.
        """
        progress = {name: getattr(state, name) for name in ("attack", "batch", "counts", "warnings", "started")}
        tensors = {name: getattr(state, name).cpu().contiguous() for name in _TENSORS}
        metadata = {"identity": json.dumps(self.identity), "progress": json.dumps(progress)}
        export_model(self.path, tensors, metadata | {"code": self._signer.code(_content(tensors, metadata))})
        text = json.dumps({"identity": self.identity, "progress": progress}, indent=2)
        try:
            # for people, and for naming what differs; the state itself is the one file above
            atomic_write_text(self.path.with_suffix(".json"), text + "\n")
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be written: {error.strerror}") from error

    def load(self, say: Callable[[str], None], check: Callable[[AttackState], None]) -> AttackState | None:
        """The saved state, or None where there is none that can be believed.

        Args:
            say: is told of states of other evaluations, which are left alone, and of one that is not believed, which is
                kept under another name.
            check: raises ValueError for a state that cannot be.
        """
        # not those of other ranks, which may be on other machines
        remove_leftovers(self.path.parent, self.path.stem)
        # a link that leads nowhere is something too
        if not os.path.lexists(self.path):
            self._name_others(say)
            return None
        try:
            tensors, metadata = read_model(self.path)
            # before anything in it is looked at
            if not self._signer.made(metadata["code"], _content(tensors, metadata)):
                raise ValueError("was not written by this user's runs, or was changed since")
            if json.loads(metadata["identity"]) != self.identity:
                raise ValueError("belongs to another evaluation")
            state = AttackState(**{name: tensors[name] for name in _TENSORS}, **json.loads(metadata["progress"]))
            check(state)
            return state
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            reason = one_line(reason.removeprefix(f"{self.path}: "))
            kept = self.path.with_suffix(".refused")
            self.path.replace(kept)
            say(
                f"autoattack: starting anew: {self.path}: this saved state is not believed: {reason}; it is kept as "
                f"{kept.name}, which may be deleted"
            )
            return None

    def _name_others(self, say: Callable[[str], None]) -> None:
        for other in sorted(self.path.parent.glob("autoattack-*.json")):
            if not _NOTE.fullmatch(other.name):
                continue
            try:
                identity = json.loads(read_file(other, limit=_NOTE_BYTES))["identity"]
                differing = [key for key, value in self.identity.items() if identity.get(key) != value]
                # another rank's of this evaluation
                if differing == ["rank"]:
                    continue
            except (CheckpointError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                differing = ["what it says of itself"]
            say(f"autoattack: {other.with_suffix('.safetensors').name} is left alone: other {', '.join(differing)}")
