"""evaluate: a model's loss and accuracy, with deterministic or stochastic firing."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Estimator
from ulr_snn.estimators.config import Config
from ulr_snn.estimators.online import Online
from ulr_snn.estimators.ulr import ULR, or_default
from ulr_snn.kernels.precision import reduced_precision
from ulr_snn.losses.metrics import Activities, Several, Tally
from ulr_snn.losses.named import LossSpec, resolve, total
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.call import no_side_effects
from ulr_snn.model.chain import Chain
from ulr_snn.model.mode import mode_of, pick_device, unpack
from ulr_snn.model.neurons import output_mask
from ulr_snn.model.runner import Run, Runner
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import check_layers, spiking_layers, turn, user_modules


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
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
    """Loss and accuracy over a loader: {"loss", "accuracy" (None for regression), "samples"}.

    mode: "deterministic", or "stochastic" with the estimator's firing noise and the outputs of `copies` runs
    averaged. samples: of the stochastic net's predictions, averaged as probabilities (softmax of the outputs summed
    over time); "loss" is then that of the single ones, "bound" the multi-sample one, -log mean exp(-loss), and with
    "calibration_error" (expected calibration error, 15 bins) and "disagreement" (how often two of them differ) they say
    what the average knows of its own mistakes (arXiv 2102.03280). activity: also "spikes" and "operations" of a sample,
    those of all layers over time (see `ulr_snn.SpikeBudget`). autocast: as of `train`. Calls from several
    threads on one model take turns. Raises UsageError as `train` does.
    """
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
    config = config_of(or_default(estimator))
    runner: Runner | None = None
    with turn(model), mode_of(model, training=False):
        model.to(device)
        for step, batch in enumerate(loader):
            x, targets, lengths = unpack(batch, device)
            given = Batch.of(model, x, targets, lengths, objective, time_first)
            if runner is None:
                if runs:  # as they stand, models without a spiking layer run, too
                    check_layers(model, spiking_layers(model), [*user_modules(model), *config.noise])
                runner = Runner(bound_exactly(model, given, config, counts), NoiseLevel(config.firing))
            with reduced_precision(device, autocast):
                found = runner.runs(given, step, runs, seed, counts)
            targets, mask = given.targets, output_mask(given.lengths, found[0][0])
            each = found if samples else [mean_of(found)]
            losses = torch.stack([objective(outputs, targets, mask, counted) for outputs, counted in each])
            totals = torch.stack([total(outputs, mask) for outputs, _ in each])
            if samples:
                several.add(losses, totals, targets)
            tally.add(losses.mean(0), totals.softmax(-1).mean(0) if samples else totals[0], targets)
            activities.add(mean_of(found)[1])
    if not tally.samples:
        raise UsageError("the loader gave no batch; give it at least one (a generator can be used only once)")
    return {**tally.means(), **several.means(), **activities.means(), "samples": tally.samples}


def config_of(estimator: Estimator) -> Config:
    """The configuration that stochastic evaluation takes its noise from; of a peer, that of `ULR()`."""
    if isinstance(estimator, Online):
        return estimator.config
    return estimator if isinstance(estimator, ULR) else ULR()


def bound_exactly(model: nn.Module, batch: Batch, config: Config, counts: Collection[str]) -> BoundModel:
    """The model bound for evaluation: as a chain on fused scans only where that gives the outputs of the model's own
    code bit for bit on this batch, the first."""
    fused = "operations" not in counts  # which are counted in the model's own modules
    bound = BoundModel.of(model, batch, config.noise, own_code=not fused)
    if not isinstance(bound.model, Chain):
        return bound
    own = BoundModel.of(model, batch, config.noise, own_code=True)
    level = NoiseLevel(config.firing)
    with no_side_effects(model):
        outputs = [each.outputs(batch.x.clone(), level, lengths=batch.lengths)[0] for each in (bound, own)]
    return bound if torch.equal(*outputs) else own


def mean_of(runs: list[Run]) -> Run:
    """Outputs and activity, mean over runs."""
    outputs = torch.stack([outputs for outputs, _ in runs]).mean(0)
    return outputs, {name: torch.stack([counted[name] for _, counted in runs]).mean(0) for name in runs[0][1]}
