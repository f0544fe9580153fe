"""What recordings are cached under: the state of a data set of tonic, or the recordings themselves."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ulr_snn.data.entry import Raw
from ulr_snn.data.files import fingerprint

SINGLE = (type(None), bool, int, float, complex, str, bytes)


class _UnknownState(Exception):
    """An object may behave in a way that its values do not show."""


def of_tonic(dataset: Any) -> tuple[str, str] | None:
    """Returns hashes of a data set's class and state, and of its files; None unless both are known for sure.

    They are known if the class is tonic's, if its state is numbers, texts, arrays and objects of tonic, and if it
    has files. A class or a function from elsewhere may be edited without a trace in its name and its attributes.
    """
    if not hasattr(dataset, "location_on_system"):
        return None
    state = hashlib.blake2b(digest_size=16)
    texts: list[str] = []
    try:
        _add(state, dataset, texts)
    except (_UnknownState, RecursionError):
        return None
    files = {file for file in Path(dataset.location_on_system).absolute().rglob("*") if file.is_file()}
    files |= {Path(text).absolute() for text in texts if os.path.isfile(text)}
    return (state.hexdigest(), fingerprint(sorted(files))) if files else None


def _add(state: Any, value: Any, texts: list[str]) -> None:
    """Adds a value to a hash, and the texts in it to a list. Raises _UnknownState."""
    kind = type(value)
    if kind is str:
        texts.append(value)
    state.update(f"{kind.__module__}.{kind.__qualname__} ".encode())
    if kind in SINGLE or isinstance(value, np.generic | np.dtype | Path):
        state.update(f"{value!r}\n".encode())
    elif kind is np.ndarray and not value.dtype.hasobject:
        state.update(f"{value.dtype!r} {value.shape}\n".encode())
        state.update(np.ascontiguousarray(value).tobytes())
    elif kind in (list, tuple, dict):
        state.update(f"{len(value)}\n".encode())
        for part in value.items() if kind is dict else value:
            _add(state, part, texts)
    elif kind.__module__.partition(".")[0] == "tonic" and hasattr(value, "__dict__"):
        state.update(f"{getattr(sys.modules['tonic'], '__version__', None)}\n".encode())
        _add(state, vars(value), texts)
    else:
        raise _UnknownState


def of_contents(raw: Raw) -> str:
    """Returns a hash of all recordings, as they are cached."""
    state = hashlib.blake2b(f"{raw.sample_shape} {raw.classes}".encode(), digest_size=16)
    for split, chunks in raw.splits.items():
        for chunk in chunks:
            state.update(f"{split}\n".encode())
            for column in (chunk.time, chunk.feature, chunk.offsets, chunk.labels):
                state.update(f"{len(column)}\n".encode())
                state.update(np.ascontiguousarray(column, np.int64).data)
    return state.hexdigest()
