"""What a firing site needs of a spiking module of another library."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ulr_snn.model.neurons import SpikingNeuron


class Step(Protocol):
    """A site as a module of another library sees it. Once a time step (or once, of a module that runs a whole sequence
    [T, B, ...] at once), in this order:"""

    def begin(self, current: Tensor) -> None:
        """The input current [B, ...] of the step."""

    def fire(self, drive: Tensor) -> Tensor:
        """Spikes (0 or 1) of the drive [B, ...], membrane less threshold."""

    def end(self, states: list[Any]) -> None:
        """What the module carries to the next step; all but tensors are left out."""

    # The spikes fired last, for the layer's own reset, so that it is known whether anything else reads them; None
    # before the first, and where firing is deterministic.
    resetting: Tensor | None


class StepNeuron:
    """A spiking module that its library's own code runs; only what decides on a spike is replaced while it is bound.

    strict: fires where the drive is above 0; else already where it is 0. whole: runs all time steps at once, for its
    spikes do not act on its own membranes.
    """

    strict = True
    whole = False
    scans = False  # whether the module sees whole sequences, over which a scan of `ulr_snn` may run in its place

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._scan: tuple[Any, list[nn.Module], SpikingNeuron] | None = None  # and what it was made for

    @property
    def threshold(self) -> Tensor:
        """Distance from reset to threshold, the unit of the firing noise; broadcasts against [B, ...]."""
        raise NotImplementedError

    def clear(self) -> None:
        """Makes the module start from its initial state; nothing to do where every call starts there, or where
        `Adapter.fresh_state` does it."""

    def patches(self, site: Step) -> dict[str, Any]:
        """Attributes of the module, by name, that make it run the site."""
        raise NotImplementedError

    def states(self) -> list[Tensor]:
        """What the module carries to the next step, where `ours` may ask for a scan."""
        return []

    def options(self) -> tuple[Any, ...]:
        """What `ours` depends on, other than parameters and buffers."""
        return ()

    def ours(self, like: Tensor) -> tuple[list[nn.Module], SpikingNeuron] | str:
        """A neuron of `ulr_snn` with the module's equations and its very parameters, and modules that its current goes
        through before; or why there is none. like: a current's dtype and device."""
        return "its equations are no scan of ulr_snn's"

    def as_scan(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, SpikingNeuron]:
        """The current [T, B, ...] of a neuron of `ulr_snn` that does for x [T, B, ...] what the module does, and that
        neuron, where the module `scans`. lengths: steps of each sample that are no padding."""
        about = self.options(), x.dtype, x.device
        if self._scan is None or self._scan[0] != about:
            self._scan = about, *self.ours(x)
        _, entry, neuron = self._scan
        for module in entry:
            x = module(x)
        neuron.lengths = lengths
        return x, neuron

    def unsupported(self) -> str | None:
        """Why this module, as it is configured, cannot be trained; None where it can."""
        return None

    @contextmanager
    def bound(self, site: Step | None) -> Iterator[None]:
        """Runs the site for a while, or the module's own firing, from the initial state; afterwards all attributes are
        as they were."""
        attributes = self.module.__dict__
        kept = {name: (value, dict(value) if isinstance(value, dict) else None) for name, value in attributes.items()}
        try:
            self.clear()
            if site is not None:
                attributes.update(self.patches(site))
            yield
        finally:
            attributes.clear()
            for name, (value, content) in kept.items():
                if content is not None:
                    value.clear()
                    value.update(content)
                attributes[name] = value


def no(_: Any) -> bool:
    return False


@dataclass(frozen=True)
class Adapter:
    """What is known of a library. An adapter file has one, by the name `ADAPTER`.

    adapt: the module as a neuron, the reason why it cannot be trained, or None where it does not spike.
    fresh_state: for a while, a model starts from its initial state, also in modules that do not fire.
    couples: a module, in training mode, couples the rows of a batch or draws noise of its own (dropout).
    carries_state: a model returns its state after its outputs, and takes it again at the next time step.
    per_row: a module sees each row of a batch by itself, and a sequence [T, B, ...] one time step after another.
    """

    adapt: Callable[[nn.Module], StepNeuron | str | None]
    fresh_state: Callable[[nn.Module], AbstractContextManager] = nullcontext
    couples: Callable[[nn.Module], bool] = no
    carries_state: Callable[[nn.Module], bool] = no
    per_row: Callable[[nn.Module], bool] = no
