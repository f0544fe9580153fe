"""What a report says of a trained network: figures, firing, predictions and examples, by one pass over test data."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.estimators.base import Estimator
from ulr_snn.evaluate import Evaluation
from ulr_snn.losses.metrics import Tally, scores
from ulr_snn.losses.named import LossSpec, resolve
from ulr_snn.model.batch import Batch
from ulr_snn.model.bound import BoundModel
from ulr_snn.model.interface import Interface
from ulr_snn.model.mode import mode_of, move
from ulr_snn.model.reading import read
from ulr_snn.plan import Plan, plan
from ulr_snn.runs.recording import Recording, bound_to_record, recorded
from ulr_snn.sites.binding import turn

EACH = 2  # examples of right predictions, of wrong ones, or of samples without a class


@dataclass(frozen=True)
class Example:
    """A sample of the test data. number: its place in them; label and predicted: classes, None if there are none."""

    number: int
    recording: Recording
    label: int | None = None
    predicted: int | None = None


@dataclass(frozen=True)
class LayerActivity:
    """The activity of a module, as means over samples. rate: spikes a neuron and time step; silent: neurons without any
    spike; spikes, operations: of a sample. None where a module has no neurons or no connections."""

    name: str
    kind: str
    neurons: int | None
    rate: float | None
    silent: int | None
    spikes: float | None
    operations: float | None


@dataclass
class Measurement:
    """What is known of a network after a pass over test data. figures: those of `ulr_snn.evaluate` with activity=True.
    rates: firing rate of each neuron by layer. confusion: counts [labels, predictions], None without classes. plan: the
    plan of its training, or the reason why there is none."""

    figures: dict[str, Any]
    layers: list[LayerActivity]
    rates: dict[str, Tensor]
    confusion: Tensor | None
    examples: list[Example]
    plan: Plan | str
    parameters: int


@dataclass
class Totals:
    """Sums over batches."""

    samples: int = 0
    steps: dict[str, int] = field(default_factory=dict)  # of all samples, by layer
    spikes: dict[str, Tensor] = field(default_factory=dict)  # of each neuron, by layer
    activity: dict[tuple[str, str], float] = field(default_factory=dict)  # by module and kind
    confusion: Tensor | None = None
    examples: list[Example] = field(default_factory=list)

    def add(self, recording: Recording, scored: tuple[Tensor, Tensor] | None) -> None:
        """Adds a batch. scored: scores [N, C] and classes [N], see `ulr_snn.losses.metrics.scores`."""
        labels = predictions = None
        if scored is not None:
            labels, predictions = scored[1].cpu(), scored[0].argmax(-1).cpu()
            classes = scored[0].shape[-1]
            counts = torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)
            self.confusion = counts if self.confusion is None else self.confusion + counts
        self._keep_examples(recording, labels, predictions)
        self.samples += recording.samples
        for name, layer in recording.layers.items():
            self.steps[name] = self.steps.get(name, 0) + recording.steps_of(layer)
            self.spikes[name] = self.spikes.get(name, 0) + layer.spikes.double().sum((0, 1))
        for key, counted in recording.activity.items():
            self.activity[key] = self.activity.get(key, 0.0) + counted.double().sum().item()

    def _keep_examples(self, recording: Recording, labels: Tensor | None, predictions: Tensor | None) -> None:
        """Keeps the first samples of different classes, right and wrong ones."""
        classed = labels is not None and predictions is not None and len(labels) == recording.samples
        for row in range(recording.samples):
            label = predicted = None
            if classed:
                assert labels is not None and predictions is not None
                label, predicted = int(labels[row]), int(predictions[row])
            alike = [e for e in self.examples if (e.label == e.predicted) == (label == predicted)]
            if len(alike) < EACH and (label is None or label not in [e.label for e in alike]):
                self.examples.append(Example(self.samples + row, recording.sample(row), label, predicted))

    def rates(self) -> dict[str, Tensor]:
        return {name: spikes / self.steps[name] for name, spikes in self.spikes.items()}

    def layers(self, model: nn.Module) -> list[LayerActivity]:
        """Returns the activity of every module that fires or has connections, in the order of the model."""
        rates, found = self.rates(), []
        for name, module in model.named_modules():
            name = name or "model"
            own = [rate.flatten() for layer, rate in rates.items() if layer.partition("#")[0] == name]
            sums = [self.activity.get((name, kind)) for kind in ("spikes", "operations")]
            spikes, operations = (None if total is None else total / self.samples for total in sums)
            neurons = rate = silent = None
            if own:
                neurons, rate = len(own[0]), torch.cat(own).mean().item()
                silent = int((sum(own[1:], own[0]) == 0).sum())
            if own or operations is not None:
                found.append(LayerActivity(name, type(module).__name__, neurons, rate, silent, spikes, operations))
        return found


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: Iterable[Any],
    estimator: Estimator | None,
    loss: LossSpec,
    interface: Interface,
    device: torch.device,
) -> Measurement:
    """Measures a network on test data, with deterministic firing. Raises UsageError as `ulr_snn.evaluate`, and for a
    model without spiking layers."""
    objective = resolve(loss)
    evaluation, totals, first = Evaluation(Tally(), apart=False), Totals(), None
    bound: dict[int, BoundModel] = {}  # by batch size
    with turn(model), mode_of(model, training=False):
        move(model, device)
        for given in loader:
            first = given if first is None else first
            batch = Batch.of(model, *read(given, model, device), objective, interface)
            if batch.samples not in bound:
                bound[batch.samples] = bound_to_record(model, batch, estimator)
            batch = bound[batch.samples].adapted(batch)
            recording = recorded(bound[batch.samples], batch)
            outputs = recording.outputs.to(device)
            evaluation.add(batch, [(outputs, recording.totals(device))])
            totals.add(recording, scores(outputs, batch))
    figures = evaluation.figures()
    layout, output = interface.layout, interface.output
    try:
        planned: Plan | str = plan(model, first, estimator, loss, layout=layout, output=output)
    except UsageError as error:  # of a peer, which has no plan
        planned = str(error)
    examples = sorted(totals.examples, key=lambda example: example.label != example.predicted)
    parameters = sum(q.numel() for q in model.parameters())
    return Measurement(figures, totals.layers(model), totals.rates(), totals.confusion, examples, planned, parameters)
