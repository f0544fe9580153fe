"""`evaluate`: a model's loss and accuracy, with deterministic or stochastic firing."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from ulr_snn.errors import UsageError
from ulr_snn.estimators.attachment import Attaches
from ulr_snn.estimators.base import Estimator
from ulr_snn.estimators.config import Config
from ulr_snn.estimators.ulr import ULR, or_default
from ulr_snn.kernels.precision import reduced_precision
from ulr_snn.losses.metrics import Activities, Several, Tally
from ulr_snn.losses.named import LossSpec, resolve, total
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import no_side_effects
from ulr_snn.model.chain import Chain
from ulr_snn.model.mode import check_model, mode_of, pick_device, unpack
from ulr_snn.model.neurons import output_mask
from ulr_snn.model.runner import Run, Runner
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import check_layers, spiking_layers, turn, user_modules


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    mode: str = "deterministic",
    copies: int = 1,
    estimator: Estimator | None = None,
    loss: LossSpec = "ce_count",
    device: str | torch.device = "auto",
    time_first: bool = True,
    seed: int = 0,
    samples: int | None = None,
    activity: bool = False,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Returns {"loss", "accuracy" (None for regression), "samples"} over a loader. Threads on one model take turns.

    mode: "deterministic", or "stochastic" with the estimator's firing noise. copies: runs whose outputs are averaged.
    samples: stochastic predictions, averaged as probabilities (softmax of outputs summed over time). "loss" is then the
    mean over predictions; further keys are "bound" (-log mean exp(-loss)), "calibration_error" (expected calibration
    error, 15 bins) and "disagreement" (how often two predictions differ), see arXiv 2102.03280. activity: adds "spikes"
    and "operations" of a sample (see `ulr_snn.SpikeBudget`). autocast: as in `train`. Raises UsageError as `train`.
    """
    check_model(model)
    if mode not in ("deterministic", "stochastic"):
        raise UsageError(f"evaluate got mode={mode!r}; it is 'deterministic' or 'stochastic'")
    if copies < 1 or (copies > 1 and mode == "deterministic"):
        raise UsageError(f"evaluate got copies={copies} with {mode} firing; copies above 1 need mode='stochastic'")
    if samples is not None and (samples < 1 or copies > 1):
        raise UsageError(f"evaluate got samples={samples} and copies={copies}; give one of them, at least 1")
    device = pick_device(device)
    objective = resolve(loss)
    counts = {"spikes", "operations"} if activity else objective.counts
    tally, several, activities = Tally(), Several(), Activities()
    runs = samples or (copies if mode == "stochastic" else 0)
    estimator = or_default(estimator)
    config = estimator.config if isinstance(estimator, Attaches) else ULR()  # a peer has no such noise
    runners: dict[int, Runner] = {}  # by batch size
    level = NoiseLevel(config.firing)
    with turn(model), mode_of(model, training=False):
        model.to(device)
        for step, batch in enumerate(loader):
            x, targets, lengths = unpack(batch, device)
            given = Batch.of(model, x, targets, lengths, objective, time_first)
            if runs and not runners:  # deterministic evaluation needs no spiking layer
                check_layers(model, spiking_layers(model), [*user_modules(model), *config.noise])
            with reduced_precision(device, autocast):
                if given.samples not in runners:
                    runners[given.samples] = Runner(bound_exactly(model, given, config, counts), level)
                all_runs = runners[given.samples].runs(given, step, runs, seed, counts)
            targets, mask = given.targets, output_mask(given.lengths, all_runs[0][0])
            each = all_runs if samples else [mean_of(all_runs)]
            losses = torch.stack([objective(outputs, targets, mask, counted) for outputs, counted in each])
            totals = torch.stack([total(outputs, mask) for outputs, _ in each])
            if samples:
                several.add(losses, totals, targets)
            tally.add(losses.mean(0), totals.softmax(-1).mean(0) if samples else totals[0], targets)
            activities.add(mean_of(all_runs)[1])
    if not tally.samples:
        raise UsageError("the loader gave no batch; give it at least one (a generator can be used only once)")
    return {**tally.means(), **several.means(), **activities.means(), "samples": tally.samples}


def bound_exactly(model: nn.Module, batch: Batch, config: Config, counts: Collection[str]) -> BoundModel:
    """Binds the model for evaluation; fused only if its outputs on this batch are bitwise those of the model's code."""
    fused = "operations" not in counts  # operations are counted in the model's own modules
    with torch.enable_grad():  # binding reads autograd graphs
        bound = BoundModel.of(model, batch, config.noise, own_code=not fused)
    if not isinstance(bound.model, Chain):
        return bound
    own = BoundModel.of(model, batch, config.noise, own_code=True)
    level = NoiseLevel(config.firing)
    with no_side_effects(model):
        outputs = [each.outputs(batch.x.clone(), level, lengths=batch.lengths)[0] for each in (bound, own)]
    return bound if torch.equal(*outputs) else own


def mean_of(runs: list[Run]) -> Run:
    """Returns outputs and activity, mean over runs."""
    outputs = torch.stack([outputs for outputs, _ in runs]).mean(0)
    return outputs, {name: torch.stack([counted[name] for _, counted in runs]).mean(0) for name in runs[0][1]}
