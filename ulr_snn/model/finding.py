"""Finds how a model is called, by trial: with a few samples, in each way that the layout of its batches allows."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.adapters import StepNeuron
from ulr_snn.errors import UsageError
from ulr_snn.model.batch import Batch
from ulr_snn.model.call import Call, carries_state, copied, joined, no_side_effects, state_arguments
from ulr_snn.model.neurons import SpikingNeuron
from ulr_snn.model.trees import items, tensors
from ulr_snn.model.view import Slot, View
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import Layers, bind, module_of, spiking_layers, unknown
from ulr_snn.sites.step import ANY_STEPS

# Errors that modules raise for a wrong shape. Any other error is a mistake in the model itself.
OF_SHAPES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)
OTHER = 5  # samples of a second trial, where two or three samples may pass for time steps
STEPS = 32  # time steps of a long sequence with which models are tried
WAYS = {
    "sequence": "a whole sequence [T, B, ...]",
    "batch first": "a whole sequence [B, T, ...]",
    "step": "a time step at a time",
    "static": "a static input [B, ...]",
}


@dataclass
class Trial:
    """A trial of one way to call a model. shapes: those of each layer's inputs, one for each call; results: what the
    model returned; selected: the part that is read; error: what it raised."""

    way: str
    layers: Layers
    shapes: dict[str, list[torch.Size]] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    selected: Any = None
    error: Exception | None = None

    @property
    def by_call(self) -> dict[str, list[torch.Size]]:
        """The shapes of the layers that run one time step a call."""
        others = {name for name, layer in self.layers if not isinstance(layer, StepNeuron) or layer.by_sequence}
        return {name: shapes for name, shapes in self.shapes.items() if name not in others}

    @property
    def loops(self) -> bool:
        """True if the model ran a layer of another library several times, as a loop over time does."""
        return any(len(shapes) > 1 for shapes in self.by_call.values())

    def steps(self) -> int:
        """Returns the number of time steps that the model ran: calls of a layer, or the length of its sequences."""
        known = {name for name, _ in self.layers}
        calls = [len(shapes) for name, shapes in self.by_call.items() if name in known]
        lengths = [shapes[0][0] for name, shapes in self.shapes.items() if name in known and name not in self.by_call]
        if calls or lengths:
            return max(calls + lengths)
        return max((len(shapes) for shapes in self.shapes.values()), default=1)

    def keeps_time(self, steps: int, view: View) -> bool:
        """Returns whether all layers that run by themselves over time, and all outputs over time, had so many steps."""
        outputs = [slot.internal(part) for slot, part in zip(view.slots, tensors(self.selected), strict=True)]
        seen = [len(part) for slot, part in zip(view.slots, outputs, strict=True) if slot.over_time]
        seen += [shape[0] for name, shapes in self.shapes.items() if name not in self.by_call for shape in shapes]
        return all(length == steps for length in seen)

    def turns(self, steps: int, samples: int) -> bool:
        """Returns whether a layer that runs by itself over time saw the samples as time steps."""
        known = {name for name, _ in self.layers} - self.by_call.keys()
        return any(shape[:2] == (samples, steps) for name in known for shape in self.shapes.get(name, ()))

    def ambiguous(self, samples: int) -> bool:
        """Returns whether an output or a layer shows a number of time steps that is also the number of samples."""
        seen = [part.shape for part in tensors(self.selected)]
        seen += [shape for name, shapes in self.shapes.items() if name not in self.by_call for shape in shapes]
        return any(len(shape) > 2 and shape[:2] == (samples, samples) for shape in seen)

    def sees(self, steps: int, samples: int) -> bool:
        """Returns whether all layers saw these axes. A layer that runs by itself over time shows which axis is time; it
        may run over another number of steps."""
        for name, shapes in self.shapes.items():
            if name not in self.by_call and any(samples in shape[:1] or samples not in shape[1:2] for shape in shapes):
                return False
        others = [len(self.shapes[name]) for name in self.by_call]
        return not (samples in others and steps not in others)


def find_call(model: nn.Module, batch: Batch) -> tuple[Call, int]:
    """Returns how a model is called, and the number of time steps of a pass. Only a few of a batch's samples are taken,
    and of long sequences a part where the model takes it. Raises the model's error if no way fits. An error that says
    nothing about shapes is raised at once."""
    if batch.static:
        call, steps = found_with(model, few(batch, 1, 3), batch)
        return (call, steps) if steps != 3 else found_with(model, few(batch, 1, 4), batch)
    # A single time step is repeated, since it would not tell both axes apart.
    first = 2 if batch.steps == 1 else min(STEPS, batch.steps)
    if first != batch.steps:
        try:
            return found_with(model, few(batch, first, 2 if first == 3 else 3), batch)[0], batch.steps
        except (RecursionError, torch.OutOfMemoryError):
            raise
        except Exception:  # the model may need all time steps
            pass
    return found_with(model, few(batch, batch.steps, 2 if batch.steps == 3 else 3), batch)[0], batch.steps


def found_with(model: nn.Module, x: Tensor, batch: Batch) -> tuple[Call, int]:
    """Returns how a model is called with events x [T, B, ...]; see `find_call`."""
    layers, interface = spiking_layers(model), batch.interface
    own = bool(layers) and all(isinstance(neuron, SpikingNeuron) for _, neuron in layers)
    states = state_arguments(model)
    doubtful = bool(states) or (not layers and bool(unknown(model)))  # time steps may pass for samples
    trials: list[Trial] = []
    forgetful: Call | None = None
    for way in ways(interface.layout, own):
        for carries in (True, False) if way == "step" and carries_state(model) else (False,):
            inputs = batch.inputs.turned("BT" if way == "batch first" else "TB")
            call = Call(way, interface, inputs, carries=carries, states=states)
            trial = tried(model, layers, call, x, check=interface.layout == "BT")
            if way != "static" and x.shape[1] < OTHER and trial.ambiguous(x.shape[1]):
                return found_with(model, few(batch, len(x), OTHER + (len(x) == OTHER)), batch)
            if way == "sequence" and interface.layout == "TB" and trial.turns(len(x), x.shape[1]):
                raise UsageError(
                    "the model runs over the samples as if they were time steps; use layout='BT' if events are "
                    "[B, T, ...]"
                )
            done = None if trial.error else finished(model, call, trial, x)
            if done is None:
                trials.append(trial)
            elif not doubtful or way == "static" or remembers(model, done, trial, x):
                return done, trial.steps() if way == "static" else len(x)
            else:
                forgetful = forgetful or done
    if forgetful is not None:
        return forgetful, len(x)
    raise refused(trials)


def remembers(model: nn.Module, call: Call, trial: Trial, x: Tensor) -> bool:
    """Returns whether the outputs over time of a trial depend on earlier time steps, so that the model knows which axis
    is time."""
    if not call.view.over_time or len(x) < 2:
        return True
    changed = tried(model, trial.layers, call, torch.cat([10 * (1 + x[:1].abs()), x[1:]]), check=False)
    if changed.error is not None:
        return True
    return not torch.equal(*(call.view.internal(each.selected)[1:] for each in (trial, changed)))


def ways(layout: str, own: bool) -> list[str]:
    """Returns the ways to call a model that are tried in turn. own: all its neurons are those of `ulr_snn`."""
    if layout == "B":
        return ["static"]
    if layout == "BT":
        return ["sequence", "batch first"] if own else ["batch first", "sequence", "step"]
    return ["sequence"] if own else ["sequence", "step"]


def few(batch: Batch, steps: int, samples: int) -> Tensor:
    """Returns the first time steps of a few samples [T, B, ...]. They are repeated where there are too few."""
    x = batch.first_samples(samples, steps)
    if len(x) < steps:
        x = x.repeat(steps, *[1] * (x.ndim - 1))
    return x if x.shape[1] == samples else x.repeat(1, samples, *[1] * (x.ndim - 2))[:, :samples]


def tried(model: nn.Module, layers: Layers, call: Call, x: Tensor, check: bool) -> Trial:
    """Calls a model and returns what it showed. check: whether both axes of a sequence are to be told apart."""
    trial = Trial(call.way, layers)
    steps = ANY_STEPS if call.way == "static" else len(x)
    running = bind(model, NoiseLevel(Logistic()), steps=steps, layers=layers)
    try:
        with no_side_effects(model), torch.no_grad(), running, watching(model, trial):
            call.run(model, copied(x))
        if check and not trial.sees(len(x), x.shape[1]):
            raise UsageError(f"the model does not take {WAYS[call.way]}")
        trial.selected = call.read(model, trial.results, trial.steps() if call.way == "static" else len(x), x.shape[1])
    except (RecursionError, torch.OutOfMemoryError):
        raise
    except OF_SHAPES as error:
        trial.error = error
    return trial


@contextmanager
def watching(model: nn.Module, trial: Trial) -> Iterator[None]:
    """Notes the shapes of the inputs of all spiking layers, and of modules of unknown classes."""
    modules = {name: module_of(neuron) for name, neuron in trial.layers}
    others = set(unknown(model))
    modules |= {name: module for name, module in model.named_modules() if name in others}

    def noted(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found = next((item for item in (*given, *named.values()) if isinstance(item, Tensor)), None)
            if found is not None:
                trial.shapes.setdefault(name, []).append(found.shape)

        return hook

    with ExitStack() as stack:
        stack.callback(model.register_forward_hook(lambda _, given, result: trial.results.append(result)).remove)
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(noted(name), with_kwargs=True).remove)
        yield


def finished(model: nn.Module, call: Call, trial: Trial, x: Tensor) -> Call | None:
    """Returns the call with the form of the outputs that a trial showed; None, with the trial's error, if they have no
    known form."""
    steps, samples = trial.steps() if call.way == "static" else len(x), x.shape[1]
    found = tensors(trial.selected)
    over_time = [True] * len(found)
    pictures = call.way == "sequence" and any(part.ndim > 2 and part.shape[:2] == (samples, steps) for part in found)
    if pictures or (call.way == "batch first" and any(part.shape[1:2] == (steps,) or part.ndim > 2 for part in found)):
        over_time = follow_time(model, call, trial, x)
    slots = []
    for number, (part, timed) in enumerate(zip(found, over_time, strict=True)):
        slot = form_of(part, steps, samples, call.way, timed)
        if slot is None:
            which = f"part {number} of its result with " if len(found) > 1 else ""
            axes = "[B, T, C]" if call.way == "batch first" else "[T, B, C]"
            advice = ", or leave parts out by output=" if len(found) > 1 else ""
            trial.error = UsageError(
                f"the model returned {which}shape {tuple(part.shape)} for {steps} steps of a batch of {samples}; "
                f"return {axes} or [B, C]{advice}"
            )
            return None
        slots.append(slot)
    count = sum(
        isinstance(item, Tensor) and (samples in item.shape[:1] or (steps, samples) == item.shape[:2])
        for _, item in items(joined(trial.results[0], steps, samples, 0))
    )
    view = View.of(trial.selected, slots)
    return replace(call, view=view, count=1 if call.carries else count, keeps_time=trial.keeps_time(steps, view))


def form_of(part: Tensor, steps: int, samples: int, way: str, timed: bool) -> Slot | None:
    """Returns the form of an output. timed: whether an axis of as many entries as there are time steps is time."""
    static = Slot("B", part.shape[1:]) if part.shape[:1] == (samples,) else None
    if not timed:
        return static
    if way == "batch first" and part.ndim > 2 and part.shape[0] == samples:
        return Slot("BT", part.shape[2:])  # its second axis may have other time steps than the events
    slot = Slot.of(part, steps, samples, way == "batch first")
    if way == "static" and steps == 1:
        return slot or static
    if slot is None and way in ("static", "batch first"):  # a loop may stack its outputs on either axis
        slot = Slot.of(part, steps, samples, way != "batch first")
    if slot is None and way != "step" and part.ndim > 2 and part.shape[1] == samples:
        slot = Slot("TB", part.shape[2:])  # over other time steps than the events'
    return slot


def follow_time(model: nn.Module, call: Call, trial: Trial, x: Tensor) -> list[bool]:
    """Returns of each output whether its second axis follows the number of time steps, as [B, T, C] does, and [B, C]
    with as many classes as time steps does not. A model that takes no other number of steps has [B, T, C] or [B, C]."""
    other = x[: (len(x) + 1) // 2] if len(x) > 2 else torch.cat([x, x[-1:]])
    if call.way == "sequence":
        other = torch.cat([other, other[:, :1]], 1)  # a model that takes no other number of samples is refused as it is
    again = tried(model, trial.layers, call, other, check=False)
    found, samples = tensors(trial.selected), x.shape[1]
    if again.error is not None or len(tensors(again.selected)) != len(found):
        return [(part.ndim > 2 and part.shape[1] == len(x)) or part.shape[:1] != (samples,) for part in found]
    pairs = zip(found, tensors(again.selected), strict=True)
    return [before.shape[1:2] != after.shape[1:2] or before.shape[:1] != (samples,) for before, after in pairs]


def refused(trials: list[Trial]) -> Exception:
    """Returns the error of the way that the model most likely means, with notes on the others."""
    last = trials[-1]
    one_step = last.way == "step" and last.layers and not any(trial.loops for trial in trials[:-1])
    chosen = last if one_step else trials[0]
    error = chosen.error
    assert error is not None
    for trial in trials:
        other = trial.error
        if trial.way != chosen.way and str(other) != str(error) and not isinstance(error, UsageError):
            note = f"called with {WAYS[trial.way]}, it raises {type(other).__name__}: {other}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
    return error
