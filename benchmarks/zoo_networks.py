"""Networks of the field: SpikingJelly's and Norse's as their packages ship them, and nets of their examples and of
snnTorch's tutorials, made small enough for 150 training steps on a CPU."""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

Part = tuple[Tensor, Tensor]
Parts = tuple[Part, Part]


@dataclass(frozen=True)
class Network:
    """A network, the data that it is trained on, and its loss. tuned: whether defaults were looked at on it."""

    make: Callable[[], nn.Module]
    data: Callable[[str], Parts]
    loss: object = "ce_count"
    tuned: bool = False


ZOO: dict[str, Network] = {}

# Networks on which defaults were tuned. All others were only measured.
TUNED = (
    *("sj_csnn", "snn_t6_cnn", "v_deep4", "sj_seq_plain", "snn_pop", "no_speech_lif"),
    # looked at while the schedule was chosen:
    *("v_sew12", "sj_spikformer", "snn_stmnist", "v_lin", "snn_slstm", "sj_seq_fb", "snn_t7_msecount", "v_deep8"),
    *("v_deep12", "v_sew4", "sj_ms18", "v_spike_LIF", "sj_sew18_AND", "sj_lif_fc", "sj_nmnist_lif", "no_memory_lsnn"),
    *("snn_rleaky", "snn_sae", "v_lin_LIF", "v_lin_nobn", "v_lin_avg"),
    # looked at while the bound of all steps together was chosen:
    *("r_s2net", "r_s2net_lateral", "r_s2net_conv", "r_srnn", "r_stbp_mnist", "r_slayer_cuba"),
)


def add(name: str, make: Callable[[], nn.Module], data: Callable[[str], Parts], loss: object = "ce_count") -> None:
    ZOO[name] = Network(make, data, loss, name in TUNED)


# -- data --------------------------------------------------------------------------------------------------


@lru_cache
def _frames() -> Parts:
    """The package's digits, [n, 20, 2, 16, 16] and labels, in both parts."""
    from ulr_snn.data import load

    found = []
    for part in load("digits"):
        samples = [part[i] for i in range(len(part))]
        frames = torch.stack([torch.as_tensor(sample[0]) for sample in samples])
        found.append((frames, torch.tensor([int(sample[1]) for sample in samples])))
    return found[0], found[1]


def digits(root: str, steps: int = 5, size: int = 16, channels: int = 2) -> Parts:
    """Digits in `steps` binary frames of `size` x `size` pixels; a third channel joins both polarities."""
    found = []
    for x, y in _frames():
        frames = x.unflatten(1, (steps, 20 // steps)).sum(2).clamp(max=1).float()
        if size > 16:
            frames = frames.repeat_interleave(size // 16, -1).repeat_interleave(size // 16, -2)
        if channels == 3:
            frames = torch.cat([frames, frames.amax(2, keepdim=True)], 2)
        found.append((frames, y))
    return found[0], found[1]


def digit_rows(root: str) -> Parts:
    """Digits row by row, one a time step: 16 steps of 32 inputs."""
    (a, ya), (b, yb) = digits(root, steps=1)
    return (a[:, 0].transpose(1, 2).flatten(2), ya), (b[:, 0].transpose(1, 2).flatten(2), yb)


def saccades(root: str, train: int = 2000, test: int = 400) -> Parts:
    """A part of saccade-mnist in 10 binary frames; both parts are of its training set."""
    from ulr_snn.data import load

    recordings, _ = load("nmnist", f"{root}/saccade-mnist", time_bins=20, bin_us=15_000, binary=True)
    order = torch.randperm(len(recordings), generator=torch.Generator().manual_seed(3))[: train + test]
    x, y, _ = recordings.dense(order.tolist())  # [T, n, ...]
    x = x.transpose(0, 1).unflatten(1, (10, 2)).amax(2).float()
    return (x[:train], y[:train]), (x[train:], y[train:])


def pictures(root: str) -> Parts:
    """Grey pictures of digits, 16 x 16, shown for five steps, to be reproduced."""
    from sklearn.datasets import load_digits

    x = torch.tensor(load_digits().images, dtype=torch.float32).div(16)[:, None]
    x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    shown, wanted = x[:, None].expand(-1, 5, -1, -1, -1), x.flatten(1)
    return (shown[:1400], wanted[:1400]), (shown[1400:], wanted[1400:])


# -- SpikingJelly ------------------------------------------------------------------------------------------


def without_torchvision() -> None:
    """SpikingJelly's models import one function of torchvision, which does not import beside torch for CPUs."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("torchvision", "torchvision.models", "torchvision.models.utils"):
            sys.modules[name] = types.ModuleType(name)
        vars(sys.modules["torchvision.models.utils"])["load_state_dict_from_url"] = None


without_torchvision()

from spikingjelly.activation_based import functional, layer, neuron, surrogate  # noqa: E402
from spikingjelly.activation_based.model import (  # noqa: E402
    ms_resnet,
    parametric_lif_net,
    sew_resnet,
    spikformer,
    spiking_vgg,
)

SHARED = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
IF = {"spiking_neuron": neuron.IFNode, **SHARED}
LIF = {"spiking_neuron": neuron.LIFNode, "tau": 2.0, **SHARED}
PLIF = {"spiking_neuron": neuron.ParametricLIFNode, "init_tau": 2.0, **SHARED}


def multi_step(net: nn.Module) -> nn.Module:
    functional.set_step_mode(net, "m")
    return net


def fires(kind: str, detach: bool = True) -> nn.Module:
    """SpikingJelly's IF or LIF node with its arc tangent."""
    options = {"surrogate_function": surrogate.ATan(), "detach_reset": detach}
    return neuron.IFNode(**options) if kind == "IF" else neuron.LIFNode(tau=2.0, **options)


class MeanOverTime(nn.Module):
    """What its layers give, averaged over time."""

    def __init__(self, *layers: nn.Module, mean: bool = True) -> None:
        super().__init__()
        self.layers, self.mean = nn.Sequential(*layers), mean
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layers(x)
        return outputs.mean(0) if self.mean else outputs


def csnn(
    kind: str = "IF",
    spikes_out: bool = True,
    norm: bool = True,
    pool: str = "max",
    mean: bool = True,
    detach: bool = True,
) -> nn.Module:
    """The convolutional net of SpikingJelly's Fashion-MNIST example with 16 channels."""
    pooling = layer.MaxPool2d if pool == "max" else layer.AvgPool2d
    layers: list[nn.Module] = []
    for inputs in (2, 16):
        layers.append(layer.Conv2d(inputs, 16, 3, padding=1, bias=not norm))
        layers += [layer.BatchNorm2d(16)] if norm else []
        layers += [fires(kind, detach), pooling(2, 2)]
    layers += [layer.Flatten(), layer.Linear(256, 256, bias=False), fires(kind, detach)]
    layers.append(layer.Linear(256, 10, bias=False))
    return MeanOverTime(*layers, *([fires(kind, detach)] if spikes_out else []), mean=mean)


class Stack(nn.Module):
    """Convolutions of 16 channels with batch norm and LIF nodes, plain or with sums around each as in SEW-ResNet."""

    def __init__(self, depth: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        strides = [2 if i in (1, depth // 2 + 1) else 1 for i in range(depth)]
        blocks = [
            nn.Sequential(
                layer.Conv2d(16 if i else 2, 16, 3, stride, 1, bias=False), layer.BatchNorm2d(16), fires("LIF")
            )
            for i, stride in enumerate(strides)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.readout = nn.Sequential(layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(16, 10))
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            spikes = block(x)
            x = spikes + x if self.residual and spikes.shape == x.shape else spikes
        return self.readout(x)


def wide_cifar(dropout: bool) -> nn.Module:
    """SpikingJelly's net for CIFAR-10 with 16 channels and a linear readout."""
    net = parametric_lif_net.CIFAR10Net(channels=16, **LIF)
    layers = [*list(net.conv_fc)[:-3], layer.Linear(2048, 10)]
    net.conv_fc = nn.Sequential(*[m for m in layers if dropout or not isinstance(m, layer.Dropout)])
    return multi_step(net)


def rows_net(recurrent: bool) -> nn.Module:
    """The recurrent or plain net of SpikingJelly's sequential Fashion-MNIST example."""
    node = neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=recurrent)
    hidden = layer.LinearRecurrentContainer(node, in_features=32, out_features=32, bias=True) if recurrent else node
    last = neuron.IFNode(surrogate_function=surrogate.ATan())
    return MeanOverTime(layer.Linear(32, 32), hidden, layer.Linear(32, 10), last)


frames32 = partial(digits, size=32, channels=3)
add("sj_nmnist_plif", lambda: multi_step(parametric_lif_net.NMNISTNet(channels=8, **PLIF)), saccades)
add("sj_nmnist_lif", lambda: multi_step(parametric_lif_net.NMNISTNet(channels=8, **LIF)), saccades)
add("sj_cifar10net", lambda: multi_step(parametric_lif_net.CIFAR10Net(channels=16, **LIF)), frames32)
add("sj_vgg11_bn", lambda: multi_step(spiking_vgg.spiking_vgg11_bn(num_classes=10, **IF)), partial(frames32, steps=4))
add("sj_vgg11", lambda: multi_step(spiking_vgg.spiking_vgg11(num_classes=10, **IF)), partial(frames32, steps=4))
for kind in ("ADD", "AND", "IAND"):
    sew = partial(sew_resnet.sew_resnet18, num_classes=10, cnf=kind, **IF)
    add(f"sj_sew18_{kind}", lambda sew=sew: multi_step(sew()), partial(frames32, steps=4))
add(
    "sj_ms18",
    lambda: ms_resnet.MSResNet(4, 2, 10, (2, 2, 2), base_channels=16, stem_kernel_size=3, stem_stride=1),
    partial(digits, steps=4),
)
add(
    "sj_spikformer",
    lambda: spikformer.Spikformer(
        T=4,
        in_channels=2,
        img_size_h=16,
        img_size_w=16,
        patch_size=4,
        num_classes=10,
        embed_dims=64,
        num_heads=4,
        depths=2,
    ),
    partial(digits, steps=4),
)
add("sj_csnn", partial(csnn, detach=False), digits)
add(
    "sj_lif_fc",
    lambda: nn.Sequential(layer.Flatten(), layer.Linear(512, 10, bias=False), fires("LIF", detach=False)),
    partial(digits, steps=20),
)
add("sj_seq_plain", lambda: rows_net(False), digit_rows)
add("sj_seq_fb", lambda: rows_net(True), digit_rows)
add("v_spike", csnn, digits)
add("v_lin", partial(csnn, spikes_out=False), digits)
add("v_spike_LIF", partial(csnn, "LIF"), digits)
add("v_lin_LIF", partial(csnn, "LIF", spikes_out=False), digits)
add("v_lin_avg", partial(csnn, spikes_out=False, pool="avg"), digits)
add("v_lin_nobn", partial(csnn, spikes_out=False, norm=False), digits)
add("v_spike_seq", partial(csnn, mean=False), digits)
add("v_lin_seq", partial(csnn, spikes_out=False, mean=False), digits)
add("v_spike_T20", csnn, partial(digits, steps=20))
add("v_lin_T20", partial(csnn, spikes_out=False), partial(digits, steps=20))
add("v_c10_lin", lambda: wide_cifar(True), frames32)
add("v_c10_lin_nodrop", lambda: wide_cifar(False), frames32)
for depth in (2, 4, 6, 8, 12):
    add(f"v_deep{depth}", partial(Stack, depth, False), digits)
    add(f"v_sew{depth}", partial(Stack, depth, True), digits)


# -- snnTorch ----------------------------------------------------------------------------------------------

import snntorch as snn  # noqa: E402
from snntorch import functional as losses  # noqa: E402


def leaky(beta: float, **options: object) -> nn.Module:
    """snnTorch's Leaky with the fast sigmoid of its tutorials, which keeps its own state."""
    return snn.Leaky(beta=beta, spike_grad=snn.surrogate.fast_sigmoid(slope=25), init_hidden=True, **options)


def tutorial6(kernel: int, features: int) -> nn.Module:
    """The convolutional net of snnTorch's tutorial 6."""
    return nn.Sequential(
        *(nn.Conv2d(2, 12, 5), nn.MaxPool2d(2), leaky(0.5)),
        *(nn.Conv2d(12, 32, kernel), nn.MaxPool2d(2), leaky(0.5)),
        *(nn.Flatten(), nn.Linear(features, 10), leaky(0.5, output=True)),
    )


def population() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(512, 128), leaky(0.9), nn.Linear(128, 200), leaky(0.9, output=True))


def st_mnist() -> nn.Module:
    """The net of snnTorch's ST-MNIST tutorial."""
    own = partial(snn.Leaky, beta=0.95, init_hidden=True)
    convolutions = (nn.Conv2d(2, 16, 4), own(), nn.Conv2d(16, 32, 3), own(), nn.MaxPool2d(2))
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 10), own(output=True))


class AllToAll(nn.Module):
    """Two recurrent layers, as in snnTorch's second regression tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(32, 64), nn.Linear(64, 10)
        self.hidden = snn.RLeaky(beta=0.9, linear_features=64, learn_beta=True)
        self.last = snn.RLeaky(beta=0.9, linear_features=10)

    def forward(self, x: Tensor) -> Tensor:
        (s, u), (o, v), found = self.hidden.init_rleaky(), self.last.init_rleaky(), []
        for now in x:
            s, u = self.hidden(self.into(now), s, u)
            o, v = self.last(self.out(s), o, v)
            found.append(o)
        return torch.stack(found)


class LongShortTerm(nn.Module):
    """Two SLSTM layers and a linear readout of the last hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = snn.SLSTM(32, 48, learn_threshold=True), snn.SLSTM(48, 48)
        self.readout = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        (a, b), (c, d) = self.first.init_slstm(), self.second.init_slstm()
        for now in x:
            spikes, a, b = self.first(now, a, b)
            _, c, d = self.second(spikes, c, d)
        return self.readout(d)


class SecondOrder(nn.Module):
    """A Synaptic layer and an Alpha readout of membranes, as in snnTorch's tutorial 4."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(512, 128), nn.Linear(128, 10)
        self.hidden, self.last = snn.Synaptic(alpha=0.9, beta=0.8), snn.Alpha(alpha=0.8, beta=0.7)

    def forward(self, x: Tensor) -> Tensor:
        (i, u), (plus, minus, v), found = self.hidden.init_synaptic(), self.last.init_alpha(), []
        for now in x:
            spikes, i, u = self.hidden(self.into(now.flatten(1)), i, u)
            _, plus, minus, v = self.last(self.out(spikes), plus, minus, v)
            found.append(v)
        return torch.stack(found)


class Autoencoder(nn.Module):
    """snnTorch's spiking autoencoder: latent spikes, and the membrane of a layer that never fires as the picture."""

    def __init__(self) -> None:
        super().__init__()

        def own(threshold: float = 1.0, **options: object) -> nn.Module:
            return snn.Leaky(
                beta=0.5, init_hidden=True, threshold=threshold, spike_grad=snn.surrogate.atan(alpha=2.0), **options
            )

        down = [m for i, o in ((1, 8), (8, 16), (16, 32)) for m in (nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), own())]
        up = [
            m
            for i, o in ((32, 16), (16, 8))
            for m in (nn.ConvTranspose2d(i, o, 3, 2, 1, output_padding=1), nn.BatchNorm2d(o), own())
        ]
        self.encoder = nn.Sequential(*down, nn.Flatten(1), nn.Linear(128, 32), own(output=True))
        self.middle = nn.Sequential(nn.Linear(32, 128), own(output=True))
        last = nn.ConvTranspose2d(8, 1, 3, 2, 1, output_padding=1)
        self.decoder = nn.Sequential(nn.Unflatten(1, (32, 2, 2)), own(), *up, last, own(20_000.0, output=True))

    def forward(self, x: Tensor) -> Tensor:
        for now in x:
            _, picture = self.decoder(self.middle(self.encoder(now)[0])[0])
        return picture.flatten(1)


count_loss = losses.mse_count_loss(correct_rate=0.8, incorrect_rate=0.2)
by_population = losses.mse_count_loss(correct_rate=1.0, incorrect_rate=0.0, population_code=True, num_classes=10)
frames20 = partial(digits, steps=20)
add("snn_t6_cnn_34", lambda: tutorial6(5, 800), saccades)
add("snn_t6_cnn", lambda: tutorial6(3, 128), frames20)
add("snn_t7_msecount", lambda: tutorial6(3, 128), frames20, count_loss)
add("snn_pop", population, frames20, by_population)
add("snn_stmnist", st_mnist, frames20, count_loss)
add("snn_rleaky", AllToAll, digit_rows, count_loss)
add("snn_slstm", LongShortTerm, digit_rows)
add("snn_syn_alpha", SecondOrder, frames20)
add("snn_sae", Autoencoder, pictures, "mse")


# -- Norse -------------------------------------------------------------------------------------------------

import norse.torch as norse  # noqa: E402
from norse.torch.models.conv import ConvNet  # noqa: E402


class LastMembrane(nn.Module):
    """The net of Norse's speech commands task: the readout's last membranes as log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = norse.LIFRecurrentCell(32, 64), norse.LILinearCell(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = readout = None
        for now in x:
            spikes, state = self.hidden(now, state)
            membranes, readout = self.readout(spikes, readout)
        return membranes.log_softmax(1)


class HighestMembrane(nn.Module):
    """The net of Norse's CIFAR-10 task: each class by the highest membrane that its noisy readout reaches."""

    def __init__(self) -> None:
        super().__init__()
        p = norse.LIFParameters(alpha=torch.tensor(100.0))

        def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
            return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norse.LIFCell(p)

        pool = nn.MaxPool2d(2)
        self.features = norse.SequentialState(
            *(*convolution(2, 8), *convolution(8, 16), pool),
            *(*convolution(16, 32), pool, *convolution(32, 32), pool, nn.Flatten()),
        )
        self.readout = norse.SequentialState(nn.Linear(128, 10, bias=False), norse.LICell())

    def forward(self, x: Tensor) -> Tensor:
        state = readout = None
        found = []
        for now in x:
            spikes, state = self.features(now, state)
            membranes, readout = self.readout(spikes, readout)
            found.append(membranes + 0.001 * torch.randn(membranes.shape))
        return torch.stack(found).amax(0)


class Adaptive(nn.Module):
    """The net of Norse's memory task: adaptive recurrent neurons and an integrating readout."""

    def __init__(self) -> None:
        super().__init__()
        p = norse.LSNNParameters(v_th=torch.tensor(0.5), beta=torch.tensor(1.8))
        self.hidden, self.readout = norse.LSNNRecurrentCell(32, 32, p=p), norse.LILinearCell(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = readout = None
        found = []
        for now in x:
            spikes, state = self.hidden(now, state)
            membranes, readout = self.readout(spikes, readout)
            found.append(membranes)
        return torch.stack(found)


add("no_convnet", lambda: ConvNet(num_channels=2, feature_size=34), saccades)
add("no_speech_lif", LastMembrane, digit_rows)
add("no_cifar", HighestMembrane, partial(digits, steps=10))
add("no_memory_lsnn", Adaptive, digit_rows)
