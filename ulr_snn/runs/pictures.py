"""Pictures of what a network does: rasters, membranes, firing rates, events, confusion.

Functions return a matplotlib Figure, as in `raster(record(model, batch)).savefig("raster.png")`. They use no pyplot, so
that matplotlib's backend and settings stay as they are.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Count, FilePath, Natural, checked
from ulr_snn.runs.plots import new_figure
from ulr_snn.runs.recording import LayerRecording, Recording, record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "LayerRecording",
    "Recording",
    "animate_events",
    "confusion",
    "event_image",
    "membranes",
    "raster",
    "rates_histogram",
    "record",
]

BLUE, RED, GREY = "#0072B2", "#D55E00", "#888888"  # Okabe-Ito colours, which suit any colour vision
FAINTEST = 0.15  # opacity of the smallest number that is shown
COLOURS = (BLUE, RED, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WIDTH = 4.8  # of a figure, in inches: readable on a phone, and two side by side on a screen
DOTS = 3000  # more marks than this are stored as pixels in vector formats
NUMBERS = 20  # most classes whose counts are written into a confusion matrix


@checked
def raster(recording: Recording, sample: Natural = 0) -> "Figure":
    """Draws the spikes of a sample: its input, and every layer, over time. Values that are no counts, such as currents,
    are drawn as an image. Raises UsageError for a sample that was not recorded."""
    one = recording.sample(sample)
    rows = {"input": one.events, **{f"layer {name}": layer.spikes for name, layer in one.layers.items()}}
    sizes = [0.4 + 0.3 * len(str(sequence[0, 0].numel())) for sequence in rows.values()]  # in inches
    figure = new_figure(WIDTH, 0.5 + sum(sizes) + 0.3 * len(rows))
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, height, (name, sequence) in zip(panels, sizes, rows.items(), strict=True):
        spikes = sequence[:, 0]
        rate = f", rate {spikes.mean().item():.3f}" if counted(spikes) else ""
        _title(axes, f"{name}: {_number(spikes[0].numel(), 'channel' if name == 'input' else 'neuron')}{rate}")
        _draw_spikes(axes, spikes, height * 72)
    _time_axis(panels[-1], len(one.events))
    return figure


def counted(sequence: Tensor) -> bool:
    """Returns whether all values are 0, 1, 2, ..., as those of spikes and events are."""
    return bool(((sequence >= 0) & (sequence == sequence.round())).all())


def _draw_spikes(axes: "Axes", sequence: Tensor, points: float) -> None:
    """Draws [T, ...] over time in a panel of this height. Two polarities have two colours."""
    from matplotlib.ticker import MaxNLocator

    flat = sequence.flatten(1)
    neurons = flat.shape[1]
    if counted(flat):
        half = max(0.35, 1.1 * neurons / points)  # of a mark's height in rows, at least 2.2 points in all
        polarities = sequence.unbind(1) if sequence.ndim == 4 and sequence.shape[1] == 2 else (sequence,)
        for polarity, part in enumerate(polarities):
            steps, rows = part.flatten(1).nonzero().double().T
            rows = rows + polarity * neurons // 2
            colour = RED if len(polarities) == 2 and polarity == 0 else BLUE  # channel 0 holds OFF events
            x, y = (
                torch.stack([low, high, torch.full_like(low, torch.nan)], 1).flatten()  # one line with gaps
                for low, high in ((steps, steps), (rows - half, rows + half))
            )
            axes.plot(x, y, color=colour, linewidth=1.5, solid_capstyle="butt", rasterized=len(steps) > DOTS)
        if not flat.any():
            axes.text(0.5, 0.5, "no spikes", transform=axes.transAxes, ha="center", va="center", fontsize=8.5)
    else:
        low, high = float(flat.min()), float(flat.max())
        image = _shaded((flat.T - low) / ((high - low) or 1.0))
        axes.imshow(image, aspect="auto", origin="lower", interpolation="nearest")
    axes.set_ylim(-0.5 - 0.02 * neurons, neurons - 0.5 + 0.02 * neurons)
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    _plain(axes)


@checked
def membranes(recording: Recording, sample: Natural = 0, neurons: Count = 3) -> "Figure":
    """Draws membranes of a sample over time: in each layer, of the neurons with the most spikes. Dashed lines are
    thresholds, ticks above are spikes. Raises UsageError if no layer has a known membrane."""
    one = recording.sample(sample)
    layers = {name: layer for name, layer in one.layers.items() if layer.membranes is not None}
    if not layers:
        raise UsageError("no layer of this recording has a known membrane; black boxes have none")
    figure = new_figure(WIDTH, 0.6 + 1.35 * len(layers))
    panels = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, layer) in zip(panels, layers.items(), strict=True):
        assert layer.membranes is not None and layer.threshold is not None
        traces, spikes = layer.membranes[:, 0].flatten(1), layer.spikes[:, 0].flatten(1)
        thresholds = layer.threshold.expand(layer.spikes.shape[2:]).flatten()
        chosen = sorted(spikes.sum(0).argsort(descending=True, stable=True)[:neurons].tolist())
        top = max(traces[:, chosen].max().item(), thresholds[chosen].max().item())
        low = min(traces[:, chosen].min().item(), 0.0)
        for place, neuron in enumerate(chosen):
            colour = COLOURS[place % len(COLOURS)]
            point = "." if len(traces) == 1 else None
            axes.plot(traces[:, neuron], marker=point, color=colour, linewidth=1.1, label=f"neuron {neuron}")
            height = top + (top - low) * (0.08 + 0.07 * place)
            times = spikes[:, neuron].nonzero()[:, 0].tolist()
            axes.plot(times, [height] * len(times), linestyle="none", marker="|", markersize=4, color=colour)
        for threshold in sorted(set(thresholds[chosen].tolist())):
            axes.axhline(threshold, color=GREY, linewidth=0.9, linestyle="--")
        _title(axes, f"layer {name}: membranes")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7.5)
        _plain(axes)
    _time_axis(panels[-1], len(one.events))
    return figure


@checked
def rates_histogram(rates: Mapping[str, Tensor], bins: Count = 24) -> "Figure":
    """Draws how many neurons of each layer fire how often. rates: spikes a neuron and time step, [...] by layer, as of
    `Recording.rates`. Neurons that never fire have a bar of their own."""
    if not rates:
        raise UsageError("there are no rates to draw; give those of at least one layer")
    highest = max(float(rate.max()) for rate in rates.values()) or 1.0
    lowest = min(0.0, *(float(rate.min()) for rate in rates.values()))  # outputs of black boxes may be negative
    figure = new_figure(WIDTH, 0.6 + 1.15 * len(rates))
    panels = figure.subplots(len(rates), 1, sharex=True, squeeze=False)[:, 0]
    width = (highest - lowest) / bins
    for axes, (name, rate) in zip(panels, rates.items(), strict=True):
        flat = rate.flatten().double()
        silent = int((flat == 0).sum())
        heights, edges = numpy.histogram(flat[flat != 0].numpy(), bins, (lowest, highest))
        axes.bar(edges[:-1], heights, width, align="edge", color=BLUE, edgecolor="none")
        axes.bar(lowest - width, silent, width, align="edge", color=RED)
        mute = f", {silent} silent" if silent else ""
        _title(axes, f"layer {name}: {_number(flat.numel(), 'neuron')}, mean rate {flat.mean().item():.3f}{mute}")
        axes.set_ylabel("neurons", fontsize=8.5)
        _plain(axes)
    panels[-1].set_xlabel("firing rate (spikes a time step)", fontsize=8.5)
    return figure


@checked
def confusion(matrix: Tensor) -> "Figure":
    """Draws a confusion matrix [classes, classes] of counts: rows are labels, columns predictions. Shades are shares of
    the row."""
    matrix = torch.as_tensor(matrix)
    if matrix.ndim != 2 or len(matrix) != matrix.shape[1]:
        raise UsageError(f"confusion got a matrix of shape {tuple(matrix.shape)}; give counts [classes, classes]")
    from matplotlib.ticker import MaxNLocator

    classes = len(matrix)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    figure = new_figure(WIDTH, WIDTH)
    axes = figure.subplots()
    axes.imshow(_shaded(shares), interpolation="nearest")
    for label in range(classes) if classes <= NUMBERS else ():
        for predicted in matrix[label].nonzero()[:, 0].tolist():
            colour = "#FFFFFF" if shares[label, predicted] > 0.5 else "#000000"
            text = f"{int(matrix[label, predicted])}"
            axes.text(predicted, label, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("predicted class", fontsize=8.5)
    axes.set_ylabel("label", fontsize=8.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(NUMBERS if classes <= NUMBERS else 8, integer=True))
    axes.spines[:].set_color(GREY)
    axes.tick_params(length=0, labelsize=8)
    return figure


def event_image(events: Tensor) -> "Figure":
    """Draws the events of a sample [T, H, W] or [T, C, H, W], summed over time. Two channels, OFF and ON, have a panel
    each; others are summed."""
    frames = _frames(events)
    if frames.ndim == 2:
        raise UsageError(f"events of {frames.shape[1]} units are no image; give [T, H, W] or [T, C, H, W]")
    total = frames.sum(0)
    parts = {"OFF": RED, "ON": BLUE} if len(total) == 2 else {"": BLUE}
    total = total if len(total) == 2 else total.sum(0, keepdim=True)
    figure = _frame_figure(frames, len(total))
    for axes, part, (name, colour) in zip(
        figure.subplots(1, len(total), squeeze=False)[0], total, parts.items(), strict=True
    ):
        _draw_frame(axes, _shaded(part / (total.max() or 1), colour))
        _title(axes, name)
    return figure


@checked
def animate_events(events: Tensor, path: FilePath, fps: Count = 10) -> None:
    """Writes the events of a sample as a GIF animation, one time step a frame.

    events: [T, H, W] or [T, C, H, W], of two channels OFF in red and ON in blue; or [T, units], which fill a raster.
    fps: time steps a second. Raises UsageError for other shapes, and for a path that cannot be written.
    """
    from matplotlib.animation import PillowWriter

    frames = _frames(events)
    figure = new_figure(WIDTH, 3.0) if frames.ndim == 2 else _frame_figure(frames)
    axes, top = figure.subplots(), float(frames.flatten(2).sum(1).max()) if frames.ndim > 2 else 1.0
    writer = PillowWriter(fps=fps)
    try:
        with writer.saving(figure, os.fspath(path), dpi=100):
            for step, frame in enumerate(frames):
                axes.clear()
                if frames.ndim == 2:
                    shown = torch.arange(len(frames))[:, None] <= step
                    _draw_spikes(axes, frames * shown, 180)
                    _time_axis(axes, len(frames))
                else:
                    _draw_frame(axes, _blended(frame, top))
                _title(axes, f"time step {step + 1} of {len(frames)}")
                writer.grab_frame()
    except (OSError, ValueError) as error:  # Pillow knows formats by the ending of the name
        raise UsageError(
            f"'{os.fspath(path)}' cannot be written ({error}); name a .gif file in a folder that exists"
        ) from error


def _frames(events: Tensor) -> Tensor:
    """Returns the events of a sample as [T, C, H, W] or [T, units]. Raises UsageError for other shapes."""
    events = torch.as_tensor(events).detach().float().cpu()
    if events.ndim not in (2, 3, 4) or not events.numel():
        raise UsageError(
            f"events have shape {tuple(events.shape)}; give one sample, [T, H, W], [T, C, H, W] or [T, units]"
        )
    return events[:, None] if events.ndim == 3 else events


def _frame_figure(frames: Tensor, panels: int = 1) -> "Figure":
    """Returns an empty figure for pictures in the shape of a sensor."""
    height, width = frames.shape[-2:]
    side = WIDTH / max(panels, 1.6)
    return new_figure(side * panels, min(max(side * height / width, 1.0), 6.0) + 0.3)


def _draw_frame(axes: "Axes", image: Any) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color(GREY)


# --- parts of the pictures


def _rgb(colour: str) -> Any:
    from matplotlib.colors import to_rgb

    return numpy.array(to_rgb(colour))


def _shaded(shares: Tensor, colour: str = BLUE) -> Any:
    """Returns values from 0 to 1 as an image in a colour, [..., 4]. Opacity shows the value, and is visible above 0."""
    image = numpy.empty((*shares.shape, 4))
    image[..., :3], image[..., 3] = _rgb(colour), torch.where(shares > 0, FAINTEST + (1 - FAINTEST) * shares, 0.0)
    return image


def _blended(frame: Tensor, top: float) -> Any:
    """Returns the events [C, H, W] of a time step as an image [H, W, 4]. Of two channels, OFF is red and ON blue."""
    total = frame.sum(0)
    image = _shaded((total / (top or 1.0)).clamp(0, 1))
    if len(frame) == 2:
        off = (frame[0] / total.clamp(min=1e-9))[..., None].numpy()
        image[..., :3] = off * _rgb(RED) + (1 - off) * _rgb(BLUE)
    return image


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", fontsize=8.5, parse_math=False)


def _plain(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _time_axis(axes: "Axes", steps: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("time step", fontsize=8.5)
    axes.set_xlim(-0.5, steps - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
