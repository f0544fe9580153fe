"""Training steps in parts of time, so that what a step keeps does not grow with the number of time steps.

A first pass leaves the outputs, what the feedback is learned from, and how the layers stand at some time steps. From
there the parts run once more, last to first, each with its graph, and the credit of a part goes on from what the next
one left: g of every layer at its first step. The second time the spikes are drawn again from the same noise. This gives
the gradient of the whole sequence.
"""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ulr_snn.credit.pooling import SpikePooling
from ulr_snn.credit.prediction import Lesson, Prediction, means
from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Batch
from ulr_snn.kernels.bits import pack_bits, unpack_bits
from ulr_snn.kernels.state import State
from ulr_snn.kernels.stateless import run
from ulr_snn.model.chain import Chain, EachStep, hooked
from ulr_snn.model.events import Events, Frames
from ulr_snn.model.forward import coupled_modules
from ulr_snn.model.neurons import LIF, Fold, LeakyReadout, RecurrentLIF, TimeAverage, shaped, step_mask
from ulr_snn.noise.level import Drawer, Noise, NoiseLevel
from ulr_snn.noise.secant import farthest
from ulr_snn.sites.binding import bind_sites, own_modules, record_of
from ulr_snn.sites.records import Record

TOGETHER = 1 << 16, 1 << 18  # spikes of a part, at least and at most, where little is to be kept
ROOMY = 1 << 21  # and where parts only have to keep within bounds: fewer of them, since each has a cost of its own
LEAST = 4  # time steps of a part, however many spikes that makes
STANDINGS = 16  # time steps at which it is kept how the layers stand, where little is to be kept
LEVELS = 6  # of groups of parts, at most
TIMELESS = (EachStep, nn.Linear, nn.Identity, nn.ReLU, nn.Sigmoid, nn.Tanh)


def chain(model: nn.Module) -> list[nn.Module]:
    """The modules that a model runs one after another."""
    if isinstance(model, Chain):
        return model.stages
    opens = type(model) is nn.Sequential and not hooked(model)
    return [part for module in model for part in chain(module)] if opens else [model]


@torch.no_grad()
def neurons(model: nn.Module, frames: Frames, dtype: torch.dtype) -> int:
    """Those of a sample in all layers. Raises UsageError for a model that has to see all time steps at once."""
    x, found = frames[:1, :2].to(dtype).clone(), 0  # a module may change it in place
    for module in Split.of(model).front:
        x = module(x)
        found += x[0, 0].numel() if isinstance(module, LIF) else 0
    return found


@dataclass(frozen=True)
class Split:
    """A model in front: modules that see each time step by itself, or carry a state that is known; average: over time,
    where there is one; back: what comes after it."""

    front: list[nn.Module]
    average: TimeAverage | None
    back: list[nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> "Split":
        """Raises UsageError for a model that has to see all time steps at once."""
        modules = chain(model)
        cut = next((i for i, module in enumerate(modules) if type(module) is TimeAverage), len(modules))
        if bad := next((module for module in modules[:cut] if not local_in_time(module)), None):
            raise UsageError(
                f"{type(bad).__name__} is not known to see each time step by itself, which parts of time need; use "
                "memory='auto', or nn.Sequential of Linear, Flatten, Fold and ulr_snn's neurons"
            )
        neurons = [module for module in modules[:cut] if isinstance(module, LIF)]
        if len(set(map(id, neurons))) < len(neurons):
            raise UsageError("parts of time need a neuron layer of its own at every place; use memory='auto'")
        last = max((i for i, module in enumerate(modules[:cut]) if isinstance(module, LIF)), default=0)
        if any(isinstance(module, LeakyReadout) for module in modules[:last]):
            raise UsageError("parts of time need a LeakyReadout to come after all spiking layers; use memory='auto'")
        return cls(modules[:cut], modules[cut] if cut < len(modules) else None, modules[cut + 1 :])

    @property
    def readouts(self) -> list[LeakyReadout]:
        return [module for module in self.front if isinstance(module, LeakyReadout)]


def local_in_time(module: nn.Module) -> bool:
    """Whether a module gives for a part of time what it gives there for the whole, from a state that is known."""
    if type(module) is nn.Flatten:
        return module.start_dim >= 2
    if type(module) is nn.Unflatten:
        return isinstance(module.dim, int) and module.dim >= 2
    if type(module) in (LIF, RecurrentLIF):
        return not any(q.requires_grad for q in (module.beta, module.threshold))
    if type(module) is LeakyReadout:
        return not module.beta.requires_grad
    if type(module) is Fold:
        return not coupled_modules(module) and not [m for m in own_modules(module) if m is not module]
    return type(module) in TIMELESS


@dataclass
class PartSite:
    """The firing site of a layer over a part of time from step `first` on. records: gets its record, if there is a
    list; watched: whether it keeps what it has seen. Afterwards
    `state` is that of its last step."""

    name: str
    index: int
    level: NoiseLevel
    noise: Noise
    first: int
    state: State | None
    records: list[Record] | None
    watched: bool = False
    before: Tensor | None = None  # spikes of the step before
    current: Tensor | None = None
    spikes: Tensor | None = None
    fed_back: Tensor | None = None
    farthest: Tensor | None = None  # distance of a membrane to its threshold

    def fire_sequence(self, neuron: LIF, current: Tensor) -> Tensor:
        scale = self.level.scale(self.name, neuron.threshold, None).detach()
        drawer = Drawer(self.noise, self.level.firing, self.index, len(current), scale, self.first)
        if self.state is None:
            self.state = State(*torch.zeros(2, *current.shape[1:], dtype=current.dtype, device=current.device))
        before = self.state.spikes.to(current.dtype)
        self.state = State(self.state.membrane.clone(), before.clone())
        with torch.no_grad():
            fired = neuron.fired(current, drawer, self.state)
        if self.watched:
            mask = None if neuron.lengths is None else step_mask(neuron.lengths, fired[1])
            self.farthest = farthest(fired[1], mask) * scale.mean()
            self.before, self.current, (self.spikes, _, self.fed_back) = before, current.detach(), fired
        if self.records is not None:
            record = record_of(self.name, neuron, current, scale, fired, self.level, before)
            self.records.append(replace(record, current=None, fed_back=None))
            record.spikes.requires_grad_()
        return fired[0]


@dataclass(frozen=True)
class Standing:
    """How the layers stand between two time steps. states: by site, their spikes as bits; membranes: of the readouts;
    empty at the start."""

    states: dict[str, State] = field(default_factory=dict)
    membranes: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def of(cls, sites: dict[str, PartSite], membranes: list[Tensor]) -> "Standing":
        """How sites stand that a part has run through."""
        states = {name: site.state for name, site in sites.items()}
        return cls({n: State(s.membrane, pack_bits(s.spikes.flatten(1))) for n, s in states.items()}, membranes)

    def state(self, name: str, dtype: torch.dtype) -> State | None:
        """Of a site, with spikes [B, ...] of that type; None at the start."""
        kept = self.states.get(name)
        if kept is None:
            return None
        spikes = unpack_bits(kept.spikes, kept.membrane[0].numel(), dtype)
        return State(kept.membrane, spikes.view(kept.membrane.shape))


@dataclass(frozen=True)
class Piece:
    """What a part of time leaves for the credit, as a `Pass` does."""

    ends: list[tuple[Tensor, Tensor]]
    records: list[Record]
    error: None = None


class Parts:
    """One training step of one copy of a batch, in parts of time.

    layers: of the model, by name; size: time steps of a part; standings: time steps at which it is kept how the layers
    stand, at most.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[tuple[str, LIF]],
        level: NoiseLevel,
        noise: Noise,
        batch: Batch,
        size: int,
        standings: int,
    ) -> None:
        self.model, self.layers, self.level, self.noise, self.batch = model, layers, level, noise, batch
        self.split = Split.of(model)
        self.parts = [range(batch.steps)[t : t + size] for t in range(0, batch.steps, size)]
        self.groups = fan_out(len(self.parts), standings)
        self.kept: list[tuple[list[range], Standing]] = []  # groups of parts, and how the layers stand before each
        self.farthest: dict[str, Tensor] = {}  # see `PartSite`, of all parts
        self.steps_run = 0  # by all parts together

    # -- forwards --------------------------------------------------------------------------------------------

    def run(
        self, part: range, standing: Standing, records: list[Record] | None = None, watched: bool = False
    ) -> tuple[Tensor, Standing, dict[str, PartSite], list[Tensor]]:
        """Front's outputs over a part, how the layers stand after it, the sites, and the readouts' last membranes."""
        self.steps_run += len(part)
        now = slice(part.start, part.stop)
        x = Events.of(self.batch.frames[now], self.batch.dtype)
        x = x if isinstance(x, Events) else x.clone()  # a module may change it in place
        lengths = self.batch.lengths
        lengths = None if lengths is None else (lengths - part.start).clamp(0, len(part))
        sites = {}
        for index, (name, _) in enumerate(self.layers):
            state = standing.state(name, self.batch.dtype)
            sites[name] = PartSite(name, index, self.level, self.noise, part.start, state, records, watched)
        membranes = iter(standing.membranes or [None] * len(self.split.readouts))
        last = []
        with bind_sites(self.model, list(sites.values()), lengths, self.layers), SpikePooling():
            for module in self.split.front:
                if isinstance(module, LeakyReadout):
                    x = module(x, next(membranes))
                    last.append(x[-1])
                else:
                    x = run(module, x)
        after = Standing.of(sites, [u.detach() for u in last])
        return x, after, sites, last

    @torch.no_grad()
    def forward(self, lessons: list[Lesson]) -> tuple[Tensor, list[tuple[dict[str, Tensor], Tensor]]]:
        """Front's outputs [T, B, ...] of all parts, or their average over time; and of every lesson what spikes of the
        sources and currents deviate by, at its rows."""
        standing, outputs, learned = Standing(), [], [Rows(lesson) for lesson in lessons]
        for group in grouped(self.parts, self.groups):
            self.kept.append((group, standing))
            for part in group:
                x, standing = self._first(part, standing, learned)
                outputs = [outputs[0] + x] if outputs and self.share is not None else [*outputs, x]
        found = torch.cat(outputs)
        found = found if self.share is None else found[0].to(self.batch.dtype)
        return found, [(rows.spikes, rows.current) for rows in learned]

    def _first(self, part: range, standing: Standing, learned: list["Rows"]) -> tuple[Tensor, Standing]:
        """Of a part that runs for the first time: outputs, or what it adds to the average, and how layers stand."""
        x, standing, sites, _ = self.run(part, standing, watched=True)
        for rows in learned:
            rows.see(part, sites, self.batch.valid)
        for name, site in sites.items():
            self.farthest[name] = torch.maximum(self.farthest.get(name, site.farthest), site.farthest)
        if self.share is not None:
            x = summed(x, self.share[part.start : part.stop])
        return x, standing

    @property
    def share(self) -> Tensor | None:
        """[T, B]: of each time step in the average; None where there is none."""
        return None if self.split.average is None else self.batch.share

    # -- backwards -------------------------------------------------------------------------------------------

    def backward(self, error: Tensor, prediction: Prediction, wanted: list[nn.Parameter]) -> None:
        """Adds the gradient of the batch's mean loss. error: ∂L/∂ what `forward` gave, of each sample's own loss."""
        self.later: dict[str, Tensor] = {}
        self.membranes: list[Tensor | None] = [None] * len(self.split.readouts)
        while self.kept:
            self._group(*self.kept.pop(), error, prediction, wanted)

    def _group(self, group: list[range], standing: Standing, *about: object) -> None:
        """The parts of a group, last to first; of one that has more than one, how layers stand is found first."""
        if len(group) == 1:
            self._part(group[0], standing, *about)
            return
        kept = []
        for smaller in grouped(group, self.groups):
            kept.append((smaller, standing))
            with torch.no_grad():
                for part in smaller if smaller[-1] != group[-1] else []:
                    standing = self.run(part, standing)[1]
        while kept:
            self._group(*kept.pop(), *about)

    def _part(
        self, part: range, standing: Standing, error: Tensor, prediction: Prediction, wanted: list[nn.Parameter]
    ) -> None:
        before = [None if u is None else u.requires_grad_() for u in standing.membranes]
        records: list[Record] = []
        x, last = self.run(part, Standing(standing.states, before), records)[::3]  # no more of it is to be kept
        now, share = slice(part.start, part.stop), self.share
        arriving = error[now] if share is None else spread(error, share[now], x)
        ends = [(x, arriving)]
        ends += [(u, g) for u, g in zip(last, self.membranes, strict=True) if g is not None]
        credits = prediction.credit(Piece(ends, records), self.later)
        if before and before[0] is not None:
            tensors, gradients = zip(*[(end, g) for end, g in ends if end.requires_grad], strict=True)
            self.membranes = list(torch.autograd.grad(tensors, before, gradients, retain_graph=True))
        weight = 1 / x.shape[1]
        entries = [
            (record.entry, credit.current.mul_(weight))
            for record, credit in zip(records, credits, strict=True)
            if record.x.requires_grad and credit.current is not None
        ]
        entries += [(end, g * weight) for end, g in ends if end.grad_fn is not None]
        del records, credits, ends, x, last  # the graph keeps what it needs
        if entries and wanted:
            torch.autograd.backward(*zip(*entries, strict=True), inputs=wanted)


class Rows:
    """Collects what a lesson is learned from over the parts of a first pass: see `prediction.contrast`."""

    def __init__(self, lesson: Lesson) -> None:
        self.lesson = lesson
        self.spikes: dict[str, Tensor] = {}
        self.current: Tensor | None = None

    def see(self, part: range, sites: dict[str, PartSite], valid: Tensor) -> None:
        before, own = self.lesson.before, valid[self.lesson.before :]
        target = sites[self.lesson.target]
        current = target.fed_back if before else target.current
        self.current = self._put(self.current, current, part.start - before, own)
        for name in self.lesson.paths:
            self.spikes[name] = self._put(self.spikes.get(name), sites[name].spikes, part.start, own)

    def _put(self, found: Tensor | None, sequence: Tensor, first: int, valid: Tensor) -> Tensor:
        """Deviations of its rows (t, b) in a sequence [t, B, ...] from the mean over valid samples, at their places.
        first: row that the sequence begins with."""
        times, samples = self.lesson.rows
        if found is None:
            found = sequence.new_empty(len(times), *sequence.shape[2:])
        steps = range(max(first, 0), min(first + len(sequence), len(valid)))
        here = (times >= steps.start) & (times < steps.stop)
        t, sequence = times[here] - steps.start, sequence[steps.start - first : steps.stop - first]
        found[here] = sequence[t, samples[here]] - means(sequence, valid[steps.start : steps.stop])[t, 0]
        return found


def fan_out(parts: int, most: int) -> int:
    """Groups that each level of groups has, where a part is a group of one: so many that before no more than `most` of
    them it is kept at a time how the layers stand (in every level but the one that goes on, which is in the next), in
    as few levels as that takes, since each is one more pass; or, if LEVELS do not do, the least that do."""
    groups = [max(2, math.ceil(round(parts ** (1 / levels), 6))) for levels in range(1, LEVELS + 1)]
    kept = [levels * (each - 1) + 1 for levels, each in enumerate(groups, 1)]
    return groups[next((i for i, standings in enumerate(kept) if standings <= most), kept.index(min(kept)))]


def grouped(parts: list[range], groups: int) -> list[list[range]]:
    """Parts in so many groups, or fewer."""
    size = -(-len(parts) // groups)
    return [parts[i : i + size] for i in range(0, len(parts), size)]


def summed(x: Tensor, share: Tensor) -> Tensor:
    """What x [t, B, ...] adds to an average over time in which each time step has that share [t, B]: [1, B, ...], in at
    least single precision, in which many such parts can be added up."""
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
