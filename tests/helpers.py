"""What several test files use: small nets and tasks, losses, and models of the other libraries."""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from benchmarks.missing_operators import declare_operators
from ulr_snn import LIF, TimeAverage

# -- nets and batches of any size --------------------------------------------------------------------------


def currents(steps: int, batch: int, inputs: int, classes: int) -> tuple[Tensor, Tensor]:
    """Inputs between 0 and 2, the same ones at every call, and all classes in turn."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(steps, batch, inputs, generator=generator), torch.arange(batch) % classes


def averaging(inputs: int, outputs: int, hidden: tuple[int, ...] = (7, 6), seed: int = 1) -> nn.Sequential:
    """[Linear, LIF] of each width, and a linear readout of the mean over time."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, width in zip((inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(before, width), LIF()]
    return nn.Sequential(*layers, TimeAverage(), nn.Linear(hidden[-1], outputs))


def errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the prediction is wrong: a loss without a gradient."""
    outputs = outputs.sum(0) if outputs.ndim == 3 else outputs
    return (outputs.detach().argmax(1) != targets).to(outputs.dtype)


@contextmanager
def only_new_objects() -> Iterator[None]:
    """What there is already is not among the objects that `gc` knows within, so that few are looked through."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# -- a task that takes a second ----------------------------------------------------------------------------

STEPS, PIXELS, CLASSES = 8, 8, 2


def samples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Events of class c are twice as frequent in the c-th half of the pixels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    rate = torch.full((count, PIXELS), 0.2)
    for c in range(CLASSES):
        rate[y == c, c * PIXELS // 2 : (c + 1) * PIXELS // 2] = 0.6
    return (torch.rand(STEPS, count, PIXELS, generator=generator) < rate).float(), y


def batches(count: int = 96, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    x, y = samples(count, seed)
    return [(x[:, i : i + size], y[i : i + size]) for i in range(0, count, size)]


def net(seed: int = 0) -> nn.Sequential:
    return averaging(PIXELS, CLASSES, (16, 16), seed)


def train(model=None, loader=None, epochs=2, **settings) -> ulr_snn.Result:
    model, loader = net() if model is None else model, batches() if loader is None else loader
    return ulr_snn.train(model, loader, epochs, **{"progress": False, "device": "cpu", **settings})


# -- other libraries ---------------------------------------------------------------------------------------


def library_of(name: str) -> Any:
    """The library, or a skip. Their own warnings at import and construction are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def separable(count: int = 48) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (count,), generator=generator)
    x = (torch.rand(12, count, 5, generator=generator) < 0.2 + 0.6 * nn.functional.one_hot(y, 5)).float()
    return [(8 * x[:, i : i + 16], y[i : i + 16]) for i in range(0, count, 16)]


class Loop(nn.Module):
    """As in snnTorch's tutorials: a time loop, states passed by hand, spikes and membranes recorded."""

    def __init__(self, snn: Any, recurrent: bool, **options: Any) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.fc1 = nn.Linear(5, 8)
        self.lif1 = snn.RLeaky(0.8, linear_features=8, **options) if recurrent else snn.Leaky(0.8, **options)
        self.fc2 = nn.Linear(8, 6)
        self.lif2 = snn.Leaky(0.7, **options)
        self.fc3 = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state = self.lif1.reset_mem() if self.recurrent else (self.lif1.reset_mem(),)
        mem2 = self.lif2.reset_mem()
        outputs, membranes = [], []
        for step in x:
            spk1, *state = self.lif1(self.fc1(step), *state)
            state = (spk1, *state) if self.recurrent else state
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            outputs.append(self.fc3(spk2))
            membranes.append(mem2)
            state = state[:2] if self.recurrent else state
        return torch.stack(outputs), torch.stack(membranes)


def nets(surrogates: bool = False) -> dict[str, Callable[[], nn.Module]]:
    """Of each library, for `separable`. surrogates: with the library's own surrogate functions, in place of ones that
    must not be called."""

    def snntorch() -> nn.Module:
        return Loop(library_of("snntorch"), True, **{} if surrogates else {"spike_grad": raising})

    def norse() -> nn.Module:
        norse = library_of("norse.torch")
        return norse.SequentialState(norse.LIFRefracRecurrent(5, 32), nn.Linear(32, 3), norse.LI())

    def spikingjelly() -> nn.Module:
        neuron = library_of("spikingjelly.activation_based.neuron")
        options = {"step_mode": "m"} | ({} if surrogates else {"surrogate_function": Raising()})
        layers = nn.Linear(5, 32), neuron.LIFNode(**options), nn.Linear(32, 3)
        return nn.Sequential(*layers, neuron.ParametricLIFNode(**options))

    return {"snntorch": snntorch, "norse": norse, "spikingjelly": spikingjelly}


def raising(*_: Any) -> Tensor:
    raise AssertionError("a surrogate function was called")


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("a surrogate function was called")


# -- files -------------------------------------------------------------------------------------------------


def png_size(file: Path) -> tuple[int, int]:
    """Width and height."""
    header = file.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def beside_torchvision(name: str) -> Any:
    """Imports a library that imports torchvision, or skips the test. A build of torchvision that does not fit torch's
    lacks its operators, which are declared."""
    declare_operators(name)
    return pytest.importorskip(name)
