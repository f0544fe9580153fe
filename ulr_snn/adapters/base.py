"""The interface between firing sites and the spiking modules of other libraries."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ulr_snn.model.neurons import LIF


class Step(Protocol):
    """A site as a module of another library sees it. The module calls `begin`, `fire` and `end` once a time step. A
    module that runs a whole sequence [T, B, ...] calls them once."""

    def begin(self, current: Tensor) -> None:
        """Takes the input current [B, ...] of the step."""

    def fire(self, drive: Tensor) -> Tensor:
        """Returns the spikes (0 or 1) for the drive [B, ...], membrane minus threshold."""

    def end(self, states: list[Any]) -> None:
        """Takes the state that the module carries to the next step. The site ignores all but tensors. A neuron that is
        `inside` a function gives the function's output, a leaf of the graph."""

    # The last spikes, as a separate tensor for the layer's own reset: so the graph shows what else reads the spikes.
    # None before the first spikes, and if firing is deterministic.
    resetting: Tensor | None


class StepNeuron:
    """A spiking module that its library's own code runs. While it is bound, a site replaces only the firing decision.

    strict: whether a neuron fires only above a drive of 0; otherwise it fires at 0 too. whole: whether the module runs
    all time steps at once, which it can because its spikes do not act on its own membranes. inside: whether the site is
    asked inside a function of autograd, which links spikes to their drive by itself (`places.py`). slot: the attribute
    of the module that holds the site while it is bound; None: nothing reads it. widest: bounds the spread of membranes,
    in units of the threshold, after which the scale of the noise begins.
    """

    strict = True
    whole = False
    inside = False
    slot: str | None = "site"
    widest = math.inf

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module  # the attributes of the libraries' classes have no types
        self._scan: tuple[Any, list[nn.Module], LIF] | None = None  # the first: options that `ours` read

    @property
    def by_sequence(self) -> bool:
        """True if a call of the module gets a whole sequence [T, B, ...], not one time step."""
        return self.whole

    @property
    def scans(self) -> bool:
        """True if the module sees whole sequences, so that a scan of `ulr_snn` may replace it."""
        return False

    @property
    def threshold(self) -> Tensor:
        """Distance from reset to threshold, the unit of the firing noise; broadcasts against [B, ...]."""
        raise NotImplementedError

    def clear(self) -> None:
        """Resets the module to its initial state. A module needs no override if every call starts there, or if
        `Adapter.fresh_state` resets it."""

    def patches(self, site: Step) -> dict[str, Any]:
        """Returns the attributes of the module, by name, that make it run the site."""
        raise NotImplementedError

    def states(self) -> list[Tensor]:
        """Returns the state that the module carries to the next step, if `ours` may return a neuron."""
        return []

    def calls_in(self, steps: int) -> int:
        """Returns how often the site is asked in a pass over so many time steps. A call that holds all of them counts
        as so many."""
        return steps

    @contextmanager
    def seeing(self, see: Callable[[Tensor], None]) -> Iterator[None]:
        """Within this context, calls `see` with the spikes of every call."""

        def seen(_: nn.Module, __: Any, output: Any) -> None:
            see(output[0] if isinstance(output, tuple | list) else output)

        hook = self.module.register_forward_hook(seen)
        try:
            yield
        finally:
            hook.remove()

    def options(self) -> tuple[Any, ...]:
        """Returns all that `ours` depends on, except parameters and buffers."""
        return ()

    def ours(self, like: Tensor) -> tuple[list[nn.Module], LIF] | str:
        """Returns a neuron of `ulr_snn` with the module's equations and shared parameters, and modules that its current
        passes first; or the reason why there is none. like: a tensor with the current's dtype and device."""
        return "no scan of ulr_snn has its equations"

    def as_scan(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, LIF]:
        """Returns a neuron of `ulr_snn`, and the current [T, B, ...] with which it does what the module does for
        x [T, B, ...]. Only for a module that `scans`. lengths: number of steps of each sample, without padding."""
        key = self.options(), x.dtype, x.device
        if self._scan is None or self._scan[0] != key:
            self._scan = key, *self.ours(x)
        _, entry, neuron = self._scan
        for module in entry:
            x = module(x)
        neuron.lengths = lengths
        return x, neuron

    def unsupported(self) -> str | None:
        """Returns the reason why the module, in this configuration, cannot be trained; None if it can."""
        return None

    @contextmanager
    def bound(self, site: Step | None) -> Iterator[None]:
        """Within this context, the module runs the site (None: its own firing) from its initial state. Afterwards all
        attributes of the module are as before."""
        attributes = self.module.__dict__
        kept = {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in attributes.items()}
        try:
            self.clear()
            if site is not None:
                attributes.update(self.patches(site))
            yield
        finally:
            for value, content in kept.values():
                if content is not None and (value or content):  # most are empty
                    put_back(value, content)
            put_back(attributes, {name: value for name, (value, _) in kept.items()})


def put_back(now: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Gives a dictionary the entries that it had before. Those are never missing, since other threads may read a
    module's attributes at any time."""
    for name in now.keys() - before.keys():
        del now[name]
    now.update(before)


def no(_: Any) -> bool:
    """Returns False, for hooks that a library does not need."""
    return False


@dataclass(frozen=True)
class Adapter:
    """The functions that describe a library. Each adapter file defines one, with the name `ADAPTER`.

    adapt: returns the module as a neuron, the reason why it cannot be trained, or None if it does not spike.
    fresh_state: a context in which a model starts from its initial state, also in modules that do not fire.
    couples: whether a module, in training mode, couples the rows of a batch or draws noise (dropout).
    carries_state: whether a model returns its state after its outputs and takes the state at the next time step.
    per_row: whether a module sees each row of a batch, and each time step of a sequence [T, B, ...], by itself.
    """

    adapt: Callable[[nn.Module], StepNeuron | str | None]
    fresh_state: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
    couples: Callable[[nn.Module], bool] = no
    carries_state: Callable[[nn.Module], bool] = no
    per_row: Callable[[nn.Module], bool] = no
