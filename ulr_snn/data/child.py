"""A process that reads files for this one.

The libraries that read HDF5, MATLAB's format and AEDAT 4 crash, loop or take memory without end for some damaged files.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulr_snn.data import readers
from ulr_snn.data.files import damaged


@dataclass
class ReadingLimits:
    """What reading a file may take. seconds: processor time of a request, beyond a second for each MiB of the file."""

    seconds: float = 20.0


limits = ReadingLimits()


class Child:
    """A process that runs the functions of a program such as `readers`."""

    def __init__(self, program: str = readers.__file__) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", program],  # -P: modules beside the program shadow no others
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self.close = weakref.finalize(self, _end, self.process, os.getpid())

    def __call__(self, function: str, file: Path, *arguments: Any) -> Any:
        """Returns `function(file, *arguments)`. Raises UsageError, with the file's name, if it raises or crashes, or
        exceeds its processor time or memory."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            request = json.dumps([limits.seconds, function, os.fspath(file), *arguments])
            self.process.stdin.write(request.encode() + b"\n")
            self.process.stdin.flush()
            good, answer = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise damaged(file, f"cannot be read ({self._end_of_it()})") from None
        except BaseException:
            self.close()  # the answer to an interrupted request must not be taken for that to the next
            raise
        if not good:
            raise damaged(file, f"cannot be read ({answer})")
        return answer

    def _end_of_it(self) -> str:
        code = self.process.wait()
        self.close()
        if code == -getattr(signal, "SIGXCPU", 0):
            return f"its reader takes more than {limits.seconds:g} s of processor time"
        return f"its reader crashes with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def _end(process: "subprocess.Popen[bytes]", owner: int) -> None:
    if os.getpid() != owner:  # in a fork of the process that started it
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


_held = threading.local()


def read(function: str, file: Path, *arguments: Any) -> Any:
    """Returns the result of a function of `readers` in this thread's child process, which is started if there is none.

    Without a Python program to start, the function runs in this process. Raises UsageError as `Child` does.
    """
    if not sys.executable:
        try:
            return readers.FUNCTIONS[function](os.fspath(file), *arguments)
        except Exception as error:
            raise damaged(file, f"cannot be read ({type(error).__name__}: {error})") from error
    owner, child = getattr(_held, "child", (0, None))
    if child is None or owner != os.getpid() or not child.close.alive:
        child = Child()
        _held.child = os.getpid(), child
    return child(function, file, *arguments)


def close() -> None:
    """Ends this thread's child process."""
    _, child = _held.__dict__.pop("child", (0, None))
    if child is not None:
        child.close()
