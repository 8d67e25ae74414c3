"""A run's epochs as a table of 80 columns: a head, and a row of aligned numbers an epoch."""

from collections.abc import Mapping

from awp_engine.files.text import duration

# a number's name in the metrics, its column, and the column's width
_COLUMNS = (
    ("loss", "loss", 7),
    ("lr", "lr", 8),
    ("train_pgd_accuracy", "train PGD", 9),
    ("held_out_clean_accuracy", "held-out clean", 14),
    ("held_out_pgd_accuracy", "held-out PGD", 12),
)
_TIME = 7


def caption(kept_by: str) -> str:
    """What stands above the table; `kept_by` is the accuracy, PGD or clean, that the epoch is chosen by."""
    return f"* = best held-out {kept_by} so far: these weights are kept"


def head(total_epochs: int) -> str:
    """The table's first line, for a run of so many epochs."""
    names = "  ".join(column.rjust(width) for _, column, width in _COLUMNS)
    return f"{'epoch'.rjust(_epoch_width(total_epochs))}  {names}    {'time'.rjust(_TIME)}"


def row(epoch: int, total_epochs: int, metrics: Mapping[str, float | int | None], *, best: bool) -> str:
    """An epoch's line; a dash for what was not measured.

    Args:
        epoch: from 1.
        total_epochs: of the run.
        metrics: `seconds` of the run so far, and what the columns show.
        best: whether its weights are the best so far.
    """
    where = f"{epoch}/{total_epochs}".rjust(_epoch_width(total_epochs))
    cells = "  ".join(_cell(name, metrics.get(name)).rjust(width) for name, _, width in _COLUMNS)
    seconds = metrics.get("seconds")
    time = "-" if seconds is None else duration(seconds)
    return f"{where}  {cells} {'*' if best else ' '}  {time.rjust(_TIME)}"


def _epoch_width(total_epochs: int) -> int:
    return max(len("epoch"), 2 * len(str(total_epochs)) + 1)


def _cell(name: str, value: float | int | None) -> str:
    if value is None:
        return "-"
    if name.endswith("accuracy"):
        return f"{value:.2%}"
    if name == "lr":
        return f"{value:.5f}" if value >= 1e-3 else f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1e}"
