"""The rest of a model behind a chain of its first modules: its own code, which finds what these modules compute known.

The model's own forward runs, with its time loop, states, outputs and whatever it computes between. Only the modules of
the chain compute nothing: at time step t the last of them gives step t of the chain's sequence. The others, and states,
give NaN, since the recorded pass showed that nothing behind the chain reads them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.model.call import Call
from ulr_snn.model.recording import Link
from ulr_snn.model.trees import mapped, tensors
from ulr_snn.sites.binding import turn


class Tail:
    """Runs a model's own code behind a chain. model, call: the model, and how it is called; links: its modules in their
    order, `count` of which are the chain; size: time steps and rows of the pass in which they were recorded; axis: that
    of time in the outputs."""

    def __init__(
        self, model: nn.Module, call: Call, links: list[Link], count: int, size: tuple[int, int], axis: int
    ) -> None:
        self.model, self.call, self.links, self.count, self.size, self.axis = model, call, links, count, size, axis

    @property
    def last(self) -> Link:
        """The last module of the chain."""
        return self.links[self.count - 1]

    def __call__(self, x: Tensor, known: Tensor) -> Tensor:
        """Returns the model's outputs [T, B, ...] or [B, ...] for events x, from the outputs [T, B, ...] of the chain.
        Raises UsageError if the model does not run the chain's last module once a time step."""
        whole = [known.flatten(0, 1) if self.last.mode == "folded" else known]
        now = iter(known.unbind() if self.last.mode == "step" else whole)
        with turn(self.model), self._knowing(known.shape[:2], now):
            (outputs,) = tensors(self.call.selected(self.model, x))
        if next(now, None) is not None:
            raise UsageError(f"{self.last.name} ran fewer times than there are time steps; run a layer once in each")
        return outputs.transpose(0, self.axis)

    @contextmanager
    def _knowing(self, size: tuple[int, ...], now: Iterator[Tensor]) -> Iterator[None]:
        """Replaces the forward of all modules of the chain within this context. A module that runs several times in a
        time step may be part of the chain at some of them."""
        forwards: dict[nn.Module, list[Callable[..., Any]]] = {link.module: [] for link in self.links[: self.count]}
        for i, link in enumerate(self.links):
            if link.module in forwards:
                own = link.module.forward
                forwards[link.module].append(self._replayed(link, size, now) if i < self.count else own)
        kept = {module: vars(module).get("forward") for module in forwards}
        for module, turns in forwards.items():
            vars(module)["forward"] = turns[0] if len(turns) == 1 else in_turn(turns)
        try:
            yield
        finally:
            for module, forward in kept.items():
                del vars(module)["forward"]
                if forward is not None:
                    vars(module)["forward"] = forward

    def _replayed(self, link: Link, size: tuple[int, ...], now: Iterator[Tensor]) -> Callable[..., Any]:
        """Returns a forward that gives what a module gave when it was recorded, but with NaN as numbers; for the last
        module, the first tensor is the next of `now`."""

        def leads(steps: int, rows: int) -> tuple[tuple[int, ...], ...]:
            return {"step": (rows,), "whole": (steps, rows), "folded": (steps * rows,)}[link.mode], (rows,)

        axes = list(zip(leads(*self.size), leads(*size), strict=True))

        def blank(tensor: Tensor) -> Tensor:
            found = next(((old, new) for old, new in axes if tensor.shape[: len(old)] == old), None)
            if found is None:
                return tensor
            value = tensor.new_full((), math.nan if tensor.is_floating_point() else 0)
            return value.expand(*found[1], *tensor.shape[len(found[0]) :])

        given = mapped(link.calls[0].output, blank)
        if link is not self.last:
            return lambda *_, **__: given

        def forward(*_: Any, **__: Any) -> Any:
            first = next(now, None)
            if first is None:
                raise UsageError(f"{link.name} ran more often than there are time steps; run a layer once in each")
            return (first, *given[1:]) if isinstance(given, tuple) else first

        return forward


def in_turn(forwards: list[Callable[..., Any]]) -> Callable[..., Any]:
    """Returns a function that calls these functions in turn."""
    following = cycle(forwards)
    return lambda *arguments, **named: next(following)(*arguments, **named)
