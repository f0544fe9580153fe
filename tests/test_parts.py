"""Steps in parts of time give the gradient of steps over the whole sequence."""

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from ulr_snn import LIF, ULR, Fold, LeakyReadout, Logistic, RecurrentLIF, TimeAverage, UsageError, attach, parts

STEPS, BATCH = 23, 6


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "dense": nn.Sequential(
            nn.Flatten(2), nn.Linear(12, 9), LIF(), nn.Linear(9, 8), LIF(0.8, 1, "zero"), TimeAverage(), nn.Linear(8, 3)
        ),
        "recurrent": nn.Sequential(nn.Flatten(2), nn.Linear(12, 9), RecurrentLIF(9), nn.Linear(9, 3), LeakyReadout()),
        "spikes": nn.Sequential(nn.Sequential(nn.Flatten(2), nn.Linear(12, 9)), LIF(), nn.Linear(9, 3), LIF()),
        "conv": nn.Sequential(
            nn.Unflatten(2, (1, 3)), Fold(nn.Conv2d(1, 2, 3, padding=1)), LIF(), nn.Flatten(2), nn.Linear(24, 9),
            RecurrentLIF(9, reset="none"), TimeAverage(), nn.Linear(9, 3),
        ),
    }  # fmt: skip


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(STEPS, BATCH, 3, 4, generator=generator) < 0.4).to(dtype) * 3, torch.arange(BATCH) % 3


def gradients(model: nn.Module, memory: str, together: int, monkeypatch, lengths=None, double=False) -> list[Tensor]:
    """Of the third step, when the feedback is learned. Constant scale: that at the start is measured by fewer samples.
    together: of `parts`."""
    monkeypatch.setattr(parts, "TOGETHER", together)
    monkeypatch.setattr(parts, "LEAST", 1)
    x, y = data()
    model, x = (model.double(), x.double()) if double else (model, x)
    with attach(model, ULR(firing=Logistic(scale=0.3), memory=memory), seed=1, total_steps=20) as ulr:
        for _ in range(3):
            model.zero_grad()
            estimate = ulr.backward(x, y, lengths=lengths)
    if memory != "auto":
        assert estimate.stats["parts"] == -(-STEPS // max(1, together // (BATCH * ulr.piecewise.neurons)))
    return [q.grad for q in model.parameters()]


@pytest.mark.parametrize("lengths", [None, [23, 4, 9, 23, 17, 1]], ids=["", "lengths"])
@pytest.mark.parametrize("memory", ["bits", "replay"])
@pytest.mark.parametrize("name", nets())
@pytest.mark.parametrize("slots", [12, 2], ids=["", "parts of parts"])
def test_the_gradient_is_that_of_the_whole(name, memory, lengths, slots, monkeypatch):
    if name == "recurrent" and lengths:
        pytest.skip("held readouts are refused, see below")
    lengths = lengths and torch.tensor(lengths)
    monkeypatch.setattr(parts, "SLOTS", slots)
    whole = gradients(nets()[name], "auto", 1, monkeypatch, lengths, double=True)
    size = BATCH * 17 * 5  # of about five time steps
    ours = gradients(nets()[name], memory, size, monkeypatch, lengths, double=True)
    for mine, other in zip(ours, whole, strict=True):
        assert other.any() and (mine - other).norm() <= 1e-9 * other.norm()


@pytest.mark.parametrize("name", nets())
def test_bits_and_replay_agree_in_single_precision(name, monkeypatch):
    bits, replay, whole = (
        gradients(nets()[name], memory, BATCH * 60, monkeypatch) for memory in ("bits", "replay", "auto")
    )
    for mine, other, third in zip(bits, replay, whole, strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()
        assert (mine - third).norm() <= 1e-4 * third.norm()


def test_a_gap_between_parts_would_be_seen(monkeypatch):
    """Without what credit a part gets from the next one, gradients differ by more than rounding."""
    whole = gradients(nets()["dense"], "auto", 1, monkeypatch)
    credit = ulr_snn.credit.prediction.Prediction.credit
    monkeypatch.setattr(ulr_snn.credit.prediction.Prediction, "credit", lambda self, p, later=None: credit(self, p, {}))
    cut = gradients(nets()["dense"], "bits", BATCH * 60, monkeypatch)
    assert any((mine - other).norm() > 1e-3 * other.norm() for mine, other in zip(cut, whole, strict=True))


def test_auto_takes_parts_where_the_whole_is_large(monkeypatch):
    x, y = data(torch.uint8)
    model = nets()["dense"]
    monkeypatch.setattr(parts, "ROOMY", 1000)
    with attach(model) as ulr:
        assert "parts" not in ulr.backward(x, y).stats
    monkeypatch.setattr(ulr_snn.piecewise, "WHOLE", 1000)
    monkeypatch.setattr(ulr_snn.piecewise, "SHORT", 1)
    with attach(model) as ulr:
        assert ulr.backward(x, y).stats["parts"] > 1
    with attach(nn.Sequential(Backwards(), *model)) as ulr:  # has to see all
        assert "parts" not in ulr.backward(x, y).stats
    with attach(nn.Sequential(*model, Backwards())) as ulr:  # but not what comes after the average
        assert ulr.backward(x, y).stats["parts"] > 1


def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.sum(0).argmax(-1) != targets).float()


@pytest.mark.parametrize("loss", [wrong, {"ce_count": 1.0, ulr_snn.SpikeBudget(5): 0.1}], ids=["no gradient", "costs"])
def test_auto_takes_the_whole_where_parts_cannot_be(loss, monkeypatch):
    monkeypatch.setattr(ulr_snn.piecewise, "WHOLE", 1000)
    monkeypatch.setattr(ulr_snn.piecewise, "SHORT", 1)
    monkeypatch.setattr(parts, "TOGETHER", 1000)
    for memory in ("auto", "bits"):
        with attach(nets()["spikes"], ULR(memory=memory), loss=loss) as ulr:
            if memory == "auto":
                assert all("parts" not in ulr.backward(*data()).stats for _ in range(2))
            else:
                with pytest.raises(UsageError, match="use memory='auto'"):
                    ulr.backward(*data())


class Backwards(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0)


WRONG = {
    "time step by itself": lambda: (
        nn.Sequential(nn.Flatten(2), nn.Linear(12, 4), Backwards(), LIF(), TimeAverage()),
        {},
    ),
    "one copy": lambda: (nets()["dense"], {"credit": "residual"}),
    "learned": lambda: (nets()["dense"], {"firing": Logistic(learn=0.1)}),
    "one of": lambda: (nets()["dense"], {"memory": "little"}),
}


@pytest.mark.parametrize("says", WRONG)
def test_what_parts_of_time_cannot_do_is_refused(says):
    model, options = WRONG[says]()
    with pytest.raises(UsageError, match=says):
        attach(model, ULR(**{"memory": "replay", **options})).backward(*data())


def test_a_readout_that_holds_is_refused():
    with pytest.raises(UsageError, match="LeakyReadout"):
        ulr = attach(nets()["recurrent"], ULR(memory="bits"))
        ulr.backward(*data(), lengths=torch.tensor([23, 4, 9, 23, 17, 1]))


def test_training_in_parts_learns(monkeypatch):
    monkeypatch.setattr(parts, "TOGETHER", 2000)
    torch.manual_seed(0)
    x, y = (torch.rand(40, 64, 12) < 0.3).float(), torch.arange(64) % 3
    for target in range(3):
        x[:, y == target, 4 * target : 4 * target + 4] *= 3
    loader = [(x[:, i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    model = nn.Sequential(nn.Linear(12, 16), LIF(), nn.Linear(16, 16), LIF(), TimeAverage(), nn.Linear(16, 3))
    result = ulr_snn.train(model, loader, epochs=15, estimator=ULR(memory="replay"), progress=False)
    assert ulr_snn.evaluate(model, loader)["accuracy"] > 0.95
    assert result.metrics["forward_passes"] >= 15 * 64 * 2


def test_the_plan_says_what_a_step_keeps(monkeypatch):
    monkeypatch.setattr(parts, "TOGETHER", BATCH * 17 * 5)
    x, y = data()
    for memory, says in (("auto", "the whole sequence"), ("bits", "parts of 5 time steps"), ("replay", "drawn again")):
        text = str(ulr_snn.plan(nets()["dense"], (x, y), ULR(memory=memory)))
        assert says in text and "scans over time of ulr_snn's neurons: " in text
    with pytest.raises(UsageError, match="time step by itself"):
        ulr_snn.plan(nets()["dense"].insert(0, Backwards()), (x, y), ULR(memory="bits"))


def test_hooks_on_the_sequence_are_not_passed_over():
    model = nets()["dense"]
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    x, y = torch.rand(6, 4, 12), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UsageError, match="Sequential is not known"), attach(model, ULR(memory="bits")) as ulr:
        ulr.backward(x.to(next(model.parameters()).dtype), y)


def test_a_readout_before_neurons_is_refused():
    model = nn.Sequential(nn.Linear(12, 4), LeakyReadout(), nn.Linear(4, 4), LIF(), TimeAverage(), nn.Linear(4, 3))
    with pytest.raises(UsageError, match="LeakyReadout to come after"), attach(model, ULR(memory="bits")) as ulr:
        ulr.backward(torch.rand(6, 4, 12), torch.zeros(4, dtype=torch.long))


def test_a_last_batch_of_one_sample_runs_whole():
    model = nn.Sequential(nn.Linear(12, 4), LIF(), TimeAverage(), nn.Linear(4, 3))
    with attach(model, ULR(memory="bits")) as ulr:
        ulr.backward(torch.rand(6, 4, 12), torch.zeros(4, dtype=torch.long))
        last = ulr.backward(torch.rand(6, 1, 12), torch.zeros(1, dtype=torch.long))
    assert "parts" not in last.stats and torch.isfinite(last.loss).all()


@pytest.mark.parametrize("memory", ["auto", "bits", "replay"])
def test_events_stay_as_they_are_where_modules_change_them_in_place(memory):
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    kind = Fold(nn.ReLU(inplace=True)) if memory != "auto" else Doubled()
    model = nn.Sequential(kind, nn.Linear(600, 4), LIF(), TimeAverage(), nn.Linear(4, 3))
    x = (torch.rand(30, 8, 600) < 0.02).float() - 0.01
    x[x < 0] = 0.0 if memory == "auto" else -1.0
    before = x.clone()
    with attach(model, ULR(memory=memory)) as ulr:
        ulr.backward(x, torch.zeros(8, dtype=torch.long))
    assert torch.equal(x, before)


def test_the_readouts_step_size_stays_when_a_training_goes_on():
    """Times are counted at the start: a net that is sure of itself asks less of its outputs."""
    x, y = torch.ones(STEPS, BATCH, 3, 4), torch.zeros(BATCH, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(12, 9), LIF(), nn.Linear(9, 3))
    with attach(model, ULR(memory="bits"), "ce_count", total_steps=20) as ulr:
        ulr.advise_step_sizes()
        ulr.backward(x, y)
        state = ulr.state_dict()
    with torch.no_grad():
        model[3].bias += torch.tensor([9.0, 0, 0])
    with attach(model, ULR(memory="bits"), "ce_count", total_steps=20) as ulr:
        ulr.load_state_dict(state)
        ulr.backward(x, y)
        assert ulr.step_sizes.summed == state["step_sizes"]["summed"] > STEPS / 2
