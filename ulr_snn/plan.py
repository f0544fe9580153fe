"""plan: which parameter gets its gradient how, and what is wrong with a model, before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ulr_snn.credit.maps import Shared
from ulr_snn.credit.structure import Structure
from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Batch
from ulr_snn.estimators.ulr import ULR, default_copies, observed, or_default
from ulr_snn.kernels.dispatch import choice
from ulr_snn.kernels.sparse import DENSITY
from ulr_snn.losses.named import LossSpec, resolve
from ulr_snn.model.chain import Engine
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.events import Events
from ulr_snn.model.forward import Forward, as_frames, coupled_modules, keep_traces, runs_by_step
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sampling.adaptive import AdaptiveCopies
from ulr_snn.sites.binding import check_layers, own_modules
from ulr_snn.sites.flow import check_flow, frozen, with_flow
from ulr_snn.sites.records import CurrentRecord, Record
from ulr_snn.sites.variance import BY_SAMPLE, by_sample, of_firing, of_weights, own_weights
from ulr_snn.sites.weights import SOURCE, check_names


@dataclass(frozen=True)
class Plan:
    """What `plan` found; print it. rows: (parameter, shape, gradient); untrained: parameters that get none; engine:
    which code runs, and what a step keeps."""

    credit: str
    copies: int
    rows: list[tuple[str, str, str]]
    sites: list[tuple[str, str, str]]
    untrained: list[str]
    notes: list[str]
    engine: list[str]

    def __str__(self) -> str:
        lines = [
            f"credit {self.credit}, {self.copies} {'copy' if self.copies == 1 else 'copies'} of every sample a step"
        ]
        lines += ["", *_table(("site", "noise", "credit of its spikes"), self.sites)]
        lines += ["", *_table(("parameter", "shape", "gradient"), self.rows)]
        lines += [f"\nnot trained: {name}" for name in self.untrained]
        lines += ["", *self.engine]
        return "\n".join(lines + [f"\nnote: {note}" for note in self.notes])


def plan(
    model: nn.Module,
    example_batch: Sequence[Tensor],
    estimator: ULR | None = None,
    loss: LossSpec = "ce_count",
    time_first: bool = True,
) -> Plan:
    """Says how `train` would estimate each parameter's gradient, from one forward pass that leaves no trace.

    example_batch: (x, y) or (x, y, lengths), as the loader gives them. Raises UsageError for what `train` would
    refuse: no spiking layer, a loss that is not one value a sample, labels out of range, swapped axes, NaN.
    """
    estimator = or_default(estimator)
    device = next(model.parameters(), torch.empty(0)).device
    if not isinstance(example_batch, tuple | list) or len(example_batch) not in (2, 3):
        raise UsageError("plan takes an example batch (x, y) or (x, y, lengths), as the loader gives it")
    x, targets, lengths = (*(torch.as_tensor(item).to(device) for item in example_batch), None)[:3]
    frames, dtype = as_frames(x, targets, lengths, time_first, model)
    x = Events.of(frames, dtype)
    level = NoiseLevel(estimator.firing, progress=0.0)
    check_names(model, estimator.noise)
    check_flow(model, estimator.flow)
    estimator = replace(estimator, noise=with_flow(model, estimator.flow, estimator.noise))
    objective = resolve(loss)
    engine = Engine(model, estimator.noise)
    with frozen(model, estimator.flow):
        if engine.changes(frames, dtype, objective):
            model = engine.running
    with keep_traces(model), frozen(engine.model, estimator.flow):
        by_step = runs_by_step(model, x)
        left_alone: list[str] = []
        layers = find_layers(model, x, by_step, estimator.noise, left_alone)
        check_layers(model, layers, [*own_modules(model), *estimator.noise])
        forward = Forward(model, level, seed=0, step=0, antithetic=False, by_step=by_step, layers=layers)
        p = forward.run(x, targets, lengths, objective, [0])
        structure = observed(forward, p, estimator, x, targets, lengths, objective)
        check_layers(model, layers, structure.weights)
        check_flow(model, estimator.flow, layers)
    attached = estimator.attach(engine.model, loss, 0, time_first)
    attached.model, attached.structure = model, structure
    batch = Batch(frames, dtype, targets, lengths, objective)
    kept = "the whole sequence at once" + ", of one copy after another, each run twice" * attached.in_turn
    with frozen(engine.model, estimator.flow):
        if not attached.in_turn and attached.piecewise.few(batch) is not None:
            kept = attached.piecewise.kept(batch)
    rows = [
        (name, "x".join(map(str, q.shape)) or "1", _source(structure, structure.parameters.get(name)))
        for name, q in model.named_parameters()
    ]
    sites = [(r.site, _noise(estimator, r, level), _credit(structure, r.site)) for r in p.records]
    return Plan(
        structure.credit,
        max(default_copies(estimator, structure), 2 if structure.weights else 1),
        rows,
        sites,
        [f"{name}: {_why(structure)}" for name in structure.untrained],
        left_alone + _notes(model, structure, estimator) + _variances(model, structure, p.records),
        engine.line() + _engine(x, kept),
    )


def _source(structure: Structure, sources: list[str] | None) -> str:
    if sources is None:
        return "frozen (requires_grad is False, or by flow)"
    if not sources:
        return "none"
    if sources == [SOURCE]:
        return "weight noise: loss minus baseline, times the score"
    return " + ".join("exact, through the outputs" if s == "outputs" else f"credit at site {s}" for s in sources)


def _noise(estimator: ULR, record: Record, level: NoiseLevel) -> str:
    if isinstance(record, CurrentRecord):
        noise = record.neuron.noise
        spread = "of its spread in the first batch"
        calls = "all steps in one call" if record.neuron.whole else "a step a call"
        return f"gaussian on its current, {calls}, " + (
            f"scale {noise.scale:g}" if noise.scale is not None else f"{noise.start:.2f} -> {noise.end:.2f} {spread}"
        )
    law = type(estimator.firing).__name__.lower()
    if estimator.firing.scale is not None:
        return f"{law}, scale {estimator.firing.scale:g}"
    return f"{law}, {level.starts[record.site]:.2f} -> {estimator.firing.end:.2f} of the threshold"


def _credit(structure: Structure, site: str) -> str:
    if site in structure.quiet:
        return "none, and no noise: nothing that the loss reads depends on its spikes"
    if structure.credit == "global":
        return "loss minus baseline, times the score"
    parts = ["learned response"] * (site in structure.responding)
    parts += ["direct"] * (site in structure.direct)
    parts += [f"exact map to layer {target}" for target in structure.exact[site]]
    for target, path in structure.feeds[site].items():
        parts.append(f"learned from layer {target}" + ", one kernel for all positions" * isinstance(path, Shared))
    parts += ["its recurrent weights"] * (structure.products and site in structure.recurs)
    parts += ["learned from its recurrent current"] * (site in structure.recurrent)
    parts += ["learned from the outputs, resolved in time"] * (site in structure.from_outputs)
    text = " + ".join(parts)
    return text if structure.credit == "feedback" else f"loss times score, less {text} of other copies"


def _why(structure: Structure) -> str:
    if not structure.differentiable:
        return "the loss has no gradient, and no spiking layer comes after it; end the model in a spiking layer"
    return "nothing depends on it, or noise on it was ruled out; freeze it or use it"


def _notes(model: nn.Module, structure: Structure, estimator: ULR) -> list[str]:
    notes = []
    judging = structure.judging
    if isinstance(estimator.copies, AdaptiveCopies):
        each = "layer" if estimator.layerwise else "step"
        notes.append(
            f"copies follow the measured variance of the gradient, {estimator.copies.least} to {estimator.copies.most} "
            f"for each {each}"
        )
    if estimator.layerwise:
        notes.append("layerwise: a pass for all, and copies - 1 more for each layer, in which it alone has other draws")
    for site in judging.smoothed.values():
        notes.append(
            f"a loss without a gradient gets one by noise on the outputs, {site.draws} draws of each sample; they need "
            "no forward pass"
        )
    if judging.blind and structure.credit != "global":
        notes.append("of the mix, losses without a gradient act by the score of every spike: more copies help them")
    if coupled_modules(model):
        notes.append(
            "training batch norm or dropout: copies run one after another, and each loss counts for its own sample"
        )
    if structure.needs_pairs and structure.credit == "feedback" and estimator.copies is None:
        notes.append(
            f"every {estimator.refresh} steps, where something is due, an antithetic pair replaces the single pass, to "
            "refresh what is learned"
        )
    return notes


def _engine(x: Tensor, kept: str) -> list[str]:
    """Which code runs the scans over time, and what a step keeps."""
    kind, why = choice(x)
    by = {"cpu": "fused, by numba", "gpu": "fused, by Triton", "reference": "in plain torch"}[kind]
    found = [f"scans over time of ulr_snn's neurons: {by} ({why})"]
    if isinstance(x, Events):
        found.append("events are sparse: a linear layer or convolution costs in proportion to those that it reads")
    if kind == "cpu":
        found.append(f"spikes: a linear layer costs in proportion to them while at most {DENSITY:.0%} of neurons fire")
    return [*found, f"memory: {kept}"]


def _variances(model: nn.Module, structure: Structure, records: Sequence[Record]) -> list[str]:
    """Where scores are weighted by whole losses, variance goes by the length of the scores: the sites with the longest
    first, and what noise on their weights would give in their place."""
    if structure.credit == "feedback" and not structure.judging.blind:
        return []
    found = []
    for r in records:
        own = own_weights(model, r, structure.parameters)
        draws, weights = r.x[:, 0].numel(), sum(q.numel() for q in own.values())
        line = f"site {r.site}: {draws:,} draws of noise a sample, {weights:,} weights that it alone trains"
        expected = of_firing(r, own) if own else 0.0
        if own:
            line += f", expected variance {expected:.1e}"
        if by_sample(model, own):
            other = of_weights(BY_SAMPLE, own)
            line += f" ({other:.1e} with WeightNoise(per_sample=True) on these)"
        found.append((expected, line))
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
