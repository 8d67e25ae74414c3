"""What an evaluation found: rows, worst case, gates and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any, Self

import torch
from torch import Tensor

from awp_engine.evaluation.gates.gate import Gate
from awp_engine.evaluation.gates.run import GateReport
from awp_engine.evaluation.reports.confidence import (
    INTERVAL,
    INTERVAL_MEANS,
    Stronger,
    chance_of_split,
    interval,
    stronger_attack,
)
from awp_engine.evaluation.reports.receipt import percent

# a chance below which a difference is none any more
_SIGNIFICANT = 0.01
# fewer tell nothing of how a model answers
_SEVERAL_IMAGES = 10
RIGHT_MEANS = "with and without the attack; an image that is wrong without one does not count as right under it"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attack's result.

    Attributes:
        attack: its name.
        right: images right both clean and attacked.
        right_attacked: images whose attacked version is right, whatever the clean one is: what some papers count.
        not_finite: images whose logits, clean or attacked, are not finite: wrong.
        blind: images that would be right, but a gradient of their attack was not finite: not counted as right.
        images: how many were attacked.
        seconds: it took, saved parts of an earlier start not counted.
        largest: largest perturbation found, measured again in fp64, in the ball's norm.
        in_ball: whether that is within epsilon; None for regional attacks, which have none.
        transferred: images that fooled this model and, right before, the second model too; None without one.
        transferable: images that fooled this model and were right on the second one before.
        parameters, details: the attack's own.
        resumed: the saved state that was gone on from; None where there was none.
    """

    attack: str
    right: int
    right_attacked: int
    not_finite: int
    blind: int
    images: int
    seconds: float
    largest: float
    in_ball: bool | None
    transferred: int | None
    transferable: int | None
    parameters: Mapping[str, Any]
    details: Mapping[str, Any]
    resumed: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """A few images of one attack: fp32 [K, C, H, W] on the CPU, labels and predicted classes."""

    attack: str
    clean: Tensor
    attacked: Tensor
    labels: tuple[int, ...]
    clean_predictions: tuple[int, ...]
    predictions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What every attack did to every image, on the CPU.

    Attributes:
        predictions: of the attacked images, int64 [N]; -1 where there is no answer.
        robust: right clean and under the attack, bool [N].
        largest: perturbation in the ball's norm, fp64 [N].
        bounded: whether the attack stayed in the ball by name, so that it counts for the worst case.
    """

    predictions: Tensor
    robust: Tensor
    largest: Tensor
    bounded: bool


@dataclass(frozen=True, kw_only=True)
class BlackBox:
    """How Square, which sees no gradients, compares with the gradient attacks, image by image.

    Attributes:
        gradients: the names of those: PGD and CW of many steps.
        square_alone: images that Square broke, and none of them.
        gradients_alone: images that one of them broke, and Square did not.
    """

    gradients: tuple[str, ...]
    square_alone: int
    gradients_alone: int

    @property
    def better(self) -> str:
        """In words, that Square broke more; empty where it did not."""
        if self.square_alone <= self.gradients_alone:
            return ""
        return (
            f"square broke {self.square_alone} images that {', '.join(self.gradients)} did not, and these "
            f"{self.gradients_alone} that square did not (by chance: p = {self.chance:.2g})"
        )

    @property
    def chance(self) -> float:
        """Of Square doing so well where neither is better."""
        return chance_of_split(self.square_alone, self.gradients_alone)


@dataclass(frozen=True, kw_only=True)
class PerImage:
    """The same evaluation, image by image.

    Attributes:
        ids, labels: int64 [N].
        clean: predicted classes without an attack, int64 [N].
        top5: whether the label is among the five largest logits without an attack, bool [N]; None for few classes.
        attacks: by name, in their order.
    """

    ids: Tensor
    labels: Tensor
    clean: Tensor
    attacks: Mapping[str, Answers]
    top5: Tensor | None = None

    @property
    def worst(self) -> Tensor:
        """Right clean and under every attack of the ball, bool [N]."""
        robust = self.clean == self.labels
        for answers in self.attacks.values():
            robust = robust & answers.robust if answers.bounded else robust
        return robust

    def by_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """For every class that has images: how many, and how many of them are right."""
        rows = []
        for number in self.labels.unique().tolist():
            own = self.labels == number
            rows.append(
                {
                    "class": class_names[number] if number < len(class_names) else str(number),
                    "images": int(own.sum()),
                    "clean": int((own & (self.clean == self.labels)).sum()),
                    "attacked": {name: int((own & found.robust).sum()) for name, found in self.attacks.items()},
                    "worst": int((own & self.worst).sum()),
                }
            )
        return rows

    def arrays(self) -> dict[str, Any]:
        """What per-image files hold: numpy arrays by name, [N] each.

        `first_broken_by` is the number of the first attack, in the order of `attacks`, under which an image that is
        right clean is wrong; -1 where there is none, and -2 where it is wrong clean.
        """
        broken = torch.full_like(self.labels, -1)
        columns = {"id": self.ids, "label": self.labels, "clean_prediction": self.clean}
        if self.top5 is not None:
            columns["clean_top5"] = self.top5
        for number, found in reversed(list(enumerate(self.attacks.values()))):
            broken[~found.robust] = number
        for name, found in self.attacks.items():
            columns[f"prediction/{name}"] = found.predictions
            columns[f"robust/{name}"] = found.robust
            columns[f"perturbation/{name}"] = found.largest
        broken[self.clean != self.labels] = -2
        columns |= {"robust_to_all": self.worst, "first_broken_by": broken}
        return {name: column.numpy() for name, column in columns.items()}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """All that was measured.

    Attributes:
        rows: in the order of the attacks.
        clean: images right without an attack.
        not_finite: images whose logits are not finite without an attack: wrong.
        top5: images whose label is among the five largest logits without an attack; None for fewer than 10 classes.
        worst: images right under every attack of the ball.
        worst_over: the names of those.
        images: how many there are.
        gates: None if they were not wanted.
        pictures: of every attack.
        per_class: counts of every class that has images, see `PerImage.by_class`.
        per_image: every image's answers; None where the report was read again.
        random: images of those looked at first that are answered otherwise from call to call; what the gates saw is
            in their report.
        black_box: None where Square or the gradient attacks were not run.
    """

    rows: tuple[Row, ...]
    clean: int
    not_finite: int
    worst: int
    worst_over: tuple[str, ...]
    images: int
    gates: GateReport | None
    pictures: tuple[Pictures, ...]
    per_class: Sequence[Mapping[str, Any]]
    per_image: PerImage | None
    random: int = 0
    top5: int | None = None
    black_box: BlackBox | None = None

    def doubts(self) -> list[str]:
        """Why not to believe the numbers, in words; empty where nothing speaks against them."""
        found = []
        not_finite = max((self.not_finite, *(row.not_finite for row in self.rows)))
        if not_finite:
            found.append(f"logits of {not_finite} of {self.images} images are not finite; they count as wrong")
        if self.random:
            found.append(
                f"the model is random: {self.random} images get other answers from call to call; attacks that do not "
                "average over them, AutoAttack's standard version for one, say too much"
            )
        for row in self.rows:
            if row.blind:
                found.append(f"{row.attack}: gradients of {row.blind} images are not finite; they count as wrong")
            if row.in_ball is False:
                found.append(f"{row.attack}: attacked images left the ball, or are no images")
            found += [f"{row.attack}: {warning}" for warning in row.details.get("warnings", [])]
        bounded = [row for row in self.rows if row.in_ball is not None]
        for row in bounded:
            for other in bounded if row.attack == "autoattack" else ():
                if row.right > other.right:
                    found.append(
                        f"autoattack: {row.right} images right, more than under {other.attack} ({other.right}): "
                        "its attacks, or what was saved of them, are broken"
                    )
        if (name := self.constant_class()) is not None:
            found.append(
                f"only images of {name} are right, and all of them: a model that answers alike for every image looks "
                "robust, and has learnt nothing"
            )
        if self.black_box is not None and self.black_box.better and self.black_box.chance < _SIGNIFICANT:
            found.append(
                f"{self.black_box.better}: gradients point nowhere useful, or these attacks are too weak; their "
                "accuracy says too much"
            )
        if self.gates is not None:
            found += [f"gate failed: {gate.name}" for gate in self.gates.gates if not gate.passed]
        return found

    def notes(self) -> list[str]:
        """What is worth a word, and no reason to doubt the numbers."""
        if self.black_box is None or not self.black_box.better or self.black_box.chance < _SIGNIFICANT:
            return []
        return [f"{self.black_box.better}: a sign of masked gradients, if it holds on more images"]

    @property
    def stronger(self) -> Stronger | None:
        """A fitting attack of the gates', where one of them failed and it leaves less than all attacks here."""
        if self.gates is None or all(gate.passed for gate in self.gates.gates):
            return None
        found = stronger_attack(self.gates.adaptive)
        return found if found is not None and found.accuracy < self.worst / self.images else None

    def constant_class(self) -> str | None:
        """The class that alone is ever right, and always; None where there is no such one among several."""
        right = [row for row in self.per_class if row["clean"]]
        alone = len(right) == 1 < len(self.per_class) and right[0]["clean"] == right[0]["images"]
        return right[0]["class"] if alone and self.images >= _SEVERAL_IMAGES else None

    def table(self) -> list[dict[str, str]]:
        """Rows of text for `report.print_table`."""
        transfers = any(row.transferable is not None for row in self.rows)
        unusable = any(row.not_finite or row.blind for row in self.rows)
        lines = []
        for row in self.rows:
            line = {
                "attack": row.attack,
                "accuracy": f"{percent(row.right, row.images)}%",
                INTERVAL: str(interval(row.right, row.images)),
                "largest": f"{row.largest:.4g}",
                "seconds": f"{row.seconds:.1f}",
            }
            if unusable:
                line |= {"logits not finite": str(row.not_finite), "gradients not finite": str(row.blind)}
            if transfers:
                line["transfer"] = f"{percent(row.transferred or 0, row.transferable)}%" if row.transferable else "-"
            lines.append(line)
        if self.top5 is not None:
            share = {
                "accuracy": f"{percent(self.top5, self.images)}%",
                INTERVAL: str(interval(self.top5, self.images)),
            }
            lines.append(dict.fromkeys(lines[0], "") | {"attack": "top-5 without an attack"} | share)
        worst: dict[str, str] = dict.fromkeys(lines[0], "") | {
            # what is right under an attack is right without one
            "attack": "worst of " + ", ".join([name for name in self.worst_over if name != "clean"] or ["clean"]),
            "accuracy": f"{percent(self.worst, self.images)}%",
            INTERVAL: str(interval(self.worst, self.images)),
        }
        return [*lines, worst]

    def attacked_alone(self) -> str:
        """The other way to count, in words; empty where it makes no difference."""
        other = [row for row in self.rows if row.attack != "clean" and row.right_attacked != row.right]
        return ", ".join(f"{row.attack} {percent(row.right_attacked, row.images)}%" for row in other)

    def regional_table(self) -> list[dict[str, str]]:
        """The regional attacks' norms, as text: means over the images that were flipped."""
        lines = []
        for row in self.rows:
            if row.in_ball is not None:
                continue
            norms = {name: f"{row.details[name]:.4g}" if name in row.details else "-" for name in ("L0", "L2", "Linf")}
            share = f"{row.details['L0_share']:.1%}" if "L0_share" in row.details else "-"
            steps = f"{row.details['steps']:.1f}" if "steps" in row.details else "-"
            transfer = "-" if row.transferable is None else f"{row.transferred}/{row.transferable}"
            flipped = f"{row.details['flipped']}/{self.clean}"
            line = {"attack": row.attack, "flipped": flipped, **norms, "L0 share": share, "steps": steps}
            lines.append(line | {"transfer": transfer})
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        rows = [
            {
                **asdict(row),
                "accuracy": row.right / row.images,
                "accuracy_percent": percent(row.right, row.images),
                "confidence_interval": list(interval(row.right, row.images)),
                "accuracy_of_attacked_images_alone": row.right_attacked / row.images,
            }
            for row in self.rows
        ]
        worst = {
            "right": self.worst,
            "images": self.images,
            "over": list(self.worst_over),
            "accuracy_percent": percent(self.worst, self.images),
            "confidence_interval": list(interval(self.worst, self.images)),
        }
        clean: dict[str, Any] = {"right": self.clean, "images": self.images, "not_finite": self.not_finite}
        clean["confidence_interval"] = list(interval(self.clean, self.images))
        if self.top5 is not None:
            clean |= {"top5": self.top5, "top5_percent": percent(self.top5, self.images)}
            clean["top5_confidence_interval"] = list(interval(self.top5, self.images))
        doubts = self.doubts()
        return {
            "unreliable": bool(doubts),
            "doubts": doubts,
            "notes": self.notes(),
            "black_box": None if self.black_box is None else asdict(self.black_box),
            "stronger_attack": None if self.stronger is None else self.stronger.to_dict(),
            "right_means": RIGHT_MEANS,
            "confidence_interval_means": INTERVAL_MEANS,
            "clean": clean,
            "random": self.random,
            "attacks": rows,
            "robust_to_all": worst,
            "per_class": self.per_class,
            "gates": None if self.gates is None else _gates_to_dict(self.gates),
        }

    @classmethod
    def from_dict(cls, report: Mapping[str, Any]) -> Self:
        """What `to_dict` gave, but for pictures and single images.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        rows = [{name: row[name] for name in (field.name for field in fields(Row))} for row in report["attacks"]]
        return cls(
            rows=tuple(Row(**row) for row in rows),
            clean=report["clean"]["right"],
            not_finite=report["clean"]["not_finite"],
            worst=report["robust_to_all"]["right"],
            worst_over=tuple(report["robust_to_all"]["over"]),
            images=report["clean"]["images"],
            gates=None if report["gates"] is None else _gates_from_dict(report["gates"]),
            pictures=(),
            per_class=report["per_class"],
            per_image=None,
            random=report["random"],
            top5=report["clean"].get("top5"),
            black_box=None if report["black_box"] is None else _black_box_from_dict(report["black_box"]),
        )


def class_table(per_class: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Accuracy of every class, as text."""
    lines = []
    for row in per_class:
        counts = {"clean": row["clean"], **row["attacked"], "worst": row["worst"]}
        shares = {name: f"{percent(count, row['images'])}%" for name, count in counts.items()}
        lines.append({"class": row["class"], "images": str(row["images"]), **shares})
    return lines


def _black_box_from_dict(found: Mapping[str, Any]) -> BlackBox:
    return BlackBox(**{**found, "gradients": tuple(found["gradients"])})


def _gates_from_dict(report: Mapping[str, Any]) -> GateReport:
    return GateReport(
        gates=tuple(Gate(**gate) for gate in report["gates"]),
        images=report["images"],
        epsilon_curve=tuple((Fraction(point["epsilon"]), point["right"]) for point in report["epsilon_curve"]),
        steps_curve=tuple((point["steps"], point["right"]) for point in report["steps_curve"]),
        epsilon=Fraction(report["epsilon"]),
        adaptive=report["adaptive"],
    )


def _gates_to_dict(report: GateReport) -> dict[str, Any]:
    return {
        "passed": all(gate.passed for gate in report.gates),
        "images": report.images,
        "gates": [asdict(gate) for gate in report.gates],
        "epsilon_curve": [{"epsilon": str(radius), "right": count} for radius, count in report.epsilon_curve],
        "steps_curve": [{"steps": steps, "right": count} for steps, count in report.steps_curve],
        "epsilon": str(report.epsilon),
        "adaptive": report.adaptive,
    }
