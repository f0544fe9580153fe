"""States that a model's own code keeps in attributes and buffers from one call to the next.

A training loop resets such states before each batch, by a method that only the model's author knows. But what a pass
leaves in the graph is a state of its batch: a next batch that began with it would go backward through the pass before.
So each pass begins with what was there before the first one.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn

from ulr_snn.adapters.blackbox import MODULES_OWN, SHARED, copied

DEEPEST = 4  # objects in objects that are looked into
LONG = 64  # of a long list, so many entries at either end are looked at

_memories: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # names of such attributes, known by a pass
_known: WeakSet[nn.Module] = WeakSet()  # models of which a pass with a graph has shown them


def in_graph(value: Any) -> bool:
    """Returns whether a value is, or contains, a tensor that was computed from parameters."""
    return any(True for _ in computed(value))


def computed(value: Any, depth: int = DEEPEST) -> Iterator[Tensor]:
    """Yields the tensors that a value is, or contains, and that were computed from parameters."""
    if isinstance(value, Tensor):
        yield from [value] if value.grad_fn is not None else []
        return
    if depth == 0 or isinstance(value, (*SHARED, str, bytes, int, float)):
        return
    if isinstance(value, Mapping):
        parts: Any = value.values()
    elif isinstance(value, Sequence):
        parts = value if len(value) <= LONG else [*islice(value, LONG), *islice(reversed(value), LONG)]
    else:
        parts = getattr(value, "__dict__", {}).values()
    for part in list(parts):
        yield from computed(part, depth - 1)


def duplicate(model: nn.Module) -> nn.Module:
    """Returns a deep copy of a model. States that its own code has kept, with their graphs, are copied without these,
    since torch copies no tensor in a graph."""
    held = [tensor for m in model.modules() for own in (vars(m), m._buffers) for tensor in computed(own)]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in held})


@dataclass
class Holder:
    """Attributes or buffers of a module as they were before a pass. names: of those that are known to be states, which
    are copies while the pass runs."""

    now: dict[str, Any]
    names: set[str]
    before: dict[str, Any] = field(init=False)
    linked: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.before = {name: value for name, value in self.now.items() if name not in MODULES_OWN}
        self.linked = {name for name, value in self.before.items() if in_graph(value)}
        for name in self.names & self.before.keys():
            self.now[name] = copied(self.before[name], {})

    def set_back(self) -> None:
        """Gives the states their values of before. What the pass has put into the graph is a state."""
        own = {name: value for name, value in self.now.items() if name not in MODULES_OWN}
        self.names |= {name for name, value in own.items() if name not in self.linked and in_graph(value)}
        for name in self.names:
            if name in self.before:
                self.now[name] = self.before[name]
            else:
                self.now.pop(name, None)


def once(model: nn.Module) -> bool:
    """Returns whether this is the first time that this function is asked about a model."""
    first = model not in _known
    _known.add(model)
    return first


@contextmanager
def own_memories(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within this context, a pass runs that begins with the states that the modules have now. Afterwards they have
    these again."""
    holders = []
    for module in modules:
        names = _memories.setdefault(module, set())
        holders += [Holder(module.__dict__, names), Holder(module._buffers, names)]
    try:
        yield
    finally:
        for holder in holders:
            holder.set_back()
