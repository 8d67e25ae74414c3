"""`awp audit concepts RUN...`: which concepts the decision for a class leans on, of several models side by side."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import Defaults, add_shared, ending, prepare, say, whole_number
from awp_engine.cli.model_flags import PLACE, add_model, named_model, place, require_model, rest_of
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.audit.concepts.layers import Layer
    from awp_engine.evaluation.reports.files import Reported


def parse(argv: Sequence[str] | None = None, prog: str = "audit_concepts.py") -> argparse.Namespace:
    """The command line's settings.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr.
    """
    parser = OneLineParser(
        prog=prog,
        description="Tests which concepts, given as images, the decision for a class leans on (RCAV, Pfau et al., "
        "2021); several models stand side by side.",
        epilog="The same command goes on where it was interrupted. "
        "A test takes up to 1 + NULLS answers of the part above the layer for each image, and ends early where nothing "
        "can come of it.",
        formatter_class=Defaults,
        example="runs/a --layers conv1 --concepts striped=photos/x",
        common=("runs", "concepts", "layers", "list_layers", "classes", "step", "nulls", "images", "output"),
    )
    add = parser.add_argument
    add("runs", type=place, nargs="*", metavar="RUN_OR_CHECKPOINT", help=PLACE)
    text = "[NAME=]SOURCE: a folder, pairs:FOLDER, crops:CLASS, textures:CLASS, colours:CLASS, random, file.py:function"
    add("--concepts", nargs="+", default=[], metavar="C", help=text)
    add("--layers", nargs="+", default=[], metavar="NAME", help="layers to look into")
    add("--list-layers", action="store_true", help="print the layers of the model, and end")
    add("--classes", nargs="+", default=[], metavar="NAME", help="classes whose decision is looked at")
    add("--step", type=float, default=10.0, metavar="S", help="length of the step along a direction")
    add("--nulls", type=whole_number(), default=500, metavar="N", help="directions of shuffled labels")
    add("--concept-images", type=whole_number(), default=100, metavar="N", help="of a concept, and others, at most")
    add_shared(parser, "limit", default=100, dest="images", help="images of a class, evenly spread")
    add_shared(parser, "seed", default=0, help="of all that is drawn")
    add_model(parser)
    add_shared(parser, "batch-size", help="images, or directions, a batch")
    add_shared(parser, "device", "threads", "data.name", "data.root", "output")
    arguments = parser.parse_args(argv)
    require_model(parser, arguments, *arguments.runs)
    if arguments.list_layers and len(arguments.runs) > 1:
        parser.error("--list-layers: prints the layers of one model; give one")
    if not arguments.list_layers:
        for name in ("concepts", "layers", "classes"):
            if not getattr(arguments, name):
                parser.error(f"--{name}: expected at least one" + ", see --list-layers" * (name == "layers"))
    return arguments


def show_layers(layers: "Sequence[Layer]") -> None:
    """The layers as a table."""
    from awp_engine.observe.report import print_table

    rows = [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "shape of its output": "x".join(map(str, layer.shape)) if layer.shape else "-",
            "to be audited": f"no: {layer.problem}" if layer.problem else "yes",
        }
        for layer in layers
    ]
    print_table(rows)


def show(done: "Reported") -> None:
    """The results as a table, and what to conclude."""
    from awp_engine.audit.concepts.page import rows_of
    from awp_engine.audit.concepts.run import ENOUGH, verdict
    from awp_engine.observe.report import print_table, print_text

    tests = done.report["tests"]
    print_table(rows_of(tests), title=done.title)
    for model in dict.fromkeys(test["model"] for test in tests):
        own = [test for test in tests if test["model"] == model]
        found: dict[tuple[str, str, str], list[str]] = {}
        for test in own:
            found.setdefault((test["class"], test["concept"], verdict(test)), []).append(test["layer"])
        leans = {key: layers for key, layers in found.items() if key[2] in ("for it", "against it")}
        for (name, concept, word), layers in leans.items():
            effect = "more" if word == "for it" else "less"
            print_text(f"{model}: {name} leans on {concept}, which makes it {effect} probable (at {', '.join(layers)})")
        if not leans:
            print_text(f"{model}: leans on none of these concepts, as far as these images and layers tell")
    # that nobody can tell a concept without meaning from others is as it should be
    controls = {concept["name"] for concept in done.report["receipt"]["concepts"] if concept["source"] == "random"}
    shown = [test for test in tests if test["concept"] not in controls]
    weak = sorted({f"{test['concept']} at {test['layer']}" for test in shown if test["held_out_accuracy"] < ENOUGH})
    if weak:
        some = ", ".join(weak[:4]) + f" and {len(weak) - 4} more" * (len(weak) > 4)
        print_text(
            f"warning: less than {ENOUGH:.0%} of held-out images are told apart for {some}: there the direction may "
            "not be that of the concept; give more images, or another layer"
        )
    if blind := sorted({test["layer"] for test in shown if test["raised"] in (0, 1) and verdict(test) == "no"}):
        print_text(
            f"at {', '.join(blind)} all images moved the same way for a concept, and for shuffled labels as well: 'no' "
            "says little there; try an earlier layer or a smaller --step"
        )
    print_text("p is corrected for all tests of a model; raised: images whose probability of the class does not fall")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None, prog: str = "audit_concepts.py") -> None:
    """Parse, build, run, close."""
    given = vars(parse(argv, prog))
    prepare(given.pop("threads"))

    from awp_engine.audit.concepts.run import Settings, audit_concepts, layers_of
    from awp_engine.evaluation.asked import Asked
    from awp_engine.observe.bars import Bar

    places = given.pop("runs") or [None]
    only_layers = given.pop("list_layers")
    asks = {name: given.pop(name) for name in ("concepts", "layers", "classes")}
    chosen = {name: given.pop(name) for name in ("step", "nulls", "images", "concept_images", "seed")}
    with ending(
        prog,
        interrupted="interrupted; the same command goes on where it was",
        place=given["output"] or places[0],
    ):
        asked = [Asked(**named_model(given, place) | rest_of(given), seed=chosen["seed"]) for place in places]
        if only_layers:
            show_layers(layers_of(asked[0], say))
            return
        done = audit_concepts(asked, settings=Settings(**chosen), **asks, say=say, bar=Bar, tell=show)
    print(f"report in {printable(str(done.output))}")


if __name__ == "__main__":
    from awp_engine.cli import run

    run("audit_concepts", "python -m awp_engine.cli.audit_concepts")
