"""Mixed flows: frozen parts, parts with the exact gradient alone, parts that learn by noise; halves apart."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import averaging, currents, errors
from ulr_snn import LIF, ULR, Fold, LayerByLayer, Logistic, TimeAverage, UsageError, WeightNoise, attach, plan, train
from ulr_snn.memory.step import Step

STEPS, BATCH, PIXELS, CLASSES = 5, 6, 4, 3
FIRING = Logistic(scale=0.4)


def data(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    return currents(STEPS, batch, PIXELS, CLASSES)


def net() -> nn.Sequential:
    return averaging(PIXELS, CLASSES)


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


@pytest.mark.slow
def test_a_part_marked_ulr_learns_by_noise_on_its_parameters():
    model = net()
    found = plan(model, data(), ULR(flow={"5": "ulr"}))
    said = {name: source for name, _, source in found.rows}
    assert said["5.weight"] == said["5.bias"] == "weight noise: loss minus baseline, times the score"
    assert said["0.weight"] == "credit at site 1" and found.copies == 2

    noise = {"5": WeightNoise(scale=0.3)}
    estimators = ULR(firing=FIRING, copies=16), ULR(firing=FIRING, copies=16, noise=noise, flow={"5": "ulr"})
    exact, drawn = (mean_gradient(net(), estimator, 180) for estimator in estimators)
    assert torch.cosine_similarity(drawn, exact, 0) > 0.8 and 0.7 < drawn.norm() / exact.norm() < 1.3


def mean_gradient(model: nn.Module, estimator: ULR, steps: int) -> Tensor:
    """Of the readout's weight."""
    with attach(model, estimator, seed=0) as ulr:
        for _ in range(steps):
            ulr.backward(*data())
    return model[5].weight.grad.flatten() / steps


def test_a_part_marked_backprop_never_gets_noise_of_its_own():
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


def test_the_halves_of_a_network_apart_give_its_gradient(monkeypatch):
    """The first half from the losses of the second alone: the same noise gives what global credit gives together."""
    whole = net()
    first = copy.deepcopy(whole[:2])
    estimator = ULR(credit="global", copies=2, firing=FIRING)
    x, y = data()
    losses: list[Tensor] = []
    finish = Step.finish
    kept = lambda step, passes, *rest: losses.extend(p.loss.flatten() for p in passes) or finish(step, passes, *rest)  # noqa: E731
    with attach(whole, estimator, seed=0) as ulr, monkeypatch.context() as patch:
        patch.setattr(Step, "finish", kept)
        ulr.backward(x, y)

    def answer(spikes: Tensor, targets: Tensor) -> Tensor:  # what comes back over the wire
        return losses.pop(0)

    with attach(first, estimator, answer, seed=0) as ulr:
        ulr.backward(x, y)
    assert not losses
    torch.testing.assert_close(first[0].weight.grad, whole[0].weight.grad)


def normed() -> nn.Sequential:
    torch.manual_seed(1)
    first = nn.Sequential(nn.Linear(PIXELS, 7), Fold(nn.BatchNorm1d(7), nn.Dropout(0.5)), LIF())
    return nn.Sequential(first, nn.Linear(7, 6), Fold(nn.BatchNorm1d(6)), LIF(), TimeAverage(), nn.Linear(6, CLASSES))


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_a_frozen_part_runs_as_in_evaluation():
    model, seen = normed(), []
    before = copy.deepcopy(model.state_dict())
    model[0].register_forward_hook(lambda *_: seen.append((modes(model[0]), modes(model[2]))))
    train(model, [data()] * 2, 2, estimator=ULR(flow={"0": "frozen"}), device="cpu", progress=False)
    assert seen and not any(mode for frozen, _ in seen for mode in frozen.values())
    assert any(all(others.values()) for _, others in seen) and all(modes(model).values())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name.startswith("0."))
    assert not torch.equal(before["2.0.running_mean"], after["2.0.running_mean"])


def test_a_frozen_part_of_a_chain_is_recognised_once():
    """The engine looks at modes: those of the model itself must be the same at every step."""
    snntorch = pytest.importorskip("snntorch")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(PIXELS, 7), nn.BatchNorm1d(7))
            self.neuron, self.out = snntorch.Leaky(beta=0.9), nn.Linear(7, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            state, outputs = self.neuron.init_leaky(), []
            for step in x:
                spikes, state = self.neuron(self.block(step), state)
                outputs.append(self.out(spikes))
            return torch.stack(outputs)

    torch.manual_seed(1)
    model = Net()
    estimator = ULR(firing=FIRING, flow={"block": "frozen"})
    assert any("chain" in line for line in plan(model, data(), estimator).engine)
    with attach(model, estimator, seed=0) as ulr:
        ulr.backward(*data())
        chain = ulr.bound.model
        ulr.backward(*data())
    assert chain is not model and ulr.bound.model is chain and all(modes(model).values())


def test_modules_put_into_evaluation_mode_stay_there_in_training():
    def running_mean(model: nn.Module) -> Tensor:
        seen: list[dict[str, bool]] = []
        model[2].register_forward_hook(lambda *_: seen.append(modes(model)))
        own = modes(model)
        train(model, [data()] * 2, 1, val_loader=[data()], device="cpu", progress=False)
        assert modes(model) == own
        expected = own if model.training else dict.fromkeys(own, True)
        assert expected in seen and all(now in (expected, dict.fromkeys(own, False)) for now in seen)
        return model[2][0].running_mean

    still = normed()
    still[2].eval()
    still[0][1][1].eval()
    assert not running_mean(still).any()
    assert running_mean(normed().eval()).any()  # as after inference: all of it trains


class FrozenNorm(nn.Sequential):
    """Keeps its batch norm in evaluation mode, as people do who fine-tune a network."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("called", [False, True])
def test_a_train_method_of_ones_own_is_called(called):
    norm = Fold(nn.BatchNorm1d(6))
    model = nn.Sequential(FrozenNorm(nn.Linear(4, 6), norm), LIF(), TimeAverage(), nn.Linear(6, 3))
    if called:
        model.train()
    x, y = torch.rand(5, 8, 4), torch.arange(8) % 3
    train(model, [(x, y)] * 2, 1, device="cpu", progress=False)
    assert not norm[0].running_mean.any() and model[1].training


EACH_WAY = {
    "feedback": ULR(firing=FIRING),
    "global": ULR(credit="global", firing=FIRING),
    "copies in turn": ULR(credit="global", memory="replay", firing=FIRING),
    "layer by layer": ULR(credit="global", sampling=LayerByLayer(), firing=FIRING),
    "noise on weights": ULR(noise={"0.weight": WeightNoise()}, firing=FIRING),
}


@pytest.mark.parametrize("way", EACH_WAY)
def test_hooks_of_parameters_see_the_whole_gradient_once(way):
    usual = gradients(net(), EACH_WAY[way])
    size = 0.5 * max(float(g.abs().max()) for g in usual.values())
    model, calls = net(), []
    for q in model.parameters():
        q.grad = torch.ones_like(q)
        q.register_hook(lambda g: calls.append("before") or g.clamp(-size, size))
        q.register_post_accumulate_grad_hook(lambda q: calls.append("after"))
    found = gradients(model, EACH_WAY[way])
    assert calls.count("before") == calls.count("after") == len(usual)
    for name, g in found.items():
        torch.testing.assert_close(g, 1 + usual[name].clamp(-size, size))
    model[0].weight.sum().backward()  # hooks are there as before
    assert len(calls) == 2 * len(usual) + 2


def test_an_optimizer_may_step_in_a_hook():
    usual, model = gradients(net(), ULR(credit="global", memory="replay")), net()
    optimizers = {q: torch.optim.SGD([q], 0.1) for q in model.parameters()}
    for q in model.parameters():
        q.register_post_accumulate_grad_hook(lambda q: optimizers[q].step())
    gradients(model, ULR(credit="global", memory="replay"))
    for (name, q), before in zip(model.named_parameters(), net().parameters(), strict=True):
        torch.testing.assert_close(q.detach(), before - 0.1 * usual[name])


def test_hooks_stay_after_an_error():
    model, calls = net(), []
    model[0].weight.register_hook(calls.append)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(ZeroDivisionError):
        gradients(model, ULR(), lambda outputs, targets: 1 / 0)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    model[0].weight.sum().backward()
    assert len(calls) == 1
