"""Traces of the operations of a model's code in a pass, as far as comparisons and detours need them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from ulr_snn.adapters import libraries
from ulr_snn.adapters.comparisons import (
    CASTS,
    CLIMBS,
    COMPARISONS,
    DECISIONS,
    Climb,
    Comparison,
    Key,
    Rounding,
    Sides,
    climbed,
    climbing,
    known,
    remember,
    spot_of,
)
from ulr_snn.adapters.intercept import SKIPPED, caller, path, user_frame
from ulr_snn.model.staircase import staircase

KEPT = 2  # calls of an operation at a spot whose values are kept
LIKES = {  # of their argument, they read the shape alone
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor),
}
SETS = {Tensor.__setitem__, Tensor.data.__set__}  # type: ignore[attr-defined]


@dataclass(eq=False)
class Node:
    """A result of an operation. index: its place in the trace. parents: of its arguments. keys: the operation at each
    spot where it gave this result. path: the operation, and the path of calls to it. call: the operation with its
    arguments, tensors as nodes, if values are kept. decides: the function and path of a comparison; turned: its second
    argument is the membrane; climbs: the operations of a staircase before it, at their spots."""

    index: int
    parents: tuple["Node", ...]
    shape: torch.Size
    dtype: torch.dtype
    trained: bool
    keys: list[Key] = field(default_factory=list)
    path: Any = None
    call: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None
    value: Tensor | None = None
    is_parameter: bool = False
    decides: Any = None
    turned: bool = False
    climbs: list[Key] = field(default_factory=list)
    children: list["Node"] = field(default_factory=list)

    @property
    def floating(self) -> bool:
        return self.dtype.is_floating_point

    def recent(self, first: int, upwards: bool = True) -> set["Node"]:
        """Returns the nodes from which this one follows, down to an index, and itself; or those that follow from it up
        to an index."""
        found, stack = {self}, [self]
        while stack:
            node = stack.pop()
            for other in node.parents if upwards else node.children:
                if other not in found and (other.index >= first if upwards else other.index <= first):
                    found.add(other)
                    stack.append(other)
        return found


class _Unhandled(Function):
    """`Rounding`, of which no handler takes calls over."""

    @staticmethod
    def forward(ctx: Any, membrane: Tensor, climb: Climb) -> Tensor:
        return climb(membrane)


class Tracing(TorchFunctionMode):
    """Runs comparisons in code of the model as calls of `Comparison`, and notes operations. modules: ids of those of
    the model; within: returns whether the code that runs may fire by comparisons; last: returns the key of the last
    call of `Comparison`."""

    def __init__(self, modules: frozenset[int], within: Callable[[], bool], last: Callable[[], Any]) -> None:
        super().__init__()
        self.modules, self.within, self.last, self.muted = modules, within, last, False
        self.nodes: list[Node] = []
        self._leaves: dict[int, tuple[Tensor, Node]] = {}  # the tensors stay alive, so that ids stay theirs
        self._counts: dict[Any, int] = {}
        self._same: dict[Any, Node] = {}
        self._stairs: dict[Any, bool] = {}

    def __torch_function__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if self.muted:
            return operation(*args, **named)
        decides = self._decision(operation, args, named) if operation in DECISIONS else None
        found = climbing(operation, args, named) if operation in CLIMBS else None
        given = flat([*args, *named.values()])
        read = 0 if operation in LIKES else 1 if operation in CASTS else len(given)
        parents = tuple(map(self.node, given[:read]))
        climbs: list[Key] = []
        versions = [(t._version, t.requires_grad) for t in given]
        result = operation(*args, **named)
        if found is not None and result is not args[0]:
            decides = self._staircase(*found, result)
            if decides is None:
                climbed(result, found)
            else:
                climbs = self._between(parents[0], self.node(found[0]))
                parents = (self.node(found[0]),)
        changed = args[:1] if operation in SETS else ()
        for out in flat([result, *changed]):
            before = next((v for t, v in zip(given, versions, strict=True) if t is out), None)
            if before is None or before != (out._version, out.requires_grad) or changed:
                self._note(out, operation, parents, args, named, decides).climbs = climbs
        return result

    def node(self, tensor: Tensor) -> Node:
        """Returns the node of a tensor; a new one for a tensor that no operation has made."""
        said = getattr(tensor, "ulr_node", None)
        if said is not None and said[0] is self:
            node: Node = said[1]
            return node
        if id(tensor) not in self._leaves:
            node = self._new((), tensor)
            node.is_parameter = isinstance(tensor, torch.nn.Parameter)
            node.value = tensor.detach()
            self._leaves[id(tensor)] = tensor, node
        return self._leaves[id(tensor)][1]

    def _between(self, last: Node, first: Node) -> list[Key]:
        """Returns the keys of the operations of one number from a node on to another."""
        return [] if last is first else [*last.keys, *self._between(last.parents[0], first)]

    def _new(self, parents: tuple[Node, ...], tensor: Tensor) -> Node:
        node = Node(len(self.nodes), parents, tensor.shape, tensor.dtype, tensor.requires_grad)
        self.nodes.append(node)
        return node

    def _note(
        self,
        out: Tensor,
        operation: Any,
        parents: tuple[Node, ...],
        args: tuple[Any, ...],
        named: Mapping[str, Any],
        decides: Any,
    ) -> Node:
        frame = user_frame()
        key: Key = (operation, (0, 0) if frame is None else spot_of(frame))
        here = operation, path(self.modules)
        count = self._counts[here] = self._counts.get(here, 0) + 1
        kept = count <= KEPT and operation not in LIKES
        plain = tuple(a for a in args if not isinstance(a, Tensor))
        again = kept and decides is None and not named and all(isinstance(a, int | float | str | None) for a in plain)
        same = (operation, tuple(p.index for p in parents), plain) if again else None
        before = self._same.get(same)
        if before is not None and before.value is not None and torch.equal(before.value, out):
            before.keys.append(key)  # computed again
            node = before
        else:
            node = self._new(parents, out)
            node.path = here
            node.keys.append(key)
            for parent in dict.fromkeys(parents):
                parent.children.append(node)
            if decides is not None:
                node.decides, node.turned = decides
            if same is not None:
                self._same[same] = node
            if kept:
                node.value = out.detach().clone()
                node.call = operation, tuple(map(self._plain, args)), {n: self._plain(a) for n, a in named.items()}
        if out.is_leaf and out.requires_grad:
            self._leaves[id(out)] = out, node
        else:
            out.ulr_node = self, node  # type: ignore[attr-defined]
        return node

    def _plain(self, item: Any) -> Any:
        return self.node(item) if isinstance(item, Tensor) else item

    def _decision(self, operation: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Runs a comparison as `Comparison`, and returns the key of this call, and whether it is turned; None for one
        that cannot fire."""
        given = (*args, *named.values())
        turned = operation in COMPARISONS and len(given) == 2 and trained(given[1]) and not trained(given[0])
        sides = Sides.of(operation, given, turned)
        if sides is None or not self.may_decide():
            return None
        spikes = known(self, sides)
        if spikes is None:
            spikes = Comparison.apply(sides.drive, sides.strict)
            remember(self, sides, named_by(spikes, self.last()))
        return getattr(spikes, "ulr_key", None), turned

    def may_decide(self) -> bool:
        """Returns whether the code that runs may fire: the model's own, and not that of a neuron that is known."""
        return caller(__file__) not in (*SKIPPED, *libraries()) and self.within()

    def _staircase(self, start: Tensor, climb: Climb, result: Tensor) -> Any:
        """Runs operations that round as `Rounding`, if they make a staircase, and returns the key of this call."""
        if not (climb.rounds and trained(start) and self.may_decide()):
            return None
        here = path(self.modules)
        if here not in self._stairs:
            with self.mute():
                stairs = staircase(_Unhandled, [((start.detach(), climb), result.detach())])
            self._stairs[here] = stairs is not None
        if not self._stairs[here]:
            return None
        Rounding.apply(start, climb)
        return self.last(), False

    @contextmanager
    def mute(self) -> Iterator[None]:
        """Within this context, operations are not seen."""
        before, self.muted = self.muted, True
        try:
            yield
        finally:
            self.muted = before


def named_by(spikes: Any, key: Any) -> Tensor:
    """Returns spikes, with the key of their comparison as an attribute."""
    spikes.ulr_key = key
    result: Tensor = spikes
    return result


def trained(item: Any) -> bool:
    """Returns whether an argument is a tensor in the graph."""
    return isinstance(item, Tensor) and item.requires_grad


def replayed(node: Node, of: Node, value: Tensor) -> Tensor | None:
    """Returns the value of a node if another node had another value; None if not all values are kept. Comparisons stay
    as they are."""
    after = of.recent(node.index, upwards=False)
    found: dict[Node, Tensor | None] = {of: value}

    def compute(wanted: Node) -> Tensor | None:
        if wanted in found:
            return found[wanted]
        result = wanted.value
        if wanted in after and wanted.decides is None:
            result = again(wanted)
        found[wanted] = result
        return result

    def again(wanted: Node) -> Tensor | None:
        if wanted.call is None:
            return None
        operation, args, named = wanted.call
        given: list[Any] = []
        for item in (*args, *named.values()):
            value = compute(item) if isinstance(item, Node) else None
            if isinstance(item, Node) and value is None:
                return None
            given.append(item if value is None else value.clone())
        result = operation(*given[: len(args)], **dict(zip(named, given[len(args) :], strict=True)))
        return result if isinstance(result, Tensor) and result.shape == wanted.shape else None

    with torch.no_grad():
        return compute(node)


def flat(items: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors among items, and in lists and tuples among them."""
    found: list[Tensor] = []
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple):
            found += flat(item)
    return found
