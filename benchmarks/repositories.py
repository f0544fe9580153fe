"""Networks of repositories that belong to papers, run from their own files: neurons, layers and models that nobody here
wrote or changed. Untuned `ULR()` against BPTT with their surrogates, as `benchmarks.zoo` compares them. The bound of
all steps together was chosen on six of them (see `NOTES.md`), and no other default on any.

    ULR_SNN_CLONES=DIR python -m benchmarks.repositories --methods ulr bptt:1e-3 bptt:3e-3 bptt:1e-2 --seeds 1
    ULR_SNN_CLONES=DIR python -m benchmarks.repositories --times
    python -m benchmarks.repositories --table

DIR holds a clone of each repository of CLONES, in a folder with its name, at the commit that stands there. Models that
are made for a GPU run on the CPU, where `cuda()` returns its tensor. Sizes are small, as in `benchmarks.zoo`.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from benchmarks import zoo
from benchmarks.zoo_networks import ZOO, Parts, add, digit_rows, digits

BEFORE = set(ZOO)
CLONED = Path(os.environ.get("ULR_SNN_CLONES", "../clones"))

CLONES = {
    "idiap/sparch": "f875625",
    "romainzimmer/s2net": "6eef813",
    "byin-cwi/Efficient-spiking-networks": "bfd47cf",
    "Gus-Lab/temporal_efficient_training": "f9bde41",
    "thiswinex/STBP-simple": "a15de7c",
    "yjwu17/BP-for-SpikingNN": "8453086",
    "HuuYuLong/Complementary-LIF": "d76af59",
    "putshua/SNN_conversion_QCFS": "c27a446",
    "ridgerchu/SpikeGPT": "029f86f",
    "lava-nc/lava-dl": "d825ac5",
    "Thvnvtos/SNN-delays": "d169b4e",
}
OLD_SPIKINGJELLY = "SpikeGPT/src"  # ships the version of SpikingJelly that another repository builds on


@contextmanager
def code_of(*folders: str) -> Iterator[Callable[[str], Any]]:
    """Within this context, imports look into folders of the clones first. Gives the function that imports. Afterwards,
    their modules have no names, since many repositories give the same ones."""
    paths = [CLONED / folder for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} does not exist; clone the repositories of CLONES, set ULR_SNN_CLONES")
    names = {entry.stem for path in paths for entry in path.iterdir()}

    def ours() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}

    kept = ours()
    for name in kept:
        del sys.modules[name]
    sys.path[:0] = map(str, paths)
    try:
        yield import_module
    finally:
        del sys.path[: len(paths)]
        for name in ours():
            del sys.modules[name]
        sys.modules.update(kept)


def without(name: str, **attributes: Any) -> None:
    """Makes an import find an empty module, in place of one that needs other packages and is not used here."""
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__dict__.update(attributes)


class As(nn.Module):
    """A model, called as it wants to be called for a batch x [T, B, ...]."""

    def __init__(self, model: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.model, x)


def first(model: nn.Module, x: Tensor) -> Tensor:
    """The first output for the batch [B, T, ...]."""
    return model(x.transpose(0, 1))[0]


def sparch(kind: str, **options: Any) -> nn.Module:
    with code_of("sparch") as load:
        snns = load("sparch.models.snns")
    return As(snns.SNN((32, 16, 32), [64, 64, 10], neuron_type=kind, **options), first)


SMALL_WEIGHTS: dict[str, Any] = {"w_init_mean": 0.0, "w_init_std": 0.15}


def s2net(recurrent: bool, lateral: bool) -> nn.Module:
    with code_of("s2net") as load:
        models = load("models")
    fire = models.SurrogateHeaviside.apply
    options = SMALL_WEIGHTS | {"recurrent": recurrent, "lateral_connections": lateral}
    hidden = [models.SpikingDenseLayer(n, 64, fire, **options) for n in (32, 64)]
    return As(models.SNN([*hidden, models.ReadoutLayer(64, 10, 0.0, 0.15, time_reduction="max")]), first)


def s2net_convolutions() -> nn.Module:
    with code_of("s2net") as load:
        models = load("models")
    options = SMALL_WEIGHTS | {"lateral_connections": False}
    fire = models.SurrogateHeaviside.apply
    a = models.SpikingConv2DLayer(32, 16, 1, 16, (3, 3), (1, 1), fire, stride=(1, 2), **options)
    b = models.SpikingConv2DLayer(16, 8, 16, 16, (3, 3), (1, 1), fire, stride=(1, 2), flatten_output=True, **options)
    model = models.SNN([a, b, models.ReadoutLayer(128, 10, 0.0, 0.15, time_reduction="max")])
    return As(model, lambda model, x: model(x.transpose(0, 1).unsqueeze(1))[0])


class Adaptive(nn.Module):
    """Layers of Yin et al., called as their script for speech commands does. Time constants are shorter, as sequences
    are, and inputs are stronger than 0 and 1, else no neuron ever fires."""

    def __init__(self) -> None:
        super().__init__()
        with code_of("Efficient-spiking-networks/GSC") as load:
            dense, rnn = load("SRNN_layers.spike_dense"), load("SRNN_layers.spike_rnn")
        self.first = dense.spike_dense(32, 64, tauM=10, tauM_inital_std=1)
        self.second = rnn.spike_rnn(64, 64, tauM=10, tauM_inital_std=1)
        self.out = dense.readout_integrator(64, 10, tauM=10, tauM_inital_std=1)
        nn.init.kaiming_normal_(self.second.recurrent.weight)
        nn.init.xavier_normal_(self.first.dense.weight)
        nn.init.xavier_normal_(self.out.dense.weight)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.second, self.out):
            part.set_neuron_state(x.shape[1])
        total: Tensor | float = 0
        for now in x:
            _, spikes = self.first(50 * now)
            _, spikes = self.second(spikes)
            total = total + self.out(spikes)
        return torch.log_softmax(torch.as_tensor(total) / len(x), 1)


def tet() -> nn.Module:
    with code_of("temporal_efficient_training") as load:
        layers = load("models.layers")
    fold = layers.SeqToANNContainer
    body = [layers.Layer(2, 16, 3, 1, 1), layers.Layer(16, 32, 3, 2, 1), layers.Layer(32, 32, 3, 2, 1)]
    body += [layers.APLayer(2), nn.Flatten(2), fold(nn.Linear(128, 10))]
    return As(nn.Sequential(*body), lambda model, x: model(x.transpose(0, 1)).transpose(0, 1))


def stbp() -> nn.Module:
    with code_of("STBP-simple") as load:
        load("setting").STEPS = 5
        model = load("model")
    model.steps = 5  # which the file uses and does not define
    return As(model.MNISTNet(), lambda model, x: model(x.permute(1, 2, 3, 4, 0)))


def stbp_convolutions() -> nn.Module:
    with code_of("STBP-simple") as load:
        load("setting").STEPS = 5
        layers = load("layers")
    one = [layers.tdLayer(nn.Conv2d(2, 16, 3, padding=1), layers.tdBatchNorm(16)), layers.LIFSpike()]
    two = [layers.tdLayer(nn.Conv2d(16, 32, 3, 2, 1), layers.tdBatchNorm(32)), layers.LIFSpike()]
    three = [layers.tdLayer(nn.AvgPool2d(2)), layers.LIFSpike(), nn.Flatten(1, 3), layers.tdLayer(nn.Linear(512, 10))]
    model = nn.Sequential(*one, *two, *three)
    return As(model, lambda model, x: model(x.permute(1, 2, 3, 4, 0)).mean(-1))


def spatio_temporal() -> nn.Module:
    with code_of("BP-for-SpikingNN") as load:
        module = load("spiking_model")

    def call(model: nn.Module, x: Tensor) -> Tensor:
        module.batch_size = x.shape[1]
        return model(x.mean(0), time_window=10)

    return As(module.SCNN(), call)


def clif_sequence() -> nn.Module:
    with code_of("Complementary-LIF", OLD_SPIKINGJELLY) as load:
        neuron = load("modules.neuron")
        td = load("spikingjelly.clock_driven.layer").SeqToANNContainer
    node = partial(neuron.CLIFSpike, 2.0)
    body = [td(nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16)), node(), td(nn.AvgPool2d(2))]
    body += [td(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)), node(), td(nn.AvgPool2d(2), nn.Flatten())]
    return nn.Sequential(*body, td(nn.Linear(512, 10)))


def clif(kind: str) -> nn.Module:
    with code_of("Complementary-LIF", OLD_SPIKINGJELLY) as load:
        neuron, vgg, surrogate = map(load, ("modules.neuron", "models.spiking_vgg_bn", "modules.surrogate"))
        functional = load("spikingjelly.clock_driven.functional")
    vgg.cfg["VGG11"] = [[16, "M"], [32], [32, "M"], [32], [512]]

    def call(model: nn.Module, x: Tensor) -> Tensor:
        functional.reset_net(model)
        return torch.stack([model(now) for now in x])

    return As(vgg.spiking_vgg11_bn(getattr(neuron, kind), surrogate_function=surrogate.Rectangle()), call)


def converted() -> nn.Module:
    """Neurons that the repository converts quantised activations to, trained directly."""
    with code_of("SNN_conversion_QCFS") as load:
        modules = load("modules")
    node = modules.ScaledNeuron
    one = [nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), node(), nn.AvgPool2d(2)]
    two = [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), node(), nn.AvgPool2d(2)]

    def call(model: nn.Module, x: Tensor) -> Tensor:
        for module in model.modules():
            if isinstance(module, node):
                module.reset()
        return torch.stack([model(now) for now in x])

    return As(nn.Sequential(*one, *two, nn.Flatten(), nn.Linear(512, 128), node(), nn.Linear(128, 10)), call)


def slayer(kind: str, **options: Any) -> nn.Module:
    with code_of("lava-dl/src") as load:
        without("lava.lib.dl.slayer.object_detection")
        slayer = load("lava.lib.dl.slayer")
    block, parameters = getattr(slayer.block, kind), PARAMETERS[kind]
    sizes = (32, 64), (64, 64), (64, 10)
    layers = [block.Dense(parameters, a, b, weight_norm=True, **options) for a, b in sizes]
    return As(nn.Sequential(*layers), lambda model, x: model(x.permute(1, 2, 0)).permute(2, 0, 1))


def delays() -> nn.Module:
    """Learned delays of DCLS (`pip install --no-deps DCLS`), and a readout whose membrane is read, and never fires."""
    with code_of("SNN-delays") as load:
        without("wandb")
        without("datasets", Augs=None)
        module, config = load("snn_delays"), load("config").Config()
    sizes = {"n_inputs": 32, "n_hidden_neurons": 64, "n_outputs": 10, "dropout_p": 0.1, "seed": torch.initial_seed()}
    for name, value in sizes.items():
        setattr(config, name, value)
    return module.SnnDelays(config)


USUAL = {"threshold": 1.25, "current_decay": 0.25, "voltage_decay": 0.03, "tau_grad": 0.03, "scale_grad": 3}
PARAMETERS: dict[str, dict[str, Any]] = {
    "cuba": USUAL | {"requires_grad": True},
    "alif": USUAL | {"threshold_step": 0.1, "threshold_decay": 0.1, "refractory_decay": 0.1},
}


def larger(root: str) -> Parts:
    """Digits of 28 x 28 pixels, with one channel for both polarities."""
    return tuple((pad(x.amax(2, keepdim=True), (6, 6, 6, 6)), y) for x, y in digits(root))  # type: ignore[return-value]


add("r_sparch_lif", partial(sparch, "LIF"), digit_rows)
add("r_sparch_adlif", partial(sparch, "adLIF"), digit_rows)
add("r_sparch_rlif", partial(sparch, "RLIF", dropout=0.1), digit_rows)
add("r_sparch_radlif", partial(sparch, "RadLIF", bidirectional=True), digit_rows)
add("r_s2net", partial(s2net, False, False), digit_rows)
add("r_s2net_lateral", partial(s2net, True, True), digit_rows)
add("r_s2net_conv", s2net_convolutions, digit_rows)
add("r_srnn", Adaptive, digit_rows)
add("r_tet", tet, digits)
add("r_stbp_mnist", stbp, larger)
add("r_stbp_conv", stbp_convolutions, digits)
add("r_stbp", spatio_temporal, larger)
add("r_clif", clif_sequence, digits)
add("r_clif_vgg", partial(clif, "ComplementaryLIFNeuron"), digits)
add("r_bptt_vgg", partial(clif, "BPTTNeuron"), digits)
add("r_plif_vgg", partial(clif, "PLIFNeuron"), digits)
add("r_qcfs", converted, digits)
add("r_slayer_cuba", partial(slayer, "cuba"), digit_rows)
add("r_slayer_delay", partial(slayer, "cuba", delay=True), digit_rows)
add("r_slayer_alif", partial(slayer, "alif"), digit_rows)
add("r_delays", delays, digit_rows)

REPOSITORIES = [name for name in ZOO if name not in BEFORE]


if __name__ == "__main__":
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    zoo.main(__doc__, REPOSITORIES, "repositories_runs.csv")
