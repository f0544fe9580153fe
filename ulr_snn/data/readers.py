"""Readers of file formats whose libraries crash, loop or take memory without end for some damaged files.

`child.py` runs this file as a program. It imports nothing of the package, so that the process starts at once.
"""

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

SPARE = 2**28  # bytes beyond those that the process holds and 64 times the size of the file
PACE = 2**20  # bytes that are read in a second of processor time at least


def shd_labels(file: str) -> tuple[np.ndarray, int | None]:
    """Returns the labels, and the number of their names if the file has names."""
    with _h5(file) as content:
        count = content["labels"].size
        if count > os.path.getsize(file):
            raise ValueError(f"{count:,} labels are more than the file's bytes")
        return content["labels"][()], len(content["extra/keys"]) if "extra/keys" in content else None


def shd_largest_unit(file: str, step: int) -> int:
    """Returns the largest unit of all spikes. step: number of recordings in memory at a time."""
    with _h5(file) as content:
        units = content["spikes/units"]
        parts = (part for start in range(0, len(content["labels"]), step) for part in units[start : start + step])
        return max((int(part.max(initial=0)) for part in parts), default=0)


def shd_spikes(file: str, start: int, stop: int) -> tuple[tuple[np.ndarray, list[int]], ...]:
    """Returns `(values of all recordings, number in each)` of the times in microseconds and of the units."""
    with _h5(file) as content:
        times, units = (content[f"spikes/{name}"][start:stop] for name in ("times", "units"))
        seconds = np.concatenate(times)
        return (
            (np.multiply(seconds, 1e6, dtype=np.float64), [len(recording) for recording in times]),
            (np.concatenate(units), [len(recording) for recording in units]),
        )


@contextmanager
def _h5(file: str) -> Iterator[Any]:
    import h5py

    with h5py.File(file, "r") as content:
        yield content


def mat(file: str) -> tuple[np.ndarray, ...]:
    """Returns x, y, ts and pol of a MATLAB file."""
    from scipy.io import loadmat

    names = ["x", "y", "ts", "pol"]
    found = loadmat(file, appendmat=False, variable_names=names)
    return tuple(found[name] for name in names)


def aedat4(file: str) -> tuple[np.ndarray, ...]:
    """Returns x, y, time and polarity of the first stream of events, as tonic reads them."""
    import aedat

    decoder = aedat.Decoder(file)
    stream = min(key for key, stream in decoder.id_to_stream().items() if stream["type"] == "events")
    events = np.concatenate([packet["events"] for packet in decoder if packet["stream_id"] == stream])
    return tuple(events[name] for name in ("x", "y", "t", "on"))


# -- the program -------------------------------------------------------------------------------------------


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Answers requests on standard input, each a line `[seconds, function, file, ...]` in JSON, by pickles of
    `(True, result)` or `(False, error)` on standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin.buffer:
        seconds, function, file, *arguments = json.loads(line)
        try:
            _limit(os.path.getsize(file), seconds)
            answer = True, functions[function](file, *arguments)
        except BaseException as error:  # a panic in Rust is no Exception
            answer = False, f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


def _limit(size: int, seconds: float) -> None:
    """Limits memory and processor time for a file of `size` bytes, where the system can."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _lower(resource, resource.RLIMIT_CPU, int(used + seconds + size / PACE) + 1)
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        _lower(resource, resource.RLIMIT_AS, held + SPARE + 64 * size)


def _lower(resource: Any, kind: int, soft: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


FUNCTIONS = {function.__name__: function for function in (shd_labels, shd_largest_unit, shd_spikes, mat, aedat4)}

if __name__ == "__main__":
    serve(FUNCTIONS)
