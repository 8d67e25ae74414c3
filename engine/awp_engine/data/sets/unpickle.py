"""Reads the pickles of CIFAR's python version without trusting them.

A pickle is a program. This one may build lists, dictionaries, strings, numbers and plain arrays, and nothing else:
every name it asks for is answered from the short list below, whose members are defined here. Not even numpy's own
reconstruction is run, as that trusts its input.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from awp_engine.data.dataset import DataError


class _PickledDtype:
    """Stands for numpy.dtype; fixed-size integers only."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("u1", "i1", "i2", "i4", "i8", "u2", "u4", "u8"):
            raise pickle.UnpicklingError(f"refused: an array of {code!r} where integers were expected")
        self.code: str = code
        self.byte_order = "|"

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("refused: unknown byte order")
        self.byte_order = state[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.byte_order + self.code)


class _PickledArray:
    """Stands for numpy.ndarray; `array` is what was pickled."""

    array: NDArray[Any] = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: Any) -> None:
        *_, shape, dtype, fortran_order, data = state
        # Python 2 wrote the bytes as a string, which encoding="latin1" has mapped byte for byte.
        self._fill(
            data.encode("latin1") if isinstance(data, str) else data, dtype, shape, "F" if fortran_order else "C"
        )

    def _fill(self, data: Any, dtype: _PickledDtype, shape: Any, order: Any) -> None:
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)


def _reconstruct(*_: Any) -> _PickledArray:
    return _PickledArray()


def _frombuffer(data: Any, dtype: _PickledDtype, shape: Any, order: Any) -> _PickledArray:
    array = _PickledArray()
    array._fill(data, dtype, shape, order)
    return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"refused: encoding {encoding!r}")
    return text.encode("latin1")


# What numpy wrote before and after it renamed its core in version 2, and how Python 3 writes bytes for Python 2.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused: it asks for {module_name}.{global_name}") from None


def _require_small_memo(data: bytes) -> None:
    """A pickle numbers its values, and its reader keeps as many places as the highest number says."""
    for operation, place, _ in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and (place or 0) > len(data):
            raise pickle.UnpicklingError(f"refused: a value of number {place} in {len(data)} bytes")


def read_pickle(path: Path) -> dict[str, Any]:
    """Reads a pickled dictionary whose values are containers, numbers, strings and integer arrays.

    Raises:
        DataError: the file is damaged, is no dictionary, or asks for anything but integer arrays; none of it has been
            run then.
    """
    advice = "expected a file of CIFAR's python version; download it again"
    try:
        data = path.read_bytes()
        _require_small_memo(data)
        content = _Unpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # Damaged pickles raise nearly anything.
        raise DataError(
            f"{path} ({path.stat().st_size} bytes): not read, {' '.join(str(error).split())}; {advice}"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}; {advice}")
    return {
        key: value.array if isinstance(value, _PickledArray) else value
        for key, value in content.items()
        if isinstance(key, str)
    }
