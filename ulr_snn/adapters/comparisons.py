"""Comparisons of membranes with thresholds in plain torch, run as calls of a function that fires.

A neuron that is written in plain torch fires by `v >= threshold`, `torch.heaviside` or `torch.sign`. While a model runs
in `Rewriting`, these run as `Comparison`, a function of autograd that a place (`adapters.places`) takes over as it does
the user's own. The spikes stay in the graph: what makes numbers of a comparison, such as `.float()`, makes them of the
output of `Comparison`.

A detour gives such spikes the gradient of something else, as `soft + (hard - soft).detach()` does. Within a detour, no
operation cuts the graph, and what the value does not depend on is detached. So its output has the gradient of `hard`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ulr_snn.adapters.intercept import user_frame

Spot = tuple[int, int]  # where the model's code calls an operation: code and instruction
Key = tuple[Any, Spot]  # an operation at a spot

ABOVE = {Tensor.gt, torch.gt, torch.greater, Tensor.greater}
AT_LEAST = {Tensor.ge, torch.ge, torch.greater_equal, Tensor.greater_equal}
BELOW = {Tensor.lt, torch.lt, torch.less, Tensor.less}
AT_MOST = {Tensor.le, torch.le, torch.less_equal, Tensor.less_equal}
STEPS = {torch.heaviside, Tensor.heaviside}
SIGNS = {torch.sign, Tensor.sign, torch.sgn, Tensor.sgn}
COMPARISONS = ABOVE | AT_LEAST | BELOW | AT_MOST
DECISIONS = COMPARISONS | STEPS | SIGNS
DATA = Tensor.data.__get__  # type: ignore[attr-defined]
CUTS = {torch.detach, Tensor.detach, Tensor.detach_, torch.detach_, DATA}
ROUNDS = {
    *(torch.round, Tensor.round, torch.floor, Tensor.floor, torch.ceil, Tensor.ceil, torch.trunc, Tensor.trunc),
    *(torch.fix, Tensor.fix),
}
CHOICES = {torch.where, Tensor.where}
FILLS = {torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_, Tensor.__setitem__}
CASTS = {Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.to, Tensor.type, Tensor.type_as}
BENDS = {  # functions of one number that are no straight lines, and that spikes of -1 and 1 may pass
    *(torch.relu, Tensor.relu, functional.relu, torch.clamp, Tensor.clamp, torch.clip, Tensor.clip),
    *(torch.clamp_min, Tensor.clamp_min, functional.hardtanh, torch.abs, Tensor.abs, torch.square, Tensor.square),
}


# Operations of one number that may stand before or behind rounding, in a staircase with several steps.
CLIMBS = {
    *ROUNDS,
    *BENDS,
    *(torch.clamp_max, Tensor.clamp_max, Tensor.add, torch.add, Tensor.sub, torch.sub, Tensor.mul, torch.mul),
    *(Tensor.div, torch.div, torch.true_divide, Tensor.true_divide, functional.relu6),
}


class Climb(NamedTuple):
    """Operations of one number, after one another. operations: each with its other arguments."""

    operations: tuple[tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]], ...]

    @property
    def rounds(self) -> bool:
        """True if one of the operations rounds."""
        return any(operation in ROUNDS for operation, *_ in self.operations)

    def __call__(self, x: Tensor) -> Tensor:
        for operation, arguments, named in self.operations:
            x = operation(x, *arguments, **dict(named))
        return x

    def then(self, operation: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> "Climb":
        """Returns this with one operation more."""
        return Climb((*self.operations, (operation, arguments, tuple(named.items()))))


def climbing(operation: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, Climb] | None:
    """Returns the tensor in which a chain of operations of one number begins, and the chain; None if the last is not
    one of these."""
    first, *others = *arguments, *named.values()
    if not isinstance(first, Tensor) or not first.is_floating_point() or any(isinstance(o, Tensor) for o in others):
        return None
    start, climb, *versions = getattr(first, "ulr_climb", (first, Climb(()), first._version, first._version))
    if versions != [start._version, first._version]:  # changed in place
        start, climb = first, Climb(())
    return start, climb.then(operation, arguments[1:], named)


def climbed(result: Any, found: tuple[Tensor, Climb]) -> None:
    """Notes the chain of operations that a tensor comes from."""
    result.ulr_climb = *found, found[0]._version, result._version


class Rounding(Function):
    """Returns what a chain of operations that round makes of a membrane."""

    @staticmethod
    def forward(ctx: Any, membrane: Tensor, climb: Climb) -> Tensor:
        return climb(membrane)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None]:
        return None, None


class Comparison(Function):
    """Returns 1 where the membrane stands above the threshold 0, and also at it unless `strict`, and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, drive: Tensor, strict: bool) -> Tensor:
        return (drive > 0 if strict else drive >= 0).to(drive.dtype)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None]:
        return None, None


PLAIN: tuple[type[Function], ...] = Comparison, Rounding  # what stands for code in plain torch


class _Choice(Function):
    """Returns `torch.where`, with the derivative in spikes."""

    @staticmethod
    def forward(ctx: Any, spikes: Tensor, chosen: Tensor, there: Any, here: Any) -> Tensor:
        result = torch.where(chosen, there, here)
        ctx.save_for_backward(chosen, *(item for item in (there, here) if isinstance(item, Tensor)))
        ctx.numbers = [None if isinstance(item, Tensor) else item for item in (there, here)]
        ctx.spikes = spikes.shape
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        chosen, *tensors = ctx.saved_tensors
        found = [number if number is not None else tensors.pop(0) for number in ctx.numbers]
        given: list[Tensor | None] = [None, None]
        for i, item in enumerate(found):
            if isinstance(item, Tensor) and ctx.needs_input_grad[2 + i]:
                given[i] = (g * (chosen if i == 0 else ~chosen)).sum_to_size(item.shape)
        spikes = (g * (found[0] - found[1])).sum_to_size(ctx.spikes) if ctx.needs_input_grad[0] else None
        return spikes, None, *given


def spot_of(frame: FrameType) -> Spot:
    """Returns where a frame's code is."""
    return id(frame.f_code), frame.f_lasti


class Sides(NamedTuple):
    """The sides of a comparison: the membrane and the threshold. strict: neurons do not fire at the threshold itself.
    inverted: the comparison asks whether the membrane is below."""

    membrane: Tensor
    threshold: Any
    strict: bool
    inverted: bool = False

    @classmethod
    def of(cls, operation: Any, given: tuple[Any, ...], turned: bool = False) -> "Sides | None":
        """Returns the sides of a decision; None if no number of floating point is compared. given: all arguments;
        turned: the second is the membrane."""
        if operation in SIGNS:
            found = cls(given[0], 0.0, True)
        elif operation in STEPS:
            found = cls(given[0], 0.0, not bool((given[1] >= 0.5).all()))
        elif len(given) != 2:
            return None
        elif turned:
            found = cls(given[1], given[0], operation in AT_LEAST | BELOW, operation in ABOVE | AT_LEAST)
        else:
            found = cls(given[0], given[1], operation in ABOVE | AT_MOST, operation in BELOW | AT_MOST)
        sides = [side for side in (found.membrane, found.threshold) if isinstance(side, Tensor)]
        tensor = isinstance(found.membrane, Tensor)
        return found if tensor and any(side.is_floating_point() for side in sides) else None

    @property
    def drive(self) -> Tensor:
        """The membrane as it stands to the threshold."""
        number = not isinstance(self.threshold, Tensor) and self.threshold == 0
        return self.membrane if number else self.membrane - self.threshold

    @property
    def key(self) -> Any:
        """What comparisons of a membrane with the same threshold have in common."""
        return id(self.threshold) if isinstance(self.threshold, Tensor) else float(self.threshold)


@dataclass(frozen=True)
class Rule:
    """How an operation runs. decides: it is a comparison that fires, or the end of a staircase; turned: see `Sides.of`.
    climbs: it is one of the operations of a staircase. inner: it lies within a detour. cut: positions of arguments that
    are detached. before: it leads to the membranes of a comparison, so that it runs by the rule even where it reads no
    spikes."""

    decides: bool = False
    turned: bool = False
    inner: bool = False
    cut: frozenset[int] = frozenset()
    before: bool = False
    climbs: bool = False


class Rewriting(TorchFunctionMode):
    """Runs operations of a model's code by rules, those at other places in the code as they are."""

    def __init__(self, rules: Mapping[Key, Rule]) -> None:
        super().__init__()
        self.rules, self.operations = rules, {operation for operation, _ in rules}
        self.graph = torch.is_grad_enabled()

    def __torch_function__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        frame = user_frame() if operation in self.operations else None
        rule = None if frame is None else self.rules.get((operation, spot_of(frame)))
        if rule is None:
            return operation(*args, **named)
        if rule.inner and self.graph and not torch.is_grad_enabled():
            with torch.enable_grad():
                return self._run(operation, args, named, rule)
        return self._run(operation, args, named, rule)

    def _run(self, operation: Any, args: tuple[Any, ...], named: Mapping[str, Any], rule: Rule) -> Any:
        if rule.climbs:
            return self._climbed(operation, args, named, rule)
        if rule.decides:
            sides = Sides.of(operation, (*args, *named.values()), rule.turned)
            if sides is not None:
                return told(operation, sides, self.spikes(sides))
        elif rule.before or any(drawn(item) is not None for item in args):
            return followed(operation, args, named, rule)
        return operation(*args, **named)

    def _climbed(self, operation: Any, args: tuple[Any, ...], named: Mapping[str, Any], rule: Rule) -> Any:
        """Runs an operation of a staircase, the last of them as `Rounding`."""
        found = climbing(operation, args, named)
        if found is not None and rule.decides:
            with torch.set_grad_enabled(self.graph):
                levels: Tensor = Rounding.apply(*found)
            return marked(levels, True)
        result = operation(*args, **named)
        if found is not None:
            climbed(result, found)
        return result

    def spikes(self, sides: Sides) -> Tensor:
        """Returns the spikes of neurons with these membranes, in the graph. Each comparison of the same membranes with
        the same threshold gives the same spikes."""
        spikes = known(self, sides)
        if spikes is None:
            if self.graph and not torch.is_grad_enabled():
                with torch.enable_grad():
                    spikes = Comparison.apply(sides.drive, sides.strict)
            else:
                spikes = Comparison.apply(sides.drive, sides.strict)
            remember(self, sides, spikes)
        return spikes


def drawn(item: Any) -> Any:
    """Returns what an argument holds of a comparison: the spikes behind truth values, the two values that spikes have,
    or True for what else follows from spikes; None if it holds nothing of one."""
    return getattr(item, "ulr_drawn", None) if isinstance(item, Tensor) else None


def marked(result: Tensor, drawn: Any) -> Tensor:
    """Marks a tensor, see `drawn`. The mark is an attribute, so that it lives as long as the tensor."""
    result.ulr_drawn = drawn  # type: ignore[attr-defined]
    return result


def remember(owner: Any, sides: Sides, spikes: Tensor) -> None:
    """Notes the spikes of a comparison for `known`. owner: the pass."""
    if not isinstance(sides.membrane, nn.Parameter):
        _decided(owner, sides)[sides.key] = sides.threshold, spikes  # an id is that of a threshold that stays alive


def known(owner: Any, sides: Sides) -> Tensor | None:
    """Returns the spikes of an earlier comparison of the same membranes with the same threshold; None if there is none.
    Whether neurons fire at the threshold itself does not tell two comparisons apart."""
    spikes: Tensor | None = _decided(owner, sides).get(sides.key, (None, None))[1]
    return spikes


def _decided(owner: Any, sides: Sides) -> dict[Any, Any]:
    """Returns what a membrane has been compared with in a pass."""
    said = getattr(sides.membrane, "ulr_decided", None)
    if said is None or said[:2] != (owner, sides.membrane._version):
        said = owner, sides.membrane._version, {}
        if not isinstance(sides.membrane, nn.Parameter):
            sides.membrane.ulr_decided = said  # type: ignore[attr-defined]
    found: dict[Any, Any] = said[2]
    return found


def told(operation: Any, sides: Sides, spikes: Tensor) -> Tensor:
    """Returns what a decision returns where neurons fire so."""
    if operation in STEPS:
        return marked(spikes.clone(), (0.0, 1.0))
    if operation in SIGNS:
        return marked(torch.where(sides.membrane == 0, 0.0, 2 * spikes - 1), (-1.0, 1.0))
    chosen = spikes.detach().bool()
    return marked(~chosen, 1 - spikes) if sides.inverted else marked(chosen, spikes)


def followed(operation: Any, arguments: tuple[Any, ...], named: Mapping[str, Any], rule: Rule) -> Any:
    """Runs an operation that reads what a decision has returned."""
    if rule.inner and operation in CUTS:
        return arguments[0]
    given = arguments
    if rule.cut:
        given = tuple([item.detach() if i in rule.cut else item for i, item in enumerate(arguments)])
    if any(map(truth, given)):
        return of_truth_values(operation, given, named)
    values = drawn(given[0])
    if operation in BENDS and isinstance(values, tuple) and not others_of(given[1:]):
        return bent(operation, given, named, values)
    result = operation(*given, **named)
    return result if result is arguments[0] or rule.before or not isinstance(result, Tensor) else marked(result, True)


def bent(operation: Any, arguments: tuple[Any, ...], named: Mapping[str, Any], values: tuple[float, float]) -> Tensor:
    """Returns a function of spikes that have one of two values, as the straight line through both."""
    low, high = operation(arguments[0].new_tensor(values), *arguments[1:], **named).tolist()
    share = (arguments[0] - values[0]) / (values[1] - values[0])
    return marked(low + (high - low) * share, (low, high))


def of_truth_values(operation: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Runs an operation on truth values, with the spikes behind them in the graph."""
    if operation in CHOICES and len(arguments) == 3:
        at = 1 if operation is Tensor.where and arguments[1].dtype == torch.bool else 0
        chosen = arguments[at]
        return chosen_of(chosen, *(item for i, item in enumerate(arguments) if i != at))
    if operation in FILLS and truth(arguments[1]) and not (isinstance(arguments[2], Tensor) and arguments[2].ndim):
        filled = chosen_of(arguments[1], arguments[2], arguments[0].clone())
        if operation in (torch.masked_fill, Tensor.masked_fill):
            return filled
        result = arguments[0].copy_(filled)
        return None if operation is Tensor.__setitem__ else result
    given = [drawn(item) if truth(item) else item for item in arguments]
    if operation in CASTS and (number := operation(*given, **named)).is_floating_point():
        return marked(number.clone() if number is given[0] else number, (0.0, 1.0))
    result = operation(*arguments, **named)
    if not isinstance(result, Tensor) or operation in CHOICES | FILLS:
        return result
    if result.is_floating_point():
        return marked(operation(*given, **named), True)
    return marked_truth(operation, result, arguments, given, named)


def truth(item: Any) -> bool:
    """Returns whether an argument holds truth values with spikes behind them."""
    return isinstance(drawn(item), Tensor)


def others_of(arguments: tuple[Any, ...]) -> list[Tensor]:
    """Returns the tensors among arguments that hold no truth values."""
    return [item for item in arguments if isinstance(item, Tensor) and not truth(item)]


def chosen_of(chosen: Tensor, there: Any, here: Any) -> Tensor:
    """Returns `torch.where` with the spikes behind its truth values in the graph."""
    spikes = drawn(chosen)
    if spikes is None:
        return torch.where(chosen, there, here)
    result = _Choice.apply(spikes, chosen, there, here)
    simple = not isinstance(there, Tensor) and not isinstance(here, Tensor)
    return marked(result, (float(here), float(there)) if simple else True)


XOR = {Tensor.__xor__, torch.logical_xor, Tensor.logical_xor}
LOGIC: dict[Any, Callable[[Any, Any], Any]] = {
    **dict.fromkeys((Tensor.__and__, torch.logical_and, Tensor.logical_and), lambda a, b: a * b),
    **dict.fromkeys((Tensor.__or__, torch.logical_or, Tensor.logical_or), lambda a, b: a + b - a * b),
    **dict.fromkeys(XOR, lambda a, b: a + b - 2 * a * b),
}
NEGATIONS = {Tensor.__invert__, torch.logical_not, Tensor.logical_not}


def marked_truth(
    operation: Any, result: Tensor, arguments: tuple[Any, ...], given: list[Any], named: Mapping[str, Any]
) -> Tensor:
    """Returns truth values or whole numbers that follow from truth values, with the spikes behind them, where these are
    known."""
    if operation in NEGATIONS:
        return marked(result, 1 - given[0])
    if operation in LOGIC:
        like = next(drawn(item) for item in arguments if truth(item))
        if given[0] is given[1] and operation not in XOR:
            return marked(result, like)
        return marked(result, LOGIC[operation](*(item.to(like) for item in given)))
    if others_of(arguments) or operation in CUTS:
        return result
    if result.shape == arguments[0].shape:  # another kind of number
        return marked(result, given[0])
    moved = operation(*given, **named)  # a view
    return marked(result, moved) if isinstance(moved, Tensor) and moved.shape == result.shape else result
