"""Links of a recorded pass: what keeps one from being part of a chain, and the stages that a run of them makes."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ulr_snn.adapters import adapter_of
from ulr_snn.model.call import coupled_modules
from ulr_snn.model.chain import OVER_TIME, EachStep, NoChain, Shape, StepByStep, hooked
from ulr_snn.model.entry import Synapse
from ulr_snn.model.equivalence import Equal, through
from ulr_snn.model.glue import between
from ulr_snn.model.neurons import LIF, Fold
from ulr_snn.model.recording import Given, Link, Read

EACH_STEP = (nn.Linear, nn.Identity, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Dropout)  # they take any axes before the features
EACH_ROW = (
    *(*EACH_STEP, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Softplus, nn.Flatten, nn.Unflatten),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.GroupNorm, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)  # they treat each row of a batch by itself; batch norm only in evaluation mode


def assembled(
    links: list[Link], neuron_of: Callable[[Link], Equal | None], x: Tensor
) -> tuple[list[nn.Module], dict[int, LIF], list[Tensor]]:
    """Returns the stages of a chain, its neurons of `ulr_snn`, and their recorded currents [T, B, ...]. The neurons are
    keyed by the id of the module whose place they take. Modules that treat each row by itself wait in `row_wise` for
    one `Fold`. neuron_of: returns what takes the place of a neuron, None for other modules. Raises NoChain."""
    (steps, rows), features = x.shape[:2], x.shape[2:]
    stages: list[nn.Module] = []
    swapped: dict[int, LIF] = {}
    row_wise: list[nn.Module] = []
    currents = []
    for link in links:
        row_wise += link.glue
        if link.glue:
            features = through(link.glue, x.new_zeros(2, *features)).shape[1:]
        if link.features(False, steps, rows) != features:
            row_wise.append(Shape(link.features(False, steps, rows)))
        features = link.features(True, steps, rows)
        if (equal := neuron_of(link)) is not None:
            entry, neuron = equal
            currents.append(through(entry, link.sequence(False).reshape(steps, rows, *features)))
            swapped[id(link.module)] = neuron
            before = [module for module in entry if not isinstance(module, Synapse)]  # which takes whole sequences
            stages += [*folded([*row_wise, *before]), *entry[len(before) :], neuron]
            row_wise = []
        elif link.mode == "whole":
            check_each_step(link)
            known = type(link.module) is nn.Linear  # a plain Linear keeps its fast paths
            stages += [*folded(row_wise), link.module if known else EachStep(link.module)]
            row_wise = []
        elif link.mode == "step" and isinstance(link.module, _BatchNorm) and coupled_modules(link.module):
            stages += [*folded(row_wise), StepByStep(link.module)]
            row_wise = []
        else:
            row_wise.append(link.module)
    return stages + folded(row_wise), swapped, currents


def folded(modules: list[nn.Module]) -> list[nn.Module]:
    """Returns the modules as one `Fold`, in a list that is empty if there are none."""
    return [Fold(*modules)] if modules else []


def check_module(name: str, module: nn.Module, neuron: bool = False) -> None:
    """Raises NoChain for a module that cannot be part of a chain. neuron: it is one, or part of one."""
    if hooked(module):
        raise NoChain(f"{name or 'the model'} has hooks")
    if module._modules or neuron:
        return
    if row_by_row(module) and any(isinstance(value, Tensor) for value in vars(module).values()):
        raise NoChain(f"{name} has a tensor in the place of a parameter")
    if type(module) not in EACH_ROW and coupled_modules(module):
        raise NoChain(f"{type(module).__name__} in training mode is not known to see one time step at a time")
    if not row_by_row(module):
        raise NoChain(f"{name or 'the model'} is a {type(module).__name__}")


def row_by_row(module: nn.Module) -> bool:
    """Returns whether a module is known to treat each row of a batch by itself (in evaluation mode)."""
    kind = type(module)
    return kind in EACH_ROW or (per_row(module) and any(base in EACH_ROW for base in kind.__mro__))


def check_norms(links: list[Link], count: int) -> None:
    """Raises NoChain if one of the first links is a batch norm whose running statistics move, at several places of a
    time step: they would see the time steps in another order."""
    names = [link.name for link in links]
    for link in links[:count]:
        norm = link.module
        moving = isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None
        if moving and names.count(link.name) > 1:
            raise NoChain(f"{link.name} runs more than once in a time step")


def per_row(module: nn.Module) -> bool:
    """Returns whether the adapter of the module's library says that it treats each row by itself."""
    adapter = adapter_of(module)
    return adapter is not None and adapter.per_row(module)


def check_each_step(link: Link) -> None:
    """Raises NoChain unless a module that takes whole sequences treats each time step by itself."""
    module = link.module
    axis = {nn.Flatten: "start_dim", nn.Unflatten: "dim"}.get(type(module))
    later = axis is not None and getattr(module, axis) >= 2
    lifted = per_row(module) and getattr(module, "step_mode", "m") == "m"
    if not (later or lifted or type(module) in EACH_STEP):
        raise NoChain(f"{link.name} is called with a whole sequence")


def check_link(start: Given, before: Link | None, link: Link, static: bool) -> None:
    """Raises NoChain unless each call of a module reads the output of the module before it for the same time step, at
    most through functions that `glue.py` knows. static: the first module reads the same input in all time steps."""
    if before is None or before.mode != "step":
        source = start if before is None else before.calls[0].gave
        if link.mode == "step":
            times = [0 if static and before is None else t for t in range(len(link.calls))]
            at = len(source.tensor) > max(times)
            fits = at and all(source.read_by(call.read, t) for t, call in zip(times, link.calls, strict=True))
        else:
            fits = source.read_by(link.calls[0].read)
    elif link.mode == "step":
        fits = all(b.gave.read_by(call.read) for b, call in zip(before.calls, link.calls, strict=True))
        fits = fits or find_glue(before, link)
    else:
        fits = stacks(link.calls[0].read.grad_fn, before.calls)
    unchanged = all(call.read._version == call.version and call.gave.unchanged for call in link.calls)
    if not fits or not unchanged:
        what = "the events" if before is None else f"{before.name} gives in the same time step"
        raise NoChain(f"{link.name} reads something else than {'' if before is None else 'what '}{what}")


def find_glue(before: Link, link: Link) -> bool:
    """Finds the functions through which a module reads, at every time step, what the module before it gives. Returns
    whether there are such."""
    found = [between(b.gave.leaf, call.read) for b, call in zip(before.calls, link.calls, strict=True)]
    if not found[0] or any(repr(modules) != repr(found[0]) for modules in found):
        return False
    link.glue = found[0]
    return True


def stacks(node: Any, calls: list[Read], axis: int = 0) -> bool:
    """Returns whether a node of the graph stacks the outputs of these calls, in their order, along this axis."""
    if type(node).__name__ != "StackBackward0" or node._saved_dim != axis:
        return False
    parents = [getattr(parent, "variable", None) for parent, _ in node.next_functions]
    return len(parents) == len(calls) and all(v is c.gave.leaf for v, c in zip(parents, calls, strict=True))


def check_end(last: Link, outputs: Tensor, axis: int) -> str | None:
    """Returns the reduction over time of the last module's outputs, a key of `OVER_TIME`, or None. axis: that of time
    in the outputs. Raises NoChain."""
    node: Any = outputs.grad_fn  # torch does not declare what nodes save
    kind = None
    if type(node).__name__ in OVER_TIME and tuple(node._saved_dim) in ((0,), (1,)) and not node._saved_keepdim:
        kind, axis, node = type(node).__name__, node._saved_dim[0], node.next_functions[0][0]
    if last.mode == "step":
        fits = stacks(node, last.calls, axis)
    elif axis:
        fits = False
    elif kind is not None:
        fits = last.mode == "whole" and getattr(node, "variable", None) is last.calls[0].gave.leaf
    else:
        fits = last.calls[0].gave.read_by(outputs)
    if not fits:
        raise NoChain(f"its outputs are something else than what {last.name} gives in every time step")
    return kind
