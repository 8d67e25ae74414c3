"""From the methods' scores of one class to its suspects."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from awp_engine.audit.data.methods import beyond, strangeness, thresholds

# of the strangest images, how many the methods' agreement is counted by
AGREED = 20


class Judged(NamedTuple):
    """Of one class: its figures, its suspects, and the places of all images, both the strangest first."""

    summary: dict[str, Any]
    suspects: list[dict[str, Any]]
    order: list[int]


def judge(
    name: str,
    ids: Sequence[int],
    files: Sequence[str] | None,
    results: Mapping[str, Mapping[str, Any]],
    percentile: float,
) -> Judged:
    """Makes suspects of scores.

    Args:
        name: of the class.
        ids: of its images.
        files: theirs, as the list of a scan names them, where they are files.
        results: what every method said: `scores`, `weights` and `seconds`; suspects are the first one's.
        percentile: of a score, beyond which an image is one.
    """
    first, strange, rows, found = next(iter(results)), {}, [], []
    for method, result in results.items():
        scores = {score: torch.tensor(values, dtype=torch.float64) for score, values in result["scores"].items()}
        limits = thresholds(scores, percentile)
        marked = beyond(scores, limits)
        any_of = torch.stack(list(marked.values())).any(0)
        strange[method] = strangeness(scores, scores)
        top = strange[method].argsort(descending=True, stable=True)[:AGREED].tolist()
        weights = result["weights"]
        rows.append(
            {
                "method": method,
                "suspects": int(any_of.sum()),
                "beyond": {score: int(which.sum()) for score, which in marked.items()},
                "limits": limits,
                "seconds": result["seconds"],
                "strangest": [ids[place] for place in top],
                "weights": None if weights is None else {str(w): weights.count(w) for w in (1, 0, -1)},
            }
        )
        if method == first:
            for place in torch.nonzero(any_of).squeeze(1).tolist():
                over = [score for score, which in marked.items() if which[place]]
                found.append(
                    {
                        "id": ids[place],
                        "class": name,
                        "file": None if files is None else files[place],
                        "strangeness": float(strange[method][place]),
                        "beyond": {score: [float(scores[score][place]), limits[score]] for score in over},
                        "unlearnt": weights is not None and weights[place] < 0,
                    }
                )
    top = set(rows[0]["strangest"])
    for row in rows:
        row["agreed"] = len(top & set(row["strangest"]))
    found.sort(key=lambda suspect: (-suspect["strangeness"], suspect["id"]))
    order = strange[first].argsort(descending=True, stable=True).tolist()
    return Judged({"name": name, "images": len(ids), "methods": rows}, found, order)
