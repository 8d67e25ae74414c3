"""What the files of a run are called, and where its directory is. Imports no torch."""

from pathlib import Path

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
CHECKPOINTS = "checkpoints"
# of weights whose file does not say what model they are of
FOREIGN = (".pt", ".pth", ".bin", ".tar", ".ckpt", ".pkl")
# a checkpoint's files lie two levels below its run
_LEVELS_UP = 3


def run_dir_of(place: Path) -> Path | None:
    """The nearest directory with a run's config.json: of a path in it, that of a run, a checkpoint or weights."""
    place = place.resolve()
    nearest = [place, *place.parents][: _LEVELS_UP + 1]
    return next((directory for directory in nearest if (directory / CONFIG_FILE).is_file()), None)


def holds_model(place: Path) -> bool:
    """Whether a path that may be anything is a run, a checkpoint or a file of weights, by its name or what it holds."""
    if place.is_dir():
        return any((place / name).exists() for name in (CONFIG_FILE, MODEL_FILE, CHECKPOINTS))
    return place.suffix in (Path(MODEL_FILE).suffix, *FOREIGN)
