"""What arguments may be. Each type and range is stated once, as the annotation of the argument.

    @checked
    def train(model, loader, epochs: Count = 10, *, clip: Positive | None = None, ...): ...

`checked` reads the annotations of a function, and `check_fields` those of a dataclass. `typed` makes a type for the
command line of one. Each raises UsageError for a value that breaks its rule. Numbers of NumPy's and tensors without
axes pass as plain Python numbers. The command line reads its options by these rules before it imports torch, so this
module imports torch only where a rule needs it.
"""

import inspect
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, wraps
from numbers import Integral, Real
from os import PathLike, cpu_count, fspath, lstat
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, get_args

from ulr_snn.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Rule:
    """What an argument may be.

    words: end of the sentence "it must be ..."; read: returns the value to use, or raises ValueError or TypeError for a
    value that breaks the rule.
    """

    words: str
    read: Callable[[Any], Any]

    def __call__(self, owner: str, name: str, value: Any, optional: bool = False) -> Any:
        """Returns the value to use. Raises UsageError that names the owner, such as a function, and the argument.
        optional: None is allowed, too."""
        try:
            return self.read(value)
        except UsageError:  # the rule has a sentence of its own
            raise
        except (ValueError, TypeError, RuntimeError):
            words = f"{self.words}, or None" if optional else self.words
            raise UsageError(f"{owner} got {name}={shown(value)}; it must be {words}") from None

    def __repr__(self) -> str:
        return self.words


def shown(value: Any) -> str:
    """Returns a value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- rules -------------------------------------------------------------------------------------------------


def where(words: str, test: Callable[[Any], bool]) -> Rule:
    """Returns the rule of values that pass a test."""

    def read(value: Any) -> Any:
        if not test(value):
            raise ValueError
        return value

    return Rule(words, read)


def plain(value: Any) -> Any:
    """Returns the Python value of a number of NumPy's or a tensor without axes, and other values as they are."""
    single = getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not getattr(value, "is_meta", False)
    return value.item() if single else value


def whole(least: float = -math.inf, words: str = "", multiple: int = 1, most: float = math.inf) -> Rule:
    """Returns the rule of whole numbers from `least` to `most`. A bool is none."""

    def read(value: Any) -> int:
        value = plain(value)
        if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
            raise ValueError
        if value % multiple:
            raise ValueError
        return int(value)

    limits = ("" if least == -math.inf else f", at least {least}") + ("" if most == math.inf else f", at most {most}")
    return Rule(words or f"a whole number{limits}", read)


def number(words: str, test: Callable[[Any], bool]) -> Rule:
    """Returns the rule of finite numbers that pass a test. A bool is none."""

    def read(value: Any) -> float:
        value = plain(value)
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or not test(value):
            raise ValueError
        return value if isinstance(value, int) else float(value)

    return Rule(words, read)


def numbers(words: str, test: Callable[[Any], Any]) -> Rule:
    """Returns the rule of a number or tensor all of whose values pass a test, given as an operation on tensors."""

    def read(value: Any) -> Any:
        import torch

        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")
        if tensor.dtype == torch.bool or not (tensor.is_meta or bool(test(tensor).all())):
            raise ValueError
        return value

    return Rule(words, read)


def one_of(*names: str) -> Rule:
    """Returns the rule of a word out of several."""
    return where(f"one of {', '.join(map(repr, names))}", lambda value: isinstance(value, str) and value in names)


def flag(value: Any) -> bool:
    """Returns a value that is True or False, also as a number. Raises ValueError for others."""
    value = plain(value)
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError
    return bool(value)


def seed_of(value: Any) -> int:
    """Returns a whole number as torch's generators take it: its lowest 64 bits, if it has more."""
    value = whole().read(value)
    return value if -(2**63) <= value < 2**64 else value % 2**64


def path(value: Any) -> Any:
    """Returns a path as it is. Raises ValueError for a text that no file system takes."""
    if not isinstance(value, str | PathLike) or not isinstance(text := fspath(value), str) or text == "":
        raise ValueError
    try:
        lstat(text)  # which raises ValueError for a null character
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except OSError:  # a name that is too long
        raise ValueError from None
    return value


def interval(value: Any) -> int | timedelta:
    """Returns a number of steps as it is, and a time as a timedelta. Raises ValueError for anything else."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d+)([smh])", value)):
        value = timedelta(seconds=int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]])
    elif isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, timedelta):
        return whole(1).read(value)
    if value <= timedelta(0):
        raise ValueError
    return value


def accepts(function: Any, count: int) -> bool:
    """Returns whether a value is callable, and takes so many arguments by position as far as its signature tells."""
    if not callable(function):
        return False
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # as of a function in C
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _callbacks(value: Any) -> tuple[Any, ...]:
    found = tuple(value)
    if not all(accepts(callback, 2) for callback in found):
        raise ValueError
    return found


def _rates(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {method: _rates(rates) for method, rates in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value  # an array of NumPy's or a tensor
    if isinstance(value, Sequence) and len(value):
        return [POSITIVE.read(rate) for rate in value]
    return POSITIVE.read(value)


def iterates(value: object) -> bool:
    """Returns whether a value may be iterated over, and is no text, class or module."""
    from torch import nn

    held = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    return held and not isinstance(value, str | bytes | type | nn.Module)


POSITIVE = number("positive and finite", lambda value: value > 0)

Count = Annotated[int, whole(1)]
Natural = Annotated[int, whole(0)]
Whole = Annotated[int, Rule("a whole number", seed_of)]
Threads = Annotated[int, whole(1, most=max(64, 4 * (cpu_count() or 1)))]  # more only take memory, until there is none
Draws = Annotated[int, whole(4)]
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, number("a number, at least 0", lambda value: value >= 0)]
Fraction = Annotated[float, number("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Rates = float | Sequence[float]
LearningRates = Annotated[
    Rates | Mapping[str, Rates], Rule("positive and finite, a list of such numbers, or either by method", _rates)
]
Leak = Annotated[
    "float | Tensor", numbers("a number from 0 to 1, or a tensor of such", lambda value: (value >= 0) & (value <= 1))
]
Threshold = Annotated["float | Tensor", numbers("a positive number, or a tensor of such", lambda value: value > 0)]
Flag = Annotated[bool, Rule("True or False", flag)]
Resume = Annotated[
    bool | str, Rule("True, False or 'changed'", lambda value: value if value == "changed" else flag(value))
]
Interval = Annotated[timedelta | int | str, Rule("a number of steps or a time such as '30s', '10m' or '2h'", interval)]
Batches = Annotated[Iterable[Any], where("an iterable of batches, such as a DataLoader or a list", iterates)]
Callbacks = Annotated[
    Iterable[Callable[[dict[str, Any], "nn.Module"], Any]],
    Rule("a list of functions of a history entry and the model", _callbacks),
]
FilePath = Annotated[str | PathLike[str], Rule("a path", path)]


# -- checks ------------------------------------------------------------------------------------------------


def rule_of(annotation: Any) -> tuple[Rule, tuple[type, ...]] | None:
    """Returns the rule of an annotation, and the classes whose objects pass it as they are; None without a rule."""
    parts = [annotation] if hasattr(annotation, "__metadata__") else get_args(annotation)
    rules = [extra for part in parts for extra in getattr(part, "__metadata__", ()) if isinstance(extra, Rule)]
    return (rules[0], tuple(part for part in parts if isinstance(part, type))) if rules else None


@cache
def rules(annotated: Any) -> dict[str, tuple[Rule, tuple[type, ...]]]:
    """Returns the rules of a function's arguments or a dataclass's fields, by name."""
    annotations: dict[str, Any] = {}
    for part in reversed(getattr(annotated, "__mro__", (annotated,))):
        annotations |= inspect.get_annotations(part)
    found = {name: rule_of(annotation) for name, annotation in annotations.items()}
    return {name: rule for name, rule in found.items() if rule is not None}


def kept(owner: str, values: Mapping[str, Any], annotated: Any) -> dict[str, Any]:
    """Returns those of the values that have a rule, read by it. Raises UsageError for a value that breaks its rule."""
    found = {}
    for name, (rule, classes) in rules(annotated).items():
        if name in values and not isinstance(values[name], classes):
            found[name] = rule(owner, name, values[name], NoneType in classes)
    return found


def checked(function: Callable[Arguments, Found]) -> Callable[Arguments, Found]:
    """Makes a function check the arguments that it is given by the rules in its annotations."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Found:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which raises an error in Python's own words
        owner = type(args[0]).__name__ if function.__name__ == "__init__" else function.__name__
        given.arguments |= kept(owner, given.arguments, function)
        return function(*given.args, **given.kwargs)

    return call


def check_fields(instance: Any) -> None:
    """Checks the fields of a dataclass by the rules in its annotations, from `__post_init__`."""
    kind = type(instance)
    for name, value in kept(kind.__name__, vars(instance), kind).items():
        object.__setattr__(instance, name, value)  # which a frozen dataclass allows itself alone


def typed(annotation: Any) -> Callable[[str], Any]:
    """Returns the type of an option of the command line: a function that reads a text by the rule of an annotation."""
    kind, rule = get_args(annotation)

    def read(text: str) -> Any:
        try:
            return rule.read(kind(text) if isinstance(kind, type) else text)
        except ValueError:
            raise ArgumentTypeError(f"must be {rule.words}, not {shown(text)}") from None

    return read
