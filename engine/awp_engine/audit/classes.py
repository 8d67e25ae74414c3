"""A class by its name, as users give it to an audit."""

from awp_engine.config.schema import did_you_mean
from awp_engine.data import Dataset
from awp_engine.evaluation.attacks.named import EvaluationError

_SHOWN = 10


def class_number(data: Dataset, text: str, flag: str) -> int:
    """The class of that name, or, if there is no such name, of that number.

    Raises:
        EvaluationError: there is none.
    """
    names = list(data.class_names)
    number = names.index(text) if text in names else int(text) if text.isdecimal() else len(names)
    if number >= len(names):
        known = ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
        hint = did_you_mean(text, names, f"expected one of {known}")
        raise EvaluationError(f"{flag}: {data.name} has no class {text[:80]!r}; {hint}")
    return number
