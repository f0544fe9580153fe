"""Small networks with one kind of layer or neuron of SpikingJelly, snnTorch or Norse each, in an otherwise usual net on
digits in five frames. Untuned `ULR()` against BPTT with the library's own surrogate, as `benchmarks.zoo` compares them,
and by its options. No default was tuned on any of these.

    python -m benchmarks.kinds --methods ulr bptt:1e-3 bptt:3e-3 bptt:1e-2 bptt-cycle:1.5e-2 --seeds 1
    python -m benchmarks.kinds --table   # of results/kinds_runs.csv
"""

from collections.abc import Callable
from functools import partial

import norse.torch as norse
import snntorch as snn
import torch
from norse.torch.functional import izhikevich
from snntorch import utils
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from benchmarks import zoo
from benchmarks.zoo_networks import ZOO, MeanOverTime, add, digits, multi_step

STEPS, PIXELS, HIDDEN, CLASSES = 5, 512, 64, 10
BEFORE = set(ZOO)
Make = Callable[[], nn.Module]

# -- SpikingJelly ------------------------------------------------------------------------------------------


def lif() -> nn.Module:
    return neuron.LIFNode(tau=2.0, detach_reset=True)


def plain(inputs: int, outputs: int) -> nn.Module:
    return layer.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def standardised(inputs: int, outputs: int) -> nn.Module:
    return layer.WSConv2d(inputs, outputs, 3, padding=1)


def batch_norm(channels: int, size: int) -> nn.Module:
    return layer.BatchNorm2d(channels)


def nothing(channels: int, size: int) -> nn.Module:
    return nn.Identity()


Sized = Callable[[int, int], nn.Module]


def convolutions(convolution: Sized = plain, norm: Sized = batch_norm, after: Sized = nothing) -> nn.Module:
    """Two convolutions. norm, after: made for so many channels and pixels on a side, before and after the neurons."""
    layers: list[nn.Module] = []
    for inputs, size in (2, 16), (16, 8):
        layers += [convolution(inputs, 16), norm(16, size), lif(), after(16, size), layer.AvgPool2d(2)]
    return MeanOverTime(*layers, layer.Flatten(), layer.Linear(PIXELS // 2, CLASSES))


def dense(*makers: Make) -> nn.Module:
    first = layer.Flatten(), layer.Linear(PIXELS, HIDDEN)
    return MeanOverTime(*first, *(make() for make in makers), layer.Linear(HIDDEN, CLASSES))


def voting() -> nn.Module:
    return MeanOverTime(layer.Flatten(), layer.Linear(PIXELS, 10 * CLASSES), lif(), layer.VotingLayer(10))


def dropped_connections() -> nn.Module:
    drop = partial(layer.DropConnectLinear, activation=None)
    return MeanOverTime(layer.Flatten(), drop(PIXELS, HIDDEN), lif(), drop(HIDDEN, CLASSES))


class Attention(nn.Module):
    """A convolution, and attention of its spikes to each other, which is added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = layer.Conv2d(2, 16, 3, stride=2, padding=1, bias=False), layer.BatchNorm2d(16)
        self.neurons, self.attention = lif(), layer.SpikingSelfAttention(16, 4)
        self.out = layer.Linear(16, CLASSES)
        multi_step(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.neurons(self.norm(self.convolution(x))).flatten(3)
        return self.out((x + self.attention(x)).mean(3)).mean(0)


CONVOLUTIONS: dict[str, dict[str, Sized]] = {
    "tdbn": {"norm": lambda channels, _: layer.ThresholdDependentBatchNorm2d(1.0, 1.0, channels)},
    "tebn": {"norm": lambda channels, _: layer.TemporalEffectiveBatchNorm2d(STEPS, channels)},
    "bntt": {"norm": lambda channels, _: layer.BatchNormThroughTime2d(STEPS, channels)},
    "groupnorm": {"norm": lambda channels, _: layer.GroupNorm(4, channels)},
    "neunorm": {"norm": lambda channels, size: layer.NeuNorm(channels, size, size)},
    "wsconv": {"convolution": standardised, "norm": nothing},
    "attention_t": {"after": lambda *_: layer.TemporalWiseAttention(STEPS, 2)},
    "attention_tcs": {"after": lambda channels, _: layer.MultiDimensionalAttention(STEPS, channels, 2, 4)},
}
DENSE: dict[str, tuple[Make, ...]] = {
    "rec_elementwise": (lambda: layer.ElementWiseRecurrentContainer(lif(), lambda x, y: x - 0.3 * y),),
    "rec_linear": (lambda: layer.LinearRecurrentContainer(lif(), HIDDEN, HIDDEN, True),),
    "delay": (lif, lambda: layer.Delay(2)),
    "synapse": (lif, lambda: layer.SynapseFilter(2.0, learnable=True)),
    "if": (neuron.IFNode,),
    "lif_soft": (lambda: neuron.LIFNode(tau=2.0, v_reset=None),),
    "lif_no_decay": (lambda: neuron.LIFNode(tau=2.0, decay_input=False),),
    "plif": (neuron.ParametricLIFNode,),
    "klif": (neuron.KLIFNode,),
    "half": (neuron.HalfThresholdIFNode,),
    "sltt": (neuron.SLTTLIFNode,),
    "ilif": (neuron.ILIFNode,),
    "simple_lif": (lambda: neuron.SimpleLIFNode(2.0, False),),
    "cubalif": (neuron.CUBALIFNode,),
    "raf": (lambda: neuron.RAFNode(v_threshold=0.3),),
    "liaf": (lambda: neuron.LIAFNode(torch.relu, False),),
    "mpbn": (lambda: neuron.MPBNLIFNode(out_features=HIDDEN),),
    "ternary": (neuron.TernaryLIFNode,),
}

# -- snnTorch ----------------------------------------------------------------------------------------------


class Loop(nn.Module):
    """A dense net of snnTorch whose states are hidden in its neurons."""

    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.first, self.neurons = nn.Linear(PIXELS, HIDDEN), make(init_hidden=True)
        self.second, self.out = nn.Linear(HIDDEN, CLASSES), snn.Leaky(beta=0.9, init_hidden=True, output=True)

    def forward(self, x: Tensor) -> Tensor:
        utils.reset(self)
        return torch.stack([self.out(self.second(self.neurons(self.first(now.flatten(1)))))[0] for now in x])


class NormThroughTime(nn.Module):
    """A convolution with a batch norm for each time step, and neurons with learned leak and threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norms = nn.Conv2d(2, 16, 3, padding=1), snn.BatchNormTT2d(16, STEPS)
        self.neurons = snn.Leaky(beta=0.9, learn_beta=True, learn_threshold=True)
        self.second, self.out = nn.Linear(2 * PIXELS, CLASSES), snn.Leaky(beta=0.9)

    def forward(self, x: Tensor) -> Tensor:
        v, w, spikes = self.neurons.init_leaky(), self.out.init_leaky(), []
        for now, norm in zip(x, self.norms, strict=True):
            inner, v = self.neurons(avg_pool2d(norm(self.convolution(now)), 2), v)
            fired, w = self.out(self.second(inner.flatten(1)), w)
            spikes.append(fired)
        return torch.stack(spikes)


LOOPS: dict[str, Callable[..., nn.Module]] = {
    "leaky": partial(snn.Leaky, beta=0.9),
    "synaptic": partial(snn.Synaptic, alpha=0.8, beta=0.9),
    "alpha": partial(snn.Alpha, alpha=0.9, beta=0.8),
    "lapicque": partial(snn.Lapicque, beta=0.9),
    "rleaky": partial(snn.RLeaky, beta=0.9, linear_features=HIDDEN),
    "rsynaptic": partial(snn.RSynaptic, alpha=0.8, beta=0.9, linear_features=HIDDEN),
}

# -- Norse -------------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """A dense net of Norse's cells, step by step."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.net = norse.SequentialState(nn.Linear(PIXELS, HIDDEN), make(), nn.Linear(HIDDEN, CLASSES), norse.LICell())

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for now in x:
            out, state = self.net(now.flatten(1), state)
            outputs.append(out)
        return torch.stack(outputs)


class Lifted(nn.Module):
    """A convolutional net of Norse's layers, on whole sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.neurons = norse.Lift(nn.Conv2d(2, 8, 3, padding=1)), norse.LIF(parameters())
        self.second, self.out = norse.Lift(nn.Linear(4 * PIXELS, CLASSES)), norse.LI()

    def forward(self, x: Tensor) -> Tensor:
        spikes, _ = self.neurons(self.convolution(x))
        outputs: Tensor = self.out(self.second(spikes.flatten(2)))[0]
        return outputs


def parameters() -> norse.LIFParameters:
    return norse.LIFParameters(method="super", alpha=torch.tensor(100.0), v_th=torch.tensor(0.4))


def refractory() -> norse.LIFRefracParameters:
    return norse.LIFRefracParameters(lif=parameters(), rho_reset=torch.tensor(2.0))


CELLS: dict[str, Make] = {
    "lif": lambda: norse.LIFCell(parameters()),
    "box": norse.LIFBoxCell,
    "refractory": lambda: norse.LIFRefracCell(refractory()),
    "recurrent": lambda: norse.LIFRecurrentCell(HIDDEN, HIDDEN, parameters()),
    "adex": norse.LIFAdExCell,
    "adex_rec": lambda: norse.LIFAdExRecurrentCell(HIDDEN, HIDDEN),
    "lsnn": lambda: norse.LSNNRecurrentCell(HIDDEN, HIDDEN),
    "ex": norse.LIFExCell,
    "iaf": norse.IAFCell,
    "izhikevich": lambda: norse.IzhikevichCell(izhikevich.tonic_spiking),
}

frames = partial(digits, steps=STEPS)
for name, options in CONVOLUTIONS.items():
    add(f"k_sj_{name}", partial(convolutions, **options), frames)
for name, layers in DENSE.items():
    add(f"k_sj_{name}", partial(dense, *layers), frames)
add("k_sj_voting", voting, frames)
add("k_sj_dropconnect", dropped_connections, frames)
add("k_sj_attention", Attention, frames)
for name, kind in LOOPS.items():
    add(f"k_snn_{name}", partial(Loop, kind), frames)
add("k_snn_bntt", NormThroughTime, frames)
for name, cell in CELLS.items():
    add(f"k_no_{name}", partial(Cells, cell), frames)
add("k_no_lift", Lifted, frames)
NETWORKS = [name for name in ZOO if name not in BEFORE]

if __name__ == "__main__":
    zoo.main(__doc__, NETWORKS, "kinds_runs.csv")
