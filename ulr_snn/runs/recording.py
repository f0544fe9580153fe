"""Recordings: spikes and membranes of every layer in one pass over a batch, with deterministic firing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters import BlackBox, StepNeuron
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import checked
from ulr_snn.estimators.attachment import Attaches
from ulr_snn.estimators.base import Estimator
from ulr_snn.estimators.config import in_one_product
from ulr_snn.estimators.ulr import ULR, or_default
from ulr_snn.kernels.precision import widened
from ulr_snn.losses.named import Objective
from ulr_snn.model.activity import counting
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import check_outputs, copied, no_side_effects
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import Model, mode_of
from ulr_snn.model.neurons import SpikingNeuron, step_mask
from ulr_snn.model.reading import read
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import Layers, Site, bind_sites, call_name, check_layers, never_fires, seeing_spikes, turn
from ulr_snn.sites.records import InPlaceGuard
from ulr_snn.sites.step import StepSite

ANY_TARGETS = Objective([], [], frozenset(), None, {})  # no loss reads them


@dataclass(frozen=True)
class LayerRecording:
    """What a layer did in a pass.

    spikes: [T, B, ...], zero on padding. membranes: in the same shape, above the reset, before the reset of the step;
    NaN on padding, None for a module without a known membrane. threshold: of the membranes, broadcasts against [...].
    """

    spikes: Tensor
    membranes: Tensor | None = None
    threshold: Tensor | None = None


@dataclass(frozen=True)
class Recording:
    """What a model did with a batch, on the CPU.

    events: [T, B, ...], all inputs. layers: by name, in the order of the modules; a layer that ran twice has two
    entries, such as "lif" and "lif#2". outputs: [T, B, ...] or [B, ...]. lengths: number of time steps of each sample
    without padding, [B], or None. activity: [B] by (module, "spikes" or "operations"), see `ulr_snn.SpikeBudget`.
    """

    events: Tensor
    layers: Mapping[str, LayerRecording]
    outputs: Tensor
    lengths: Tensor | None = None
    activity: Mapping[tuple[str, str], Tensor] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> int:
        return self.events.shape[1]

    def steps(self, sample: int) -> int:
        """Returns the number of time steps of a sample, without padding."""
        return len(self.events) if self.lengths is None else int(self.lengths[sample])

    def rates(self) -> dict[str, Tensor]:
        """Returns the firing rate of each neuron by layer, [...]: spikes of all samples over their time steps."""
        return {name: layer.spikes.sum((0, 1)) / self.steps_of(layer) for name, layer in self.layers.items()}

    def steps_of(self, layer: LayerRecording) -> int:
        """Returns the number of time steps of all samples in a layer, which may have others than the events."""
        return len(layer.spikes) * self.samples if self.lengths is None else int(self.lengths.sum())

    def totals(self, device: torch.device) -> dict[str, Tensor]:
        """Returns the spikes and operations of all modules, [B] each, on a device."""
        found: dict[str, Tensor] = {}
        for (_, kind), counted in self.activity.items():
            found[kind] = found[kind] + counted if kind in found else counted
        return {kind: counted.to(device) for kind, counted in found.items()}

    def sample(self, index: int) -> "Recording":
        """Returns the recording of one sample, with B = 1 and without padding. Raises UsageError if there is none."""
        if not -self.samples <= index < self.samples:
            raise UsageError(f"sample={index} is not recorded; the batch has {self.samples} samples, from 0 on")
        index %= self.samples
        steps = slice(None if self.lengths is None else self.steps(index))
        rows = slice(index, index + 1)

        def of(sequence: Tensor) -> Tensor:
            return sequence[steps, rows].clone()

        layers = {}
        for name, layer in self.layers.items():
            membranes = None if layer.membranes is None else of(layer.membranes)
            layers[name] = replace(layer, spikes=of(layer.spikes), membranes=membranes)
        over_time = self.outputs.ndim > 2
        activity = {key: counted[rows] for key, counted in self.activity.items()}
        return Recording(of(self.events), layers, of(self.outputs) if over_time else self.outputs[rows], None, activity)


@checked
def record(
    model: Model,
    batch: Any,
    *,
    estimator: Estimator | None = None,
    time_first: bool = True,
    layout: str | None = None,
    output: Any = None,
) -> Recording:
    """Runs the model on a batch and records every layer. Firing is deterministic, and the model stays as it is.

    batch: as from a loader, or x alone. estimator: of the training, if its `noise` names modules that are no known
    neurons. time_first, layout, output: see `ulr_snn.train`. Raises UsageError for a model without spiking layers, and
    as `ulr_snn.evaluate`.
    """
    device = next(model.parameters(), torch.empty(0)).device
    x, targets, lengths = read(batch, model, device)
    given = Batch.of(model, x, targets, lengths, ANY_TARGETS, Interface.of(time_first, layout, output))
    with turn(model), mode_of(model, training=False), no_side_effects(model):
        bound = bound_to_record(model, given, estimator)
        return recorded(bound, bound.adapted(given))


def bound_to_record(model: nn.Module, batch: Batch, estimator: Estimator | None) -> BoundModel:
    """Binds the model's own code. Raises UsageError if nothing in it spikes."""
    estimator = or_default(estimator)
    config = estimator.config if isinstance(estimator, Attaches) else ULR()  # a peer has no such noise
    with torch.enable_grad():  # binding reads autograd graphs
        bound = BoundModel.of(model, batch, config.noise, own_code=True, plain=in_one_product(config))
    check_layers(model, bound.layers, notes=bound.notes)
    return bound


@torch.no_grad()
def recorded(bound: BoundModel, batch: Batch) -> Recording:
    """Runs a pass over a batch, as the bound model sees it, and records it."""
    model, layers, steps = bound.model, bound.layers, batch.steps
    sites = [watching(name, index, neuron, steps, batch.lengths) for index, (name, neuron) in enumerate(layers)]
    counts = ("spikes", "operations")
    with (
        outputs_of(layers) as fired,
        counting(model, layers, counts, steps, batch.samples, batch.lengths) as activity,
        bind_sites(model, sites, batch.lengths, layers),
    ):
        outputs = widened(bound.call.outputs(model, copied(batch.x)))
    check_outputs(outputs, steps, batch.samples)
    found: dict[str, LayerRecording] = {}
    for (name, neuron), site in zip(layers, sites, strict=True):
        found |= layer_recordings(name, neuron, site, fired[name], (steps, batch.samples), batch.lengths)
    names = {id(module): name or "model" for name, module in model.named_modules()}
    of_modules = {(names[module], kind): counted.cpu() for (kind, module), counted in activity.of_modules.items()}
    lengths = None if batch.lengths is None else batch.lengths.cpu()
    events = batch.frames.to(batch.dtype).cpu()
    return Recording(events, found, outputs.cpu(), lengths, of_modules)


@dataclass
class WatchedSequence(Site):
    """The site of a neuron of `ulr_snn` that fires deterministically and keeps the drives [T, B, ...] of its calls."""

    drives: list[Tensor] = field(default_factory=list)

    def fire_sequence(self, neuron: SpikingNeuron, current: Tensor) -> Tensor:
        spikes, drive, _ = neuron.fired(current)
        self.drives.append(drive)
        return spikes


@dataclass
class WatchedSteps(StepSite):
    """The site of another library's neuron that fires deterministically and keeps the drives of its calls."""

    drives: list[Tensor] = field(default_factory=list)

    def fire(self, drive: Tensor) -> Tensor:
        self.drives.append(drive)
        return super().fire(drive)

    def later(self) -> None:
        """No call passes `fire` by."""


def watching(
    name: str, index: int, neuron: SpikingNeuron | StepNeuron, steps: int, lengths: Tensor | None
) -> WatchedSequence | WatchedSteps | None:
    """Returns a site that keeps the drives of its calls; None for a module without a known membrane."""
    if isinstance(neuron, BlackBox):
        return None
    level, guard = NoiseLevel(Logistic()), InPlaceGuard(copies=False)
    if isinstance(neuron, SpikingNeuron):
        return WatchedSequence(name, index, level, None, [], lengths, None, guard)
    return WatchedSteps(name, index, level, None, [], neuron, steps, lengths, guard)


@contextmanager
def outputs_of(layers: Layers) -> Iterator[dict[str, list[Tensor]]]:
    """Within this context, collects the outputs of every call of each layer."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in layers}

    def keep(name: str, _: nn.Module, spikes: Tensor) -> None:
        found[name].append(spikes.detach().clone())  # the model may change it in place

    with seeing_spikes(layers, keep):
        yield found


def layer_recordings(
    name: str,
    neuron: SpikingNeuron | StepNeuron,
    site: WatchedSequence | WatchedSteps | None,
    fired: list[Tensor],
    size: tuple[int, int],
    lengths: Tensor | None,
) -> dict[str, LayerRecording]:
    """Returns what a layer did in a pass over so many steps and samples: one entry for each run of the sequence."""
    by_sequence = isinstance(neuron, SpikingNeuron) or neuron.by_sequence
    spikes = sequences(fired, by_sequence, size)
    drives: list[Tensor] = []
    if site is not None and not never_fires(neuron):
        of_layer = (len(spikes[0]), size[1]) if spikes else size
        drives = sequences(site.drives, isinstance(neuron, SpikingNeuron) or neuron.whole, of_layer)
    found = {}
    for call, each in enumerate(spikes):
        mask = None if lengths is None else step_mask(lengths, each)
        layer = LayerRecording((each if mask is None else each * mask).cpu())
        if call < len(drives) and drives[call].shape == each.shape:
            threshold = torch.as_tensor(neuron.threshold).detach().to(each)
            membranes = drives[call].detach() + threshold
            membranes = membranes if mask is None else membranes.masked_fill(mask == 0, torch.nan)
            layer = replace(layer, membranes=membranes.cpu(), threshold=threshold.cpu())
        found[call_name(name, call + 1)] = layer
    return found


def sequences(calls: list[Tensor], by_sequence: bool, size: tuple[int, int]) -> list[Tensor]:
    """Returns the tensors of a layer's calls as sequences [T, B, ...], one for each run over all steps. by_sequence: a
    call has [T, B, ...], else [B, ...]. Raises UsageError if they do not add up to whole sequences."""
    if not calls:
        return []
    joined = torch.cat(calls) if by_sequence else torch.stack(calls)
    if by_sequence and len(calls) == 1 and joined.shape[1:2] == size[1:]:
        return calls  # also over other time steps than the events'
    if len(joined) % size[0] or joined.shape[1:2] != size[1:]:
        raise UsageError(
            f"a layer gave {list(joined.shape)} in {size[0]} time steps of {size[1]} samples; a layer gives [B, ...] "
            "once a step, or [T, B, ...]"
        )
    return list(joined.split(size[0]))
