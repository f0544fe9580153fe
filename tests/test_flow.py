"""Mixed flows: frozen parts, parts with the exact gradient alone, parts that learn by noise; halves apart."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, ULR, Logistic, TimeAverage, UsageError, WeightNoise, attach, plan, train

STEPS, BATCH, PIXELS, CLASSES = 5, 6, 4, 3
FIRING = Logistic(scale=0.4)


def data(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(STEPS, batch, PIXELS, generator=generator), torch.arange(batch) % CLASSES


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(PIXELS, 7), LIF(), nn.Linear(7, 6), LIF(), TimeAverage(), nn.Linear(6, CLASSES))


def gradients(model: nn.Module, estimator: ULR, loss="ce_count") -> dict[str, Tensor | None]:
    with attach(model, estimator, loss, seed=0) as ulr:
        ulr.backward(*data())
    return {name: q.grad for name, q in model.named_parameters()}


def test_a_frozen_part_gets_no_gradient_and_the_others_theirs():
    usual = gradients(net(), ULR(firing=FIRING))
    model = net()
    found = gradients(model, ULR(firing=FIRING, flow={"0": "frozen", "5.bias": "frozen"}))
    assert {name for name, g in found.items() if g is None} == {"0.weight", "0.bias", "5.bias"}
    assert all(q.requires_grad for q in model.parameters())
    for name, g in found.items():
        if g is not None:
            torch.testing.assert_close(g, usual[name])


def test_fine_tuning_leaves_the_frozen_part_as_it_is():
    model = net()
    before = copy.deepcopy(model.state_dict())
    train(model, [data()] * 3, 2, estimator=ULR(flow={"0": "frozen", "2": "frozen"}), device="cpu", progress=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"5.weight", "5.bias"}


def test_a_part_marked_ulr_learns_by_noise_on_its_parameters():
    model = net()
    found = plan(model, data(), ULR(flow={"5": "ulr"}))
    said = {name: source for name, _, source in found.rows}
    assert said["5.weight"] == said["5.bias"] == "weight noise: loss minus baseline, times the score"
    assert said["0.weight"] == "credit at site 1" and found.copies == 2

    noise = {"5": WeightNoise(scale=0.3)}
    estimators = ULR(firing=FIRING, copies=16), ULR(firing=FIRING, copies=16, noise=noise, flow={"5": "ulr"})
    exact, drawn = (mean_gradient(net(), estimator, 300) for estimator in estimators)
    assert torch.cosine_similarity(drawn, exact, 0) > 0.8 and 0.7 < drawn.norm() / exact.norm() < 1.3


def mean_gradient(model: nn.Module, estimator: ULR, steps: int) -> Tensor:
    """Of the readout's weight."""
    with attach(model, estimator, seed=0) as ulr:
        for _ in range(steps):
            ulr.backward(*data())
    return model[5].weight.grad.flatten() / steps


def test_a_part_marked_backprop_never_gets_noise_of_its_own():
    def errors(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.detach().argmax(1) != targets).to(outputs.dtype)

    quiet = {"outputs": None}
    usual = plan(net(), data(), ULR(noise=quiet, firing=FIRING), loss=errors)
    assert usual.untrained == []
    found = plan(net(), data(), ULR(noise=quiet, firing=FIRING, flow={"5": "backprop"}), loss=errors)
    assert [line.split(":")[0] for line in found.untrained] == ["5.weight", "5.bias"]
    with pytest.raises(UsageError, match="in which 1 fires"):
        attach(net(), ULR(flow={"1": "backprop"}))


def test_a_black_box_is_not_differentiable():
    class Hard(nn.Module):
        def forward(self, current: Tensor) -> Tensor:
            return (current.detach() > 0.5).to(current.dtype)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 6), Hard(), TimeAverage(), nn.Linear(6, CLASSES))
    with pytest.raises(UsageError, match="in which 1 fires or cuts the graph"):
        plan(model, data(), ULR(flow={"1": "backprop"}))


@pytest.mark.parametrize(
    "flow, message", [({"9": "frozen"}, "no module or parameter"), ({"0": "surrogate"}, "it is one of ulr")]
)
def test_wrong_flows(flow, message):
    with pytest.raises(UsageError, match=message):
        attach(net(), ULR(flow=flow))


def test_the_halves_of_a_network_apart_give_its_gradient():
    """The first half from the losses of the second alone: the same noise gives what global credit gives together."""
    whole = net()
    first = copy.deepcopy(whole[:2])
    estimator = ULR(credit="global", copies=2, firing=FIRING)
    x, y = data()
    losses: list[Tensor] = []
    with attach(whole, estimator, seed=0) as ulr:
        finish = ulr._finish
        ulr._finish = lambda passes, *rest: losses.extend(p.loss.flatten() for p in passes) or finish(passes, *rest)
        ulr.backward(x, y)

    def answer(spikes: Tensor, targets: Tensor) -> Tensor:  # what comes back over the wire
        return losses.pop(0)

    with attach(first, estimator, answer, seed=0) as ulr:
        ulr.backward(x, y)
    assert not losses
    torch.testing.assert_close(first[0].weight.grad, whole[0].weight.grad)
