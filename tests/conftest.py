"""Fixtures of all tests: one thread (small tensors are slower on two), and the devices that tests run on.

A test with the mark `gpu` needs a GPU, and is skipped elsewhere. A test that takes the fixture `device` runs on the CPU
and on the GPU, and has the mark on the GPU alone.
"""

import pytest
import torch

torch.set_num_threads(1)

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
