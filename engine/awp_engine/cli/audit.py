"""`awp audit concepts|weights|data ...`: looks into a trained model, and into the images that it learns from."""

import importlib
import sys
from collections.abc import Sequence

from awp_engine.cli.command_line import OneLineParser

# one module each, audit_NAME
AUDITS = {
    "concepts": "which concepts a class's answers lean on",
    "weights": "how small an edit of the weights can hide a backdoor",
    "data": "which training images do not belong to their class",
}


def main(argv: Sequence[str] | None = None, prog: str = "awp audit") -> None:
    """Runs one audit.

    Raises:
        SystemExit: 2 after one line on stderr, for an audit that there is not.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given and given[0] in AUDITS:
        importlib.import_module(f"awp_engine.cli.audit_{given[0]}").main(given[1:], prog=f"{prog} {given[0]}")
        return
    parser = OneLineParser(prog=prog, description="Audits a trained model, or the images that it learns from.")
    commands = parser.add_subparsers(dest="audit", required=True, metavar="|".join(AUDITS))
    for name, text in AUDITS.items():
        commands.add_parser(name, help=text)
    parser.parse_args(given)
