"""`write_report`: the report of a run, one HTML file that needs no other file and no network."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ulr_snn.errors import UsageError, unwritable
from ulr_snn.errors.arguments import Batches, FilePath, checked
from ulr_snn.estimators.base import Estimator
from ulr_snn.losses.named import LossSpec
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import Model, pick_device
from ulr_snn.runs import pictures
from ulr_snn.runs.checkpoints import newest
from ulr_snn.runs.directory import versions
from ulr_snn.runs.measure import Example, LayerActivity, Measurement, measure
from ulr_snn.runs.plots import draw_curve, new_figure, quantities

CONTENTS = {
    "summary": "Summary",
    "curves": "Training curves",
    "plan": "Plan",
    "activity": "Firing and operations",
    "predictions": "Predictions",
    "examples": "Examples",
    "settings": "Settings and versions",
}
# The colours of pictures as the style sheet of the page names them, in light and dark mode.
INKS = {
    "#0072b2": "var(--blue)",
    "#d55e00": "var(--red)",
    "#009e73": "var(--green)",
    "#cc79a7": "var(--pink)",
    "#e69f00": "var(--yellow)",
    "#56b4e9": "var(--sky)",
    "#000000": "currentColor",
}
MISSING = "\N{EN DASH}"
OPTIONS = ("model", "data_root", "batch_size", "lr", "seed", "credit", "copies", "epochs", "max_steps", "device")
UNKNOWN = (
    "The network was not run for this report, which is made of the files of the run alone. In Python, "
    "ulr_snn.runs.report.write_report(run_dir, model, loader) runs it on test data."
)


@dataclass(frozen=True)
class Run:
    """What the files of a run hold. metrics: empty for a run that has not finished. versions: of its last training."""

    name: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    epoch: int | None
    versions: dict[str, str]

    @property
    def finished(self) -> bool:
        return bool(self.metrics)


@checked
def write_report(
    run_dir: FilePath,
    model: Model | None = None,
    loader: Batches | None = None,
    *,
    out: FilePath | None = None,
    estimator: Estimator | None = None,
    loss: LossSpec = "ce_count",
    time_first: bool = True,
    layout: str | None = None,
    output: Any = None,
    device: str | torch.device = "auto",
) -> Path:
    """Writes the report of a run as one HTML file, and returns its path.

    model, loader: the run's model, whose weights become those of the newest checkpoint, and test data; without both,
    the report says what the files alone can tell. out: by default `run_dir/report.html`. estimator, loss, time_first,
    layout, output: as in the training. Raises UsageError for a directory without a run or with a damaged one.
    """
    if (model is None) != (loader is None):
        raise UsageError("write_report takes a model and a loader of test data together; give both or neither")
    run = read_run(run_dir, model)
    found = None
    if model is not None and loader is not None:
        interface = Interface.of(time_first, layout, output)
        found = measure(model, loader, estimator, loss, interface, pick_device(device))
    path = Path(run_dir) / "report.html" if out is None else Path(out)
    try:
        path.write_text(page(run, found), encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def read_run(run_dir: Any, model: nn.Module | None) -> Run:
    """Returns what the files of a run hold, and loads its newest checkpoint into the model. Raises UsageError for a
    missing or damaged run."""
    path = Path(run_dir)
    checkpoint = newest(path)
    if model is not None:
        checkpoint.load_weights(model)
    state, file = checkpoint.state, path / "metrics.json"
    try:
        metrics = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise UsageError(f"'{file}' is damaged ({error}); resume the run, which writes it anew") from error
    history = list(metrics.get("history", state.get("history", [])))
    return Run(path.resolve().name, checkpoint.config, metrics, history, state.get("epoch"), state.get("versions", {}))


def page(run: Run, found: Measurement | None) -> str:
    """Returns the HTML of a report. found: None if the network was not run."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.render(
        name=run.name,
        status="finished" if run.finished else "unfinished",
        subtitle=subtitle(run),
        contents=CONTENTS,
        summary=summary(run, found),
        notes=notes(run),
        curves=curves(run.history),
        epochs=epochs(run.history),
        unknown=UNKNOWN if found is None else None,
        **({} if found is None else measured(found)),
        command=command(run),
        settings=settings(run),
        versions=both_versions(run),
    )


# --- the parts of the page


def measured(found: Measurement) -> dict[str, Any]:
    """Returns the parts of the page that are known only if the network was run."""
    confusion = found.confusion
    return {
        "plan": found.plan,
        "samples": number(found.figures["samples"]),
        "layers": rows_of(found.layers),
        "totals": [number(found.figures.get(kind)) for kind in ("spikes", "operations")],
        "rates": svg(pictures.rates_histogram(found.rates), "Histograms of firing rates, a panel for each layer"),
        "confusion": None if confusion is None else svg(pictures.confusion(confusion), "Confusion matrix"),
        "classes": [] if confusion is None else classes(confusion.tolist()),
        "examples": [drawn(example) for example in found.examples],
    }


def subtitle(run: Run) -> str:
    """Returns what was trained on what, where it is known."""
    data, model = run.config.get("data"), run.config.get("model")
    what = [f"data {data}"] * (data is not None) + [f"model {model}" if model else "the reference network"] * bool(data)
    return ", ".join([*what, f"report of ulr_snn {versions()['ulr_snn']}"])


def notes(run: Run) -> list[str]:
    """Returns what a reader must know before the figures."""
    if run.finished:
        return []
    return [f"The run has not finished. This is its newest checkpoint, after {run.epoch or 0} whole epochs."]


def summary(run: Run, found: Measurement | None) -> dict[str, str]:
    """Returns the most important figures as text, by title."""
    metrics, last = run.metrics, run.history[-1] if run.history else {}
    accuracy, loss = metrics.get("test_accuracy", last.get("val_accuracy")), last.get("val_loss")
    if found is not None:
        accuracy, loss = found.figures["accuracy"], found.figures["loss"]
    seconds = metrics.get("seconds", sum(entry.get("seconds", 0.0) for entry in run.history))
    passes = metrics.get("forward_passes", sum(entry.get("forward_passes", 0) for entry in run.history))
    memory = metrics.get("peak_memory_bytes")
    figures = {
        "test accuracy": None if accuracy is None else f"{100 * accuracy:.2f} %",
        "test loss": None if loss is None else f"{loss:.4f}",
        "epochs": number(run.epoch if metrics.get("epochs") is None else metrics["epochs"]),
        "training time": f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min",
        "forward passes": number(passes),
        "peak memory": None if memory is None else f"{memory / 2**20:,.0f} MiB",
        "parameters": None if found is None else f"{found.parameters:,}",
        "spikes a sample": None if found is None else number(found.figures.get("spikes")),
        "operations a sample": None if found is None else number(found.figures.get("operations")),
    }
    return {title: value for title, value in figures.items() if value is not None}


def curves(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a drawing of each quantity by epoch."""
    found = {}
    for name in quantities(history) if history else ():
        figure = new_figure(pictures.WIDTH, 3.0)
        draw_curve(figure.subplots(), history, name)
        found[name] = svg(figure, f"{name} by epoch; the table below has the numbers")
    return found


def epochs(history: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns the history as a table, with its head."""
    names = list(dict.fromkeys(name for entry in history for name in entry))
    return [[name.replace("_", " ") for name in names], *([number(e.get(name)) for name in names] for e in history)]


def rows_of(layers: Sequence[LayerActivity]) -> list[dict[str, Any]]:
    """Returns the rows of the table of activity. Bars show values over the largest of their column."""
    most = {key: max((getattr(row, key) or 0 for row in layers), default=0) for key in ("rate", "spikes", "operations")}
    found = []
    for row in layers:
        bars = {}
        for key, top in most.items():
            value = getattr(row, key)
            text = MISSING if value is None else f"{value:.4f}" if key == "rate" else number(value)
            bars[key] = {"text": text, "share": f"{100 * (value or 0) / (top or 1):.1f}"}
        whole = {key: MISSING if (n := getattr(row, key)) is None else f"{n:,}" for key in ("neurons", "silent")}
        found.append({"name": row.name, "kind": row.kind, **whole, **bars})
    return found


def classes(confusion: Sequence[Sequence[int]]) -> list[list[str]]:
    """Returns a row of each class: samples, share that is recognised, and the class they are taken for most often."""
    found = []
    for label, row in enumerate(confusion):
        total, wrong = sum(row), [0 if label == place else count for place, count in enumerate(row)]
        worst = f"{wrong.index(max(wrong))} ({max(wrong)})" if any(wrong) else MISSING
        found.append([str(label), f"{total:,}", f"{row[label] / total:.1%}" if total else MISSING, worst])
    return found


def drawn(example: Example) -> dict[str, Any]:
    """Returns the title and the pictures of an example."""
    title, recording = f"Test sample {example.number}", example.recording
    if example.label is not None:
        right = "right" if example.label == example.predicted else "wrong"
        title += f": label {example.label}, predicted {example.predicted}, {right}"
    events, found = recording.events[:, 0], {}
    if events.ndim == 4:
        found["Input, summed over time"] = svg(pictures.event_image(events), "Input events, summed over time")
    found["Spikes"] = svg(pictures.raster(recording), f"Rasters of the input and of {len(recording.layers)} layers")
    if any(layer.membranes is not None for layer in recording.layers.values()):
        label = "Membranes of the neurons with the most spikes, with their thresholds"
        found["Membranes"] = svg(pictures.membranes(recording), label)
    return {"title": title, "pictures": found}


def command(run: Run) -> str | None:
    """Returns the command that starts the run, if it was started by the command line."""
    if run.config.get("data") is None:
        return None
    import shlex

    given = run.config | ({"device": None} if run.config.get("device") == "auto" else {})
    words = ["ulr-snn", "train", str(run.config["data"])]
    for name in OPTIONS:
        if given.get(name) is not None:
            words += ["--" + name.replace("_", "-"), str(given[name])]
    return shlex.join(words)


def settings(run: Run) -> list[tuple[str, str]]:
    """Returns the config of the run and the figures of its end, as text."""
    ends = {key: value for key, value in run.metrics.items() if key not in ("history", "versions")}
    given = {key: "default" if value is None else shown(value) for key, value in run.config.items()}
    found = given | {key: shown(value) for key, value in ends.items()}
    return [(key.replace("_", " "), text) for key, text in found.items()]


def both_versions(run: Run) -> list[tuple[str, str, str]]:
    """Returns the versions of packages in the run and in this report."""
    before, now = run.versions, versions()
    return [
        (name, str(before.get(name, MISSING)), str(now.get(name, MISSING))) for name in dict.fromkeys([*before, *now])
    ]


# --- text and drawings


def number(value: Any) -> str:
    """Returns a number as text, with four digits at least, and anything else as it is."""
    if not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def shown(value: Any) -> str:
    """Returns the value of a setting as text."""
    if value is None or isinstance(value, str):
        return value or MISSING
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def svg(figure: Any, label: str) -> Any:
    """Returns a figure as SVG for the page: its text is text, and its colours follow the page. label: says what it
    shows to those who cannot see it."""
    import matplotlib
    from markupsafe import Markup, escape

    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(False)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # no argument of savefig says so
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    content = text[text.index(">", text.index("<svg")) + 1 :]
    content = re.sub(
        r'(?<= )id="(figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend)_[^"]*"', "", content
    )
    content = re.sub("|".join(INKS), lambda colour: INKS[colour[0]], content)
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(label)}">{content}')
