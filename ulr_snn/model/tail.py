"""The rest of a model behind a chain of its first modules: its own code, which receives the outputs of these modules.

The model's own forward runs, with its time loop, states, outputs and whatever it computes between. Only the modules of
the chain compute nothing: at time step t the last of them gives step t of the chain's sequence. The others, and states,
give NaN, since the recorded pass showed that nothing behind the chain reads them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from torch import Tensor, nn

from ulr_snn.errors import UsageError
from ulr_snn.model.call import Call
from ulr_snn.model.chain import NoChain
from ulr_snn.model.recording import Link, leading
from ulr_snn.model.trees import mapped, tensors
from ulr_snn.sites.binding import turn

Axes = tuple[int, ...]


@dataclass(frozen=True)
class Blank:
    """The form of a tensor that a module returned: its axes of time and samples, its other axes, and its dtype."""

    lead: str  # "link": those of the module's output; "rows": samples; "": it has neither, and stays as it is
    features: Axes
    tensor: Tensor  # without memory of its own, or the tensor itself

    @classmethod
    def of(cls, tensor: Tensor, lead: Axes, rows: int, first: bool) -> "Blank":
        """Raises NoChain if it is not clear what the axes are."""
        fits = [name for name, axes in (("link", lead), ("rows", (rows,))) if tensor.shape[: len(axes)] == axes]
        if not first and len(fits) > 1 and lead != (rows,):
            raise NoChain("a module returns a tensor whose axes may be time or features")
        if not fits:
            return cls("", (), tensor.detach())
        empty = tensor.detach().new_full((), math.nan if tensor.is_floating_point() else 0)
        return cls(fits[0], tuple(tensor.shape[len(lead) if fits[0] == "link" else 1 :]), empty)

    def like(self, lead: Axes, rows: int) -> Tensor:
        """Returns NaN in this form, for other numbers of time steps and samples."""
        if not self.lead:
            return self.tensor
        return self.tensor.expand(*(lead if self.lead == "link" else (rows,)), *self.features)


@dataclass(frozen=True)
class Part:
    """A module of a chain: how it is called, and the form of its result."""

    module: nn.Module
    name: str
    mode: str
    output: Any

    @classmethod
    def of(cls, link: Link, size: tuple[int, int]) -> "Part":
        """size: time steps and samples of the pass in which the module was recorded."""
        output, first = link.calls[0].output, link.calls[0].gave.leaf
        blank = lambda t: Blank.of(t, leading(link.mode, *size), size[1], t is first)  # noqa: E731
        return cls(link.module, link.name, link.mode, mapped(output, blank))

    def blank(self, steps: int, rows: int) -> Any:
        """Returns NaN in the form of the module's result."""
        return mapped(self.output, lambda each: each.like(leading(self.mode, steps, rows), rows), Blank)


class Tail:
    """Runs a model's own code behind a chain. model, call: the model, and how it is called; links: its modules in their
    order, `count` of which are the chain; size: time steps and samples of the pass in which they were recorded; axis:
    that of time in the outputs."""

    def __init__(
        self, model: nn.Module, call: Call, links: list[Link], count: int, size: tuple[int, int], axis: int
    ) -> None:
        self.model, self.call, self.axis = model, call, axis
        self.parts = [Part.of(link, size) for link in links[:count]]
        self.later = [link.module for link in links[count:]]

    def __call__(self, x: Tensor, known: Tensor) -> Tensor:
        """Returns the model's outputs [T, B, ...] or [B, ...] for events x, from the outputs [T, B, ...] of the chain.
        Raises UsageError if the model does not run the chain's last module once a time step."""
        last = self.parts[-1]
        now = iter(known.unbind() if last.mode == "step" else [known.flatten(0, 1) if last.mode == "folded" else known])
        with turn(self.model), self._knowing(known.shape[0], known.shape[1], now):
            (outputs,) = tensors(self.call.selected(self.model, x))
        if next(now, None) is not None:
            raise UsageError(f"{last.name} ran fewer times than there are time steps; run a layer once in each")
        return outputs.transpose(0, self.axis)

    @contextmanager
    def _knowing(self, steps: int, rows: int, now: Iterator[Tensor]) -> Iterator[None]:
        """Replaces the forward of all modules of the chain within this context. A module that runs several times in a
        time step may be part of the chain at some of them."""
        forwards: dict[nn.Module, list[Callable[..., Any]]] = {part.module: [] for part in self.parts}
        for part in self.parts:
            forwards[part.module].append(
                replayed(part, part.blank(steps, rows), now if part is self.parts[-1] else None)
            )
        for module in self.later:
            if module in forwards:
                forwards[module].append(module.forward)
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


def replayed(part: Part, given: Any, now: Iterator[Tensor] | None) -> Callable[..., Any]:
    """Returns a forward that gives this result, with the next of `now`, if that is not None, as its first tensor."""
    if now is None:
        return lambda *_, **__: given

    def forward(*_: Any, **__: Any) -> Any:
        first = next(now, None)
        if first is None:
            raise UsageError(f"{part.name} ran more often than there are time steps; run a layer once in each")
        return (first, *given[1:]) if isinstance(given, tuple) else first

    return forward


def in_turn(forwards: list[Callable[..., Any]]) -> Callable[..., Any]:
    """Returns a function that calls these functions in turn."""
    following = cycle(forwards)
    return lambda *arguments, **named: next(following)(*arguments, **named)
