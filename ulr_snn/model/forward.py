"""Stochastic forward passes that draw the spikes of some copies of a batch and keep what the estimator needs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ulr_snn.credit.pooling import SpikePooling
from ulr_snn.losses.evaluation import LossEvaluation, LossTreatment, evaluate_losses
from ulr_snn.model.activity import counting
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import (
    check_outputs,
    copied,
    coupled_modules,
    generator_state,
    no_side_effects,
    set_generator_state,
)
from ulr_snn.model.neurons import output_mask
from ulr_snn.model.passes import Pass
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Noise
from ulr_snn.sampling.kinds import Antithetic, Sampling, rows_of
from ulr_snn.sites.binding import site_index
from ulr_snn.sites.records import InPlaceGuard, Links, Record
from ulr_snn.sites.weights import WeightSites


@dataclass
class PassLog:
    """The state that all passes of one step share. generator: state of torch's generators before the first pass. extra:
    number of passes beside the estimator's own, which set noise levels and find dependencies. measured: whether step
    sizes and noise have been measured in this step."""

    generator: tuple[Tensor, Tensor | None] | None = None
    extra: int = 0
    measured: bool = False


@dataclass(frozen=True)
class Forward:
    """Runs the passes of one training step.

    The first pass has the side effects of an ordinary forward pass (running statistics, generator state). Every further
    pass sees the same dropout masks and has no side effects. weights: parameters with noise of their own. treatment:
    which losses are smoothed or have no gradient. links: keep spikes in the graph behind the drives that they were
    drawn from; without links, spikes are leaves of the graph. pools: look for max pooling, which slows down all of
    torch's functions. changes: the model may change spikes in place.
    """

    bound: BoundModel
    level: NoiseLevel
    seed: int = 0
    step: int = 0
    sampling: Sampling = field(default_factory=Antithetic)
    weights: WeightSites | None = None
    treatment: LossTreatment = field(default_factory=LossTreatment)
    links: Links | None = None
    pools: bool = True
    changes: bool = True
    log: PassLog = field(default_factory=PassLog)

    def chunks(self, copies: list[int]) -> list[list[int]]:
        """Splits copies into passes: all in one where that changes nothing, else one pass a copy."""
        apart = self.weights is not None or coupled_modules(self.bound.model)
        return [[copy] for copy in copies] if apart else [copies] * bool(copies)

    def all(self, batch: Batch, copies: range, varied: str | None = None) -> list[Pass]:
        """Runs these copies in as few passes as possible. varied: see `run`."""
        return [self.run(batch, chunk, varied) for chunk in self.chunks(list(copies))]

    def run(self, batch: Batch, copies: list[int], varied: str | None = None) -> Pass:
        """Runs one pass of these copies of a batch. varied: the only site at which copies differ; None: all sites."""
        lengths, k, model = batch.lengths, len(copies), self.bound.model
        rows = batch.copies(k)
        row_lengths = lengths.repeat(k) if lengths is not None else None
        noise = self.noise(batch.samples, copies, rows.device, varied)

        def outputs_of() -> tuple[Tensor, list[Record], bool]:
            guard = InPlaceGuard(copies=self.changes)
            events = copied(rows)  # a model may change its input in place
            outputs, records = self.bound.outputs(events, self.level, noise, row_lengths, self.links, guard)
            return outputs, records, guard.changed

        self.log.extra += self.bound.measure_levels(self.level, outputs_of)
        size = batch.steps, batch.samples
        disturbed: AbstractContextManager[None] = nullcontext()
        if self.weights is not None:
            (copy,) = copies  # see `chunks`
            disturbed = self.weights.disturbed(model, self.step, copy, *size)
        counted = counting(model, self.bound.layers, batch.objective.counts, size[0], size[1] * k, row_lengths)
        pooling = SpikePooling() if self.pools else None
        with self.side_effects_once(), disturbed, counted as activity, pooling or nullcontext():
            outputs, records, changes = outputs_of()
        check_outputs(outputs, size[0], size[1] * k, lengths is not None)
        evaluation = self.evaluate(batch, outputs, activity, copies)
        pools = pooling is not None and pooling.used
        return Pass(copies, outputs, records, activity, evaluation, pools, changes, self.links is not None)

    def evaluate(self, batch: Batch, outputs: Tensor, activity: dict[str, Tensor], copies: list[int]) -> LossEvaluation:
        """Evaluates the objective on the outputs and the activity of a pass of these copies."""
        k, targets, lengths = len(copies), batch.targets, batch.lengths
        mask = output_mask(lengths.repeat(k) if lengths is not None else None, outputs)
        noise = self.noise(batch.samples, copies, outputs.device) if self.treatment.smoothed else None
        repeated = targets.repeated(k)
        return evaluate_losses(batch.objective, self.treatment, outputs, activity, repeated, mask, noise)

    def noise(self, samples: int, copies: list[int], device: torch.device, varied: str | None = None) -> Noise:
        """Returns the noise of these copies of a batch of `samples` samples."""
        sample, copy = rows_of(copies, samples, device)
        site = None if varied is None else site_index(self.bound.layers, varied)
        return self.sampling.noise(self.seed, self.step, sample, copy, site)

    @contextmanager
    def side_effects_once(self) -> Iterator[None]:
        """Lets the first pass have side effects. Every further pass starts from its generator state and has none."""
        if self.log.generator is None:
            self.log.generator = generator_state()
            yield
            return
        with no_side_effects(self.bound.model):
            set_generator_state(self.log.generator)
            yield
