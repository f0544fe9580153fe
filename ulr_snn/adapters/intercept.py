"""Calls of functions of autograd, taken over while a model runs, and told apart by the code that makes them.

Only autograd's own machinery knows a call's backward, and only the interpreter's frames know which code calls. Neither
has a public interface, so all that this library needs of them is here.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from threading import Lock, local
from types import CodeType, FrameType
from typing import Any, Protocol

from torch import nn
from torch.autograd import Function

Path = tuple[tuple[int, int, int], ...]  # of the calls that lead to a function: code, instruction, and module of each
Enter = Callable[[Any], None]  # prepares the context of a function's call for its backward

CALLS = "ulr_snn.model.call"  # calls of models begin in this module
AGAIN = "torch.utils.checkpoint"  # code of this module runs a part of a model again in the backward pass
SKIPPED = ("torch", "ulr_snn")  # packages whose calls are left out of paths
# Kinds of code: where paths end, what they leave out, code without arguments, and with a first one.
END, SKIP, PLAIN, BOUND = range(4)
_kinds: dict[int, tuple[int, CodeType]] = {}  # by id, which the code that is kept here keeps from being used again


def kind_of(frame: FrameType) -> int:
    """Returns the kind of a frame's code."""
    code = frame.f_code
    own = PLAIN if not code.co_argcount else BOUND
    kind = END if frame.f_globals.get("__name__") == CALLS else SKIP if package_of(frame) in SKIPPED else own
    _kinds[id(code)] = kind, code
    return kind


def package_of(frame: FrameType) -> str:
    """Returns the top package of a frame's code."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def caller(file: str) -> str:
    """Returns the top package, torch apart, of the code that calls code of a file."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_code.co_filename == file or package_of(frame) == "torch"):
        frame = frame.f_back
    return "" if frame is None else package_of(frame)


def user_frame() -> FrameType | None:
    """Returns the frame of the code outside of torch and ulr_snn that calls the caller of this function."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        known = _kinds.get(id(frame.f_code))
        if (kind_of(frame) if known is None else known[0]) != SKIP:
            break
        frame = frame.f_back
    return frame


def calls() -> list[tuple[int, int, Any]]:
    """Returns the calls of the model's code that lead to a function, from the inside out: the id of the code, the
    instruction, and the first argument, None if there is none."""
    found: list[tuple[int, int, Any]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        known = _kinds.get(id(code))
        kind = kind_of(frame) if known is None else known[0]
        if kind == BOUND:
            found.append((id(code), frame.f_lasti, frame.f_locals.get(code.co_varnames[0])))
        elif kind == PLAIN:
            found.append((id(code), frame.f_lasti, None))
        elif kind == END:
            break
        frame = frame.f_back
    return found


def path(modules: frozenset[int]) -> Path:
    """Returns the path of calls by which the model's code came here. modules: ids of the modules that tell calls apart,
    those of the model, but not such as its code makes anew."""
    return tuple([(code, at, id(first) if id(first) in modules else 0) for code, at, first in calls()])


def runs_again() -> bool:
    """Returns whether the code that leads here will run again in the backward pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == AGAIN:
            return True
        frame = frame.f_back
    return False


def modules() -> list[nn.Module]:
    """Returns the modules whose code leads here, from the inside out."""
    return [first for *_, first in calls() if isinstance(first, nn.Module)]


class Handler(Protocol):
    """Runs in place of a function's forward. own: the function's own forward, of these arguments if it gets none, and
    of others without any trace in the context. Returns the output, and what prepares the context for another backward
    than the function's own."""

    def __call__(self, own: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Enter | None]: ...


class Mute:
    """A context that takes everything and keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _Thread(local):
    """handlers: those of the functions that this thread has replaced. entering: of the forward that has just run."""

    def __init__(self) -> None:
        self.handlers: dict[type[Function], Any] = {}
        self.entering: Enter | None = None


_thread = _Thread()
_replaced: dict[type[Function], tuple[int, dict[str, Any]]] = {}  # number of users, and the attributes of before
_replacing = Lock()


def handler_of(function: type[Function]) -> Any:
    """Returns the handler that runs in place of a function in this thread, or None."""
    return _thread.handlers.get(function)


@contextmanager
def handled(function: type[Function], handler: Handler) -> Iterator[None]:
    """Within this context, the handler runs in place of a function's forward in this thread."""
    before = _thread.handlers.get(function)
    _replace(function)
    _thread.handlers[function] = handler
    try:
        yield
    finally:
        _thread.handlers.pop(function)
        if before is not None:
            _thread.handlers[function] = before
        _restore(function)


def _replace(function: Any) -> None:
    """Replaces the forward of a function by one that asks the handler of its thread."""
    with _replacing:
        users, attributes = _replaced.get(function, (0, {}))
        if not users:
            attributes = {name: vars(function).get(name) for name in ("forward", "setup_context")}
            apart = function.setup_context is not Function.setup_context  # forward gets no context
            function.forward = staticmethod(_asking(function, function.forward, apart))
            if apart:
                function.setup_context = staticmethod(_entering(function.setup_context))
        _replaced[function] = users + 1, attributes


def _restore(function: Any) -> None:
    with _replacing:
        users, attributes = _replaced.pop(function)
        if users > 1:
            _replaced[function] = users - 1, attributes
            return
        for name, value in attributes.items():
            if value is not None:
                setattr(function, name, value)
            elif name in vars(function):
                delattr(function, name)


def _asking(function: type[Function], own: Callable[..., Any], apart: bool) -> Callable[..., Any]:
    @wraps(own)
    def forward(*given: Any) -> Any:
        handler, enter = _thread.handlers.get(function), None
        if handler is None:
            result = own(*given)
        else:
            result, enter = handler(partial(_owns, own, given, apart), given if apart else given[1:])
        if apart:
            _thread.entering = enter
        elif enter is not None:
            enter(given[0])
        return result

    return forward


def _owns(own: Callable[..., Any], given: tuple[Any, ...], apart: bool, *others: Any) -> Any:
    """Runs a function's own forward of what it was given, or of other arguments with a mute context."""
    if not others:
        return own(*given)
    return own(*others) if apart else own(Mute(), *others)


def _entering(own: Callable[..., None]) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        enter, _thread.entering = _thread.entering, None
        if enter is None:
            own(ctx, inputs, output)
        else:
            enter(ctx)

    return setup_context


def set_backward(ctx: Any, function: type[Function]) -> None:
    """Makes a call's backward that of another function. ctx: the context of the call; torch looks the backward up in it
    when it runs."""
    ctx._forward_cls = function
