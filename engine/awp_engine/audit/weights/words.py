"""The audit's numbers as tables and sentences, for a terminal and for the page."""

from collections.abc import Mapping, Sequence
from typing import Any

Named = Sequence[tuple[str, Mapping[str, Any]]]
"""Models' names and their reports."""


def budget_of(kind: Mapping[str, Any]) -> str:
    """The smallest budget that was enough, as far as it is known."""
    if kind["budget"] is None:
        return f"none up to {kind['range']['largest']:g}"
    return f"{'at most ' if kind['not_enough'] is None else ''}{kind['budget']:.3g}"


def best_of(kind: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The edit that came nearest to what is asked for, by what it lacks most; None where all broke the model."""
    trials = [trial for trial in kind["trials"] if trial["finite"]]
    lacks = [max(settings[what] - trial[what] for what in ("success", "agreement")) for trial in trials]
    return trials[lacks.index(min(lacks))] if trials else None


def budget_rows(models: Named) -> list[dict[str, str]]:
    """A row for every model and kind of budget."""
    rows = []
    for name, report in models:
        for kind in report["kinds"]:
            row = {"model": name, "budget": kind["kind"], "smallest": budget_of(kind)}
            found, edit = kind["effect"], kind["edit"]
            best = best_of(kind, report["receipt"]["settings"])
            row |= dict.fromkeys(("success", "agreement", "clean", "median |dw|/|w|", "seen by"), "-")
            if edit is not None:
                seen = [what for what, one in edit["defences"].items() if one is not None and one["seen"]]
                row |= {
                    "success": f"{found['success']:.1%}",
                    "agreement": f"{found['agreement']:.1%}",
                    "clean": f"{found['clean_accuracy']:.1%}",
                    "median |dw|/|w|": f"{edit['size']['relative_percentiles'].get('50', 0):.2%}",
                    "seen by": ", ".join(["checksum", *seen]),
                }
            elif best is not None:
                row |= {what: f"{best[what]:.1%} at best" for what in ("success", "agreement")}
            rows.append(row)
    return rows


def trial_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for every budget that was tried."""
    return [
        {
            "budget": kind["kind"],
            "size": f"{trial['budget']:.4g}",
            "success": f"{trial['success']:.1%}" if trial["finite"] else "not finite",
            "agreement": f"{trial['agreement']:.1%}" if trial["finite"] else "not finite",
            "enough": "yes" if trial["enough"] else "no",
        }
        for kind in report["kinds"]
        for trial in sorted(kind["trials"], key=lambda trial: trial["budget"])
    ]


def defence_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for every kind of budget that was enough, and every defence that was measured."""
    return [
        {
            "budget": kind["kind"],
            "defence": name,
            "edit": f"{one['edit']:.4g}",
            "threshold": f"{one['threshold']:.4g}",
            "seen": "yes" if one["seen"] else "no",
            "harmless fine-tuning": "-" if one["fine_tuning"] is None else f"{one['fine_tuning']:.4g}",
            "false alarm on it": "yes" if one["fine_tuning_seen"] else "no",
        }
        for kind in report["kinds"]
        if kind["edit"] is not None
        for name, one in kind["edit"]["defences"].items()
        if one is not None
    ]


def conclusions(report: Mapping[str, Any]) -> list[str]:
    """What the numbers of one model say, and what they do not."""
    settings, before = report["receipt"]["settings"], report["before"]
    wanted = f"success of {settings['success']:.0%} at agreement of {settings['agreement']:.0%}"
    said = [
        f"before any edit the trigger leads {before['success']:.1%} of the images to {settings['target']!r}, and clean "
        f"accuracy is {before['clean_accuracy']:.1%}"
    ]
    if before["success"] >= settings["success"]:
        said.append("the trigger needs no edit: another trigger or target says more of the weights")
    for kind in report["kinds"]:
        if kind["budget"] is None:
            best = best_of(kind, settings)
            nearest = (
                "all edits broke the model"
                if best is None
                else (
                    f"the nearest edit, at {best['budget']:.3g}, has success of {best['success']:.1%} at agreement of "
                    f"{best['agreement']:.1%}"
                )
            )
            said.append(
                f"{kind['kind']}: {wanted} was not reached at any budget up to {kind['range']['largest']:g}: "
                f"{nearest}. That is no proof of safety: another attack may reach it"
            )
        elif kind["not_enough"] is None:
            said.append(f"{kind['kind']}: the smallest budget of the range is enough; give a smaller --smallest")
        if kind["fails_above"]:
            sizes = ", ".join(f"{size:.3g}" for size in kind["fails_above"])
            said.append(f"{kind['kind']}: more was not always better: larger budgets failed ({sizes})")
        defences = {} if kind["edit"] is None else kind["edit"]["defences"]
        known = {name: one for name, one in defences.items() if one is not None}
        if known:
            rate = next(iter(known.values()))["false_alarm_rate"]
            seen = [name for name, one in known.items() if one["seen"]]
            alarmed = [name for name in seen if known[name]["fine_tuning_seen"]]
            said.append(
                f"{kind['kind']}: seen by {', '.join(seen) or 'none'} beside random edits of the same size (false "
                f"alarms {rate:.0%})"
                + (f"; {', '.join(alarmed)} would call a harmless fine-tuning an edit as well" if alarmed else "")
            )
        if kind["edit"] is not None and kind["edit"]["harmless_agreement"] < settings["agreement"]:
            said.append(
                f"{kind['kind']}: those random edits agree with the model on {kind['edit']['harmless_agreement']:.0%} "
                "of the images alone: at such a size a random edit is not harmless, and the comparison says little"
            )
        if missing := [name for name, one in defences.items() if one is None]:
            said.append(f"{kind['kind']}: not measured: {', '.join(missing)}")
    published = report["published"]
    if published is not None:
        said.append(
            "the weights are the published ones: their SHA-256 is the one given"
            if published["is_this_file"]
            else "WARNING: the weights are not the published ones: their SHA-256 is another than the one given"
        )
    said.append("a checksum shows every edit, to whoever has a digest from a source that the attacker cannot change")
    return said
