"""What is wrong inside a network: layers that never fire or always do, and where values are first not finite."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Estimator
from ulr_snn.model.batch import Batch
from ulr_snn.model.call import copied, no_side_effects
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import mode_of
from ulr_snn.model.reading import read
from ulr_snn.runs.recording import ANY_TARGETS, bound_to_record, record, watching
from ulr_snn.sites.binding import bind_sites, never_fires, seeing_spikes, turn

REMEDIES = {
    "silent": "never fires: give it larger weights or a lower threshold",
    "saturated": "fires at every time step: give it smaller weights, a higher threshold, or a reset",
}


def quiet_layers(model: nn.Module, batch: Any, estimator: Estimator, interface: Interface) -> dict[str, list[str]]:
    """Returns the layers that never fire in a batch ("silent") and those that always do ("saturated"), with
    deterministic firing. batch: as from a loader. A kind without any layer has no key."""
    try:
        fired = firing(model, batch, estimator, interface)
    except UsageError:  # nothing spikes, and all noise is on weights
        return {}
    except Exception as error:  # of the model's own code in evaluation mode, which must not end a training
        warnings.warn(f"silent layers could not be looked for, because the model fails: {error}", stacklevel=2)
        return {}
    silent = [name for name, calls in fired.items() if calls and not any(some for some, _ in calls)]
    saturated = [name for name, calls in fired.items() if calls and all(every for _, every in calls)]
    return {kind: names for kind, names in (("silent", silent), ("saturated", saturated)) if names}


class Dropped(list[Tensor]):
    """A list that keeps nothing."""

    def append(self, _: Tensor) -> None:
        pass


@torch.no_grad()
def firing(
    model: nn.Module, batch: Any, estimator: Estimator, interface: Interface
) -> dict[str, list[tuple[bool, bool]]]:
    """Returns for each call of each layer that can fire whether some neuron fired, and whether all did."""
    device = next(model.parameters()).device
    x, targets, lengths = read(batch, model, device)
    given = Batch.of(model, x, targets, lengths, ANY_TARGETS, interface)
    fired: dict[str, list[tuple[bool, bool]]] = {}

    def see(name: str, _: nn.Module, spikes: Tensor) -> None:
        fired[name].append((bool((spikes != 0).any()), bool((spikes != 0).all())))

    with turn(model), mode_of(model, training=False), no_side_effects(model):
        bound = bound_to_record(model, given, estimator)
        seen = bound.adapted(given)
        sites = []
        for index, (name, neuron) in enumerate(bound.layers):
            sites.append(site := watching(name, index, neuron, seen.steps, seen.lengths))
            if site is not None:
                site.drives = Dropped()
        firing_layers = [(name, neuron) for name, neuron in bound.layers if not never_fires(neuron)]
        fired |= {name: [] for name, _ in firing_layers}
        running = bind_sites(bound.model, sites, seen.lengths, bound.layers)
        with seeing_spikes(firing_layers, see), running:
            bound.call.outputs(bound.model, copied(seen.x))
    return fired


def advice(quiet: dict[str, list[str]]) -> list[str]:
    """Returns a sentence for each layer of `quiet_layers`."""
    return [f"layer {name!r} {REMEDIES[kind]}" for kind, names in quiet.items() for name in names]


def first_not_finite(model: nn.Module, batch: Any, estimator: Estimator, interface: Interface) -> str:
    """Says where the values of a pass over a batch, without noise, are first not finite; empty if it cannot run."""
    try:
        layout, output = interface.layout, interface.output
        recording = record(model, batch, estimator=estimator, layout=layout, output=output)
    except UsageError:  # weights are not finite, which the error says
        return ""
    except Exception as error:  # of the model's own code
        return f"a pass without noise fails: {error}"
    values = [(f"the membranes of layer {n!r}", q.membranes) for n, q in recording.layers.items()]
    for name, value in [*values, ("the outputs", recording.outputs)]:
        place = None if value is None else place_of(value, recording.lengths)
        if place is not None:
            return f"{name} are the first that are not finite, at {place}"
    return "membranes and outputs of a pass without noise are finite, so look at the loss"


def place_of(values: Tensor, lengths: Tensor | None) -> str | None:
    """Returns the first time step and sample at which values [T, B, ...] or [B, ...] are not finite."""
    bad = ~torch.isfinite(values).flatten(min(2, values.ndim - 1)).all(-1)
    if bad.ndim == 2 and lengths is not None:
        bad &= torch.arange(len(bad))[:, None] < lengths  # membranes of padding are NaN
    if not bad.any():
        return None
    place = bad.nonzero()[0].tolist()
    return f"time step {place[0]} of sample {place[1]}" if len(place) == 2 else f"sample {place[0]}"
