"""Networks that fire by functions with a surrogate gradient in their own code: neurons that are written out, recurrent
nets with spikes as gates, nodes and models of SpikingJelly that no adapter takes over, and, where they are installed,
layers of sinabs (`pip install --no-deps sinabs`) and Rockpool. Untuned `ULR()` against BPTT
with that surrogate, as `benchmarks.zoo` compares them, and by its options. No default was tuned on any of these.

    python -m benchmarks.written --methods ulr bptt:1e-3 bptt:3e-3 bptt:1e-2   # results/written_runs.csv
    python -m benchmarks.written --times                                      # results/written_times.csv
    python -m benchmarks.written --table
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from benchmarks import zoo
from benchmarks.zoo_networks import ZOO, add, digit_rows, digits, multi_step, without_torchvision

without_torchvision()

from spikingjelly.activation_based import layer, neuron, rnn, surrogate  # noqa: E402
from spikingjelly.activation_based.model import masnn, maxformer, qkformer, spiking_vggws_ottt  # noqa: E402

STEPS = 10
BEFORE = set(ZOO)


class Rectangle(torch.autograd.Function):
    """Fires above a threshold; a surrogate that is constant around it, as in STBP (arXiv 1706.02609)."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.threshold = threshold
        return v.gt(threshold).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return gradient * ((v - ctx.threshold).abs() < 0.5).float(), None


class FastSigmoid(torch.autograd.Function):
    """Fires above zero; the surrogate of SuperSpike (arXiv 1705.11146)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (10 * x.abs() + 1) ** 2


class Convolutional(nn.Module):
    """Two convolutions and a linear layer with neurons in a loop over time, as in repositories of papers."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.third, self.out = nn.Linear(16 * channels, 128), nn.Linear(128, 10)

    @staticmethod
    def neuron(current: Tensor, v: Tensor | float) -> tuple[Tensor, Tensor]:
        v = 0.5 * v + current
        spikes = Rectangle.apply(v, 0.5)
        return spikes, v * (1 - spikes)

    def forward(self, x: Tensor) -> Tensor:
        a: Tensor | float = 0.0
        b: Tensor | float = 0.0
        c: Tensor | float = 0.0
        total: Tensor | float = 0.0
        for now in x:
            s, a = self.neuron(self.first(now), a)
            s, b = self.neuron(self.second(avg_pool2d(s, 2)), b)
            s, c = self.neuron(self.third(avg_pool2d(s, 2).flatten(1)), c)
            total = total + self.out(s)
        return torch.as_tensor(total) / len(x)


class Synaptic(nn.Module):
    """Two matrices, no module: currents and membranes that leak, and a readout, as in SpyTorch's tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = (nn.Parameter(torch.randn(a, b) / a**0.5) for a, b in ((512, 128), (128, 10)))

    def forward(self, x: Tensor) -> Tensor:
        current = x.flatten(2) @ self.inner
        synapse = v = torch.zeros_like(current[0])
        y, outputs = torch.zeros(x.shape[1], 10), []
        for now in current:
            spikes = FastSigmoid.apply(v - 1.0)
            reset = spikes.detach()
            v, synapse = (0.9 * v + synapse) * (1 - reset), 0.8 * synapse + now
            y = 0.9 * y + spikes @ self.outer
            outputs.append(y)
        return torch.stack(outputs)


class AdaptiveThresholds(nn.Module):
    """Recurrent neurons with adaptive thresholds and learned leaks, as in Yin et al. 2021 (arXiv 2103.12593)."""

    def __init__(self, neurons: int = 64) -> None:
        super().__init__()
        self.hidden, self.recurrent, self.out = (
            nn.Linear(32, neurons),
            nn.Linear(neurons, neurons),
            nn.Linear(neurons, 10),
        )
        self.leak, self.forgetting = (nn.Parameter(torch.full((neurons,), value)) for value in (2.0, 3.0))

    def forward(self, x: Tensor) -> Tensor:
        leak, forgetting = self.leak.sigmoid(), self.forgetting.sigmoid()
        v = spikes = torch.zeros(x.shape[1], len(leak))
        b, y, outputs = torch.full_like(v, 0.01), torch.zeros(x.shape[1], 10), []
        for now in x:
            b = forgetting * b + (1 - forgetting) * spikes
            threshold = 0.1 + 1.8 * b
            v = leak * v + (1 - leak) * (self.hidden(now) + self.recurrent(spikes)) - threshold * spikes
            spikes = FastSigmoid.apply(v - threshold)
            y = 0.9 * y + 0.1 * self.out(spikes)
            outputs.append(y)
        return torch.stack(outputs)


class Gates(nn.Module):
    """A recurrent net of SpikingJelly, whose gates are spikes, and a linear readout."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.recurrent, self.out = kind(32, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.recurrent(x)[0])


def convolutions(node: Callable[[], nn.Module]) -> nn.Module:
    """Two convolutions with batch norm, and nodes of SpikingJelly."""
    first = layer.Conv2d(2, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), node(), layer.MaxPool2d(2, 2)
    second = layer.Conv2d(16, 16, 3, padding=1, bias=False), layer.BatchNorm2d(16), node(), layer.AvgPool2d(2, 2)
    return multi_step(nn.Sequential(*first, *second, layer.Flatten(), layer.Linear(256, 10)))


class BatchFirst(nn.Module):
    """Layers that take [B, T, ...]."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(0, 1)).transpose(0, 1)


def sinabs_conv() -> nn.Module:
    """The network of sinabs' quick start with N-MNIST, for 16 x 16 pixels."""
    from sinabs import activation, layers

    def fires() -> nn.Module:
        surrogate_gradient = activation.PeriodicExponential()
        return layers.IAFSqueeze(num_timesteps=STEPS, min_v_mem=-1.0, surrogate_grad_fn=surrogate_gradient)

    first = nn.Conv2d(2, 8, 3, padding=1, bias=False), fires(), nn.AvgPool2d(2)
    second = nn.Conv2d(8, 16, 3, padding=1, bias=False), fires(), nn.AvgPool2d(2)
    third = nn.Conv2d(16, 16, 3, padding=1, stride=2, bias=False), fires(), nn.Flatten()
    last = nn.Linear(64, 10, bias=False), fires()
    return BatchFirst(layers.FlattenTime(), *first, *second, *third, *last, nn.Unflatten(0, (-1, STEPS)))


def sinabs_rows(kind: str) -> nn.Module:
    """A hidden layer of sinabs' recurrent or adaptive neurons, and a linear readout."""
    from sinabs import layers

    if kind == "ALIF":
        hidden = layers.ALIF(tau_mem=10.0, tau_adapt=10.0, norm_input=False)
    else:
        hidden = layers.LIFRecurrent(tau_mem=10.0, rec_connect=nn.Linear(64, 64), norm_input=False)
    return BatchFirst(nn.Linear(32, 64), hidden, nn.Linear(64, 10))


class Rockpool(nn.Module):
    """A hidden layer of Rockpool's neurons, and its exponential synapse as readout."""

    def __init__(self) -> None:
        super().__init__()
        from rockpool.nn.combinators import Sequential
        from rockpool.nn.modules import ExpSynTorch, LIFTorch, LinearTorch
        from rockpool.parameters import Constant

        taus = {"tau_mem": Constant(2e-2), "tau_syn": Constant(2e-2), "dt": 1e-2}
        hidden = LinearTorch((32, 64)), LIFTorch(64, **taus)
        self.layers = Sequential(
            *hidden, LinearTorch((64, 10)), ExpSynTorch(10, tau=Constant(2e-2), dt=1e-2)
        ).to_torch()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(0, 1)).transpose(0, 1)


def parallel() -> nn.Module:
    return neuron.PSN(STEPS, surrogate_function=surrogate.ATan())


def gated() -> nn.Module:
    return neuron.GatedLIFNode(STEPS, 16, surrogate_function=surrogate.ATan())


long, short, pictures = (
    partial(digits, steps=STEPS),
    partial(digits, steps=4, channels=3),
    partial(digits, steps=4, size=32, channels=3),
)
add("w_conv", Convolutional, long)
add("w_spytorch", Synaptic, partial(digits, steps=20))
add("w_alif", AdaptiveThresholds, digit_rows)
add("w_lstm", partial(Gates, rnn.SpikingLSTM), digit_rows)
add("w_gru", partial(Gates, rnn.SpikingGRU), digit_rows)
add("w_psn", partial(convolutions, parallel), long)
add("w_clif", partial(convolutions, neuron.ComplementaryLIFNode), long)
add("w_glif", partial(convolutions, gated), long)
add("w_ternary", partial(convolutions, neuron.TernaryLIFNode), long)
add(
    "w_ottt",
    lambda: spiking_vggws_ottt.OTTTSpikingVGG(
        [16, "A", 32, "A", 512], num_classes=10, spiking_neuron=neuron.OTTTLIFNode
    ),
    short,
)
add("w_masnn", lambda: masnn.MASNN(STEPS, 2, 10, (16, 16), (16, 32), (2, 2), 64, 5, 8), long)
add("w_qkformer", lambda: qkformer.QKFormer(4, 3, 10, 64, (2, 4, 4), (1, 1, 1)), pictures)
add("w_maxformer", lambda: maxformer.MaxFormer(4, 3, 10, 64, (1, 1, 1)), pictures)
if find_spec("sinabs"):
    add("w_sinabs_conv", sinabs_conv, long)
    add("w_sinabs_rec", partial(sinabs_rows, "recurrent"), digit_rows)
    add("w_sinabs_alif", partial(sinabs_rows, "ALIF"), digit_rows)
if find_spec("rockpool"):
    add("w_rockpool", Rockpool, digit_rows)
NETWORKS = [name for name in ZOO if name not in BEFORE]

if __name__ == "__main__":
    zoo.main(__doc__, NETWORKS, "written_runs.csv")
