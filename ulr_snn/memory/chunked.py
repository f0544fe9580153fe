"""Recomputation in time chunks: the memory of a training step does not grow with the number of time steps.

The first pass keeps the outputs, the regression batches, and the layer states at some time steps. Then the chunks run
again, last to first, each with its graph and with spikes drawn from the same noise. The credit of a chunk continues
from g of every layer at the first step of the next chunk. The sum is the gradient of the whole sequence.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_snn.credit.formula import Contribution, Formula, enter
from ulr_snn.credit.map_learning import MapLearning, RegressionBatch, means
from ulr_snn.credit.pooling import SpikePooling
from ulr_snn.credit.prediction import Prediction
from ulr_snn.kernels import ranks
from ulr_snn.kernels.stateless import run
from ulr_snn.memory.chunk import Chunk, ChunkSite, Fired, LayerStates
from ulr_snn.memory.split import Split
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import check_outputs
from ulr_snn.model.events import Events
from ulr_snn.model.neurons import LeakyReadout, shaped
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Noise
from ulr_snn.sites.binding import bind_sites
from ulr_snn.sites.records import Record

LEVELS = 6  # largest depth of nested groups of chunks


class ChunkedRun:
    """One training step of one copy of a batch, in chunks of time.

    size: time steps of a chunk; states: largest number of time steps at which layer states are kept.
    """

    def __init__(
        self, bound: BoundModel, level: NoiseLevel, noise: Noise, batch: Batch, size: int, states: int
    ) -> None:
        self.model, self.layers, self.level, self.noise, self.batch = bound.model, bound.layers, level, noise, batch
        self.split = Split.of(bound.model)
        self.chunks = [range(batch.steps)[t : t + size] for t in range(0, batch.steps, size)]
        self.groups = fan_out(len(self.chunks), states)
        self.kept: list[tuple[list[range], LayerStates]] = []  # (group of chunks, states before it)
        self.later: dict[str, Tensor] = {}  # ∂L/∂J of each layer at the first step of the last chunk run
        self.membranes: list[Tensor | None] = [None] * len(self.split.readouts)  # ∂L/∂u of the readouts there
        self.farthest: dict[str, Tensor] = {}  # `Fired.farthest` over all chunks
        self.steps_run = 0  # time steps, over all chunks

    # -- forwards --------------------------------------------------------------------------------------------

    def run(
        self, chunk: range, states: LayerStates, records: list[Record] | None = None
    ) -> tuple[Tensor, LayerStates, dict[str, Fired], list[Tensor]]:
        """Runs a chunk: the outputs of `split.front`, the states after it, the activity, the readouts' membranes."""
        self.steps_run += len(chunk)
        now = slice(chunk.start, chunk.stop)
        x = Events.of(self.batch.frames[now], self.batch.dtype)
        x = x if isinstance(x, Events) else x.clone()  # a module may change it in place
        lengths = self.batch.lengths
        lengths = None if lengths is None else (lengths - chunk.start).clamp(0, len(chunk))
        fired: dict[str, Fired] = {}
        sites = [
            ChunkSite(
                name, i, self.level, self.noise, chunk.start, states.state(name, self.batch.dtype), fired, records
            )
            for i, (name, _) in enumerate(self.layers)
        ]
        membranes = iter(states.membranes or [None] * len(self.split.readouts))
        last = []
        with bind_sites(self.model, sites, lengths, self.layers), SpikePooling():
            for module in self.split.front:
                if isinstance(module, LeakyReadout):
                    x = module(x, next(membranes))
                    last.append(x[-1])
                else:
                    x = run(module, x)
        return x, LayerStates.of(fired, [u.detach() for u in last]), fired, last

    @torch.no_grad()
    def forward(self, regressions: list[RegressionBatch]) -> tuple[Tensor, list["RegressionRows"]]:
        """Returns the outputs [T, B, ...] of `split.front`, or their average over time, and the regression batches."""
        learned = [RegressionRows(regression) for regression in regressions]
        states, outputs = LayerStates(), list[Tensor]()
        for group in grouped(self.chunks, self.groups):
            self.kept.append((group, states))
            for chunk in group:
                x, states = self._first(chunk, states, learned)
                outputs = [outputs[0] + x] if outputs and self.share is not None else [*outputs, x]
        found = torch.cat(outputs)
        found = found if self.share is None else found[0].to(self.batch.dtype)
        return found, learned

    def _first(self, chunk: range, states: LayerStates, learned: list["RegressionRows"]) -> tuple[Tensor, LayerStates]:
        """Runs a chunk for the first time: its outputs or summand of the average, and the states after it."""
        x, states, fired, _ = self.run(chunk, states)
        for rows in learned:
            rows.see(chunk, fired, self.batch.valid)
        see_farthest(self.farthest, fired)
        if self.share is not None:
            x = summed(x, self.share[chunk.start : chunk.stop])
        return x, states

    @property
    def share(self) -> Tensor | None:
        """The weight [T, B] of each time step in the average; None if there is no average."""
        return None if self.split.average is None else self.batch.share

    def finished(self, seen: Tensor) -> Tensor:
        """Returns the model's outputs from the result of `forward`."""
        if self.split.average is not None:
            seen.requires_grad_()
        outputs = seen.clone() if self.split.back else seen  # a module may change it in place
        for module in self.split.back:
            outputs = module(outputs)
        check_outputs(outputs, self.batch.steps, self.batch.samples)
        return outputs

    # -- backwards -------------------------------------------------------------------------------------------

    def backward(self, error: Tensor, prediction: Prediction, formula: Formula, wanted: list[Tensor]) -> None:
        """Adds the gradient of the batch's mean loss. error: each sample's ∂L/∂ result of `forward`."""
        while self.kept:
            for chunk, states in self._backwards(*self.kept.pop()):
                contributions = list(self._contributions(chunk, states, error, prediction, formula))
                enter([(part.tensor, part.gradient) for part in contributions], wanted)

    def _backwards(self, group: list[range], states: LayerStates) -> Iterator[tuple[range, LayerStates]]:
        """Yields the chunks of a group, last to first, each with the recomputed states before it."""
        if len(group) == 1:
            yield group[0], states
            return
        kept = []
        for smaller in grouped(group, self.groups):
            kept.append((smaller, states))
            with torch.no_grad():
                for chunk in smaller if smaller[-1] != group[-1] else []:
                    states = self.run(chunk, states)[1]
        while kept:
            yield from self._backwards(*kept.pop())

    def _contributions(
        self, chunk: range, states: LayerStates, error: Tensor, prediction: Prediction, formula: Formula
    ) -> Iterator[Contribution]:
        """Yields the gradient contributions of a chunk."""
        before = [None if u is None else u.requires_grad_() for u in states.membranes]
        records: list[Record] = []
        x, last = self.run(chunk, LayerStates(states.states, before), records)[::3]  # the rest would take memory
        now, share = slice(chunk.start, chunk.stop), self.share
        ends = [(x, error[now] if share is None else spread(error, share[now], x))]
        ends += [(u, g) for u, g in zip(last, self.membranes, strict=True) if g is not None]
        passed = Chunk(ends, records)
        credits = prediction.credit(passed, self.later)
        carried = [u for u in before if u is not None]
        if carried:
            tensors, gradients = zip(*[(end, g) for end, g in ends if end.requires_grad], strict=True)
            self.membranes = list(torch.autograd.grad(tensors, carried, gradients, retain_graph=True))
        weight = x.new_full((x.shape[1],), 1 / x.shape[1])
        yield from formula.contributions(passed, credits, weight)


class RegressionRows:
    """Collects a regression batch over the chunks of a first pass; see `prediction.contrast`."""

    def __init__(self, regression: RegressionBatch) -> None:
        self.regression = regression
        self.spikes: dict[str, Tensor] = {}
        self.current: Tensor | None = None

    def see(self, chunk: range, fired: dict[str, Fired], valid: Tensor) -> None:
        """Adds the activity of a chunk. valid: [T, B], False on padding."""
        before, own = self.regression.before, valid[self.regression.before :]
        target = fired[self.regression.target]
        current = target.fed_back if before else target.current
        if current is not None:
            self.current = self._put(self.current, current, chunk.start - before, own)
        for name in self.regression.paths:
            self.spikes[name] = self._put(self.spikes.get(name), fired[name].spikes, chunk.start, own)

    def learn(self, maps: MapLearning) -> None:
        """Fits the regression to the collected batch, and drops the batch."""
        if self.current is not None:
            current, *spikes = ranks.sums(self.current, *self.spikes.values())  # each rank has put its own rows
            maps.learn(self.regression, dict(zip(self.spikes, spikes, strict=True)), current)
        self.spikes, self.current = {}, None

    def _put(self, found: Tensor | None, sequence: Tensor, first: int, valid: Tensor) -> Tensor:
        """Stores how rows (t, b) of a sequence [t, B, ...] deviate from the mean over valid samples. first: its t."""
        times, samples = self.regression.rows
        if found is None:
            found = sequence.new_zeros(len(times), *sequence.shape[2:])
        steps = range(max(first, 0), min(first + len(sequence), len(valid)))
        mine, places = ranks.own(samples)
        here = (times[mine] >= steps.start) & (times[mine] < steps.stop)
        t, sequence = times[mine][here] - steps.start, sequence[steps.start - first : steps.stop - first]
        now = sequence[t, places[here]] - means(sequence, valid[steps.start : steps.stop])[t, 0]
        found[torch.arange(len(times), device=times.device)[mine][here]] = now
        return found


def see_farthest(found: dict[str, Tensor], fired: dict[str, Fired]) -> None:
    """Keeps the largest distances of membranes to their thresholds, by site."""
    for name, layer in fired.items():
        here = layer.farthest
        found[name] = torch.maximum(found.get(name, here), here)


def fan_out(chunks: int, most: int) -> int:
    """Returns the number of groups into which each level of nesting splits its chunks.

    `levels` levels of that many groups keep levels (groups - 1) + 1 layer states, and each level is one more pass. So
    this is the number for the fewest levels that keep at most `most` states, or the fewest states if no level does.
    """
    groups = [max(2, math.ceil(round(chunks ** (1 / levels), 6))) for levels in range(1, LEVELS + 1)]
    kept = [levels * (each - 1) + 1 for levels, each in enumerate(groups, 1)]
    return groups[next((i for i, states in enumerate(kept) if states <= most), kept.index(min(kept)))]


def grouped(chunks: list[range], groups: int) -> list[list[range]]:
    """Splits chunks into at most `groups` groups."""
    size = -(-len(chunks) // groups)
    return [chunks[i : i + size] for i in range(0, len(chunks), size)]


def summed(x: Tensor, share: Tensor) -> Tensor:
    """Returns Σ_t share_t x_t [1, B, ...], at least in single precision, for x [t, B, ...] and share [t, B]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if uniform(share):
        return x.sum(0, keepdim=True, dtype=wide) * share[0, 0]
    return (x * shaped(share.to(wide), x)).sum(0, keepdim=True)


def spread(error: Tensor, share: Tensor, x: Tensor) -> Tensor:
    """Returns ∂L/∂x [t, B, ...] for the gradient [B, ...] of the average that `summed` adds to."""
    if uniform(share):
        return (error * share[0, 0]).expand(x.shape)
    return error * shaped(share, x)


def uniform(share: Tensor) -> bool:
    """True if the tensor is one expanded number, so that results can be expanded, too."""
    return not any(share.stride())
