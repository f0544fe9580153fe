"""Progress of a training: bars in terminals and notebooks, plain lines in logs, and a line for each epoch."""

import importlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Any

from ulr_snn.runs.optim import loader_length
from ulr_snn.runs.quiet import REMEDIES, advice

MINUTE = 60.0
_importing = Lock()


def _tqdm() -> Any:
    """Returns the class of bars for this terminal or notebook."""
    with _importing:
        if "tqdm.auto" not in sys.modules:  # warnings are caught once, since other threads see it
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a notebook without ipywidgets, where lines are as good
                importlib.import_module("tqdm.auto")
    return sys.modules["tqdm.auto"].tqdm


def _in_notebook() -> bool:
    from tqdm.notebook import tqdm_notebook

    return issubclass(_tqdm(), tqdm_notebook)


def say(text: str) -> None:
    """Writes a line above a progress bar if there is one: to stderr, in notebooks to the cell's output."""
    _tqdm().write(text, file=sys.stdout if _in_notebook() else sys.stderr)


def report(entry: dict[str, Any], epochs: int, metrics: Iterable[str] = ()) -> None:
    """Writes a line on an epoch. metrics: names of the user's metrics."""
    figures = [f"loss {entry['train_loss']:.4g}"]
    if entry["train_accuracy"] is not None:
        figures.append(f"accuracy {entry['train_accuracy']:.2%}")
    if "val_loss" in entry:
        figures.append(f"validation loss {entry['val_loss']:.4g}")
    if entry.get("val_accuracy") is not None:
        figures.append(f"validation accuracy {entry['val_accuracy']:.2%}")
    for name in metrics:
        for kind, label in (("train", ""), ("val", "validation ")):
            if isinstance(value := entry.get(f"{kind}_{name}"), float):
                figures.append(f"{label}{name} {value:.4g}")
    say(f"epoch {entry['epoch']}/{epochs}: {', '.join(figures)}, {entry['seconds']:.1f} s")
    for sentence in advice({kind: entry[kind] for kind in REMEDIES if kind in entry}):
        say(f"note: {sentence}")


class Lines:
    """A file that takes what a progress bar draws, and writes it to stderr as lines."""

    def write(self, drawn: str) -> None:
        if line := drawn.strip():
            print(line, file=sys.stderr)


def _lazily(items: Iterable[Any]) -> Iterator[Any]:
    """Gives items. Unlike tqdm.auto, it begins with the first one, so that a loader draws its order once."""
    yield from items


def progress_bar(items: Iterable[Any], label: str, shown: bool, every: float = MINUTE) -> Any:
    """Returns the items under a progress bar, which in a log is a line now and then. every: seconds between lines."""
    options: dict[str, Any] = {"desc": label, "leave": False, "disable": not shown}
    in_log = shown and not _in_notebook() and not sys.stderr.isatty()
    if in_log:
        options |= {"file": Lines(), "mininterval": every, "miniters": 1, "delay": every}
    kind = type("Bar", (_tqdm(),), {"monitor_interval": 0})  # the monitor is a thread that outlives the training
    bar = kind(_lazily(items), total=loader_length(items), **options)
    if in_log:
        bar.bar_format = "{desc}, step {n_fmt}/{total_fmt}{postfix}, " + (
            "{remaining} left" if bar.total else "{elapsed}"
        )
    return bar
