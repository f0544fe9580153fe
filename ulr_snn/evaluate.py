"""evaluate: a model's loss and accuracy, with deterministic or stochastic firing."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.estimators.ulr import ULR, or_default
from ulr_snn.kernels.precision import reduced_precision, widened
from ulr_snn.losses.named import LossSpec, resolve, total
from ulr_snn.model.activity import counting
from ulr_snn.model.discovery import find_layers
from ulr_snn.model.forward import as_sequence, check_outputs, measure_levels, model_outputs, runs_by_step
from ulr_snn.model.neurons import output_mask
from ulr_snn.noise.level import Noise, NoiseLevel
from ulr_snn.sites.binding import Layers, bind, check_layers, own_modules, spiking_layers, turn

Run = tuple[Tensor, Mapping[str, Tensor]]  # outputs, and activity [B] by name
BINS = 15  # of the calibration error


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    mode: str = "deterministic",
    copies: int = 1,
    estimator: ULR | None = None,
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
    estimator = or_default(estimator)
    runner: Runner | None = None
    with turn(model), mode_of(model, training=False):
        model.to(device)
        for step, batch in enumerate(loader):
            x, targets, lengths = unpack(batch, device)
            x = as_sequence(x, targets, lengths, time_first, model)
            if runner is None:
                if runs:  # as they stand, models without a spiking layer run, too
                    check_layers(model, spiking_layers(model), [*own_modules(model), *estimator.noise])
                runner = Runner.of(model, x, estimator)
            with reduced_precision(device, autocast):
                found = runner.runs(x, lengths, step, runs, seed, counts)
            mask = output_mask(lengths, found[0][0])
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


@contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts the model in training or evaluation mode; afterwards every module is in its own mode again. For training, a
    model in training mode stays as it is: the user has put those of its modules that are not into evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    if not (training and model.training):
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass
class Runner:
    """Runs a model as it stands, or with noise at the level of the end of training."""

    model: nn.Module
    by_step: bool
    layers: Layers
    level: NoiseLevel

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, estimator: ULR) -> "Runner":
        by_step = runs_by_step(model, x)
        return cls(model, by_step, find_layers(model, x, by_step, estimator.noise), NoiseLevel(estimator.firing))

    def runs(self, x: Tensor, lengths: Tensor | None, step: int, copies: int, seed: int, counts: set[str]) -> list[Run]:
        """Outputs and activity of each copy; of deterministic firing where copies is 0."""
        found = []
        for copy in range(max(copies, 1)):
            noise = None
            if copies:
                sample = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
                noise = Noise(seed, step, sample, torch.full_like(sample, copy))
                measure_levels(self.model, self.layers, self.level, lambda n=noise: self._run(x, lengths, n))
            with counting(self.model, self.layers, counts, *x.shape[:2], lengths) as activity:
                outputs = self._run(x, lengths, noise)
            check_outputs(outputs, x.shape[0], x.shape[1])
            found.append((outputs, activity))
        return found

    def _run(self, x: Tensor, lengths: Tensor | None, noise: Noise | None) -> Tensor:
        with bind(self.model, self.level, noise, lengths, len(x), self.layers):
            return widened(model_outputs(self.model, x, self.by_step))


def mean_of(runs: list[Run]) -> Run:
    """Outputs and activity, mean over runs."""
    outputs = torch.stack([outputs for outputs, _ in runs]).mean(0)
    return outputs, {name: torch.stack([counted[name] for _, counted in runs]).mean(0) for name in runs[0][1]}


@dataclass
class Tally:
    """Running means over samples."""

    samples: int = 0
    loss: float = 0.0
    correct: int | None = None

    def add(self, loss: Tensor, totals: Tensor, targets: Tensor) -> None:
        """loss [B]; totals: outputs summed over time [B, C]."""
        self.samples += len(targets)
        self.loss += loss.sum().item()
        if not targets.is_floating_point() and targets.ndim == 1 and totals.ndim == 2:
            self.correct = (self.correct or 0) + int((totals.argmax(1) == targets).sum())

    def means(self) -> dict[str, float | None]:
        count = max(1, self.samples)
        return {"loss": self.loss / count, "accuracy": None if self.correct is None else self.correct / count}


@dataclass
class Several:
    """What several predictions of each sample tell. Means over samples; empty where none were added."""

    bound: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    differ: list[Tensor] = field(default_factory=list)

    def add(self, losses: Tensor, totals: Tensor, targets: Tensor) -> None:
        """losses: [K, B]; totals: outputs summed over time [K, B, C]."""
        self.bound.append(multi_sample(losses))
        if targets.is_floating_point() or targets.ndim != 1:
            return
        confidence, predicted = totals.softmax(-1).mean(0).max(-1)
        self.confidence.append(confidence)
        self.right.append((predicted == targets).to(confidence.dtype))
        runs, classes = len(totals), totals.shape[-1]
        votes = torch.nn.functional.one_hot(totals.argmax(-1), classes).sum(0).to(confidence.dtype)  # [B, C]
        pairs = runs * (runs - 1)
        self.differ.append(1 - (votes * (votes - 1)).sum(-1) / pairs if pairs else torch.zeros_like(confidence))

    def means(self) -> dict[str, float]:
        if not self.bound:
            return {}
        found = {"bound": torch.cat(self.bound).mean().item()}
        if self.differ:
            error = calibration_error(torch.cat(self.confidence), torch.cat(self.right))
            found |= {"calibration_error": error, "disagreement": torch.cat(self.differ).mean().item()}
        return found


def multi_sample(losses: Tensor) -> Tensor:
    """-log mean over copies of exp(-loss), [B], of losses [K, B]: of a cross-entropy, that of the mean probability."""
    return -(torch.logsumexp(-losses, 0) - torch.tensor(float(len(losses))).log())


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error: |mean confidence - accuracy|, of samples in equal bins of confidence, weighted by
    their number."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=confidence.dtype, device=confidence.device).index_add_(0, bins, confidence - right)
    return gaps.abs().sum().item() / len(confidence)


@dataclass
class Activities:
    """Activity of a sample by name, mean over samples."""

    found: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, activity: Mapping[str, Tensor]) -> None:
        for name, counted in activity.items():
            self.found.setdefault(name, []).append(counted)

    def means(self) -> dict[str, float]:
        return {name: torch.cat(counted).mean().item() for name, counted in self.found.items()}


def unpack(batch: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, y) or (x, y, lengths) on the device."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise UsageError("the loader must give (x, y) or (x, y, lengths) batches of tensors")
    moved = [torch.as_tensor(item).to(device, non_blocking=True) for item in batch]
    return moved[0], moved[1], moved[2] if len(moved) == 3 else None


def pick_device(device: str | torch.device) -> torch.device:
    """ "auto" is a CUDA device where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device={device!r} is not known; use 'auto', 'cpu' or 'cuda'") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device={device!r} was asked for, but there is no CUDA device here; use 'cpu'")
    return picked
