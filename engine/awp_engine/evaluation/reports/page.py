"""The report as one HTML page."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from awp_engine.config.data_sets import data_title, own_title
from awp_engine.evaluation.reports.confidence import INTERVAL
from awp_engine.evaluation.reports.figures import Picture
from awp_engine.evaluation.reports.receipt import percent
from awp_engine.evaluation.reports.results import class_table
from awp_engine.models.normalisation import shown as numbers
from awp_engine.observe.page import document, escaped, facts, figure, image, listed, table

_MOST_CLASSES = 25
_STYLE = """
.headline { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)); gap: 1rem;
  margin: 1rem 0; }
.headline > div { background: var(--box); border-radius: 6px; padding: .75rem 1rem; }
.headline b { display: block; font-size: 1.8rem; line-height: 1.3; }
.banner { border-left: 4px solid var(--bad); background: var(--box); padding: .25rem 1rem; margin: 1rem 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: 1rem; }
.pictures figure { background: var(--box); border-radius: 6px; padding: .6rem; }
.pictures figure > div { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; font-size: .8rem;
  line-height: 1.3; overflow-wrap: break-word; }
.pictures div > .soft { font-size: .75rem; }
.pictures img { width: 100%; display: block; image-rendering: pixelated; border-radius: 2px; }
.pictures figcaption { margin-bottom: .35rem; }
"""


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return lines


def _headline(report: Mapping[str, Any]) -> str:
    """The accuracies that an evaluation is made for, each with its interval; what is to be believed comes first."""

    def tile(number: str, name: str, found: Mapping[str, Any], of: str, kind: str = "") -> str:
        low, high = found["confidence_interval"]
        sure = f"{low:.1%} to {high:.1%} with 95% confidence; {found['images']:,} images, {of}"
        return f'<div><b class="{kind}">{number}</b>{name}<br><span class="soft">{escaped(sure)}</span></div>'

    clean, worst, stronger = report["clean"], report["robust_to_all"], report["stronger_attack"]
    attacks = ", ".join(name for name in worst["over"] if name != "clean")
    robust = "Robust accuracy, unreliable" if report["unreliable"] else "Robust accuracy"
    tiles = []
    if stronger is not None:
        tiles.append(tile(f"≤ {stronger['accuracy']:.1%}", "Robust accuracy", stronger, f"under {stronger['attack']}"))
        robust = "Unreliable: by attacks that do not fit this model"
    if attacks:
        number, kind = f"{worst['accuracy_percent']}%", "bad" if report["unreliable"] else ""
        tiles.append(tile(number, robust, worst, f"under each of {attacks}", kind))
    tiles.append(tile(f"{percent(clean['right'], clean['images'])}%", "Clean accuracy", clean, "without an attack"))
    return f'<div class="headline">{"".join(tiles)}</div>'


def _normalisation(front: Mapping[str, Any]) -> str:
    if "mean" not in front:
        return front["where"]
    return f"mean {numbers(front['mean'])}, deviation {numbers(front['std'])}, {front['where']}"


def _data(receipt: Mapping[str, Any]) -> str:
    # reports of earlier versions name no folder
    return data_title(receipt["data"]["name"], receipt["data"].get("folder"))


def _top(receipt: Mapping[str, Any]) -> str:
    """What was measured, in a few lines."""
    weights, data, known = receipt["checkpoint"], receipt["data"], receipt["versions"] | {"commit": receipt["commit"]}
    kind = own_title(weights.get("architecture") or "not named")
    precision = receipt["precision"]["computes_in"]
    taken = "" if "taken" not in weights else f": {weights['taken']}"
    limited = "" if data["images"] == data["images_in_split"] else f", of {data['images_in_split']:,}"
    rows = {"run": "none: these weights came without a config.json"}
    if "run" in weights:
        rows = {
            "run": f"{weights['run']}, seed {weights['seed']}",
            "method": weights["method"],
            "gamma": f"{weights['gamma']:g}",
        }
    rows |= {
        "model": f"{kind}, {receipt['parameters']:,} parameters",
        "weights": f"{weights['name']} ({weights['file']}), SHA-256 {weights['sha256']}{taken}",
        "normalisation": weights.get("normalisation") or _normalisation(receipt["normalisation"]),
        "data": f"{_data(receipt)}, {data['split']} split, {data['images']:,} images{limited}",
        "ball": f"{receipt['norm']}, epsilon {receipt['epsilon']}",
        **({} if precision == "fp32" else {"precision": f"{precision}: all numbers are those of the model rounded so"}),
        "date": receipt["date"].replace("T", " "),
        "versions": ", ".join(f"{name} {version}" for name, version in known.items() if version is not None),
    }
    return facts(rows.items())


def _gates(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return ["<h2>Gates</h2>", "<p>Not run (--no-gates); so there are no curves of accuracy either.</p>"]
    rows = [
        {
            "gate": gate["name"],
            "result": "passed" if gate["passed"] else "failed",
            "measured": gate["measured"],
            "bound": gate["bound"],
            "a failure means": gate["failure_means"],
        }
        for gate in report["gates"]
    ]
    about = f'<p class="soft">Checks of the evaluation itself, on {report["images"]:,} images.</p>'
    return ["<h2>Gates</h2>", about, table(rows, sentences=True, colours={"passed": "good", "failed": "bad"})]


def _settings(attacks: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far PGD and its kin went; the section on attacks has all settings."""
    return [
        "{}: steps {steps}, step size {step_size}, random starts {restarts}".format(row["attack"], **row["parameters"])
        for row in attacks
        if "restarts" in row["parameters"]
    ]


def _classes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Accuracy of every class; many of them are folded up."""
    rows = class_table(found)
    if not rows:
        return []
    shown = table(rows)
    folded = f"<details><summary>all {len(rows)} classes</summary>{shown}</details>"
    return _titled("Classes", shown if len(rows) <= _MOST_CLASSES else folded)


def _card(picture: Picture) -> str:
    def answer(text: str) -> str:
        return escaped(text) if text == picture.label else f'<span class="bad">✗ {escaped(text)}</span>'

    def shown(png: bytes, name: str, text: str) -> str:
        alt = f"{name}: image of class {picture.label}"
        return f'<div>{image(png, alt)}<span class="soft">{name}</span><br>{text}</div>'

    parts = [
        shown(picture.clean, "clean", answer(picture.clean_answer)),
        shown(picture.attacked, "attacked", answer(picture.attacked_answer)),
        shown(picture.difference, "change", f"{picture.largest:.3g}"),
    ]
    return f"<figure><figcaption>class {escaped(picture.label)}</figcaption><div>{''.join(parts)}</div></figure>"


def _pictures(pictures: Mapping[str, Sequence[Picture]]) -> list[str]:
    if not pictures:
        return []
    about = (
        "Over three images their class; under each what the model says it is: red and with ✗ where that is wrong. The "
        "change is stretched around grey; its largest value is given, on pixels in [0, 1]."
    )
    parts = ["<h2>Images</h2>", f'<p class="soft">{about}</p>']
    for attack, cards in pictures.items():
        parts += [f"<h3>{escaped(attack)}</h3>", f'<div class="pictures">{"".join(map(_card, cards))}</div>']
    return parts


def _titled(heading: str, html: str) -> list[str]:
    return [f"<h2>{heading}</h2>", html]


def render_page(
    report: Mapping[str, Any],
    tables: Sequence[Sequence[Mapping[str, str]]],
    figures: Sequence[tuple[str, bytes]],
    pictures: Mapping[str, Sequence[Picture]] = MappingProxyType({}),
) -> str:
    """The page's text.

    Args:
        report: what evaluation.json holds.
        tables: the results as text; empty ones are left out.
        figures: captions and PNG files.
        pictures: attack -> images.
    """
    receipt = report["receipt"]
    subject = receipt["checkpoint"].get("method") or receipt["checkpoint"].get("architecture") or "a model"
    on = f"{_data(receipt)}, {receipt['norm']} epsilon {receipt['epsilon']}"
    title = f"Evaluation of {own_title(subject)}: {on}"
    sections = [_headline(report)]
    if report["doubts"]:
        doubts = listed([f"Unreliable: {doubt}" for doubt in report["doubts"]])
        sections.append(f'<div class="banner bad">{doubts}</div>')
    if report["notes"]:
        sections.append(listed(report["notes"]))
    about = (
        f"Right means {report['right_means']}. {INTERVAL}: {report['confidence_interval_means']}. largest: by how much "
        f"the attack changed an image at most, in {receipt['norm']}, on pixels in [0, 1]."
    )
    shown = (table(rows, "" if number else about) for number, rows in enumerate(tables) if rows)
    sections += [_top(receipt), "<h2>Accuracy</h2>", *shown, listed(_settings(report["attacks"]))]
    sections += _classes(report.get("per_class", ()))
    sections += _gates(report["gates"])
    if figures:
        drawn = "\n".join(figure(png, caption) for caption, png in figures)
        sections += _titled("Curves", f'<div class="figures">{drawn}</div>')
    sections += _pictures(pictures)
    details = {row["attack"]: {**row["parameters"], **row["details"]} for row in report["attacks"]}
    sections += _titled("Receipt", facts(_flat(receipt)))
    sections += _titled("Attacks", facts(_flat(details)))
    return document(title, sections, _STYLE)
