"""`plan`: says how each parameter gets its gradient, and what is wrong with a model, without training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulr_snn.credit.kinds import Learned
from ulr_snn.credit.maps import Shared
from ulr_snn.credit.structure import LOSS, Structure
from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import checked
from ulr_snn.estimators.attachment import LearnedAttachment
from ulr_snn.estimators.base import Estimator
from ulr_snn.estimators.config import Config
from ulr_snn.estimators.observe import without_gradient
from ulr_snn.estimators.ulr import or_default
from ulr_snn.kernels.dispatch import choice, in_one_kernel
from ulr_snn.kernels.limits import limits
from ulr_snn.losses.named import LossSpec
from ulr_snn.memory.step import Step
from ulr_snn.model.call import coupled_modules, no_side_effects
from ulr_snn.model.events import Events
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import Model, check_tracked
from ulr_snn.model.neurons import LIF, SpikingNeuron
from ulr_snn.model.reading import read
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import check_layers, open_modules
from ulr_snn.sites.flow import frozen
from ulr_snn.sites.records import CurrentRecord, Record
from ulr_snn.sites.variance import BY_SAMPLE, by_sample, of_firing, of_weights, own_weights
from ulr_snn.sites.weights import SOURCE


@dataclass(frozen=True)
class Plan:
    """The result of `plan`, printed as text.

    rows: (parameter, shape, gradient); sites: (site, noise, credit); untrained: parameters without a gradient;
    engine: which code runs, and what a step keeps.
    """

    credit: str
    copies: int
    rows: list[tuple[str, str, str]]
    sites: list[tuple[str, str, str]]
    untrained: list[str]
    notes: list[str]
    engine: list[str]

    def __str__(self) -> str:
        copies = f"{self.copies} {'copy' if self.copies == 1 else 'copies'}"
        lines = [f"credit {self.credit}, {copies} of every sample a step"]
        lines += ["", *_table(("site", "noise", "credit of its spikes"), self.sites)]
        lines += ["", *_table(("parameter", "shape", "gradient"), self.rows)]
        lines += [f"\nnot trained: {name}" for name in self.untrained]
        lines += ["", *self.engine]
        return "\n".join(lines + [f"\nnote: {note}" for note in self.notes])


@checked
@torch.inference_mode(False)
def plan(
    model: Model,
    example_batch: Any,
    estimator: Estimator | None = None,
    loss: LossSpec = "ce_count",
    time_first: bool = True,
    layout: str | None = None,
    output: Any = None,
) -> Plan:
    """Says how `train` would estimate each parameter's gradient, by one forward pass without side effects.

    example_batch: as from the loader. time_first, layout, output: see `train`. Raises UsageError wherever `train` does:
    no spiking layer, a loss that is not one value a sample, labels out of range, swapped axes, NaN.
    """
    check_tracked(model.parameters())
    device = next(model.parameters(), torch.empty(0)).device
    x, targets, lengths = read(example_batch, model, device)
    interface = Interface.of(time_first, layout, output)
    attached = or_default(estimator).attach(model, loss, 0, interface, progress=0.0)
    if not isinstance(attached, LearnedAttachment):
        raise UsageError(f"plan got {type(estimator).__name__}; it is for ULR and Online, peers have no plan")
    with no_side_effects(model), frozen(model, attached.config.flow), torch.enable_grad():
        step = attached.prepared(x, targets, None, lengths)
        check_layers(step.model, step.bound.layers, [*open_modules(step.model), *attached.config.noise])
        _, p = step.first_pass()
        kept = attached.memory.describe(step)
        variances = _variances(step.model, step.structure, p.records)
    return _plan(step, p.records, variances, kept)


def _plan(step: Step, records: list[Record], variances: list[str], kept: str) -> Plan:
    structure, level, config = step.structure, step.learner.level, step.config
    rows = [
        (name, "x".join(map(str, q.shape)) or "1", _source(structure, structure.parameters.get(name)))
        for name, q in step.model.named_parameters()
    ]
    sites = [(r.site, _noise(config, r, level), _credit(structure, r.site)) for r in records]
    copies = _copies(step)
    return Plan(
        structure.credit.name,
        copies,
        rows,
        sites,
        [f"{name}: {_why(structure)}" for name in structure.untrained],
        [*step.bound.notes, *_notes(step, copies), *variances],
        step.bound.describe() + _engine(step, kept) + step.bound.seen.describe(),
    )


def _copies(step: Step) -> int:
    """Returns the number of copies of a step that learns nothing from antithetic pairs."""
    structure = step.structure
    return max(step.learner.copies.copies(default=step.default_copies), 2 if structure.weights else 1)


def _source(structure: Structure, sources: list[str] | None) -> str:
    if sources is None:
        return "frozen (requires_grad is False, or by flow)"
    if not sources:
        return "none"
    if sources == [SOURCE]:
        return "weight noise: loss minus baseline, times the score"
    exact = {"outputs": "exact, through the outputs", LOSS: "exact, of the loss itself"}
    return " + ".join(exact.get(s, f"credit at site {s}") for s in sources)


def _noise(config: Config, record: Record, level: NoiseLevel) -> str:
    if isinstance(record, CurrentRecord):
        noise = record.neuron.noise
        spread = "of its spread in the first batch"
        calls = "all steps in one call" if record.neuron.whole else "a step a call"
        return f"gaussian on its current, {calls}, " + (
            f"scale {noise.scale:g}" if noise.scale is not None else f"{noise.start:.2f} -> {noise.end:.2f} {spread}"
        )
    law = type(config.firing).__name__.lower()
    if config.firing.scale is not None:
        return f"{law}, scale {config.firing.scale:g}"
    return f"{law}, {level.starts[record.site]:.2f} -> {config.firing.end:.2f} of the threshold"


def _credit(structure: Structure, site: str) -> str:
    if site in structure.noiseless:
        why = "nothing that the loss reads depends on its spikes, or not by a derivative"
        return f"none, and no noise: {why}, or nothing is trained before it"
    parts = ["learned response"] * (site in structure.responding)
    parts += ["direct"] * (site in structure.direct)
    parts += [f"exact map to layer {target}" for target in structure.exact.get(site, [])]
    for target, path in structure.feeds.get(site, {}).items():
        parts.append(f"learned from layer {target}" + ", one kernel for all positions" * isinstance(path, Shared))
    parts += ["its recurrent weights"] * (structure.products and site in structure.recurs)
    parts += ["learned from its recurrent current"] * (site in structure.recurrent)
    parts += ["learned from the outputs, resolved in time"] * (site in structure.from_outputs)
    return structure.credit.describe(" + ".join(parts))


def _why(structure: Structure) -> str:
    if not structure.differentiable:
        return "the loss has no gradient, and no spiking layer comes after it; end the model in a spiking layer"
    return "nothing depends on it, or noise on it was ruled out; freeze it or use it"


def _notes(step: Step, copies: int) -> list[str]:
    structure, sampling = step.structure, step.config.sampling
    notes, treatment = sampling.describe(), structure.treatment
    for site in treatment.smoothed.values():
        notes.append(
            f"a loss without a gradient gets one by noise on the outputs, {site.draws} draws of each sample; they need "
            "no forward pass"
        )
    if treatment.flipped:
        notes.append(
            "a loss without a gradient is evaluated with each spike flipped, for the effect of every output spike; "
            "this needs no forward pass"
        )
    if treatment.gradientless and not structure.credit.by_losses:
        notes.append("losses without a gradient act by the score of every spike: more copies help them")
    if structure.detached:
        notes.append(without_gradient(structure, copies))
    if coupled_modules(step.model):
        notes.append(
            "training batch norm or dropout: copies run one after another, and each loss counts for its own sample"
        )
    if step.batch.lengths is not None and any(isinstance(m, _BatchNorm) and m.training for m in step.model.modules()):
        notes.append("training batch norm counts the padding of short samples in its means and variances")
    credit = structure.credit
    if structure.needs_pairs and isinstance(credit, Learned) and not credit.unbiased and sampling.copies is None:
        notes.append(
            f"every {credit.refresh} steps, where something is due, an antithetic pair replaces the single pass, to "
            "refresh what is learned"
        )
    return notes


def _engine(step: Step, kept: str) -> list[str]:
    """Says which code runs the scans over time, if there are any, and what a step keeps."""
    x = step.batch.x
    kind, why = choice(x)
    by = {"cpu": "fused, by numba", "gpu": "fused, by Triton", "reference": "in plain torch"}[kind]
    scans = any(isinstance(neuron, SpikingNeuron) or neuron.scans for _, neuron in step.bound.layers)
    found = [f"scans over time of ulr_snn's neurons: {by} ({why})"] if scans else []
    weights: list[Any] = [n.recurrent.weight for _, n in step.bound.layers if isinstance(n, LIF) and n.recurrent]
    if kind == "gpu" and not all(map(in_one_kernel, weights)):
        found.append(f"recurrent layers of more than {limits.recurrent} neurons: step by step, in plain torch")
    if isinstance(x, Events):
        found.append("events are sparse: a linear layer or convolution costs in proportion to those that it reads")
    if kind == "cpu":
        found.append(
            f"spikes: a linear layer costs in proportion to them while at most {limits.density:.0%} of neurons fire"
        )
    return [*found, f"memory: {kept}"]


def _variances(model: nn.Module, structure: Structure, records: Sequence[Record]) -> list[str]:
    """Says the expected variance of each site whose scores are weighted by whole losses, and of weight noise there."""
    if not (structure.credit.unbiased or structure.treatment.gradientless):
        return []
    found = []
    for record in records:
        own = own_weights(model, record, structure.parameters)
        draws, weights = record.x[:, 0].numel(), sum(q.numel() for q in own.values())
        line = f"site {record.site}: {draws:,} draws of noise a sample, {weights:,} weights that it alone trains"
        expected = of_firing(record, own) if own else 0.0
        if own:
            line += f", expected variance {expected:.1e}"
        if by_sample(model, own):
            line += f" ({of_weights(BY_SAMPLE, own):.1e} with WeightNoise(per_sample=True) on these)"
        found.append((expected, line))
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
