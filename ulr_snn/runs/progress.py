"""Progress of a training on stderr: a bar, and a line for each epoch."""

import sys
from collections.abc import Iterable
from typing import Any


def say(text: str) -> None:
    """Writes a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def report(entry: dict[str, Any], epochs: int, metrics: Iterable[str] = ()) -> None:
    """Writes a line on an epoch to stderr. metrics: names of the user's metrics."""
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


def progress_bar(items: Iterable[Any], label: str, shown: bool) -> Any:
    """Returns the items under a progress bar."""
    from tqdm import tqdm

    return tqdm(items, label, leave=False, disable=None if shown else True)
