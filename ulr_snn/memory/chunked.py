"""A batch in chunks of time, so that what a training step keeps does not grow with the number of time steps.

A first pass leaves the outputs, what feedback is learned from, and the states of the layers at some time steps. From
there the chunks run once more, last to first, each with its graph, and the credit of a chunk goes on from what the next
one left: g of every layer at its first step. The second time the spikes are drawn again from the same noise. This gives
the gradient of the whole sequence.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ulr_snn.credit.formula import Entry, Formula, enter
from ulr_snn.credit.pooling import SpikePooling
from ulr_snn.credit.prediction import Prediction, RegressionBatch, means
from ulr_snn.kernels.stateless import run
from ulr_snn.memory.chunk import Chunk, ChunkSite, LayerStates
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

LEVELS = 6  # of groups of chunks, at most


class ChunkedRun:
    """One training step of one copy of a batch, in chunks of time.

    size: time steps of a chunk; states: number of time steps at which the states of the layers are kept, at most.
    """

    def __init__(
        self, bound: BoundModel, level: NoiseLevel, noise: Noise, batch: Batch, size: int, states: int
    ) -> None:
        self.model, self.layers, self.level, self.noise, self.batch = bound.model, bound.layers, level, noise, batch
        self.split = Split.of(bound.model)
        self.chunks = [range(batch.steps)[t : t + size] for t in range(0, batch.steps, size)]
        self.groups = fan_out(len(self.chunks), states)
        self.kept: list[tuple[list[range], LayerStates]] = []  # groups of chunks, and the layers' states before each
        self.later: dict[str, Tensor] = {}  # ∂L/∂J of each layer at the first step of the chunk that ran last
        self.membranes: list[Tensor | None] = [None] * len(self.split.readouts)  # ∂L/∂ of the readouts' there
        self.farthest: dict[str, Tensor] = {}  # see `ChunkSite`, of all chunks
        self.steps_run = 0  # by all chunks together

    # -- forwards --------------------------------------------------------------------------------------------

    def run(
        self, chunk: range, states: LayerStates, records: list[Record] | None = None, watched: bool = False
    ) -> tuple[Tensor, LayerStates, dict[str, ChunkSite], list[Tensor]]:
        """Front's outputs over a chunk, the states of the layers after it, the sites, and the readouts' last
        membranes."""
        self.steps_run += len(chunk)
        now = slice(chunk.start, chunk.stop)
        x = Events.of(self.batch.frames[now], self.batch.dtype)
        x = x if isinstance(x, Events) else x.clone()  # a module may change it in place
        lengths = self.batch.lengths
        lengths = None if lengths is None else (lengths - chunk.start).clamp(0, len(chunk))
        sites = {}
        for index, (name, _) in enumerate(self.layers):
            state = states.state(name, self.batch.dtype)
            sites[name] = ChunkSite(name, index, self.level, self.noise, chunk.start, state, records, watched)
        membranes = iter(states.membranes or [None] * len(self.split.readouts))
        last = []
        with bind_sites(self.model, list(sites.values()), lengths, self.layers), SpikePooling():
            for module in self.split.front:
                if isinstance(module, LeakyReadout):
                    x = module(x, next(membranes))
                    last.append(x[-1])
                else:
                    x = run(module, x)
        after = LayerStates.of(sites, [u.detach() for u in last])
        return x, after, sites, last

    @torch.no_grad()
    def forward(self, regressions: list[RegressionBatch]) -> tuple[Tensor, list[tuple[dict[str, Tensor], Tensor]]]:
        """Front's outputs [T, B, ...] of all chunks, or their average over time; and of every regression what spikes of
        the sources and currents deviate by, at its rows."""
        states, outputs, learned = LayerStates(), [], [RegressionRows(regression) for regression in regressions]
        for group in grouped(self.chunks, self.groups):
            self.kept.append((group, states))
            for chunk in group:
                x, states = self._first(chunk, states, learned)
                outputs = [outputs[0] + x] if outputs and self.share is not None else [*outputs, x]
        found = torch.cat(outputs)
        found = found if self.share is None else found[0].to(self.batch.dtype)
        return found, [(rows.spikes, rows.current) for rows in learned]

    def _first(self, chunk: range, states: LayerStates, learned: list["RegressionRows"]) -> tuple[Tensor, LayerStates]:
        """Of a chunk that runs for the first time: outputs, or what it adds to the average, and the states of the
        layers."""
        x, states, sites, _ = self.run(chunk, states, watched=True)
        for rows in learned:
            rows.see(chunk, sites, self.batch.valid)
        for name, site in sites.items():
            self.farthest[name] = torch.maximum(self.farthest.get(name, site.farthest), site.farthest)
        if self.share is not None:
            x = summed(x, self.share[chunk.start : chunk.stop])
        return x, states

    @property
    def share(self) -> Tensor | None:
        """[T, B]: of each time step in the average; None where there is none."""
        return None if self.split.average is None else self.batch.share

    def finished(self, seen: Tensor) -> Tensor:
        """The model's outputs, of what `forward` gave."""
        if self.split.average is not None:
            seen.requires_grad_()
        outputs = seen.clone() if self.split.back else seen  # what comes after may change it in place
        for module in self.split.back:
            outputs = module(outputs)
        check_outputs(outputs, self.batch.steps, self.batch.samples)
        return outputs

    # -- backwards -------------------------------------------------------------------------------------------

    def backward(self, error: Tensor, prediction: Prediction, formula: Formula, wanted: list[nn.Parameter]) -> None:
        """Adds the gradient of the batch's mean loss. error: ∂L/∂ what `forward` gave, of each sample's own loss."""
        while self.kept:
            for chunk, states in self._backwards(*self.kept.pop()):
                entries = list(self._entries(chunk, states, error, prediction, formula))
                enter([(entry.tensor, entry.gradient) for entry in entries], list(wanted))

    def _backwards(self, group: list[range], states: LayerStates) -> Iterator[tuple[range, LayerStates]]:
        """The chunks of a group, last to first, with the layers' states before each, which are found anew."""
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

    def _entries(
        self, chunk: range, states: LayerStates, error: Tensor, prediction: Prediction, formula: Formula
    ) -> Iterator[Entry]:
        """What a chunk adds to the gradient."""
        before = [None if u is None else u.requires_grad_() for u in states.membranes]
        records: list[Record] = []
        x, last = self.run(chunk, LayerStates(states.states, before), records)[::3]  # no more of it is to be kept
        now, share = slice(chunk.start, chunk.stop), self.share
        ends = [(x, error[now] if share is None else spread(error, share[now], x))]
        ends += [(u, g) for u, g in zip(last, self.membranes, strict=True) if g is not None]
        passed = Chunk(ends, records)
        credits = prediction.credit(passed, self.later)
        if before and before[0] is not None:
            tensors, gradients = zip(*[(end, g) for end, g in ends if end.requires_grad], strict=True)
            self.membranes = list(torch.autograd.grad(tensors, before, gradients, retain_graph=True))
        weight = x.new_full((x.shape[1],), 1 / x.shape[1])
        yield from formula.entries(passed, credits, weight)


class RegressionRows:
    """Collects what a regression is learned from over the chunks of a first pass: see `prediction.contrast`."""

    def __init__(self, regression: RegressionBatch) -> None:
        self.regression = regression
        self.spikes: dict[str, Tensor] = {}
        self.current: Tensor | None = None

    def see(self, chunk: range, sites: dict[str, ChunkSite], valid: Tensor) -> None:
        before, own = self.regression.before, valid[self.regression.before :]
        target = sites[self.regression.target]
        current = target.fed_back if before else target.current
        self.current = self._put(self.current, current, chunk.start - before, own)
        for name in self.regression.paths:
            self.spikes[name] = self._put(self.spikes.get(name), sites[name].spikes, chunk.start, own)

    def _put(self, found: Tensor | None, sequence: Tensor, first: int, valid: Tensor) -> Tensor:
        """Deviations of its rows (t, b) in a sequence [t, B, ...] from the mean over valid samples, at their places.
        first: row that the sequence begins with."""
        times, samples = self.regression.rows
        if found is None:
            found = sequence.new_empty(len(times), *sequence.shape[2:])
        steps = range(max(first, 0), min(first + len(sequence), len(valid)))
        here = (times >= steps.start) & (times < steps.stop)
        t, sequence = times[here] - steps.start, sequence[steps.start - first : steps.stop - first]
        found[here] = sequence[t, samples[here]] - means(sequence, valid[steps.start : steps.stop])[t, 0]
        return found


def fan_out(chunks: int, most: int) -> int:
    """Groups that each level of groups has, where a chunk is a group of one: so many that the states of the layers are
    kept before no more than `most` of them at a time (in every level but the one that goes on, which is in the next),
    in as few levels as that takes, since each is one more pass; or, if LEVELS do not do, the least that do."""
    groups = [max(2, math.ceil(round(chunks ** (1 / levels), 6))) for levels in range(1, LEVELS + 1)]
    kept = [levels * (each - 1) + 1 for levels, each in enumerate(groups, 1)]
    return groups[next((i for i, states in enumerate(kept) if states <= most), kept.index(min(kept)))]


def grouped(chunks: list[range], groups: int) -> list[list[range]]:
    """Chunks in so many groups, or fewer."""
    size = -(-len(chunks) // groups)
    return [chunks[i : i + size] for i in range(0, len(chunks), size)]


def summed(x: Tensor, share: Tensor) -> Tensor:
    """What x [t, B, ...] adds to an average over time in which each time step has that share [t, B]: [1, B, ...], in at
    least single precision, in which many such chunks can be added up."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if uniform(share):
        return x.sum(0, keepdim=True, dtype=wide) * share[0, 0]
    return (x * shaped(share.to(wide), x)).sum(0, keepdim=True)


def spread(error: Tensor, share: Tensor, x: Tensor) -> Tensor:
    """∂L/∂x [t, B, ...], of ∂L/∂ such an average [B, ...]."""
    if uniform(share):
        return (error * share[0, 0]).expand(x.shape)
    return error * shaped(share, x)


def uniform(share: Tensor) -> bool:
    """Whether it is one number, seen as many: then what is made of it need not be as large."""
    return not any(share.stride())
