"""Noise on a current of which only the signs are kept: an estimator of its own, in a bit for each number."""

import math

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.statistics import compare_means, gradient_draws
from ulr_snn import ULR, CurrentNoise, TimeAverage, attach
from ulr_snn.sites.records import CurrentRecord


class Copies(nn.Module):
    """Gives its current, and cuts the graph."""

    def forward(self, current: Tensor) -> Tensor:
        return current.detach().clone()


class Hard(nn.Module):
    def forward(self, current: Tensor) -> Tensor:
        return (current.detach() > 0.5).to(current.dtype)


def net(box: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 33), box(), TimeAverage(), nn.Linear(33, 3)).to(dtype)


def data(samples: int = 64, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator, y = torch.Generator().manual_seed(0), torch.arange(samples) % 3
    return torch.rand(5, samples, 4, generator=generator, dtype=dtype) + torch.eye(4, dtype=dtype)[y], y


def with_signs(signs: bool, credit: str = "global", **options) -> ULR:
    return ULR(credit=credit, copies=4, noise={"1": CurrentNoise(scale=0.4, signs=signs), **options})


@pytest.mark.parametrize("credit", ["global", "residual", "feedback"])
def test_the_gradient_is_that_of_signs_in_the_place_of_z(credit: str, monkeypatch):
    """Same noise: as if z were sqrt(π/2) sign(z) wherever it is used but in the forward pass."""
    found = []
    for signs in (True, False):
        if not signs:
            monkeypatch.setattr(CurrentRecord, "_drawn", lambda self: math.sqrt(math.pi / 2) * self.z.sign())
        model = net(Hard)
        with attach(model, with_signs(signs, credit), seed=0) as ulr:
            for _ in range(3):
                model.zero_grad()
                ulr.backward(*data())
        found.append([q.grad for q in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_is_kept_takes_a_bit_a_number(monkeypatch):
    sizes, score = {}, CurrentRecord.score

    def seen(self: CurrentRecord) -> Tensor:
        kept = self.signs if self.z is None else self.z
        sizes[self.z is None] = kept.numel() * kept.element_size() / self.x.numel()
        return score(self)

    monkeypatch.setattr(CurrentRecord, "score", seen)
    for signs in (True, False):
        with attach(net(Hard, torch.float32), with_signs(signs), seed=0) as ulr:
            ulr.backward(*data(dtype=torch.float32))
    assert sizes[False] == 4  # bytes
    assert sizes[True] == 2 * 4 / 33  # two words for 33 neurons


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that is linear in the outputs."""
    return (outputs * torch.tensor([1.0, -2.0, 0.5], dtype=outputs.dtype)).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "without the factor"])
def test_where_the_loss_is_linear_in_the_noise_there_is_no_bias(wrong: bool, monkeypatch):
    if wrong:
        drawn = CurrentRecord._drawn
        monkeypatch.setattr(CurrentRecord, "_drawn", lambda self: drawn(self) / math.sqrt(math.pi / 2))
    model, batch = net(Copies), data(2048)
    rest = {name: None for name, _ in model.named_parameters()}
    exact = torch.autograd.grad(weighted(model[3](model[0](batch[0]).mean(0)), batch[1]).mean(), [*model.parameters()])
    with attach(model, with_signs(True, **rest), weighted, seed=0) as ulr:
        draws = gradient_draws(ulr, batch, [*model.parameters()], 24, 2)
    verdict = compare_means("unbiased", draws, torch.cat([g.flatten() for g in exact]), spending=not wrong)
    assert verdict.agrees != wrong, verdict


def test_a_box_trains():
    model, (x, y) = net(Hard, torch.float32), data(256, torch.float32)
    estimator = ULR(noise={"1": CurrentNoise(signs=True)})
    result = ulr_snn.train(model, [(x, y)] * 20, epochs=5, val_loader=[(x, y)], estimator=estimator, progress=False)
    assert result.metrics["test_accuracy"] > 0.9
