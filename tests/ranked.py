"""Cases of training on shares of joined batches, which `test_ranks.py` runs in two processes and in one."""

import importlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ulr_snn
from benchmarks.missing_operators import declare_operators
from tests.helpers import errors, nets
from tests.written import Above
from ulr_snn import (
    LIF,
    ULR,
    Adaptive,
    CurrentNoise,
    Feedback,
    Fold,
    Global,
    Independent,
    LayerByLayer,
    LeakyReadout,
    Online,
    OutputNoise,
    RecurrentLIF,
    Residual,
    Sobol,
    TimeAverage,
    WeightNoise,
    attach,
)
from ulr_snn.credit.feedback import FeedbackLimits
from ulr_snn.kernels import ranks
from ulr_snn.memory.over_ranks import CopiesOverRanks
from ulr_snn.model.interface import Interface
from ulr_snn.peers import EvolutionStrategies, ExpectedGradientBPTT, FeedbackAlignment, SurrogateBPTT

STEPS, BATCH, PIXELS, CLASSES = 6, 7, 5, 3
SPLIT = 4  # samples of the first of two ranks
SEED = 3
LIMITS = FeedbackLimits(warm_up=1)
WIDE = FeedbackLimits(entries=40, warm_up=1)  # layers too wide for a matrix learn from the outputs


class Hard(nn.Module):
    """A black box: threshold units without a derivative."""

    def forward(self, current: Tensor) -> Tensor:
        return (current.detach() > 0).to(current.dtype)


def dense() -> nn.Sequential:
    layers = nn.Linear(PIXELS, 8), LIF(0.8), nn.Linear(8, 6), LIF(0.7, reset="zero", learn_threshold=True)
    return nn.Sequential(*layers, nn.Linear(6, CLASSES), LeakyReadout(0.9, learn_beta=True))


def recurrent() -> nn.Sequential:
    layers = nn.Linear(PIXELS, 7), RecurrentLIF(7, 0.8), nn.Linear(7, 6), LIF(0.7)
    return nn.Sequential(*layers, nn.Linear(6, CLASSES), LeakyReadout(0.9))


def averaging() -> nn.Sequential:
    return nn.Sequential(nn.Linear(PIXELS, 8), LIF(0.8), nn.Linear(8, 6), LIF(), TimeAverage(), nn.Linear(6, CLASSES))


def spiking() -> nn.Sequential:
    return nn.Sequential(nn.Linear(PIXELS, 8), LIF(0.8), nn.Linear(8, CLASSES), LIF(0.8))


def convolutional(norm: bool = False) -> nn.Sequential:
    first = [nn.Conv2d(1, 3, 3, padding=1), *([nn.BatchNorm2d(3)] if norm else [])]
    second = nn.MaxPool2d(2), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten()
    return nn.Sequential(Fold(*first), LIF(0.8), Fold(*second), LIF(0.8), TimeAverage(), nn.Linear(12, CLASSES))


def boxed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(PIXELS, 8), Hard(), nn.Linear(8, 6), LIF(), TimeAverage(), nn.Linear(6, CLASSES))


class Gates(nn.Module):
    """Units that are written out and rest at their threshold, so that the unit of their noise depends on the batch."""

    def forward(self, current: Tensor) -> Tensor:
        return Above.apply(current)


def written() -> nn.Sequential:
    return nn.Sequential(nn.Linear(PIXELS, 8, bias=False), Gates(), nn.Linear(8, CLASSES))


def rounding() -> nn.Sequential:
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (4 * x).round() / 4

    return nn.Sequential(nn.Linear(PIXELS, 8), LIF(), nn.Linear(8, 6), Rounded(), LIF(), TimeAverage(), nn.Linear(6, 3))


def library(name: str) -> Callable[[], nn.Module]:
    return lambda: nets()[name]()


@dataclass
class Case:
    """model, estimator, loss: what is trained; lengths: batches have them; shape: of a sample's time step; unlabelled:
    number of first samples without a label."""

    model: Callable[[], nn.Module]
    estimator: Any
    loss: Any = "ce_count"
    lengths: bool = False
    shape: tuple[int, ...] = (PIXELS,)
    unlabelled: int = 0
    steps: int = 4
    dtype: torch.dtype = torch.float64
    scale: float = 3.0
    set_up: Callable[[nn.Module], Any] = field(default=lambda model: None)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(step)
        x = self.scale * (torch.rand(STEPS, BATCH, *self.shape, generator=generator) < 0.5).to(self.dtype)
        lengths = torch.randint(2, STEPS + 1, (BATCH,), generator=generator)
        lengths[0] = STEPS
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        labels[: self.unlabelled] = -100
        return x, labels, lengths if self.lengths else None

    def make(self) -> nn.Module:
        torch.manual_seed(1)
        model = self.model().to(self.dtype)
        self.set_up(model)
        return model


def learned(kind: type, limits: FeedbackLimits = LIMITS, **options: Any) -> ULR:
    return ULR(credit=kind(refresh=2, limits=limits), maps="learned", **options)


IMAGE = {"shape": (1, 4, 4)}
WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64))
CASES = {
    "default": Case(dense, ULR(), lengths=True),
    "single precision": Case(dense, ULR(), dtype=torch.float32, steps=2),
    "written out": Case(written, ULR(), steps=2),
    "recurrent": Case(recurrent, ULR(), "ce_rate"),
    "convolutional": Case(convolutional, ULR(), **IMAGE),
    "learned maps": Case(recurrent, learned(Feedback), lengths=True),
    "learned maps, pairs": Case(dense, learned(Feedback, copies=4)),
    "learned convolution": Case(convolutional, learned(Feedback), **IMAGE),
    "from outputs": Case(dense, learned(Feedback, WIDE), lengths=True),
    "rounding": Case(rounding, ULR(credit=Feedback(refresh=2, limits=LIMITS))),
    "global": Case(dense, ULR(credit="global", copies=4)),
    "global, one copy": Case(dense, ULR(credit="global", copies=1)),
    "reward to go": Case(dense, ULR(credit=Global(reward_to_go=True), copies=2), "ce_rate", lengths=True),
    "residual": Case(recurrent, learned(Residual, WIDE, copies=4)),
    "layer by layer": Case(dense, ULR(credit="global", sampling=LayerByLayer())),
    "Sobol": Case(dense, ULR(credit="global", sampling=Sobol(4))),
    "adaptive": Case(dense, ULR(credit="global", sampling=Adaptive(least=4, most=12)), steps=6),
    "adaptive layers": Case(dense, ULR(credit="residual", sampling=LayerByLayer(of=Adaptive(least=4, most=8)))),
    "multi-sample": Case(dense, ULR(credit="feedback", sampling=Independent(3, multi_sample=True))),
    "currents": Case(boxed, ULR(credit=Feedback(refresh=2, limits=LIMITS), noise={"1": CurrentNoise()}), lengths=True),
    "weights": Case(boxed, ULR(credit="global", copies=4, noise={"2": WeightNoise()})),
    "weights by sample": Case(averaging, ULR(noise={"2": WeightNoise(per_sample=True)})),
    "least variance": Case(spiking, ULR(credit="auto", noise={"outputs": None}), errors),
    "output noise": Case(averaging, ULR(noise={"outputs": OutputNoise()}), "zero_one"),
    "flips": Case(spiking, ULR(), "latency"),
    "weighted loss": Case(averaging, ULR(), WEIGHTED),
    "unlabelled": Case(dense, ULR(), unlabelled=3, steps=2),
    "unlabelled, surrogate": Case(recurrent, SurrogateBPTT(), "ce_rate", unlabelled=SPLIT),
    "mixed losses": Case(dense, ULR(noise={"outputs": None}), {"ce_count": 1.0, "zero_one": 0.5}),
    "online": Case(recurrent, Online(), "ce_rate", lengths=True, steps=2),
    "online, learned maps": Case(recurrent, Online(maps="learned"), "ce_rate", steps=3),
    "time chunks": Case(recurrent, ULR(memory="replay")),
    "time chunks, learned maps": Case(recurrent, learned(Feedback, memory="replay")),
    "copies in turn": Case(dense, ULR(credit="global", copies=4, memory="replay")),
    "frozen": Case(dense, ULR(flow={"2": "frozen"})),
    "surrogate": Case(recurrent, SurrogateBPTT()),
    "expected": Case(recurrent, ExpectedGradientBPTT()),
    "alignment": Case(recurrent, FeedbackAlignment()),
    "evolution": Case(recurrent, EvolutionStrategies(copies=4)),
}
LIBRARIES = {name: Case(library(name), ULR(), scale=8.0, steps=3) for name in ("snntorch", "norse", "spikingjelly")}


@dataclass
class Outcome:
    """gradients: of each update; parameters, buffers: of the model, and state: of the attachment, at the end."""

    gradients: list[list[Tensor | None]]
    parameters: list[Tensor]
    buffers: list[Tensor]
    state: dict[str, Any]


def part(size: int, rank: int) -> slice:
    return slice(None) if size == 1 else slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)


def outcome(case: Case, size: int, rank: int) -> Outcome:
    """Trains on this rank's share."""
    model, own, gradients = case.make(), part(size, rank), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    attached = case.estimator.attach(model, case.loss, SEED, Interface.of(True), 10, rates=True)
    with attached:
        for step in range(case.steps):
            x, y, lengths = case.batch(step)
            given = x[:, own], y[own], None, None if lengths is None else lengths[own]
            optimizer.zero_grad()
            for _ in attached.steps(*given):
                gradients.append([None if q.grad is None else q.grad.clone() for q in model.parameters()])
                optimizer.step()
                optimizer.zero_grad()
            attached.learning_rates()
    return Outcome(gradients, [q.detach() for q in model.parameters()], list(model.buffers()), attached.state_dict())


# -- other scenes, each of which returns what a rank found -------------------------------------------------


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [q.grad.clone() for q in model.parameters()]


def error_of(call: Callable[[], Any]) -> str:
    """The class and the text of what a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def wrapped(size: int, rank: int) -> Any:
    """Steps of a model in DistributedDataParallel, which runs by itself, with a graph, before each."""
    case, own, found = CASES["global"], part(size, rank), []
    model = case.make()
    outer = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    with attach(outer, case.estimator, seed=SEED, total_steps=10) as ulr:
        for step in range(3):
            x, y, _ = case.batch(step)
            model.zero_grad()
            outer(x[:, own])
            ulr.backward(x[:, own], y[own])
            found.append(gradients_of(model))
    return found, getattr(outer, "require_backward_grad_sync", True)


def accumulated(size: int, rank: int) -> Any:
    """Two steps whose gradients add up, and what is left of them after averaging by hand."""
    case, own = CASES["default"], part(size, rank)
    model = case.make()
    with attach(model, seed=SEED) as ulr:
        for step in range(2):
            x, y, _ = case.batch(step)
            ulr.backward(x[:, own], y[own])
    found = gradients_of(model)
    for q in model.parameters() if size > 1 else ():
        dist.all_reduce(q.grad)
        q.grad /= size
    return found, gradients_of(model)


def normed(size: int, rank: int) -> Any:
    """Batch norm right after the events, with the same samples on both ranks in another order, so that statistics of a
    share are those of the joined batch; and in evaluation mode with any samples."""
    found = []
    for training in (True, False):
        x, y, _ = CASES["convolutional"].batch(0)
        if training:
            x, y = torch.cat([x[:, :3], x[:, [2, 0, 1]]], 1), torch.cat([y[:3], y[:3]])
        torch.manual_seed(1)
        model = convolutional(norm=True).double()
        model[0][1].train(training)
        half = len(y) // 2
        own = slice(None) if size == 1 else slice(half * rank, half if rank == 0 else None)
        with attach(model, seed=SEED) as ulr:
            ulr.backward(x[:, own], y[own])
        found += [gradients_of(model), list(model.buffers())]
    return found


def not_finite(size: int, rank: int) -> Any:
    """A loss that is not finite for the last sample of the second step, which is on the last rank."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found = nn.functional.cross_entropy(outputs.sum(0), targets, reduction="none")
        return torch.where(broken & (torch.arange(len(found)) == len(found) - 1) & (rank == size - 1), torch.nan, found)

    case, own, found = CASES["default"], part(size, rank), []
    for estimator in (ULR(on_nonfinite="skip"), ULR(), SurrogateBPTT()):
        model = case.make()
        with attach(model, estimator, loss, seed=SEED) as ulr:
            for step in range(3):
                x, y, _ = case.batch(step)
                broken = step == 1
                found.append(error_of(lambda x=x, y=y, ulr=ulr: ulr.backward(x[:, own], y[own])))
            found.append(gradients_of(model))
    return found


def different_start(size: int, rank: int) -> Any:
    """Ranks that begin with other weights and another seed."""
    case, own = CASES["default"], part(size, rank)
    model = case.make()
    if rank:
        nn.init.ones_(model[0].weight)
    with attach(model, seed=SEED + rank) as ulr:
        x, y, _ = case.batch(0)
        ulr.backward(x[:, own], y[own])
    return gradients_of(model), [q.detach() for q in model.parameters()]


def refused(size: int, rank: int) -> Any:
    """Batches that do not fit together, or are wrong on one rank; the step after them goes well."""
    case, found = CASES["default"], []
    model = case.make()
    with attach(model, seed=SEED) as ulr:
        x, y, _ = case.batch(0)
        for events, targets in ((x[: STEPS - rank], y), (x / (1 - rank), y), (x, y)):
            found.append(error_of(lambda events=events, targets=targets: ulr.backward(events, targets)))
    spread = ULR(credit="global", copies=2, noise={"0": WeightNoise()}, memory=CopiesOverRanks())
    found.append(error_of(lambda: attach(boxed().double(), spread).backward(x, y)))
    cut = averaging()
    torch.distributed.fsdp.fully_shard(cut)
    found.append(error_of(lambda: attach(cut)))
    return found


def spread(size: int, rank: int) -> Any:
    """Copies over ranks, of noise on all weights: gradients, and what travelled."""
    noise = {name: WeightNoise() for name in ("0", "2", "5")}
    estimator = ULR(credit="global", copies=8, noise=noise, memory=CopiesOverRanks() if size > 1 else "auto")
    model = CASES["weights"].make()
    optimizer, found = torch.optim.Adam(model.parameters(), 1e-2), []
    with attach(model, estimator, "mse", seed=SEED) as ulr:
        for step in range(3):
            x, y, _ = CASES["weights"].batch(step)
            optimizer.zero_grad()
            with talk() as sizes:
                ulr.backward(x, nn.functional.one_hot(y, CLASSES).double())
            found.append(gradients_of(model))
            optimizer.step()
    return found, ulr.forward_passes, sizes


@contextmanager
def talk() -> Iterator[list[int]]:
    """The numbers that all-reduces send within the context."""
    usual, sizes = dist.all_reduce, []

    def counted(tensor: Tensor, *options: Any) -> Any:
        sizes.append(tensor.numel())
        return usual(tensor, *options)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = usual


def traffic(size: int, rank: int) -> Any:
    """Numbers that the all-reduces of a later step send, and of a step of one rank alone."""
    case, own = CASES["default"], part(size, rank)
    model, (x, y, _) = case.make(), case.batch(0)
    with attach(model, seed=SEED) as ulr:
        for _ in range(2):
            with talk() as sizes:
                ulr.backward(x[:, own], y[own])
    with ranks.alone(), talk() as none, attach(model, seed=SEED) as ulr:
        ulr.backward(x[:, own], y[own])
    return sizes, none, sum(q.numel() for q in model.parameters()), len(list(model.parameters()))


def on_one_rank(size: int, rank: int) -> Any:
    """One rank asks for a plan, a diagnosis and an evaluation, while the other does not."""
    if rank == 0:
        model, (x, y, _) = CASES["default"].make(), CASES["default"].batch(0)
        ulr_snn.plan(model, (x, y))
        ulr_snn.diagnose(model, (x, y), {"ulr": ULR()}, draws=4, reference_draws=4, warm_up=1)
        ulr_snn.evaluate(model, [(x, y)])
    return ranks.gathered(rank), ranks.totals([rank, 1.0]), ranks.agree([rank == 1, False])


def loaded(size: int, rank: int) -> Any:
    """Batches of a shared loader, and of a loader that ends early or raises on one rank."""
    generator = torch.Generator().manual_seed(0)
    loader = ranks.shared(DataLoader(range(21), batch_size=4, shuffle=True, generator=generator))
    epochs = [[batch.tolist() for batch in loader] for _ in range(2)]
    early = list(ranks.together(range(3 + rank)))

    def broken() -> Iterator[int]:
        yield 0
        if rank:
            raise OSError("no such recording")
        yield 1

    return epochs, len(loader), early, error_of(lambda: list(ranks.together(broken())))


def deserted(size: int, rank: int) -> Any:
    """The last rank leaves in a step."""
    case, own = CASES["default"], part(size, rank)

    def leaving(outputs: Tensor, targets: Tensor) -> Tensor:
        if rank == size - 1:
            os._exit(0)
        return nn.functional.cross_entropy(outputs.sum(0), targets, reduction="none")

    x, y, _ = case.batch(0)
    return error_of(lambda: attach(case.make(), loss=leaving, seed=SEED).backward(x[:, own], y[own]))


def task() -> tuple[Tensor, Tensor]:
    """Three joined batches of 8 samples, with the batch first."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * (torch.rand(24, STEPS, PIXELS, generator=generator) < 0.5).double()
    return x, torch.randint(CLASSES, (24,), generator=generator)


def loop(model: nn.Module, loader: Any, optimizer: Any) -> list[Tensor]:
    """Trains by a loop of one's own, and returns the parameters."""
    with attach(model, seed=SEED, total_steps=3, time_first=False) as ulr:
        for x, y in loader:
            optimizer.zero_grad()
            ulr.backward(x, y)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return [q.detach() for q in model.parameters()]


def accelerated(size: int, rank: int) -> Any:
    """Accelerate's model, optimizer and loader. Ranks take turns at the loader's batches."""
    declare_operators("accelerate")
    model = CASES["default"].make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    loader = DataLoader(TensorDataset(*task()), batch_size=8 // size)
    if size > 1:
        accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return loop(model, loader, optimizer)


def lightning(size: int, rank: int) -> Any:
    """Lightning's strategy "ddp" with manual optimisation. The sampler gives every rank every second sample."""
    declare_operators("lightning")
    model, (x, y) = CASES["default"].make(), task()
    if size == 1:
        order = torch.arange(24).view(3, 4, 2).transpose(1, 2).flatten()
        loader = DataLoader(TensorDataset(x[order], y[order]), batch_size=8)
        return loop(model, loader, torch.optim.Adam(model.parameters(), 1e-2))
    library = importlib.import_module("lightning")

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = model, False

        def on_fit_start(self) -> None:
            self.ulr = attach(self.net, seed=SEED, total_steps=3, time_first=False)

        def training_step(self, batch: Any, _: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.ulr.backward(*batch)
            nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": size, "strategy": "ddp", "enable_progress_bar": False, **quiet}
    trainer = library.Trainer(max_epochs=1, use_distributed_sampler=False, **options)
    data = TensorDataset(x, y)
    trainer.fit(Module(), DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False)))
    return [q.detach() for q in model.parameters()]


SCENES = {
    scene.__name__: scene
    for scene in (
        *(wrapped, accumulated, normed, not_finite, different_start, refused, spread, traffic, on_one_rank, loaded),
        deserted,  # the last one
    )
}
LOOPS = {"accelerated": accelerated, "lightning": lightning}


def run(rank: int, size: int, port: int, names: list[str], path: str) -> None:
    """Runs cases and scenes as one rank of several, and saves each outcome, or the text of an exception."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    for name in names:
        scenes = SCENES | LOOPS
        scene = scenes[name] if name in scenes else partial(outcome, (CASES | LIBRARIES)[name])
        try:
            found = scene(size, rank)
        except Exception:
            found = traceback.format_exc()
        torch.save(found, f"{path}/{name}.{rank}")
        if isinstance(found, str) and found.startswith("Traceback"):
            os._exit(0)  # the ranks are no longer in step
    os._exit(0)  # threads of a group that has lost a rank may abort the process
