"""Models, losses and batches as tutorials have them: snnTorch's, Norse's and SpikingJelly's, on data that need no
download.

A `Case` says twice what is measured: as arguments of `train`, and as the code that its user would write
(`own_loss`, `own_accuracy`). Both have to give the same numbers.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

import ulr_snn
from ulr_snn.data import load

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own imports
    import norse.torch as norse
    import snntorch as snn
    from norse.dataset.memory import MemoryStoreRecallDataset
    from norse.task.speech_commands.model import lif_model
    from snntorch import functional as SF
    from snntorch import surrogate, utils
    from spikingjelly.activation_based import functional, layer, neuron
    from spikingjelly.activation_based import surrogate as sj_surrogate

Parts = tuple[TensorDataset, TensorDataset]
BATCH = 64


@dataclass(frozen=True)
class Case:
    """A model and its task.

    make: makes the model. data: returns the training set and the test set, samples first. loss, options: arguments of
    `train`. own_loss, own_accuracy: (result of the model, targets) -> the number that the user's own code reports; an
    accuracy of None if there is no such thing. own_pass: how the user calls the model. collate: joins samples to a
    batch. loop: a file of examples/ whose function `fit` trains the model in the place of `train`.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], Parts]
    loss: Any
    own_loss: Callable[[Any, Any], Any]
    own_accuracy: Callable[[Any, Any], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    own_pass: Callable[[nn.Module, Any], Any] = lambda model, x: model(x)
    collate: Callable[[list[Any]], Any] | None = None
    loop: str | None = None

    @property
    def metric(self) -> str:
        """The name of the figure that the benchmark compares."""
        return "loss" if self.own_accuracy is None else "accuracy"

    def loader(self, part: TensorDataset | Subset, seed: int | None = None) -> DataLoader:
        """Returns the batches of a part, shuffled if there is a seed."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(part, BATCH, seed is not None, generator=generator, collate_fn=self.collate)

    @torch.no_grad()
    def own_figures(self, model: nn.Module, loader: DataLoader) -> dict[str, float | None]:
        """Returns loss and accuracy over a loader, by the user's own code."""
        loss = right = count = 0.0
        model.eval()
        for batch in loader:
            x, y = batch if len(batch) == 2 else (batch[0], batch[0])
            result = self.own_pass(model, x)
            loss += float(self.own_loss(result, y)) * len(y)
            right += 0.0 if self.own_accuracy is None else float(self.own_accuracy(result, y)) * len(y)
            count += len(y)
        return {"loss": loss / count, "accuracy": None if self.own_accuracy is None else right / count}


# -- data --------------------------------------------------------------------------------------------------


def parts(*tensors: Tensor, train: int = 1437) -> Parts:
    """Returns a shuffled training set of so many samples, and the others as the test set."""
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    return tuple(TensorDataset(*(t[now] for t in tensors)) for now in (order[:train], order[train:]))


@lru_cache
def images(size: int = 8, labels: bool = True) -> Parts:
    """Returns the grey images of scikit-learn's digits, [1, size, size]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32).div(16)[:, None]
    x = x.repeat_interleave(size // 8, -1).repeat_interleave(size // 8, -2)
    return parts(x, torch.tensor(found.target)) if labels else parts(x)


@lru_cache
def events() -> Parts:
    """Returns the event set "digits", [10, 2, 16, 16]: counts of events in 10 time bins."""
    found = []
    for part in load("digits", time_bins=10, bin_us=30_000):
        x, y, _ = part.dense(range(len(part)))
        found.append(TensorDataset(x.transpose(0, 1).float(), y))
    return found[0], found[1]


@lru_cache
def rows() -> Parts:
    """Returns images as sequences of their 8 rows, each shown for two time steps, [16, 8]."""
    train, test = images()
    return tuple(TensorDataset(p.tensors[0][:, 0].repeat_interleave(2, 1), p.tensors[1]) for p in (train, test))


@lru_cache
def square_roots() -> Parts:
    """Returns ramps to a random height and their square roots, [50, 1], as snnTorch's regression tutorial."""
    ends = torch.rand(768, 1, generator=torch.Generator().manual_seed(0))
    values = (ends * torch.linspace(0, 1, 50))[..., None]
    return parts(values, values.sqrt(), train=640)


@lru_cache
def memories() -> Parts:
    """Returns the sequences of Norse's memory task: 4 periods of 10 steps, and the pattern to recall in one of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = MemoryStoreRecallDataset(640, 10, seq_periods=4, seq_repetitions=1, poisson_rate=400)
        samples = [found[i] for i in range(len(found))]
    return parts(*map(torch.stack, zip(*samples, strict=True)), train=512)


def time_first(samples: list[Any]) -> Any:
    """Joins samples to a batch (x, y) whose x has time first."""
    x, y = default_collate(samples)
    return x.transpose(0, 1), y


# -- snnTorch ----------------------------------------------------------------------------------------------


class Tutorial5(nn.Module):
    """The fully connected network of tutorial 5, which is shown a static image at every time step."""

    def __init__(self, hidden: int = 200, steps: int = 25, beta: float = 0.95) -> None:
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(64, hidden), snn.Leaky(beta=beta)
        self.fc2, self.lif2 = nn.Linear(hidden, 10), snn.Leaky(beta=beta)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x.flatten(1)), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


def every_step(membranes: Tensor, targets: Tensor) -> Tensor:
    """The loss of tutorial 5: cross-entropy of the membranes, summed over time; one value a sample."""
    return torch.stack([F.cross_entropy(mem, targets, reduction="none") for mem in membranes]).sum(0)


class Tutorial6(nn.Module):
    """The convolutional network of tutorial 6 and its `forward_pass`, on images of 16 x 16 pixels."""

    def __init__(self, steps: int = 12) -> None:
        super().__init__()
        self.steps = steps

        def leaky(**options: Any) -> nn.Module:
            return snn.Leaky(beta=0.5, spike_grad=surrogate.fast_sigmoid(slope=25), init_hidden=True, **options)

        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), leaky()),
            *(nn.Conv2d(8, 16, 3), nn.MaxPool2d(2), leaky()),
            *(nn.Flatten(), nn.Linear(16 * 2 * 2, 10), leaky(output=True)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        utils.reset(self.net)
        found = [self.net(x) for _ in range(self.steps)]
        spk_rec, mem_rec = zip(*found, strict=True)
        return torch.stack(spk_rec), torch.stack(mem_rec)


def tutorial7() -> nn.Module:
    """Makes the network of tutorial 7 for events of 16 x 16 pixels. It takes one time step a call."""

    def leaky(**options: Any) -> nn.Module:
        return snn.Leaky(beta=0.5, spike_grad=surrogate.atan(), init_hidden=True, **options)

    return nn.Sequential(
        *(nn.Conv2d(2, 12, 5), nn.MaxPool2d(2), leaky()),
        *(nn.Conv2d(12, 32, 3), nn.MaxPool2d(2), leaky()),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, 10), leaky(output=True)),
    )


def forward_pass(net: nn.Module, data: Tensor) -> Tensor:
    """The forward pass of tutorial 7: spikes of all time steps."""
    spk_rec = []
    utils.reset(net)
    for step in range(data.size(0)):
        spk_out, _ = net(data[step])
        spk_rec.append(spk_out)
    return torch.stack(spk_rec)


class Regression(nn.Module):
    """The network of the first regression tutorial, whose output is the membrane of a layer that is never reset."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()

        def leaky(count: int) -> nn.Module:
            return snn.Leaky(torch.rand(count), threshold=torch.rand(count), learn_beta=True)

        self.fc_in, self.lif_in = nn.Linear(1, hidden), leaky(hidden)
        self.fc_hidden, self.lif_hidden = nn.Linear(hidden, hidden), leaky(hidden)
        self.fc_out, self.li_out = nn.Linear(hidden, 1), snn.Leaky(0.8, learn_beta=True, reset_mechanism="none")

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2, mem3 = self.lif_in.init_leaky(), self.lif_hidden.init_leaky(), self.li_out.init_leaky()
        mem_rec = []
        for now in x:
            spk1, mem1 = self.lif_in(self.fc_in(now), mem1)
            spk2, mem2 = self.lif_hidden(self.fc_hidden(spk1), mem2)
            _, mem3 = self.li_out(self.fc_out(spk2), mem3)
            mem_rec.append(mem3)
        return torch.stack(mem_rec)


class RecurrentRegression(nn.Module):
    """The network of the second regression tutorial: recurrent layers, which are shown a static image."""

    def __init__(self, hidden: int = 128, steps: int = 12) -> None:
        super().__init__()
        self.steps = steps
        self.fc_in, self.lif_in = nn.Linear(64, hidden), snn.RLeaky(beta=0.9, linear_features=hidden)
        self.fc_out, self.lif_out = nn.Linear(hidden, 10), snn.RLeaky(beta=0.9, linear_features=10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spk1, mem1 = self.lif_in.init_rleaky()
        spk2, mem2 = self.lif_out.init_rleaky()
        spk_rec, mem_rec = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif_in(self.fc_in(x.flatten(1)), spk1, mem1)
            spk2, mem2 = self.lif_out(self.fc_out(spk1), spk2, mem2)
            spk_rec.append(spk2)
            mem_rec.append(mem2)
        return torch.stack(spk_rec), torch.stack(mem_rec)


class Population(nn.Module):
    """The network of the tutorial on population codes: 20 neurons a class, and one time step."""

    def __init__(self, steps: int = 1) -> None:
        super().__init__()
        self.steps = steps
        self.fc1, self.lif1 = nn.Linear(64, 128), snn.Leaky(beta=0.9, spike_grad=surrogate.fast_sigmoid())
        self.fc2, self.lif2 = nn.Linear(128, 200), snn.Leaky(beta=0.9, spike_grad=surrogate.fast_sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk_rec, mem_rec = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x.flatten(1)), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk_rec.append(spk2)
            mem_rec.append(mem2)
        return torch.stack(spk_rec), torch.stack(mem_rec)


class Autoencoder(nn.Module):
    """The spiking autoencoder: latent spikes, and the last membrane of a layer that never fires as the picture."""

    def __init__(self, steps: int = 5) -> None:
        super().__init__()
        self.steps = steps

        def leaky(threshold: float = 1.0, **options: Any) -> nn.Module:
            spike_grad = surrogate.atan(alpha=2.0)
            return snn.Leaky(beta=0.5, spike_grad=spike_grad, init_hidden=True, threshold=threshold, **options)

        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), leaky()),
            *(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), leaky()),
            *(nn.Flatten(), nn.Linear(16 * 2 * 2, 32), leaky(output=True)),
        )
        self.linear = nn.Sequential(nn.Linear(32, 16 * 2 * 2), leaky(output=True))
        self.decoder = nn.Sequential(
            *(nn.Unflatten(1, (16, 2, 2)), leaky()),
            *(nn.ConvTranspose2d(16, 8, 3, 2, 1, 1), nn.BatchNorm2d(8), leaky()),
            *(nn.ConvTranspose2d(8, 1, 3, 2, 1, 1), leaky(20_000, output=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.encoder, self.linear, self.decoder):
            utils.reset(part)
        for _ in range(self.steps):
            spk, _ = self.encoder(x)
            spk, _ = self.linear(spk)
            _, picture = self.decoder(spk)
        return picture


# -- Norse -------------------------------------------------------------------------------------------------


class LSNNLIFNet(nn.Module):
    """The hidden layer of Norse's memory task: half LSNN neurons and half LIF neurons."""

    def __init__(self, features: int) -> None:
        super().__init__()
        p_lsnn = norse.LSNNParameters(v_th=torch.tensor(0.5), beta=torch.tensor(1.8))
        p_lif = norse.LIFParameters(v_th=torch.tensor(0.5))
        self.lsnn_cell = norse.LSNNRecurrentCell(features, features // 2, p_lsnn)
        self.lif_cell = norse.LIFRecurrentCell(features, features // 2, p_lif)

    def forward(self, x: Tensor, state: tuple[Any, Any] | None) -> tuple[Tensor, tuple[Any, Any]]:
        lif_state, lsnn_state = (None, None) if state is None else state
        lif_out, lif_state = self.lif_cell(x, lif_state)
        lsnn_out, lsnn_state = self.lsnn_cell(x, lsnn_state)
        return torch.cat((lif_out, lsnn_out), -1), (lif_state, lsnn_state)


class MemoryNet(nn.Module):
    """The network of Norse's memory task: [B, T, 20] events -> spikes [T, B, 20], readouts [period, step, B, 2]."""

    def __init__(self, seq_length: int = 10) -> None:
        super().__init__()
        self.seq_length = seq_length
        self.layer, self.readout = LSNNLIFNet(20), norse.LILinearCell(20, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sl = sr = None
        seq_spikes, seq_readouts = [], []
        for x_step in x.unbind(1):
            spikes, sl = self.layer(x_step, sl)
            v, sr = self.readout(spikes, sr)
            seq_spikes.append(spikes)
            seq_readouts.append(v)
        return torch.stack(seq_spikes), torch.stack(seq_readouts).unflatten(0, (-1, self.seq_length))


def periods(result: tuple[Tensor, Tensor]) -> Tensor:
    """The readout of Norse's memory task in each period, [B, period, 2]."""
    return result[1].mean(1).softmax(2).permute(1, 0, 2)


def recall_loss(readouts: Tensor, ys: Tensor) -> Tensor:
    """The loss of Norse's memory task, in the period of the recall command; one value a sample."""
    mask = ys.sum(2).gt(0)
    each = F.binary_cross_entropy_with_logits(readouts[mask], ys[mask].float(), reduction="none")
    return each.mean(1)


def recalled(readouts: Tensor, ys: Tensor) -> Tensor:
    """The accuracy of Norse's memory task."""
    mask = ys.sum(2).gt(0)
    return (ys[mask].argmax(1) == readouts[mask].argmax(1)).float()


# -- SpikingJelly ------------------------------------------------------------------------------------------


def node() -> nn.Module:
    return neuron.IFNode(surrogate_function=sj_surrogate.ATan())


class CSNN(nn.Module):
    """The convolutional network of SpikingJelly's Fashion-MNIST example. It repeats an image and returns mean rates."""

    def __init__(self, T: int = 4, channels: int = 8) -> None:
        super().__init__()
        self.T = T
        self.conv_fc = nn.Sequential(
            *(layer.Conv2d(1, channels, kernel_size=3, padding=1, bias=False), layer.BatchNorm2d(channels), node()),
            layer.MaxPool2d(2, 2),  # 4 x 4
            *(layer.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False), layer.BatchNorm2d(channels)),
            *(node(), layer.MaxPool2d(2, 2), layer.Flatten()),  # 2 x 2
            *(layer.Linear(channels * 2 * 2, channels * 4 * 4, bias=False), node()),
            *(layer.Linear(channels * 4 * 4, 10, bias=False), node()),
        )
        functional.set_step_mode(self, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        x_seq = x.unsqueeze(0).expand(self.T, -1, -1, -1, -1)
        return self.conv_fc(x_seq).mean(0)


class SEW(nn.Module):
    """A small SEW-ResNet: blocks of two convolutions whose spikes are added to their input."""

    def __init__(self, T: int = 4, channels: int = 12, blocks: int = 2) -> None:
        super().__init__()
        self.T = T

        def convolution(inputs: int) -> nn.Module:
            kernel = layer.Conv2d(inputs, channels, 3, padding=1, bias=False)
            return nn.Sequential(kernel, layer.BatchNorm2d(channels), node())

        self.stem = convolution(1)
        self.blocks = nn.ModuleList(nn.Sequential(convolution(channels), convolution(channels)) for _ in range(blocks))
        self.readout = nn.Sequential(layer.AvgPool2d(4), layer.Flatten(), layer.Linear(channels * 2 * 2, 10))
        functional.set_step_mode(self, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1))
        for block in self.blocks:
            x = block(x) + x
        return self.readout(x).mean(0)


def reset_first(model: nn.Module, x: Tensor) -> Tensor:
    """Calls a model of SpikingJelly, whose neurons keep their state from call to call."""
    functional.reset_net(model)
    return model(x)


def squared_rates(rates: Tensor, targets: Tensor) -> Tensor:
    """The loss of SpikingJelly's examples: squared error of firing rates and one-hot labels; one value a sample."""
    return F.mse_loss(rates, F.one_hot(targets, 10).float(), reduction="none").mean(1)


def highest(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).float().mean()


def dense() -> nn.Module:
    """Makes the network of the examples of loops."""
    return nn.Sequential(nn.Flatten(2), nn.Linear(512, 128), ulr_snn.LIF(), nn.Linear(128, 10))


# -- the cases ---------------------------------------------------------------------------------------------

ce_rate, membranes = SF.ce_rate_loss(), SF.mse_membrane_loss(on_target=1.05, off_target=0.2)
counts = SF.mse_count_loss(correct_rate=0.8, incorrect_rate=0.2)
by_population = SF.mse_count_loss(correct_rate=1.0, incorrect_rate=0.0, population_code=True, num_classes=10)
STATIC = {"layout": "B"}

CASES: dict[str, Case] = {
    "snntorch-5": Case(
        Tutorial5,
        images,
        every_step,
        lambda result, y: every_step(result[1], y).mean(),
        lambda result, y: SF.accuracy_rate(result[1], y),
        {**STATIC, "output": 1},
    ),
    "snntorch-6": Case(
        Tutorial6,
        lambda: images(16),
        ce_rate,
        lambda result, y: ce_rate(result[0], y),
        lambda result, y: SF.accuracy_rate(result[0], y),
        STATIC,
        epochs=8,
    ),
    "snntorch-7": Case(
        tutorial7, events, counts, counts, SF.accuracy_rate, own_pass=forward_pass, collate=time_first, epochs=12
    ),
    "snntorch-regression-1": Case(
        Regression,
        square_roots,
        nn.MSELoss(),
        lambda result, y: nn.MSELoss()(result, y.transpose(0, 1)),
        options={"layout": "BT"},
        own_pass=lambda model, x: model(x.transpose(0, 1)),
        epochs=15,
    ),
    "snntorch-regression-2": Case(
        RecurrentRegression,
        images,
        membranes,
        lambda result, y: membranes(result[1], y),
        lambda result, y: SF.accuracy_rate(result[1], y),
        {**STATIC, "output": 1},
    ),
    "snntorch-population": Case(
        Population,
        images,
        by_population,
        lambda result, y: by_population(result[0], y),
        lambda result, y: SF.accuracy_rate(result[0], y, population_code=True, num_classes=10),
        STATIC,
    ),
    "snntorch-autoencoder": Case(
        Autoencoder,
        lambda: images(labels=False),
        nn.MSELoss(),
        nn.MSELoss(),
        options=STATIC,
    ),
    "norse-memory": Case(
        MemoryNet,
        memories,
        recall_loss,
        lambda result, y: recall_loss(periods(result), y).mean(),
        lambda result, y: recalled(periods(result), y).mean(),
        {"layout": "BT", "output": periods, "metrics": {"recalled": recalled}},
        epochs=20,
    ),
    "norse-speech": Case(
        lambda: lif_model(n_features=64, n_input=8, n_output=10),
        rows,
        nn.NLLLoss(),
        nn.NLLLoss(),
        highest,
        collate=time_first,
        epochs=20,
    ),
    "spikingjelly-csnn": Case(
        CSNN,
        images,
        squared_rates,
        lambda rates, y: F.mse_loss(rates, F.one_hot(y, 10).float()),
        highest,
        STATIC,
        own_pass=reset_first,
    ),
    "spikingjelly-sew": Case(
        SEW, images, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(), highest, STATIC, own_pass=reset_first
    ),
    **{
        loop.partition("_")[0]: Case(
            dense,
            events,
            "ce_count",
            lambda outputs, y: F.cross_entropy(outputs.sum(0), y),
            lambda outputs, y: highest(outputs.sum(0), y),
            epochs=8,
            collate=time_first,
            loop=loop,
        )
        for loop in ("lightning_loop", "accelerate_loop")
    },
}
