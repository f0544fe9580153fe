"""Cases of training on shares of joined batches, which `test_ranks.py` runs in two processes and in one."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.helpers import nets
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
)
from ulr_snn.credit.feedback import FeedbackLimits
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


def rounding() -> nn.Sequential:
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (4 * x).round() / 4

    return nn.Sequential(nn.Linear(PIXELS, 8), LIF(), nn.Linear(8, 6), Rounded(), LIF(), TimeAverage(), nn.Linear(6, 3))


def library(name: str) -> Callable[[], nn.Module]:
    return lambda: nets()[name]()


@dataclass
class Case:
    """model, estimator, loss: what is trained; lengths: batches have them; shape: of a sample's time step."""

    model: Callable[[], nn.Module]
    estimator: Any
    loss: Any = "ce_count"
    lengths: bool = False
    shape: tuple[int, ...] = (PIXELS,)
    steps: int = 4
    dtype: torch.dtype = torch.float64
    scale: float = 3.0
    set_up: Callable[[nn.Module], Any] = field(default=lambda model: None)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(step)
        x = self.scale * (torch.rand(STEPS, BATCH, *self.shape, generator=generator) < 0.5).to(self.dtype)
        lengths = torch.randint(2, STEPS + 1, (BATCH,), generator=generator)
        lengths[0] = STEPS
        return x, torch.randint(CLASSES, (BATCH,), generator=generator), lengths if self.lengths else None

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
    "least variance": Case(averaging, ULR(noise={"outputs": None}), "zero_one"),
    "output noise": Case(averaging, ULR(noise={"outputs": OutputNoise()}), "zero_one"),
    "flips": Case(spiking, ULR(), "latency"),
    "weighted loss": Case(averaging, ULR(), WEIGHTED),
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
SLOW = {name: Case(library(name), ULR(), scale=8.0, steps=3) for name in ("snntorch", "norse", "spikingjelly")}


@dataclass
class Outcome:
    """gradients: of each update; parameters: at the end; state: of the attachment at the end."""

    gradients: list[list[Tensor | None]]
    parameters: list[Tensor]
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
    return Outcome(gradients, [q.detach() for q in model.parameters()], attached.state_dict())


def run(rank: int, size: int, port: int, names: list[str], path: str) -> None:
    """Runs cases as one rank of several, and saves their outcomes by name; an exception stands for an outcome."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=30))
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = outcome((CASES | SLOW)[name], size, rank)
        except Exception:
            import traceback; traceback.print_exc(); found[name]=None
    torch.save(found, f"{path}/{rank}.pt")
    dist.destroy_process_group()
