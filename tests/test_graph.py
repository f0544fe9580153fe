"""What an autograd graph reaches."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

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
