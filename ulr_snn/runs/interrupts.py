"""Ctrl-C and SIGTERM during a training that can be saved: they are noted, and the training ends after its step."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from ulr_snn.errors import Interrupted, Terminated

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Notes SIGINT and SIGTERM inside its context, in the main thread. A second one ends the process as usual.

    watch: False leaves all signals as they are. Signals that the process ignores stay ignored.
    """

    def __init__(self, watch: bool) -> None:
        self.watch = watch and threading.current_thread() is threading.main_thread()
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS if self.watch else ():
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # None: a handler that is no Python function
                self._before[number] = before
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        signal.signal(number, self._before[self.asked])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        known = (signal.SIG_DFL, signal.default_int_handler)
        if self.asked is not None and self._before.get(self.asked, signal.SIG_DFL) not in known:
            signal.raise_signal(self.asked)  # for the handler that was there
        if self.asked is not None and error is None:  # the training was over before it could be interrupted
            raise ended_by(self.asked, f"{self.asked.name} came at the end of the training, which is saved")


def ended_by(number: signal.Signals, message: str) -> Interrupted | Terminated:
    """Returns the exception that ends a training after a signal."""
    return Terminated(message) if number == signal.SIGTERM else Interrupted(message)
