"""Walks over the modules and parameters of a model in the order of torch's own, in a fraction of their time."""

from torch import nn


def modules_in(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of a model, each once."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            if module._modules:
                waiting += reversed(list(module._modules.values()))
    return list(found.values())


def parameters_in(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters of a model, each once."""
    held = [q for module in modules_in(model) for q in module._parameters.values() if q is not None]
    return list({id(q): q for q in held}.values())


def named_parameters_in(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a model by name, each once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module | None]] = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            for name, q in module._parameters.items():
                if q is not None and id(q) not in found:
                    found[id(q)] = prefix + name, q
            if module._modules:
                waiting += [(f"{prefix}{name}.", part) for name, part in reversed(list(module._modules.items()))]
    return dict(found.values())
