"""Fixtures of all tests: one thread (small tensors are slower on two), and the devices that are
here."""

import pytest
import torch

torch.set_num_threads(1)

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
