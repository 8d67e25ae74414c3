"""The command line: `awp COMMAND`; the scripts in engine/ call the same for train, evaluate and landscape.

One module a command: its `main` parses, builds, runs, and ends with one line for what is wrong. All but data
and checkpoint import no torch before a command line is known to be right.
"""

import importlib.util
import os
import sys

from awp_engine.distributed.signals import begin_command

COMMANDS = {
    "train": "train a robust classifier, or go on with a run",
    "evaluate": "measure how robust a trained model is",
    "certify": "certify a model's accuracy in L2 by randomised smoothing",
    "predict": "classify image files by a trained model",
    "compare": "show runs side by side: tables, learning curves, one page",
    "audit": "look for backdoors, telling concepts and images that do not belong",
    "landscape": "draw the loss around trained weights, and measure its flatness",
    "data": "download, scan, split and pack data sets; verify shards",
    "export": "write a trained model for the Hugging Face Hub, PyTorch or ONNX",
    "checkpoint": "verify, list or export the checkpoints of a run",
}
# what all commands need beside torch, of setup.py's extra "train"; the digits ask for scikit-learn, YAML for
# pyyaml, and a run does without tensorboard, each in a line of its own
NEEDED = {
    "numpy": "numpy",
    "safetensors": "safetensors",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "scipy": "scipy",
}


def missing_packages() -> list[str]:
    """What of `NEEDED` is not installed, as pip names it."""
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


def run(command: str, prog: str) -> None:
    """Run one command, with the arguments in `sys.argv`, and exit.

    Args:
        command: one of `COMMANDS`.
        prog: what messages call it.

    Raises:
        SystemExit: always, with the command's exit code; 2 where a package is missing.
    """
    begin_command(prog)
    # before torch loads OpenMP: threads that spin while they wait run ten times slower beside any other busy process
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if missing := missing_packages():
        from awp_engine.cli.command_line import fail

        fail(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}", prog=prog, once=True)
    raise SystemExit(importlib.import_module(f"awp_engine.cli.{command}").main(prog=prog))


def main(prog: str = "awp") -> None:
    """The command `awp`.

    Raises:
        SystemExit: always, with the command's exit code; 2 for a command that there is not.
    """
    given = sys.argv[1:2]
    if given and given[0] in COMMANDS:
        del sys.argv[1]
        run(given[0], f"{prog} {given[0]}")
    import difflib

    import awp_engine
    from awp_engine.cli.command_line import OneLineParser

    lines = "".join(f"  {name:<12}{text}\n" for name, text in COMMANDS.items())
    usage = f"{prog} COMMAND ...\n\ncommands:\n{lines}\n{prog} COMMAND --help lists its flags"
    parser = OneLineParser(prog=prog, usage=usage)
    parser.add_argument("--version", action="version", version=f"awp-engine {awp_engine.__version__}")
    if not given:
        parser.print_usage(sys.stderr)
        raise SystemExit(2)
    parser.parse_known_args(given)
    near = difflib.get_close_matches(given[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
    parser.error(f"{given[0]}: unknown command; {hint}")
