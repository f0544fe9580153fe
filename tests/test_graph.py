"""What an autograd graph reaches, and what a model holds."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from ulr_snn.kernels.walk import modules_in, named_parameters_in, parameters_in
from ulr_snn.model.graph import leaves, passes_through

KINDS: dict[str, Callable[[list[Tensor]], Iterable[Tensor]]] = {
    "list": list,
    "iterator": iter,
    "generator": lambda tensors: (tensor for tensor in tensors),
}


@pytest.mark.parametrize("kind", KINDS)
def test_leaves_of_any_iterable(kind):
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    assert leaves(KINDS[kind]([(a * b).sum(), c, torch.ones(2)])) == {id(a), id(b), id(c)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_path_from_any_iterable(kind):
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    tensors = [b.exp(), a.round().sum()]
    assert passes_through(KINDS[kind](tensors), {id(a)}, ("Round",))
    assert not passes_through(KINDS[kind](tensors), {id(b)}, ("Round",))


@pytest.mark.parametrize("scripted", [False, True])
def test_a_walk_meets_the_modules_in_the_order_of_torch(scripted):
    shared, inner = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.Sequential(inner, shared, nn.Sequential(nn.Tanh(), inner, shared), nn.BatchNorm1d(2, affine=False))
    model.nothing = None
    model.register_module("none", None)
    model = torch.jit.script(model[:2]) if scripted else model
    assert [id(m) for m in modules_in(model)] == [id(m) for m in model.modules()]
    assert [id(q) for q in parameters_in(model)] == [id(q) for q in model.parameters()]
    found = named_parameters_in(model)
    assert [(name, id(q)) for name, q in found.items()] == [(name, id(q)) for name, q in model.named_parameters()]
