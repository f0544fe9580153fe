"""Pictures of runs. As in `pictures.py`, matplotlib is used without pyplot, which has global state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ulr_snn.errors import UsageError, unwritable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colours suit any colour vision, and markers tell the curves apart in print.
_CURVES = (("train", "#0072B2", "o"), ("val", "#D55E00", "s"))

_SCALE = {"loss": 1.0, "accuracy": 100.0}


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG file. Raises UsageError for a path that cannot be written."""
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise unwritable(path, error) from error


def save_curves(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws loss and, if known, accuracy by epoch into a PNG file. Raises UsageError if there is no epoch.

    history: entries with `train_*` and `val_*`.
    """
    if not history:
        raise UsageError("there is no epoch to draw: train for at least one")
    drawn = quantities(history)
    figure = new_figure(4.5 * len(drawn), 3.6)
    for axes, name in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        draw_curve(axes, history, name)
    save(figure, path)


def quantities(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of all quantities that a history has as numbers: "loss", "accuracy" if known, metrics."""
    names = [key.removeprefix("train_") for key in history[-1] if key.startswith("train_")]
    return [name for name in names if any(isinstance(entry.get(f"train_{name}"), float) for entry in history)]


def draw_curve(axes: Axes, history: Sequence[Mapping[str, Any]], quantity: str) -> None:
    """Draws a quantity of training and validation by epoch. quantity: as "loss" for `train_loss` and `val_loss`."""
    from matplotlib.ticker import MaxNLocator

    for name, colour, marker in _CURVES:
        points = [(entry["epoch"], entry.get(f"{name}_{quantity}")) for entry in history]
        points = [(epoch, _SCALE.get(quantity, 1.0) * value) for epoch, value in points if value is not None]
        if points:
            label = "training" if name == "train" else "validation"
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%)" if quantity == "accuracy" else quantity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    epochs = [entry["epoch"] for entry in history]
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)  # matplotlib would zoom in on a single epoch
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)


def save_comparison(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws a comparison into a PNG file: accuracy (or loss) by epoch, step time, and peak memory if known."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in rows if row["history"]]
    if not rows:
        raise UsageError("there is nothing to draw: every training diverged")
    labels = [row["method"] + ("" if row["lr"] is None else f", lr {row['lr']:g}") for row in rows]
    colours = [colormaps["viridis"](0.9 * i / max(1, len(rows) - 1)) for i in range(len(rows))]
    quantity = "loss" if any(row["accuracy"] is None for row in rows) else "accuracy"
    bars = [("time a step (ms)", [1e3 * row["seconds_a_step"] for row in rows])]
    if all(row["peak_memory_bytes"] is not None for row in rows):
        bars.append(("peak memory (MiB)", [row["peak_memory_bytes"] / 2**20 for row in rows]))
    figure = new_figure(5.5 + 3.2 * len(bars), 3.6)
    curves, *others = figure.subplots(1, 1 + len(bars), width_ratios=[1.7] + [1] * len(bars))
    for row, label, colour, marker in zip(rows, labels, colours, "osD^v<>Xph" * len(rows), strict=False):
        values = [_SCALE[quantity] * entry[f"val_{quantity}"] for entry in row["history"]]
        curves.plot([entry["epoch"] for entry in row["history"]], values, color=colour, marker=marker, label=label)
    curves.set_xlabel("epoch")
    curves.set_ylabel("validation accuracy (%)" if quantity == "accuracy" else "validation loss")
    curves.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    curves.legend(frameon=False)
    for axes, (name, values) in zip(others, bars, strict=True):
        axes.barh(range(len(rows)), values, color=colours)
        axes.set_yticks(range(len(rows)), labels)
        axes.invert_yaxis()
        axes.set_xlabel(name)
    for axes in (curves, *others):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


ROUNDING = 1e-12  # a relative variance below is that of rounding: the estimator draws nothing


def save_diagnosis(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws a diagnosis into a PNG file: the cosines and relative variance of each layer and estimator."""
    from matplotlib import colormaps

    estimators, layers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("estimator", "layer"))
    values = {(row["estimator"], row["layer"]): row for row in rows}
    panels = {
        "cosine": "cosine of the mean (bias)",
        "step_cosine": "cosine of a step (bias and noise)",
        "variance": "relative variance of a step",
    }
    figure = new_figure(4 * len(panels), 1.6 + 0.16 * len(layers) * (len(estimators) + 1))
    height = 0.8 / len(estimators)
    for axes, (key, title) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        for i, estimator in enumerate(estimators):
            found = [values[estimator, layer][key] for layer in layers]
            places = [row + (i - (len(estimators) - 1) / 2) * height for row in range(len(layers))]
            drawn = [
                (place, value) for place, value in zip(places, found, strict=True) if value and abs(value) > ROUNDING
            ]
            colour = colormaps["viridis"](0.9 * i / max(1, len(estimators) - 1))
            axes.barh(*zip(*drawn, strict=True) if drawn else ((), ()), height, color=colour, label=estimator)
        axes.set_yticks(range(len(layers)), layers)
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "variance":
            axes.set_xscale("log")
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    save(figure, path)
