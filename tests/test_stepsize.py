"""Step sizes: how far a step moves membranes and outputs is what is measured, and what the own optimizer heeds."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, LeakyReadout, RecurrentLIF, TimeAverage, attach, train
from ulr_snn.estimators.step_sizes import NONLINEAR, OUTPUTS, REACH, READOUT, SELDOM, SIZE, StepSizes

STEPS, BATCH, PIXELS, CLASSES, BETA, THRESHOLD = 6, 5, 3, 4, 0.8, 1.5


def model(*readout: nn.Module, recurrent: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    neuron = RecurrentLIF(7, BETA, THRESHOLD) if recurrent else LIF(BETA, THRESHOLD)
    return nn.Sequential(nn.Linear(PIXELS, 7), neuron, *(readout or (TimeAverage(), nn.Linear(7, CLASSES)))).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.rand(STEPS, BATCH, PIXELS, generator=generator).double(), torch.arange(BATCH) % CLASSES


def last(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs[-1], targets, reduction="none")


def measured(net: nn.Module, lengths: Tensor | None = None, loss: str = "ce_count") -> StepSizes:
    with attach(net, loss=loss, seed=0) as ulr:
        ulr.learner.step_sizes = StepSizes()
        ulr.backward(*data(), lengths=lengths)
        return ulr.learner.step_sizes


def trace(x: Tensor) -> Tensor:
    level, found = torch.zeros_like(x[0]), []
    for now in x:
        level = BETA * level + now
        found.append(level)
    return torch.stack(found)


def test_the_reach_of_weights_is_the_sum_of_their_inputs_traces_over_the_threshold():
    found = measured(model(recurrent=True)).reach["1"]
    x = data()[0]
    assert found["0.weight"] == pytest.approx(float(trace(x).mean((0, 1)).sum() / THRESHOLD))
    assert found["0.bias"] == pytest.approx(float(trace(torch.ones(STEPS, 1, 1)).mean() / THRESHOLD))
    assert 0 < found["1.recurrent.weight"] < 7 * found["0.bias"]


def test_padding_moves_nothing():
    lengths = torch.full((BATCH,), STEPS // 2)
    found = measured(model(), lengths).reach["1"]
    assert found["0.weight"] == pytest.approx(float(trace(data()[0])[: STEPS // 2].mean((0, 1)).sum() / THRESHOLD / 2))


@pytest.mark.parametrize(
    ("readout", "loss", "low", "high"),
    [
        ((TimeAverage(), nn.Linear(7, CLASSES)), "ce_count", 1, 1),
        ((nn.Linear(7, CLASSES),), "ce_count", STEPS, STEPS),
        ((nn.Linear(7, CLASSES), LeakyReadout(BETA)), "ce_count", STEPS, STEPS),
        ((nn.Linear(7, CLASSES),), "ce_rate", 1, 2),
        ((nn.Linear(7, CLASSES),), last, 1, 2),
    ],
    ids=["averaged", "summed", "leaky", "loss of each step", "last step"],
)
def test_outputs_count_as_often_as_the_loss_adds_them_up(readout, loss, low, high):
    assert low <= measured(model(*readout), loss=loss).summed <= high


def test_the_factors_of_the_learning_rate():
    found = StepSizes()
    found.reach = {"a": {"near": 0.5 * REACH, "far": 4 * REACH, "none": 0.0}}
    assert found.factor("near", ["a"]) == found.factor("none", ["a"]) == found.factor("other", []) == 1.0
    assert found.factor("far", ["a"]) == found.factor("far", ["outputs", "a"]) == 0.125
    assert found.factor("readout", ["outputs"]) == READOUT
    found.summed = 2.0
    assert found.factor("readout", ["outputs"]) == READOUT / 2
    found.reach["outputs"] = {"readout": OUTPUTS / 5, "rich": 100 * OUTPUTS, "silent": 0.0, "poor": 1e-3, "bias": 1e-3}
    found.size = {"readout": 1.0, "rich": 1.0, "silent": 1.0, "poor": 4 / SIZE}
    assert found.factor("readout", ["outputs"]) == 5.0  # so that a step moves the outputs far enough
    assert found.factor("rich", ["outputs"]) == found.factor("silent", ["outputs"]) == READOUT / 2
    assert found.factor("poor", ["outputs"]) == 4.0  # but does not turn the readout around
    assert found.factor("bias", ["outputs"]) == READOUT
    assert found.factor("inside", ["weight noise"]) == 1.0


def test_a_readout_that_learns_alone_has_at_least_the_rate_itself():
    rates = []
    for alone in (False, True):
        net = model(nn.Linear(7, CLASSES))
        net[0].requires_grad_(not alone)
        with attach(net, loss="ce_count", seed=0) as ulr:
            ulr.learner.step_sizes = StepSizes()
            ulr.backward(1e3 * data()[0].repeat(10, 1, 1), data()[1])
            rates.append(ulr.learning_rates()["2.weight"])
    assert rates[0] < rates[1] == 1


@pytest.mark.parametrize("moves", [[0.2], [3.0], [0.9, 0.9], [0.1, 0.3, 7.0], [0.1, 0.3, 0.7, 5.0, 9.0], [0.4] * 9])
def test_all_parameters_together_keep_to_one_bound(moves):
    """Those that move little move as they would, and all others by the same number of thresholds."""
    found = StepSizes()
    for i, move in enumerate(moves):
        found.reach[f"site{i % 2}"] = found.reach.get(f"site{i % 2}", {}) | {str(i): move * REACH}
    found.reach["outputs"] = {"readout": 5 * REACH}
    kept = [move * found.factor(str(i), [f"site{i % 2}"]) for i, move in enumerate(moves)]
    assert sum(kept) == pytest.approx(min(1.0, sum(moves)))
    bounded = [after for before, after in zip(moves, kept, strict=True) if after < before]
    assert all(after == pytest.approx(max(kept)) for after in bounded)
    assert all(after == before for before, after in zip(moves, kept, strict=True) if before < 0.99 * max(kept))


def test_layers_that_learn_no_more_leave_their_part_of_the_bound():
    net = model()
    with attach(net, seed=0) as ulr:
        ulr.learner.step_sizes = StepSizes()
        ulr.backward(*data())
        assert set(ulr.learner.step_sizes.reach) == {"1", "outputs"}
        net[0].requires_grad_(False)
        for _ in range(SELDOM):
            ulr.backward(*data())
        assert not ulr.learner.step_sizes.reach.get("1")
    found = StepSizes()
    found.reach = {"a": {"w": float("nan")}, "b": {"v": 4 * REACH}}
    assert found.factor("v", ["b"]) == 0.25


def test_the_size_of_a_readout_is_that_of_its_weights_at_the_start_and_is_kept():
    net = model()
    with attach(net, seed=0) as ulr:
        ulr.learner.step_sizes = StepSizes()
        ulr.backward(*data())
        expected = {name: float(q.detach().square().mean().sqrt()) for name, q in net.named_parameters() if q.ndim == 2}
        assert ulr.learner.step_sizes.size == pytest.approx(expected)
        with torch.no_grad():
            net[3].weight *= 2
        ulr.backward(*data())
        state = ulr.state_dict()
    with attach(net, seed=0) as ulr:
        ulr.learner.step_sizes = StepSizes()
        ulr.load_state_dict(state)
        ulr.backward(*data())
        assert ulr.learner.step_sizes.size == pytest.approx(expected)


def test_a_readout_that_was_not_linear_once_is_none_when_hardly_anything_comes_in():
    net = model(TimeAverage(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    x, y = data()
    with attach(net, seed=0) as ulr:
        ulr.learner.step_sizes = StepSizes()
        ulr.backward(10 * x, y)
        assert not ulr.learner.step_sizes.linear
        with torch.no_grad():
            net[3].weight *= 1e-3
            net[3].bias *= 1e-3
        ulr.backward(x, y)
        assert not ulr.learner.step_sizes.linear and ulr.learning_rates()["5.weight"] == NONLINEAR


def test_the_own_optimizer_takes_these_steps_and_others_do_not():
    """The first step of Adam is the learning rate itself."""
    x, y = data()
    moved = {}
    for name, options in {
        "own": {"lr": 1e-3, "scheduler": None},
        "theirs": {"optimizer": lambda ps: torch.optim.Adam(ps, 1e-3, eps=1e-30), "scheduler": None},
    }.items():
        net = model()
        before = copy.deepcopy(net.state_dict())
        train(net, [(x, y)], 1, device="cpu", progress=False, **options)
        moved[name] = {key: (net.state_dict()[key] - value).abs().max().item() for key, value in before.items()}
    sizes = measured(model())
    for key, sources in {"0.weight": ["1"], "3.weight": ["outputs"]}.items():
        assert moved["own"][key] == pytest.approx(1e-3 * sizes.factor(key, sources), rel=1e-3)
        assert moved["theirs"][key] == pytest.approx(1e-3, rel=1e-3)
    assert sizes.factor("3.weight", ["outputs"]) >= READOUT


def test_they_are_restored_with_the_state():
    with attach(model()) as ulr:
        ulr.backward(*data())
        assert ulr.learner.step_sizes is None  # nobody asked
        ulr.learner.step_sizes = StepSizes()
        ulr.backward(*data())
        state = copy.deepcopy(ulr.state_dict())
    with attach(model()) as other:
        other.load_state_dict(state)
        assert (
            other.learner.step_sizes.reach == ulr.learner.step_sizes.reach
            and other.learner.step_sizes.summed == ulr.learner.step_sizes.summed
        )
