"""The learner: all state that training steps change and checkpoints hold."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters.places import Place
from ulr_snn.credit.baseline import moving
from ulr_snn.credit.feedback import LearnedFeedback
from ulr_snn.credit.kinds import Learned
from ulr_snn.credit.prediction import Prediction
from ulr_snn.credit.structure import Structure
from ulr_snn.errors import UsageError
from ulr_snn.estimators.config import Config
from ulr_snn.estimators.observe import observed
from ulr_snn.estimators.step_sizes import StepSizes
from ulr_snn.kernels import ranks
from ulr_snn.model.batch import Batch
from ulr_snn.model.forward import Forward
from ulr_snn.model.neurons import spread_without_padding
from ulr_snn.model.passes import Pass
from ulr_snn.noise.kinds import WeightNoise
from ulr_snn.noise.level import WIDENING, NoiseLevel
from ulr_snn.sites.binding import Layers, check_layers
from ulr_snn.sites.records import Record


class Learner:
    """The state of an attachment.

    step, forward_passes: counts so far; level: level of the firing noise; feedback: learned effects of spikes;
    copies: counter of the copies of a step; mean_loss, mean_gradientless: moving baselines of all losses, and of
    losses without a gradient; step_sizes: None if learning rates are not used; times: updates of a batch.
    """

    def __init__(
        self,
        config: Config,
        seed: int,
        total_steps: int | None,
        fixed_progress: float | None = None,
        rates: bool = False,
    ) -> None:
        self.config, self.seed, self.total_steps, self.fixed_progress = config, seed, total_steps, fixed_progress
        self.step, self.forward_passes = 0, 0
        self.level = NoiseLevel(config.firing)
        credit = config.credit if isinstance(config.credit, Learned) else Learned()
        self.feedback = LearnedFeedback(credit.time_functions, credit.rate, credit.limits)
        self.copies = config.sampling.counter()
        self.mean_loss: Tensor | None = None
        self.mean_gradientless: Tensor | None = None
        self.step_sizes = StepSizes() if rates else None
        self.times = 1
        self._prediction: Prediction | None = None
        self.resumed = False  # True until the first pass after a checkpoint is loaded
        self.driven: set[str] | None = None  # sites that read the input not only by spikes; None if not known
        self.chosen: dict[str, WeightNoise] | None = None  # weight noise from a checkpoint

    @property
    def structure(self) -> Structure | None:
        """The structure observed in the first pass; None before it."""
        return None if self._prediction is None else self._prediction.structure

    @property
    def prediction(self) -> Prediction:
        """The learned effects of spikes. Raises RuntimeError before the first pass."""
        if self._prediction is None:
            raise RuntimeError("credit was asked for before a first pass")
        return self._prediction

    @property
    def progress(self) -> float:
        """The fraction of the training that is over; 0.5 if its length is not known."""
        if self.fixed_progress is not None:
            return self.fixed_progress
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.5

    @property
    def measures(self) -> bool:
        """True if `measure` has something to measure at this step."""
        return self._widens or (self.step_sizes is not None and self.step_sizes.due(self.step))

    @property
    def _widens(self) -> bool:
        """True if the noise of layers that began at rest may still follow their membranes."""
        readout = self.structure is not None and self.structure.has_readout
        resting = bool(self.level.resting) and self.fixed_progress is None
        return resting and not readout and self.level.progress <= WIDENING

    def observe(self, forward: Forward, p: Pass, batch: Batch) -> Structure:
        """Observes the structure of the model and the loss in the first pass."""
        structure = observed(forward, p, batch, self.config, self.driven, self.chosen)
        self._prediction = Prediction(structure, self.feedback, self.seed)
        self.chosen, self.driven = None, structure.driven
        check_layers(forward.bound.model, forward.bound.layers, structure.weights, forward.bound.notes)
        self.level.noiseless = structure.noiseless
        return structure

    def keep_units(self, layers: Layers) -> None:
        """Gives places in the model's code the units that the first batch showed, on the first rank."""
        places = {name: neuron for name, neuron in layers if isinstance(neuron, Place)}
        if new := {name: place.unit for name, place in places.items() if name not in self.level.units}:
            self.level.units |= ranks.gathered(new)[0]
        for name, place in places.items():
            place.unit = self.level.units[name]

    def measure(self, model: nn.Module, p: Pass, whole: bool = True) -> None:
        """Measures step sizes and the noise of layers that began at rest. whole: the pass is over all time steps."""
        first = self.step_sizes is not None and self.step_sizes.summed is None
        if not (first or self.measures) or not ranks.everywhere(bool(torch.isfinite(p.loss).all()))[0]:
            return
        if self.step_sizes is not None:
            self.step_sizes.measure(model, p, self.step, whole)
        if self._widens:
            for record in p.records:
                if record.site not in self.level.currents:
                    self.level.widen(record.site, record.neuron.threshold, partial(spread_of, record))

    def learn(self, passes: list[Pass], losses: Tensor) -> None:
        """Updates noise level and baselines by the passes of a step. losses: [K, B]."""
        if self.structure is not None and self.structure.credit.goes_back:
            self.level.measure_distances([p.records for p in passes])
        self.mean_loss = moving(self.mean_loss, losses)
        self.mean_gradientless = moving(self.mean_gradientless, torch.cat([p.gradientless for p in passes]))

    def learning_rates(self) -> dict[str, float]:
        """See `Attachment.learning_rates`."""
        if self.step_sizes is None or self.structure is None:
            return {}
        found, bound = self.structure.parameters.items(), self.step_sizes.bound()
        alone = all(set(sources) <= {"outputs"} for _, sources in found)
        return {name: self.step_sizes.factor(name, sources, bound, alone) / self.times for name, sources in found}

    def observe_again(self) -> None:
        """Drops the structure, so that the next pass is observed."""
        self._prediction = None

    def state_dict(self) -> dict[str, Any]:
        chosen = self.chosen if self.structure is None else self.structure.weights
        return {
            "step": self.step,
            "forward_passes": self.forward_passes,
            "mean_loss": self.mean_loss,
            "mean_gradientless": self.mean_gradientless,
            **self.level.state_dict(),
            "step_sizes": None if self.step_sizes is None else self.step_sizes.state_dict(),
            "driven": None if self.driven is None else sorted(self.driven),
            "weights": None if chosen is None else {q: asdict(n) for q, n in chosen.items()},
            "feedback": self.feedback.state_dict(),
            "budget": self.copies.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.observe_again()  # with the state's choices
        self.step, self.forward_passes = state.get("step", 0), state["forward_passes"]
        if "feedback" not in state:
            return  # of an attachment of another kind, which has learned nothing of this
        self.resumed = self.step > 0
        state = {"mean_gradientless": state.get("mean_blind"), **state}  # the name of earlier versions
        for name in ("mean_loss", "mean_gradientless"):
            setattr(self, name, None if state[name] is None else state[name].to(device))
        self.level.load_state_dict(state, device)
        if state["step_sizes"] is not None:
            self.step_sizes = self.step_sizes or StepSizes()
            self.step_sizes.load_state_dict(state["step_sizes"])
        self.driven = None if state["driven"] is None else set(state["driven"])
        self.chosen = None if state["weights"] is None else {q: weight_noise(n) for q, n in state["weights"].items()}
        self.feedback.load_state_dict(state["feedback"], device)
        self.copies.load_state_dict(state.get("budget") or {})


def weight_noise(state: dict[str, Any]) -> WeightNoise:
    """Returns weight noise from a checkpoint. Raises UsageError for noise of rank one, which earlier versions had."""
    if state.get("rank") is not None:
        raise UsageError("the checkpoint has weight noise of rank one, which ULR no longer has; train anew")
    return WeightNoise(**{name: value for name, value in state.items() if name != "rank"})


def spread_of(record: Record) -> float:
    """Returns the standard deviation of a layer's membranes without padding."""
    return spread_without_padding(record.membrane(), record.mask)
