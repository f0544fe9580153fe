"""Stochastic forward passes: draw the spikes of some copies of a batch, keep what the estimator needs."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ulr_snn.adapters import BlackBox, copies_of_state
from ulr_snn.credit.pooling import SpikePooling
from ulr_snn.errors import UsageError
from ulr_snn.kernels.stateless import run
from ulr_snn.losses.evaluation import Judgement, Judging, judge
from ulr_snn.losses.named import Objective
from ulr_snn.model.activity import counting
from ulr_snn.model.event_list import EventList
from ulr_snn.model.events import Events, Frames
from ulr_snn.model.explained import explained
from ulr_snn.model.neurons import SpikingNeuron, output_mask
from ulr_snn.noise.level import Logistic, Noise, NoiseLevel
from ulr_snn.sites.binding import Layers, Replay, bind, bind_sites, own_modules, site_index, spiking_layers
from ulr_snn.sites.records import Handed, Links, Record
from ulr_snn.sites.weights import WeightSites


@dataclass
class Pass:
    """One forward pass of `copies` of a batch of B samples, stacked along the batch: row = copy * B + sample."""

    copies: list[int]
    outputs: Tensor  # [T, copies * B, ...] or [copies * B, ...], graph cut at every spike
    records: list[Record]  # of layers of other libraries in a linked pass `Seen` alone
    activity: dict[str, Tensor]  # what the objective needs of it, [copies * B], graph cut at every spike
    judgement: Judgement
    pools: bool = True  # whether there is max pooling in it, as far as was looked for
    changes: bool = True  # whether the model changes spikes in place, as far as was looked for
    linked: bool = False  # whether a gradient that arrives at spikes becomes their credit, where else the graph is cut

    @property
    def loss(self) -> Tensor:
        """[copies, B]."""
        return self.judgement.loss.view(len(self.copies), -1)

    def judged(self) -> "Pass":
        """Its outputs and losses alone."""
        return Pass(self.copies, self.outputs.detach(), [], {}, self.judgement)

    @property
    def blind(self) -> Tensor:
        """[copies, B]: the part of the loss that has no gradient in the outputs, nor is a cost of activity."""
        return self.judgement.blind_loss.view(len(self.copies), -1)

    @property
    def loss_in_time(self) -> Tensor:
        """[copies, B, T]: what each time step adds to the loss."""
        return self.judgement.steps.T.view(*self.loss.shape, -1)

    @property
    def error(self) -> Tensor | None:
        """∂loss/∂outputs in the shape of the outputs; None if the loss has no gradient."""
        return self.judgement.error

    @property
    def ends(self) -> list[tuple[Tensor, Tensor]]:
        """Where spikes reach the loss differentiably: tensors, and the loss's gradient with respect to them."""
        ends = [] if self.error is None else [(self.outputs, self.error)]
        return ends + [(activity, gradient) for activity, gradient, _ in self.judgement.costs]


def coupled_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that couple the rows of a batch or draw noise of their own: training batch norm (without running
    statistics always) and dropout.

    Copies must not share a batch with each other there, or they would distort its statistics.
    """
    return [
        m
        for m in model.modules()
        if (m.training and (isinstance(m, _BatchNorm | _DropoutNd) or theirs(m)))
        or (isinstance(m, _BatchNorm) and m.running_mean is None)
    ]


def theirs(module: nn.Module) -> bool:
    """Whether it is dropout of SpikingJelly, which is no subclass of torch's."""
    kind = type(module)
    return kind.__module__.startswith("spikingjelly") and "Dropout" in kind.__name__


class Forward:
    """Makes the passes of one step. antithetic: copies are pairs; points: or, if not 0, Sobol sets of so many.

    The first pass leaves the traces of an ordinary forward pass (running statistics, generator state); every further
    one sees the same dropout masks and leaves none.
    """

    def __init__(
        self,
        model: nn.Module,
        level: NoiseLevel,
        seed: int,
        step: int,
        antithetic: bool,
        by_step: bool = False,
        layers: Layers | None = None,
        weights: WeightSites | None = None,
        judging: Judging | None = None,
        points: int = 0,
    ) -> None:
        self.model, self.level, self.seed, self.step, self.antithetic = model, level, seed, step, antithetic
        self.by_step, self.layers = by_step, spiking_layers(model) if layers is None else layers
        self.weights, self.judging, self.points = weights, judging or Judging(), points
        self.links: Links | None = None  # of passes whose graph is not cut at spikes
        self.pools = True  # whether max pooling is looked for, which makes all of torch's functions slower
        self.changes = True  # whether the model may change spikes in place
        self.varied: str | None = None  # the only site at which copies differ, if there is but one
        self.extra_passes = 0  # so far, of a batch each: to set levels of noise, and to see what depends on what
        self._generator_state: tuple[Tensor, Tensor | None] | None = None

    def chunks(self, copies: list[int]) -> list[list[int]]:
        """Copies in one pass where that changes nothing; else one pass a copy."""
        apart = self.weights is not None or coupled_modules(self.model)
        return [[copy] for copy in copies] if apart else [copies] * bool(copies)

    def run(
        self,
        x: Tensor,
        targets: Tensor,
        lengths: Tensor | None,
        objective: Objective,
        copies: list[int],
    ) -> Pass:
        """One pass over x [T, B, ...] for these copies."""
        batch, k = x.shape[1], len(copies)
        rows = x.repeat(1, k, *[1] * (x.ndim - 2)) if k > 1 else x
        row_lengths = lengths.repeat(k) if lengths is not None else None
        noise = self.noise(batch, copies, x.device)

        def outputs_of() -> tuple[Tensor, list[Record], bool]:
            handed = Handed(copies=self.changes)
            with bind(self.model, self.level, noise, row_lengths, len(x), self.layers, self.links, handed) as records:
                outputs = model_outputs(self.model, rows.clone(), self.by_step)  # a model may change its input in place
            return outputs, records, handed.changed

        counted = counting(self.model, self.layers, objective.counts, len(x), batch * k, row_lengths)

        self.extra_passes += measure_levels(self.model, self.layers, self.level, outputs_of)
        disturbed = (
            nullcontext()
            if self.weights is None
            else self.weights.disturbed(self.model, self.step, *copies, len(x), batch)
        )
        pooling = SpikePooling() if self.pools else None
        with self._traceless(), disturbed, counted as activity, pooling or nullcontext():
            outputs, records, changes = outputs_of()
        check_outputs(outputs, x.shape[0], batch * k)
        judgement = self.judge(outputs, activity, targets, lengths, objective, copies)
        pools = pooling is not None and pooling.used
        return Pass(copies, outputs, records, activity, judgement, pools, changes, self.links is not None)

    def judge(
        self,
        outputs: Tensor,
        activity: dict[str, Tensor],
        targets: Tensor,
        lengths: Tensor | None,
        objective: Objective,
        copies: list[int],
    ) -> Judgement:
        """What the objective says about outputs and activity of a pass of these copies."""
        k = len(copies)
        mask = output_mask(lengths.repeat(k) if lengths is not None else None, outputs)
        noise = self.noise(len(targets), copies, outputs.device) if self.judging.smoothed else None
        repeated = targets.repeat(k, *[1] * (targets.ndim - 1))
        return judge(objective, self.judging, outputs, activity, repeated, mask, noise)

    def driven_by_events(self, x: Tensor, lengths: Tensor | None, p: Pass) -> set[str]:
        """Sites whose input current changes when other events x come in while all spikes stay as in the pass p of
        one copy. The other events are the same ones at other times, in other samples."""
        self.extra_passes += 1
        others = x.roll((1, 1), (0, 1))
        if torch.equal(others, x):
            return {r.site for r in p.records}  # nothing to tell by
        records, currents = {r.site: r for r in p.records}, {}
        sites = [Replay(name, records, currents, lengths) for name, _ in self.layers]
        with torch.no_grad(), self._traceless(), bind_sites(self.model, sites, lengths, self.layers):
            model_outputs(self.model, others, self.by_step)
        return {r.site for r in p.records if not torch.equal(currents[r.site], r.current)}

    def read_by_nobody(self, x: Tensor, lengths: Tensor | None, p: Pass, sites: Collection[str]) -> set[str]:
        """Those of these sites whose spikes neither the outputs nor the input current of another layer depend on: all
        of them are flipped in a replay of the pass p of one copy, in which all other spikes stay."""
        records, found = {r.site: r for r in p.records}, set()
        for site in sites:
            self.extra_passes += 1
            currents: dict[str, Tensor] = {}
            replays = [Replay(name, records, currents, lengths, flipped=name == site) for name, _ in self.layers]
            with torch.no_grad(), self._traceless(), bind_sites(self.model, replays, lengths, self.layers):
                outputs = model_outputs(self.model, x.clone(), self.by_step)
            others = (r for r in p.records if r.site != site)
            if torch.equal(outputs, p.outputs) and all(torch.equal(currents[r.site], r.current) for r in others):
                found.add(site)
        return found

    def noise(self, batch: int, copies: list[int], device: torch.device) -> Noise:
        """That of these copies of a batch of so many samples."""
        copy = torch.tensor(copies, dtype=torch.int32, device=device).repeat_interleave(batch)
        sample = torch.arange(batch, dtype=torch.int32, device=device).repeat(len(copies))
        varied = None if self.varied is None else site_index(self.layers, self.varied)
        if self.points:
            net = copy // self.points
            return Noise(self.seed, self.step, sample, net, point=(copy % self.points).long(), varied=varied)
        if not self.antithetic:
            return Noise(self.seed, self.step, sample, copy, varied=varied)
        return Noise(self.seed, self.step, sample, copy // 2, mirrored=copy % 2 == 1, varied=varied)

    @contextmanager
    def _traceless(self) -> Iterator[None]:
        """The first pass as it is; every further one with the first one's generator state, and without a trace."""
        if self._generator_state is None:
            self._generator_state = generator_state()
            yield
            return
        with keep_traces(self.model):
            set_generator_state(self._generator_state)
            yield


def measure_levels(model: nn.Module, layers: Layers, level: NoiseLevel, run: Callable[[], Any]) -> int:
    """Runs passes until the level of noise is known in all layers that run by themselves; returns how many it took."""
    names = [site for site, neuron in layers if not (isinstance(neuron, SpikingNeuron) or neuron.scans)]
    level.currents.update({site: neuron.noise for site, neuron in layers if isinstance(neuron, BlackBox)})
    passes = 0
    while unknown := [site for site in names if not (level.knows(site) or site in level.quiet)]:
        known = len(level.starts)
        with keep_traces(model), torch.no_grad():
            run()
        passes += 1
        if len(level.starts) == known:
            level.idle.update(unknown)  # they do not run
    return passes


def generator_state() -> tuple[Tensor, Tensor | None]:
    """State of torch's global generators, on the CPU and on the current CUDA device."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None


def set_generator_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


@contextmanager
def keep_traces(model: nn.Module) -> Iterator[None]:
    """Forward passes inside leave neither running statistics, nor what modules of the user's own classes keep, nor the
    generators changed."""
    norms = [m for m in coupled_modules(model) if isinstance(m, _BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    state = generator_state()
    try:
        for norm, buffers in zip(norms, kept, strict=True):
            # clones: an earlier pass's graph may still hold the originals
            norm._buffers.update({k: None if b is None else b.clone() for k, b in buffers.items()})
        with ExitStack() as stack:
            for module in own_modules(model):
                stack.enter_context(copies_of_state(module))
            yield
    finally:
        set_generator_state(state)
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def runs_by_step(model: nn.Module, x: Tensor) -> bool:
    """Whether the model takes one time step [B, ...] a call: its layers, which run so, do not fire len(x) times when it
    is called with a sequence x [T, B, ...], or it cannot be."""
    layers = spiking_layers(model)
    if layers and all(isinstance(neuron, SpikingNeuron) for _, neuron in layers):
        return False
    x = x[:, :2] if len(x) > 1 else x[:, :2].repeat(2, *[1] * (x.ndim - 1))  # a single step would tell nothing
    try:
        with keep_traces(model), torch.no_grad(), bind(model, NoiseLevel(Logistic()), steps=len(x)):
            check_outputs(model_outputs(model, x.clone()), len(x), x.shape[1])
        return False
    except Exception as whole:
        try:
            with keep_traces(model), torch.no_grad(), bind(model, NoiseLevel(Logistic()), steps=len(x)):
                model_outputs(model, x.clone(), by_step=True)
        except Exception:
            raise whole from None
        return True


def model_outputs(model: nn.Module, x: Tensor, by_step: bool = False) -> Tensor:
    """The model's output; of a tuple or list (as in `(spikes, membranes)`), its first item. Stacked over time where the
    model takes one time step a call (by_step)."""
    if by_step:
        return torch.stack(list(each_step(model, x)))
    with explained(model):
        return first_output(model, run(model, x))


def each_step(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Outputs of a model that takes one time step a call. Models of Norse return their state, and take it again."""
    carries, state = type(model).__module__.startswith("norse"), ()
    for step in x:
        outputs = model(step, *state)
        if carries and isinstance(outputs, tuple) and len(outputs) == 2:
            state = outputs[1:]
        yield first_output(model, outputs)


def first_output(model: nn.Module, outputs: Any) -> Tensor:
    """The tensor, or the first one of a tuple or list."""
    if isinstance(outputs, tuple | list) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor):
        raise UsageError(
            f"{type(model).__name__} returned {type(outputs).__name__}; return a tensor [T, B, C] or [B, C]"
        )
    return outputs


def check_outputs(outputs: Tensor, steps: int, rows: int) -> None:
    """Raises UsageError unless outputs are [T, B, ...] or [B, C]."""
    shape = tuple(outputs.shape)
    if (outputs.ndim >= 3 and shape[:2] != (steps, rows)) or (
        outputs.ndim < 3 and (outputs.ndim < 2 or shape[0] != rows)
    ):
        raise UsageError(
            f"the model returned shape {shape} for {steps} steps of a batch of {rows}; return [T, B, C] or [B, C]"
        )


def as_sequence(x: Tensor, targets: Tensor, lengths: Tensor | None, time_first: bool, model: nn.Module) -> Tensor:
    """x as a floating-point sequence [T, B, ...] in the model's dtype. Raises UsageError for what cannot be one."""
    return Events.of(*as_frames(x, targets, lengths, time_first, model))


def as_frames(
    x: Tensor, targets: Tensor, lengths: Tensor | None, time_first: bool, model: nn.Module
) -> tuple[Frames, torch.dtype]:
    """x as frames [T, B, ...] of the type they came in, or as a list of events if it is a sparse tensor, on the model's
    device; and the model's dtype. Raises UsageError for what cannot be a sequence."""
    if not isinstance(x, Tensor) or x.ndim < 3:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(
            f"events have shape {shape}; they must be a tensor [T, B, ...] (or [B, T, ...], time_first=False)"
        )
    if x.layout is torch.sparse_coo and x.dense_dim():
        x = x.to_dense()  # whose values are no single events
    x = x if time_first else x.transpose(0, 1)
    if 0 in x.shape[:2]:
        raise UsageError(f"events have shape {tuple(x.shape)}, without a step or a sample; leave empty batches out")
    if x.shape[1] != len(targets):
        swapped = x.shape[0] == len(targets)
        hint = (
            f"the time axis looks swapped, pass time_first={not time_first}" if swapped else "give one target a sample"
        )
        raise UsageError(
            f"events hold {x.shape[1]} samples of {x.shape[0]} steps, but there are {len(targets)} targets; {hint}"
        )
    if lengths is not None and (lengths.shape != targets.shape[:1] or lengths.min() < 1 or lengths.max() > len(x)):
        raise UsageError(f"lengths must be [B], each from 1 to the {len(x)} steps of the batch")
    reference = next((p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()), None)
    dtype = reference.dtype if reference is not None else torch.get_default_dtype()
    x = EventList.of(x) if x.layout is torch.sparse_coo else x
    values = x.values if isinstance(x, EventList) else x
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise UsageError("events contain NaN or infinite values; clean the recordings first")
    device = reference.device if reference is not None else x.device
    return x.to(device), dtype
