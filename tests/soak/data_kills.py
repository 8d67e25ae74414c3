"""Kill runs that DALI feeds, in the middle of an epoch, and see which images come after.

python tests/soak/data_kills.py --kills 20 --ranks 1 2 --json data-kills.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kill_runs import RunError, differences, outcome

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from image_folders import write_images

LOGGED = Path(__file__).parent / "logged_train.py"
# no batch has fewer images than there are ranks: each would compute it whole
IMAGES, BATCH, EPOCHS = 60, 5, 3
_LONGEST = 180.0


def command(root: Path, run_dir: Path, ranks: int, loader: str) -> list[str]:
    """A run of a second or two; every step writes a checkpoint."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    flags = (
        f"digits --data.name folder --data.root {root} --data.loader {loader} --data.workers 1 --data.pad 1 "
        f"--data.flip --epochs {EPOCHS} --global-batch-size {BATCH} --model.width 2 --attack.steps 1 "
        "--evaluation.steps 1 --evaluation.batch-size 16 --checkpoint-steps 1 --deterministic --log-interval 1e-9 "
        f"--distributed.timeout 60 --run-dir {run_dir}"
    )
    return [*launcher, str(LOGGED), *flags.split()]


def lines(ids: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """What every rank wrote; a last line may be cut off."""
    found = []
    for rank in range(ranks):
        path = Path(f"{ids}.{rank}")
        whole = path.read_text().splitlines(keepends=True) if path.exists() else []
        found.append([json.loads(line) for line in whole if line.endswith("\n")])
    return found


def start(arguments: list[str], ids: Path, log: Path) -> subprocess.Popen[bytes]:
    """The run as a session of its own."""
    environment = os.environ | {"RUN_IDS": str(ids), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the end.

    Raises:
        RunError: it failed, or hangs.
    """
    try:
        code = process.wait(_LONGEST)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise RunError(f"{log}: hangs") from None
    if code:
        raise RunError(f"{log}: exit code {code}: {log.read_text()[-2000:]}")


def undisturbed(directory: Path, root: Path, ranks: int, loader: str = "dali") -> dict[str, Any]:
    """What a run leaves that nobody kills."""
    directory.mkdir()
    log = directory / "log"
    finish(start(command(root, directory / "run", ranks, loader), directory / "ids", log), log)
    return outcome(directory / "run")


def kill_once(
    directory: Path, root: Path, ranks: int, generator: random.Random, whole: dict[str, Any], loader: str = "dali"
) -> dict[str, Any]:
    """Kill a run of `ranks` at a random batch, go on, and compare; returns when it was.

    Raises:
        RunError: an image came twice or never in an epoch, or the run ended otherwise than `whole`.
    """
    directory.mkdir()
    arguments, log = command(root, directory / "run", ranks, loader), directory / "log"
    steps = -(-len_train(root) // BATCH)
    target, delay = generator.randrange(1, EPOCHS * steps - 4), generator.uniform(0, 0.01)
    process = start(arguments, directory / "before", log)
    deadline = time.monotonic() + _LONGEST
    while max(len(rank) for rank in lines(directory / "before", ranks)) < target:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"{log}: ended before batch {target}: {log.read_text()[-2000:]}")
        time.sleep(0.002)
    time.sleep(delay)
    # torchrun's ranks are sessions of their own
    found = subprocess.run(["pgrep", "-f", str(directory / "run")], capture_output=True, text=True, check=False)
    for number in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)
    process.wait()
    finish(start(arguments, directory / "after", log), log)
    before, after = (lines(directory / name, ranks) for name in ("before", "after"))
    # a kill that came after the last batch leaves nothing to go on with
    first = (after[0][0]["epoch"], after[0][0]["index"]) if after[0] else (EPOCHS, steps)
    for epoch in range(first[0], EPOCHS + 1):
        begin = first[1] if epoch == first[0] else 0
        parts = [line for rank in before for line in rank if line["epoch"] == epoch and line["index"] < begin]
        rest = [line for rank in after for line in rank if line["epoch"] == epoch]
        ids = sorted(number for line in parts + rest for number in line["ids"])
        if ids != sorted(trained(root)) or min((line["index"] for line in rest), default=steps) != begin:
            raise RunError(
                f"{directory}: epoch {epoch}, killed at batch {target}, gone on at {first}: not each image once"
            )
    if differs := differences(directory / "run", whole):
        raise RunError(f"{directory}: killed at batch {target}: other than undisturbed: {differs}")
    return {"ranks": ranks, "batch": target, "gone_on_at": first, "taken_before": len(before[0])}


def trained(root: Path) -> list[int]:
    """The ids of the images that the run trains on."""
    from awp_engine.data import load_dataset

    return load_dataset("folder", root=root, held_out_fraction=0.1, seed=0).train.ids.tolist()


def len_train(root: Path) -> int:
    """How many they are."""
    return len(trained(root))


def main() -> None:
    """Kill, and write down when."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--loader", choices=("dali", "torch"), default="dali")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    generator, found, wrong = random.Random(arguments.seed), [], []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        write_images(directory / "data", IMAGES, (10, 10))
        for ranks in arguments.ranks:
            whole = undisturbed(directory / f"whole-{ranks}", directory / "data", ranks, arguments.loader)
            for number in range(arguments.kills):
                place = directory / f"{ranks}-{number}"
                try:
                    found.append(kill_once(place, directory / "data", ranks, generator, whole, arguments.loader))
                    print(found[-1], flush=True)
                except RunError as error:
                    wrong.append(str(error))
                    print(error, flush=True)
    result = {"loader": arguments.loader, "kills": len(found) + len(wrong), "wrong": wrong, "moments": found}
    print(f"{len(found)} of {len(found) + len(wrong)} went on with exactly what was not seen")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
