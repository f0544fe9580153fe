"""A recorded pass of a model, and the chains that it shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ulr_snn.model.call import Call, generator_state, set_generator_state
from ulr_snn.model.chain import Chain, NoChain, OverTime
from ulr_snn.model.equivalence import Equal, check_numbers, equations
from ulr_snn.model.graph import leaves
from ulr_snn.model.habits import Watched, changed_buffer, changed_option, holds_nan, options, own_buffers
from ulr_snn.model.links import assembled, check_each_step, check_end, check_link, check_module, check_norms
from ulr_snn.model.recording import Given, Link, Recorder
from ulr_snn.model.tail import Tail
from ulr_snn.model.trees import tensors
from ulr_snn.noise.firing import Logistic
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import Layers, bind


@dataclass
class RecordedPass:
    """A recorded pass of deterministic firing. start: what the model was given; outputs: what is read of its result;
    generator: state of torch's generators before the pass; equal: what takes the place of neurons, by name."""

    model: nn.Module
    call: Call
    x: Tensor
    layers: Layers
    recorder: Recorder
    start: Given
    outputs: Tensor
    generator: Any
    equal: dict[str, Equal] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, call: Call, x: Tensor, layers: Layers) -> "RecordedPass":
        """Records a pass over events x [T, B, ...]. Raises NoChain for a forward with side effects or branches."""
        recorder, start = Recorder(model, layers), Given.to_model(x[:1] if call.way == "static" else x)
        generator, buffers = generator_state(), own_buffers(model)
        firing = bind(model, NoiseLevel(Logistic()), steps=len(x), layers=layers)
        watched = Watched(model, lambda: not recorder.inside)
        thresholds = recorder.thresholds()
        with torch.enable_grad(), firing, recorder.watching(), watched:
            (outputs,) = tensors(call.selected(model, start.tensor))
            moved = recorder.thresholds()  # they are restored after the pass
        if idle := [name for name, _ in layers if name not in (*recorder.calls, *recorder.odd)]:
            raise NoChain(f"{idle[0]} does not run")
        if watched.reads:
            raise NoChain("its code reads numbers from tensors, as branches on values do")
        if watched.writes:
            raise NoChain("its code changes parameters or buffers")
        name = changed_buffer(thresholds, moved) or changed_buffer(buffers, own_buffers(model))
        if name is not None:
            raise NoChain(f"its code changes {name}")
        chosen = options(model)
        found = cls(model, call, x, layers, recorder, start, outputs, generator)
        try:
            again = found.again(lambda: call.selected(model, start.leaf.detach().clone()))
        except Exception as error:  # the recorded pass had gradients
            raise NoChain(f"it cannot run without gradients, {type(error).__name__}") from error
        if not alike(again, outputs):
            raise NoChain("two passes over the same events have different outputs")
        if (name := changed_option(chosen, options(model))) is not None:
            raise NoChain(f"its code changes {name}")
        return found

    @torch.no_grad()
    def again(self, run: Callable[[], Any]) -> Tensor:
        """Returns the outputs of another pass, with the same draws of torch's generators."""
        set_generator_state(self.generator)
        with bind(self.model, NoiseLevel(Logistic()), steps=len(self.x), layers=self.layers):
            (outputs,) = tensors(run())
        return outputs

    @property
    def axis(self) -> int:
        """The axis of time in the outputs."""
        return int(self.call.view.slots[0].axes == "BT")

    @property
    def links(self) -> list[Link]:
        return self.recorder.links(*self.x.shape[:2])

    def check_reading(self, links: list[Link], i: int) -> None:
        """Raises NoChain unless link i reads what the link before it gives."""
        check_link(self.start, links[i - 1] if i else None, links[i], self.call.way == "static")

    def neuron_of(self, link: Link) -> Equal | None:
        """Returns what takes the place of a neuron; None for other modules. Raises NoChain."""
        if link.name in self.recorder.neurons and link.name not in self.equal:
            features = link.features(True, *self.x.shape[:2])
            self.equal[link.name] = equations(self.recorder.neurons[link.name], link, features, self.x)
        return self.equal.get(link.name)

    def chain(self) -> Chain:
        """Returns the chain that is all of the model. Raises NoChain."""
        links = self.links
        for reason in self.recorder.odd.values():
            raise NoChain(reason)
        check_norms(links, len(links))
        for i in range(len(links)):
            self.check_reading(links, i)
        kind = check_end(links[-1], self.outputs, self.axis)
        end = [OverTime(kind)] if kind else []
        return self.checked(links, self.outputs.detach().transpose(0, self.axis), end)

    def checked(
        self, links: list[Link], outputs: Tensor, end: Sequence[nn.Module] = (), tail: Tail | None = None, why: str = ""
    ) -> Chain:
        """Returns the chain of these links and of the modules at their end, if it gives the recorded currents and these
        outputs. Raises NoChain. tail, why: see `Chain`."""
        stages, swapped, currents = assembled(links, self.neuron_of, self.x)
        chain = Chain(self.model, [*stages, *end], swapped, [link.name for link in links], tail, why)
        fired = [link.sequence(True) for link in links if id(link.module) in swapped]
        check_numbers(chain, self.x, [*currents, outputs], fired)
        return chain

    def beginning(self, why: str) -> Chain | None:
        """Returns a chain of the first modules with the rest of the model behind it; None if there is no such chain
        that has a neuron of its own. why: why the model as a whole is no chain."""
        links, neurons = self.links, self.recorder.neurons
        if not self.start.unchanged:
            return None
        for count in range(self.reach(links), 0, -1):
            own = [link for link in links[:count] if link.name in neurons and not neurons[link.name].scans]
            if not own:
                return None
            found = self.with_tail(links, count, why) if self.hidden(links, count) else None
            if found is not None:
                return found
        return None

    def reach(self, links: list[Link]) -> int:
        """Returns how many of the first links are those of a chain."""
        size = self.x.shape[:2]
        for i, link in enumerate(links):
            try:
                check_norms(links, i + 1)
                self.check_reading(links, i)
                link.features(False, *size)
                link.features(True, *size)
                neuron = self.neuron_of(link) is not None
                for name in within(link.name):
                    check_module(name, self.model.get_submodule(name), neuron)
                for name, module in link.module.named_modules() if neuron else ():  # such as its recurrent weights
                    check_module(f"{link.name}.{name}", module, neuron)
                if link.mode == "whole" and not neuron:
                    check_each_step(link)
            except NoChain:
                return i
        return len(links)

    def hidden(self, links: list[Link], count: int) -> bool:
        """Returns whether nothing behind the first links reads what they give, except of the last of them."""
        inner = {id(call.gave.leaf) for link in links[: count - 1] for call in link.calls}
        later = [call.read for link in links[count:] for call in link.calls]
        return not inner & leaves([self.outputs, *later])

    def with_tail(self, links: list[Link], count: int, why: str) -> Chain | None:
        """Returns the chain of so many first links with the rest of the model behind it; None if that gives other
        outputs, fails, or keeps what is computed inside the chain."""
        first, (steps, rows) = links[:count], self.x.shape[:2]
        try:
            tail = Tail(self.model, self.call, links, count, (steps, rows), self.axis)
            known = first[-1].sequence(True).reshape(steps, rows, *first[-1].features(True, steps, rows))
            chain = self.checked(first, known, tail=tail, why=why)
        except NoChain:
            return None
        kept: list[bool] = []  # whether states are NaN, which the neurons' own are after the pass no more

        def run() -> Tensor:
            outputs = tail(self.start.leaf.detach().clone(), known)
            kept.append(holds_nan(self.model))
            return outputs

        try:
            outputs = self.again(run)
        except Exception:  # what the model's own code does with NaN
            return None
        return chain if alike(outputs, self.outputs.transpose(0, self.axis)) and not any(kept) else None


def alike(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors are equal up to rounding."""
    return one.shape == other.shape and torch.allclose(one, other.detach())


def within(name: str) -> list[str]:
    """Returns the names of a module and of all modules that hold it, apart from the model."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
