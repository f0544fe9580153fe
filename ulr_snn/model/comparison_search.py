"""Search for comparisons in plain torch by which neurons fire, and for detours that give them other gradients.

A comparison fires if what the model returns follows from the spikes other than by the neuron's own membrane. So a mask
that bounds a membrane, or that makes a ReLU of it, is no neuron. A detour is an operation whose value does not depend
on a number, though its gradient does. One that gives a comparison the gradient of something else fires, too.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ulr_snn.adapters.comparisons import BENDS, CLIMBS, Key, Rule
from ulr_snn.model.tracing import KEPT, Node, replayed

FORWARD, BACK = 4, 3  # operations between a cut and the end of a detour, and between what it cuts and its beginning


@dataclass(frozen=True)
class Detour:
    """An operation `end` whose value does not depend on `soft`, though its gradient does. decisions: the comparisons
    on which its value depends."""

    soft: Node
    end: Node
    decisions: tuple[Node, ...]


@dataclass
class Comparisons:
    """The comparisons of a trace by which neurons fire. calls: their results, by function and path. ways: detours
    around them."""

    calls: dict[Any, list[Node]]
    ways: list[Detour]

    @classmethod
    def of(cls, nodes: list[Node], outputs: Collection[Node], plain: bool) -> "Comparisons":
        """Finds the comparisons that fire. outputs: what the model returns. plain: also those without a detour."""
        calls: dict[Any, list[Node]] = {}
        for node in nodes:
            if node.decides is not None:
                calls.setdefault(node.decides, []).append(node)
        ways = list(detours(nodes)) if calls else []
        around = cls(calls, ways).around()
        returned = {node for output in outputs for node in output.recent(0)} if calls else set()
        unseen = max((node.index for node in returned if not (node.keys or node.is_parameter)), default=0)
        returned |= set(nodes[:unseen])  # what a layer returns that is not traced may follow from all before it

        def fires(key: Any, found: list[Node]) -> bool:
            alone = plain and key not in around and in_graph(found) and emits(found, returned, outputs)
            return (alone or key in around) and behind_parameters(found[-1])

        return cls({key: found for key, found in calls.items() if fires(key, found)}, ways)

    def around(self) -> set[Any]:
        """Returns the keys of comparisons within detours."""
        return {call.decides for way in self.ways for call in way.decisions}

    def rules(self, firing: Collection[Any]) -> dict[Key, Rule]:
        """Returns the rules by which the model's code runs where these fire."""
        calls = [call for key, found in self.calls.items() if key in firing for call in found]
        return rules(calls, [way for way in self.ways if all(call.decides in firing for call in way.decisions)])


def in_graph(calls: list[Node]) -> bool:
    """Returns whether membranes that a comparison reads are in the graph. What is detached stays so."""
    return any(parent.trained for call in calls for parent in call.parents)


def emits(calls: list[Node], returned: set[Node], outputs: Collection[Node]) -> bool:
    """Returns whether the spikes of a comparison reach what the model returns, other than by their own membrane. calls:
    results of the comparison; returned: nodes from which the model's result, outputs, follows."""
    shapes = dict.fromkeys(call.shape for call in calls)  # layers on one line of a loop
    calls = [call for shape in shapes for call in [c for c in calls if c.shape == shape][: 2 * KEPT]]
    own = {node for call in calls for parent in call.parents for node in elementwise(parent)}
    stack = list(calls)
    seen = set(stack)
    while stack:
        node = stack.pop()
        for child in node.children:
            if child in seen or child not in returned:
                continue
            seen.add(child)
            if mixes(child) or child.shape != node.shape:
                return True
            others = (parent for parent in child.parents if parent is not node)
            if child.decides is None and own.isdisjoint(n for parent in others for n in elementwise(parent)):
                if child in outputs:
                    return True
                stack.append(child)
    return False


def mixes(node: Node) -> bool:
    """Returns whether weights act on a node: parameters that do not belong to its numbers one by one."""
    return any(parent.trained and not broadcasts(parent.shape, node.shape) for parent in node.parents)


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Returns whether a tensor of one shape may be expanded to another."""
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, other) for size, other in pairs)


def elementwise(node: Node) -> set[Node]:
    """Returns the trained nodes of the same shape from which a node follows number by number, and itself."""
    found = {node} if node.trained and node.floating else set()
    stack = list(found)
    while stack:
        one = stack.pop()
        if not mixes(one):
            near = {p for p in one.parents if p.trained and p.floating and p.shape == node.shape} - found
            found |= near
            stack += near
    return found


def detours(nodes: Collection[Node]) -> Iterator[Detour]:
    """Yields the detours of a trace, one for each place where a graph is cut."""
    done: set[Any] = set()
    for cut in nodes:
        if not (cut.floating and cut.call and not cut.trained and any(p.trained for p in cut.parents)):
            continue
        found = next(candidates(cut), None) if cut.path not in done else None
        if found is not None:
            done.add(cut.path)
            yield found


def candidates(cut: Node) -> Iterator[Detour]:
    """Yields the detours around a place where a graph is cut, the nearest first."""
    softs = [node for node in around(cut, BACK, upwards=True) if node.trained and node.value is not None]
    for end in around(cut, FORWARD, upwards=False):
        if not (end.trained and end.value is not None):
            continue
        for soft in softs:
            decisions = decisions_of(soft, end)
            if decisions and is_free(end, soft):
                yield Detour(soft, end, decisions)


def around(node: Node, distance: int, upwards: bool) -> list[Node]:
    """Returns nodes of the same shape within so many operations before or behind a node."""
    found, last = [], [node]
    for _ in range(distance):
        near = [other for one in last for other in (one.parents if upwards else one.children)]
        last = [o for o in dict.fromkeys(near) if o.floating and o.shape == node.shape and o not in found]
        found += last
    return found


def decisions_of(soft: Node, end: Node) -> tuple[Node, ...]:
    """Returns the comparisons on which a detour's end depends, and its soft side does not."""
    found, last = [], [end]
    for _ in range(2 * FORWARD):
        last = [p for node in last for p in node.parents if p.shape == end.shape]
        found += [node for node in dict.fromkeys(last) if node.decides is not None and node not in found]
    return tuple(node for node in found if node not in soft.recent(node.index))


def is_free(end: Node, soft: Node) -> bool:
    """Returns whether a node's value does not depend on that of another."""
    assert end.value is not None
    assert soft.value is not None
    if soft not in end.recent(soft.index):
        return False
    generator = torch.Generator(soft.value.device).manual_seed(0)
    size = 1 + soft.value.abs().max()
    move = size * (0.5 + torch.rand(soft.value.shape, generator=generator, device=soft.value.device))
    close = 64 * torch.finfo(soft.dtype).eps * float(size)
    for moved in (soft.value + move, soft.value - move):
        after = replayed(end, soft, moved.to(soft.value))
        if after is None or not bool(((after - end.value).abs() <= close).all()):
            return False
    return True


def rules(calls: Collection[Node], ways: Collection[Detour]) -> dict[Key, Rule]:
    """Returns the rules by which the model's code runs. calls: results of the comparisons that fire; ways: detours
    around them."""
    found: dict[Key, Rule] = {}

    def note(keys: list[Key], **has: Any) -> None:
        for key in keys:
            rule = found.get(key, Rule())
            kept = {name: value or getattr(rule, name) for name, value in has.items() if name != "cut"}
            found[key] = replace(rule, **kept, cut=rule.cut | has.get("cut", frozenset()))

    for call in calls:
        climbs = any(operation in CLIMBS for operation, _ in call.keys)
        note(call.keys, decides=True, turned=call.turned, climbs=climbs)
        note(call.climbs, climbs=True)
        stack = [call]
        while stack:  # all that reads truth values, or that bends spikes
            node = stack.pop()
            for child in node.children:
                bends = any(operation in BENDS for operation, _ in child.keys)
                if child.decides is None and (bends or not node.floating):
                    note(child.keys)
                    stack.append(child)
    for way in ways:
        for node, cut in within(way):
            if node.decides is not None:
                note(node.keys, inner=True)
            else:
                note(node.keys, inner=True, cut=cut)
        for node in (node for call in way.decisions for node in cut_before(call)):
            note(node.keys, inner=True, before=True)
    return found


def cut_before(call: Node) -> list[Node]:
    """Returns the operations that lead from the graph to the membranes that a comparison reads, but leave the graph."""
    found, last = [], [call]
    while last:
        last = [p for node in last for p in node.parents if p.shape == call.shape and p.floating and not p.trained]
        last = [node for node in dict.fromkeys(last) if node.keys and node not in found]
        found += last
    return found if any(parent.trained for node in found for parent in node.parents) else []


def within(way: Detour) -> Iterator[tuple[Node, frozenset[int]]]:
    """Yields the operations from a detour's comparisons to its end, and the positions of arguments that depend on its
    soft side alone."""
    first = min(node.index for node in way.decisions)
    behind = {node for call in way.decisions for node in call.recent(way.end.index, upwards=False)}
    soft = way.soft.recent(way.end.index, upwards=False)
    for node in behind & way.end.recent(first):
        args = () if node.call is None else node.call[1]
        cut = (i for i, a in enumerate(args) if isinstance(a, Node) and a in soft and a not in behind)
        yield node, frozenset(cut)


def behind_parameters(call: Node) -> bool:
    """Returns whether parameters lie before a comparison."""
    return any(node.is_parameter for node in call.recent(0))
