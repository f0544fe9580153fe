"""`evaluate`: a model's loss and accuracy, with deterministic or stochastic firing."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import nn

from ulr_snn.errors import UsageError
from ulr_snn.errors.arguments import Batches, Count, Flag, Whole, checked, one_of
from ulr_snn.estimators.attachment import Attaches
from ulr_snn.estimators.base import Estimator
from ulr_snn.estimators.config import Config, in_one_product
from ulr_snn.estimators.ulr import ULR, or_default
from ulr_snn.kernels.precision import Autocast, reduced_precision
from ulr_snn.losses.metrics import Activities, Several, Tally, check_metrics, scores, share_counted
from ulr_snn.losses.named import LossSpec, resolve
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import copied, no_side_effects
from ulr_snn.model.chain import Chain
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import Model, mode_of, move, pick_device
from ulr_snn.model.neurons import output_mask
from ulr_snn.model.reading import read
from ulr_snn.model.runner import Run, Runner
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import check_layers, open_modules, spiking_layers, turn

Mode = Annotated[str, one_of("deterministic", "stochastic")]


@checked
@torch.inference_mode(False)  # tensors of inference mode have no graphs, which binding reads
@torch.no_grad()
def evaluate(
    model: Model,
    loader: Batches,
    mode: Mode = "deterministic",
    copies: Count = 1,
    estimator: Estimator | None = None,
    loss: LossSpec = "ce_count",
    device: str | torch.device = "auto",
    time_first: bool = True,
    seed: Whole = 0,
    samples: Count | None = None,
    activity: Flag = False,
    autocast: Autocast | None = None,
    layout: str | None = None,
    output: Any = None,
    metrics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns {"loss", "accuracy", "samples"} and metrics over a loader. Accuracy is None unless targets are class
    indices of the outputs. Threads on one model take turns.

    mode: "deterministic", or "stochastic" with the estimator's firing noise. copies: runs whose outputs are averaged.
    samples: stochastic predictions, averaged as probabilities (softmax of outputs summed over time). "loss" is then the
    mean over predictions; further keys are "bound" (-log mean exp(-loss)), "calibration_error" (expected calibration
    error, 15 bins) and "disagreement" (how often two predictions differ), see arXiv 2102.03280. activity: adds "spikes"
    and "operations" of a sample (see `ulr_snn.SpikeBudget`). time_first, layout, output, metrics, autocast: as in
    `train`. Raises UsageError as `train`.
    """
    check_options(mode, copies, samples)
    device, objective = pick_device(device), resolve(loss)
    interface = Interface.of(time_first, layout, output)
    counts = {"spikes", "operations"} if activity else objective.counts
    estimator = or_default(estimator)
    config = estimator.config if isinstance(estimator, Attaches) else ULR()  # a peer has no such noise
    runs = samples or (copies if mode == "stochastic" else 0)
    found = Evaluation(Tally(check_metrics(metrics)), apart=samples is not None)
    runners: dict[int, Runner] = {}  # by batch size
    level = NoiseLevel(config.firing)
    with turn(model), mode_of(model, training=False):
        move(model, device)
        for step, given in enumerate(loader):
            x, targets, lengths = read(given, model, device)
            batch = Batch.of(model, x, targets, lengths, objective, interface)
            if runs and not runners:  # deterministic evaluation needs no spiking layer
                check_layers(model, spiking_layers(model), [*open_modules(model), *config.noise])
            with reduced_precision(device, autocast):
                if batch.samples not in runners:
                    runners[batch.samples] = Runner(bound_exactly(model, batch, config, counts), level)
                runner = runners[batch.samples]
                batch = runner.bound.adapted(batch)
                found.add(batch, runner.runs(batch, step, runs, seed, counts))
    return found.figures()


@dataclass
class Evaluation:
    """The figures of an evaluation so far. apart: every run is a prediction of its own; else their mean is one."""

    tally: Tally
    apart: bool
    several: Several = field(default_factory=Several)
    activities: Activities = field(default_factory=Activities)

    def add(self, batch: Batch, runs: list[Run]) -> None:
        """Adds the runs of a batch."""
        mean = mean_of(runs)
        each = runs if self.apart else [mean]
        mask = output_mask(batch.lengths, mean[0])
        losses = torch.stack([batch.objective(outputs, batch.targets, mask, counted) for outputs, counted in each])
        found = [one for outputs, _ in each if (one := scores(outputs, batch)) is not None]
        scored = None
        if found:
            totals, labels = torch.stack([one for one, _ in found]), found[0][1]
            scored = totals.softmax(-1).mean(0) if self.apart else totals[0], labels
        if self.apart:
            share = share_counted(batch)
            self.several.add(losses, totals if found else None, labels if found else None, share)
        self.tally.add(losses.mean(0), mean[0], batch, scored)
        self.activities.add(mean[1])

    def figures(self) -> dict[str, Any]:
        """Returns all figures by name. Raises UsageError if there was no batch."""
        if not self.tally.samples:
            raise UsageError("the loader gave no batch; give it at least one (a generator can be used only once)")
        means = {**self.tally.means(), **self.several.means(), **self.activities.means()}
        return {**means, "samples": self.tally.samples}


def check_options(mode: str, copies: int, samples: int | None) -> None:
    """Raises UsageError for options of `evaluate` that do not fit."""
    if copies > 1 and mode == "deterministic":
        raise UsageError(f"evaluate got copies={copies} with {mode} firing; copies above 1 need mode='stochastic'")
    if samples is not None and copies > 1:
        raise UsageError(f"evaluate got samples={samples} and copies={copies}; give one of them")


def bound_exactly(model: nn.Module, batch: Batch, config: Config, counts: Collection[str]) -> BoundModel:
    """Binds the model for evaluation; fused only if its outputs on this batch are bitwise those of the model's code."""
    fused = "operations" not in counts  # operations are counted in the model's own modules
    with torch.enable_grad():  # binding reads autograd graphs
        bound = BoundModel.of(model, batch, config.noise, own_code=not fused, plain=in_one_product(config))
    if not isinstance(bound.model, Chain):
        return bound
    own = BoundModel.of(model, batch, config.noise, own_code=True, plain=in_one_product(config))
    level, batch = NoiseLevel(config.firing), own.adapted(batch)
    with no_side_effects(model):
        outputs = [each.outputs(copied(batch.x), level, lengths=batch.lengths)[0] for each in (bound, own)]
    return bound if torch.equal(*outputs) else own


def mean_of(runs: list[Run]) -> Run:
    """Returns outputs and activity, mean over runs."""
    outputs = torch.stack([outputs for outputs, _ in runs]).mean(0)
    return outputs, {name: torch.stack([counted[name] for _, counted in runs]).mean(0) for name in runs[0][1]}
