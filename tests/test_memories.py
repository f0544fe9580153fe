"""States that a model's own code keeps in attributes: every batch starts with those of before the training."""

from collections import deque
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.written import BATCH, CLASSES, INPUTS, Above, data, gradients
from ulr_snn import ULR, Logistic, evaluate, train
from ulr_snn.adapters.memories import in_graph


@dataclass
class Record:
    v: Tensor | None = None


class Keeping(nn.Module):
    """LIF neurons that keep their membrane in an attribute, a buffer, a list, a dictionary, an object, a queue, or a
    tensor that they change in place, or in none of them."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.seen = where, 0.0
        self.attribute: Tensor | None = None
        self.register_buffer("buffer", torch.zeros(0))
        self.register_buffer("place", torch.zeros(1, 1, dtype=torch.float64))
        self.listed: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.record, self.queue = Record(), deque(maxlen=2)

    def kept(self) -> Tensor | None:
        if self.where == "place":
            return self.place if self.place.numel() > 1 else None
        found = {"attribute": self.attribute, "buffer": self.buffer if self.buffer.numel() else None}
        found |= {"list": self.listed[-1] if self.listed else None, "dict": self.named.get("v")}
        found |= {"object": self.record.v, "queue": self.queue[-1] if self.queue else None}
        return found.get(self.where)

    def keep(self, v: Tensor) -> None:
        if self.where == "attribute":
            self.attribute = v
        elif self.where == "buffer":
            self.buffer = v
        elif self.where == "list":
            self.listed.append(v)
        elif self.where == "dict":
            self.named["v"] = v
        elif self.where == "object":
            self.record.v = v
        elif self.where == "queue":
            self.queue.append(v)
        elif self.where == "place":
            self.place = torch.zeros_like(v) if self.place.numel() == 1 else self.place
            self.place.copy_(v)

    def forward(self, x: Tensor) -> Tensor:
        found, v = [], self.kept()
        v = torch.zeros_like(x[0]) if v is None else v.clone()
        for now in x:
            v = 0.8 * v + now
            spikes = Above.apply(v - 1.0)
            v = v - spikes
            found.append(spikes)
        self.keep(v)
        self.seen = self.seen + float(x.detach().abs().mean())  # not of the graph: it stays
        return torch.stack(found)


def net(where: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 8), Keeping(where), nn.Linear(8, CLASSES)).double()


@pytest.mark.parametrize("where", ["attribute", "buffer", "list", "dict", "object", "queue", "place"])
def test_every_batch_starts_with_the_state_of_before(where):
    model = net(where)
    kept, fresh = (gradients(m, ULR(firing=Logistic(0.4))) for m in (model, net("nowhere")))
    for a, b in zip(kept, fresh, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert model[1].kept() is None and model[1].seen > 0
    assert not any(map(in_graph, vars(model[1]).values()))


@pytest.mark.parametrize("where", ["attribute", "buffer", "list", "dict"])
def test_a_state_that_is_there_is_where_every_batch_starts(where):
    """Also one that a pass in the graph has left."""
    model, once = net(where), net(where)
    for each in (model, once):
        each[1].keep(each[0](data()[0][0].double()).relu()[:1])
    before = model[1].kept().detach().clone()
    several = gradients(model, ULR(firing=Logistic(0.4)))
    assert torch.equal(model[1].kept(), before)
    with torch.no_grad():
        once[1].keep(once[1].kept().detach())  # the same state, without a graph
    for a, b in zip(several, gradients(once, ULR(firing=Logistic(0.4))), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Step(nn.Module):
    """A model that takes one time step a call and keeps its state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, 12), nn.Linear(12, CLASSES)
        self.v: Tensor | float = 0.0

    def forward(self, now: Tensor) -> Tensor:
        self.v = 0.8 * self.v + self.first(now)
        spikes = Above.apply(self.v - 1.0)
        self.v = self.v - spikes
        return self.second(spikes)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("make", [lambda: net("attribute"), lambda: Step().double()], ids=["layer", "step"])
def test_evaluation_does_not_depend_on_the_order_of_batches(make, frozen):
    model = make().requires_grad_(not frozen)
    x, y = data()
    parts = [(x[:, :8], y[:8]), (x[:, 8:], y[8:]), (x[:, 3:11], y[3:11])]
    assert evaluate(model, parts)["loss"] == pytest.approx(evaluate(model, parts[::-1])["loss"], rel=1e-12)
    assert not any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())


def test_a_model_of_one_time_step_a_call_that_keeps_its_state_trains():
    torch.manual_seed(0)
    model = Step().double()
    x, y = data()
    x[:, torch.arange(BATCH), y] += 1
    before = evaluate(model, [(x, y)])["loss"]
    train(model, [(x, y)] * 30, epochs=2, lr=1e-2, progress=False)
    assert evaluate(model, [(x, y)])["loss"] < before - 0.2 and model.v == 0.0
