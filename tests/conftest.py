"""Fixtures of all tests: one thread (small tensors are slower on two), also in processes that tests start, and the
devices that tests run on.

A test with the mark `gpu` needs a GPU, and is skipped elsewhere. A test that takes the fixture `device` runs on the CPU
and on the GPU, and has the mark on the GPU alone. Of a test with the mark `product`, one in FAST of its combinations of
options (at least one), drawn by name, runs with the fast tests, and the others have the mark `slow`.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from zlib import crc32

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

FAST = 4
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    products = defaultdict(list)
    for item in items:
        if item.get_closest_marker("product"):
            products[item.nodeid.partition("[")[0]].append(item)
    for product in products.values():
        product.sort(key=lambda item: crc32(item.name.encode()))
        for item in product[-(-len(product) // FAST) :]:
            item.add_marker("slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")


@pytest.fixture
def own_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    """`snntorch.utils.reset` resets every neuron of the process, and fails for those that have not run yet."""
    monkeypatch.setattr("snntorch.SpikingNeuron.instances", [])


@pytest.fixture
def some_threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads until the test ends."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
