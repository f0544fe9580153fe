"""Any allowed number of copies steps and learns, with every credit, paired or not."""

import pytest
import torch
from torch import nn

import ulr_snn
import ulr_snn.structure


@pytest.mark.parametrize(
    ("credit", "copies", "antithetic"),
    [
        ("feedback", 1, False),
        ("feedback", 3, False),
        ("feedback", 4, True),
        ("global", 1, True),
        ("global", 3, False),
        ("residual", 3, False),
        ("residual", 4, True),
        ("residual", 5, False),
    ],
)
def test_every_number_of_copies(credit: str, copies: int, antithetic: bool, monkeypatch, device) -> None:
    monkeypatch.setattr(ulr_snn.structure, "ENTRIES", 50)  # the first layer is too wide for its recurrent current
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), ulr_snn.RecurrentLIF(8), nn.Linear(8, 6), ulr_snn.LIF(), nn.Linear(6, 3))
    model.to(device)
    x = (torch.rand(7, 10, 5, device=device) < 0.5).float()
    y = torch.randint(0, 3, (10,), device=device)
    estimator = ulr_snn.ULR(credit=credit, copies=copies, antithetic=antithetic, firing=ulr_snn.Logistic(0.3))
    with ulr_snn.attach(model, estimator) as ulr:
        for _ in range(3):
            estimate = ulr.backward(x, y)
            assert estimate.outputs.shape == (estimate.stats["copies"], 7, 10, 3)
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())
    learned = ulr.state_dict()["feedback"]
    assert bool(learned["outputs"]) == bool(learned["layers"]) == (credit != "global")
