"""Pictures of what speed.csv and memory.csv hold, the last rows of each case and method.

    python -m benchmarks.pictures

results/speed.png: time of a training step on the three nets, and as T grows; results/memory.png: memory as T grows.
"""

import argparse
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.speed import HERE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#56B4E9", "#999999")  # Okabe and Ito's
MARKERS = "os^Dvp*"
Rows = list[dict[str, str]]


def last(path: Path, *keys: str) -> Rows:
    """Of the rows that agree in these columns, the last one."""
    with path.open(newline="") as file:
        found = {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}
    return list(found.values())


def unique(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def style(methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each method, the same in every panel."""
    return {name: {"color": COLOURS[i % 7], "marker": MARKERS[i % 7]} for i, name in enumerate(methods)}


def bars(axes: "Axes", rows: Rows, looks: dict[str, dict[str, str]], title: str) -> None:
    """Times of one net, quartiles as whiskers."""
    for place, row in enumerate(rows):
        middle, low, high = (float(row[key]) for key in ("ms", "ms_low", "ms_high"))
        spread = [[middle - low], [high - middle]]
        axes.bar(place, middle, color=looks[row["method"]]["color"], yerr=spread, capsize=3, label=row["method"])
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_ylabel("ms a step")
    axes.spines[["top", "right"]].set_visible(False)


def lines(axes: "Axes", rows: Rows, looks: dict[str, dict[str, str]], value: str, label: str) -> None:
    """A value over T, both logarithmic."""
    for method in unique(rows, "method"):
        own = sorted((int(row["steps"]), float(row[value])) for row in rows if row["method"] == method)
        axes.plot(*zip(*own, strict=True), markersize=4, linewidth=1.2, label=method, **looks[method])
    axes.set(xscale="log", yscale="log", xlabel="time steps T", ylabel=label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure) -> None:
    """Below all panels, of the methods in any of them."""
    named = {n: h for axes in figure.axes for h, n in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def save_speed(rows: Rows, path: Path) -> None:
    """rows of speed.csv."""
    plain = [row for row in rows if "compile" not in row["method"]]
    looks = style(unique(plain, "method"))
    usual = {"dense": ("20", "64", "256"), "recurrent": ("50", "64", "256"), "conv": ("20", "64", "128")}
    swept = [row for row in plain if row["case"] == "dense" and (row["batch"], row["width"]) == ("64", "256")]
    grown = len(unique(swept, "steps")) > 1  # whether there is a sweep
    figure = Figure(figsize=(10 if grown else 7.5, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 + grown, width_ratios=(1, 1, 1, *[1.8] * grown))
    for axes, (case, size) in zip(panels, usual.items(), strict=False):
        own = [r for r in plain if r["case"] == case and (r["steps"], r["batch"], r["width"]) == size]
        bars(axes, own, looks, f"{case}, T={size[0]}")
    if grown:
        lines(panels[3], swept, looks, "ms", "ms a step, dense")
    legend(figure)
    figure.savefig(path)


def save_memory(rows: Rows, path: Path) -> None:
    """rows of memory.csv."""
    looks, cases = style(unique(rows, "method")), unique(rows, "case")
    figure = Figure(figsize=(4.6 * len(cases), 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        lines(axes, [row for row in rows if row["case"] == case], looks, "mb", "MB above weights and events")
        axes.set_title(case, fontsize=9)
    legend(figure)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    folder = parser.parse_args(arguments).results
    save_speed(last(folder / "speed.csv", "case", "method", "steps", "batch", "width"), folder / "speed.png")
    save_memory(last(folder / "memory.csv", "case", "method", "steps"), folder / "memory.png")


if __name__ == "__main__":
    main()
