"""Steps in chunks of time give the gradient of steps over the whole sequence."""

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.helpers import only_new_objects
from ulr_snn import LIF, ULR, Fold, LeakyReadout, Logistic, RecurrentLIF, TimeAverage, UsageError, attach
from ulr_snn.estimators.step_sizes import StepSizes
from ulr_snn.kernels.limits import limits as kernel_limits
from ulr_snn.memory import chunked
from ulr_snn.memory.chunk import LayerStates
from ulr_snn.memory.chunks import ChunkLimits, Chunks, TimeChunks
from ulr_snn.memory.one_step import OneTimeStep
from ulr_snn.memory.step import Memory

STEPS, BATCH = 23, 6


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "dense": nn.Sequential(
            nn.Flatten(2), nn.Linear(12, 9), LIF(), nn.Linear(9, 8), LIF(0.8, 1, "zero"), TimeAverage(), nn.Linear(8, 3)
        ),
        "recurrent": nn.Sequential(nn.Flatten(2), nn.Linear(12, 9), RecurrentLIF(9), nn.Linear(9, 3), LeakyReadout()),
        "spikes": nn.Sequential(nn.Sequential(nn.Flatten(2), nn.Linear(12, 9)), LIF(), nn.Linear(9, 3), LIF()),
        "averaged": nn.Sequential(nn.Flatten(2), nn.Linear(12, 9), LIF(), nn.Linear(9, 3), TimeAverage()),
        "conv": nn.Sequential(
            nn.Unflatten(2, (1, 3)), Fold(nn.Conv2d(1, 2, 3, padding=1)), LIF(), nn.Flatten(2), nn.Linear(24, 9),
            RecurrentLIF(9, reset="none"), TimeAverage(), nn.Linear(9, 3),
        ),
    }  # fmt: skip


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(STEPS, BATCH, 3, 4, generator=generator) < 0.4).to(dtype) * 3, torch.arange(BATCH) % 3


def way(memory: str, **limits: Any) -> Memory:
    """`ULR(memory=...)` with other limits of chunks."""
    return OneTimeStep() if memory == "online" else TimeChunks(memory == "replay", ChunkLimits(**limits))


def gradients(
    model: nn.Module, memory: str, together: int, lengths: Tensor | None = None, double: bool = False, **limits: Any
) -> list[Tensor]:
    """Of the third step, when the feedback is learned. Constant scale: that at the start is measured by fewer samples.
    together, limits: of `ChunkLimits`."""
    limits |= {"together": (together,) * 2, "least": 1}
    x, y = data()
    model, x = (model.double(), x.double()) if double else (model, x)
    with attach(model, ULR(firing=Logistic(scale=0.3), memory=way(memory, **limits)), seed=1, total_steps=20) as ulr:
        for _ in range(3):
            model.zero_grad()
            estimate = ulr.backward(x, y, lengths=lengths)
    if memory != "auto":
        assert estimate.stats["chunks"] == -(-STEPS // max(1, together // (BATCH * ulr.bound.findings["neurons"])))
    return [q.grad for q in model.parameters()]


@pytest.mark.product
@pytest.mark.parametrize("lengths", [None, [23, 4, 9, 23, 17, 1]], ids=["", "lengths"])
@pytest.mark.parametrize("memory", ["replay"])
@pytest.mark.parametrize("name", nets())
@pytest.mark.parametrize("states", [12, 2], ids=["", "chunks of chunks"])
def test_the_gradient_is_that_of_the_whole(name, memory, lengths, states):
    if name == "recurrent" and lengths:
        pytest.skip("held readouts are refused, see below")
    lengths = lengths and torch.tensor(lengths)
    whole = gradients(nets()[name], "auto", 1, lengths, double=True)
    size = BATCH * 17 * 5  # of about five time steps
    ours = gradients(nets()[name], memory, size, lengths, double=True, states=states)
    for mine, other in zip(ours, whole, strict=True):
        assert other.any() and (mine - other).norm() <= 1e-9 * other.norm()


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17, 125, 1000])
@pytest.mark.parametrize("most", [2, 4, 16])
def test_groups_of_chunks_keep_no_more_states_than_they_may(count, most):
    possible = {}  # groups of each level, by the number of levels
    for levels in range(1, chunked.LEVELS + 1):
        possible[levels] = next(groups for groups in range(2, count + 2) if groups**levels >= count)
    groups = chunked.fan_out(count, most)
    kept = {n: most_alive(count, each) for n, each in possible.items()}
    levels = next(n for n in possible if groups**n >= count)
    assert groups == possible[levels]
    if kept[levels] <= most:
        assert all(n >= levels or n * (possible[n] - 1) + 1 > most for n in kept)  # fewer levels would not do
    else:
        assert levels * (groups - 1) + 1 == min(n * (each - 1) + 1 for n, each in possible.items())


def most_alive(count: int, groups: int) -> int:
    """States that are kept at a time, as `ChunkedRun` goes through the groups: all that are still to come."""

    def inside(group: list[range]) -> int:
        if len(group) == 1:
            return 1
        return max(i + inside(smaller) for i, smaller in enumerate(chunked.grouped(group, groups)))

    return inside([range(t, t + 1) for t in range(count)])


def test_an_average_in_half_precision_does_not_overflow():
    limits = {"least": 100}  # 100 time steps with outputs of 800 or so are more than float16 can hold
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), LIF(), nn.Linear(9, 3), TimeAverage()).half()
    with torch.no_grad():
        model[2].bias.fill_(800)
    found = []
    for memory in ("auto", "replay"):
        with attach(model, ULR(firing=Logistic(scale=0.3), memory=way(memory, **limits)), seed=1) as ulr:
            found.append(ulr.backward((torch.rand(200, 4, 12) < 0.4).half(), torch.arange(4) % 3).outputs)
    assert all(outputs.isfinite().all() and (outputs - 800).abs().max() < 8 for outputs in found)


@pytest.mark.product
@pytest.mark.parametrize("lengths", [None, [500, 400, 450, 500]], ids=["", "lengths"])
@pytest.mark.parametrize("reduced", ["autocast", "half"])
def test_an_average_of_many_chunks_in_reduced_precision_is_as_good_as_at_once(lengths, reduced):
    """Each of 250 chunks adds to it what bfloat16 can hardly tell from nothing."""
    limits = {"together": (1, 1), "least": 2}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), LIF(), nn.Linear(9, 3), TimeAverage())
    x = (torch.rand(500, 4, 12) < 0.4).float()
    if reduced == "half":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    lengths, found = None if lengths is None else torch.tensor(lengths), []
    for memory in ("auto", "replay"):
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=reduced == "autocast")
        with attach(model, ULR(firing=Logistic(scale=0.3), memory=way(memory, **limits)), seed=1) as ulr, mixed:
            found.append(ulr.backward(x, torch.arange(4) % 3, lengths=lengths).outputs.float())
    torch.testing.assert_close(*found, atol=1e-4, rtol=2**-7)  # about the last bit


@pytest.mark.parametrize("memory", ["auto", "replay", "online"])
def test_steps_are_measured_by_more_than_a_few_time_steps(memory, monkeypatch):
    """Of a net with many neurons and few weights, too."""
    limits = {"whole": 1000}
    model = nn.Sequential(
        nn.Unflatten(2, (1, 10)), Fold(nn.Conv2d(1, 16, 3, padding=1)), LIF(), nn.Flatten(2), nn.Linear(1600, 4)
    )
    x = (torch.rand(60, 32, 10, 10) < 0.3).float()
    outputs = "ce_rate" if memory == "online" else "ce_count"
    seen, first = [], Chunks.first
    monkeypatch.setattr(Chunks, "first", lambda memory, step: seen.append(first(memory, step)) or seen[-1])
    with attach(model, ULR(memory=way(memory, **limits)), outputs) as ulr:
        ulr.backward(x, torch.arange(32) % 4)
    steps, samples = seen[0]
    assert steps.stop >= 32 and samples.stop >= 4


@pytest.mark.slow
def test_a_step_keeps_no_more_states_than_it_may(monkeypatch):
    """All that are alive while a chunk has its graph, of 23 chunks of one time step."""
    seen, original = [], chunked.ChunkedRun._contributions

    def counting(self, *arguments):
        seen.append(sum(type(item) is LayerStates for item in gc.get_objects()))
        yield from original(self, *arguments)

    monkeypatch.setattr(chunked.ChunkedRun, "_contributions", counting)
    with only_new_objects():
        gradients(nets()["dense"], "replay", BATCH * 17, states=8)
    assert len(seen) == 3 * STEPS and 3 <= max(seen) <= 8 + 1  # the one that it begins from


@pytest.mark.parametrize("name", ["dense", "recurrent"])
def test_steps_see_the_weights_that_the_last_one_has_left(name, monkeypatch):
    """What is made of weights for one step does not outlive it."""
    estimators = [
        ULR(firing=Logistic(scale=0.3), memory=way(memory, together=(BATCH * 17 * 5,) * 2))
        for memory in ("auto", "replay")
    ]
    monkeypatch.setattr(kernel_limits, "fewest", 1)
    found = []
    for estimator in estimators:
        model, (x, y) = nets()[name], data()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with attach(model, estimator, seed=1, total_steps=20) as ulr:
            for _ in range(3):
                optimizer.zero_grad()
                ulr.backward((x * (torch.arange(x[0].numel()).view(x[0].shape) % 12 == 0)).byte(), y)
                optimizer.step()
        found.append(torch.cat([q.detach().flatten() for q in model.parameters()]))
    start = torch.cat([q.detach().flatten() for q in nets()[name].parameters()])
    assert (found[0] - start).norm() > 1e-3 * start.norm()
    assert (found[0] - found[1]).norm() <= 1e-4 * (found[0] - start).norm()


@pytest.mark.parametrize("name", nets())
def test_chunks_and_whole_agree_in_single_precision(name):
    replay, whole = (gradients(nets()[name], memory, BATCH * 60) for memory in ("replay", "auto"))
    for mine, other in zip(replay, whole, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm()


def test_an_older_name_still_works():
    with pytest.warns(DeprecationWarning, match="memory='replay'"):
        assert ULR(memory="bits") == ULR(memory="replay")


def test_a_gap_between_chunks_would_be_seen(monkeypatch):
    """Without what credit a chunk gets from the next one, gradients differ by more than rounding."""
    whole = gradients(nets()["dense"], "auto", 1)
    credit = ulr_snn.credit.prediction.Prediction.credit
    monkeypatch.setattr(ulr_snn.credit.prediction.Prediction, "credit", lambda self, p, later=None: credit(self, p, {}))
    cut = gradients(nets()["dense"], "replay", BATCH * 60)
    assert any((mine - other).norm() > 1e-3 * other.norm() for mine, other in zip(cut, whole, strict=True))


def test_auto_takes_chunks_where_the_whole_is_large():
    x, y = data(torch.uint8)
    model = nets()["dense"]
    limits = {"roomy": 1000}
    with attach(model, ULR(memory=way("auto", **limits))) as ulr:
        assert "chunks" not in ulr.backward(x, y).stats
    limits["whole"] = 1000
    limits["short"] = 1
    with attach(model, ULR(memory=way("auto", **limits))) as ulr:
        assert ulr.backward(x, y).stats["chunks"] > 1
    with attach(nn.Sequential(Backwards(), *model), ULR(memory=way("auto", **limits))) as ulr:  # has to see all
        assert "chunks" not in ulr.backward(x, y).stats
    with attach(
        nn.Sequential(*model, Backwards()), ULR(memory=way("auto", **limits))
    ) as ulr:  # but not what comes after the average
        assert ulr.backward(x, y).stats["chunks"] > 1


@pytest.mark.parametrize("inputs, made", [(12, 23), (600, 3)])
def test_chunks_of_auto_are_longer_where_weights_are_many(inputs, made):
    """Since each costs a gradient of all of them: of 4835 weights, chunks take as many bytes, ten steps of six
    samples of eight neurons."""
    limits = {"roomy": 1, "least": 1, "whole": 1, "short": 1}
    model = nn.Sequential(nn.Linear(inputs, 8), LIF(), TimeAverage(), nn.Linear(8, 3))
    with attach(model, ULR(memory=way("auto", **limits))) as ulr:
        x = (torch.rand(STEPS, BATCH, inputs) < 0.3).float()
        assert ulr.backward(x, torch.arange(BATCH) % 3).stats["chunks"] == made


def wrong(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.sum(0).argmax(-1) != targets).float()


@pytest.mark.parametrize("loss", [wrong, {"ce_count": 1.0, ulr_snn.SpikeBudget(5): 0.1}], ids=["no gradient", "costs"])
def test_auto_takes_the_whole_where_chunks_cannot_be(loss):
    limits = {"whole": 1000, "short": 1, "together": (1000,) * 2}
    for memory in ("auto", "replay"):
        with attach(nets()["spikes"], ULR(memory=way(memory, **limits)), loss=loss) as ulr:
            if memory == "auto":
                with pytest.warns(UserWarning, match="no gradient") if loss is wrong else nullcontext([0]) as told:
                    assert all("chunks" not in ulr.backward(*data()).stats for _ in range(2))
                assert len(told) == 1
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
    "one of": lambda: (nets()["dense"], {"memory": "little"}),
}


@pytest.mark.parametrize("says", WRONG)
def test_what_chunks_of_time_cannot_do_is_refused(says):
    model, options = WRONG[says]()
    with pytest.raises(UsageError, match=says):
        attach(model, ULR(**{"memory": "replay", **options})).backward(*data())


def test_a_readout_that_holds_is_refused():
    with pytest.raises(UsageError, match="LeakyReadout"):
        ulr = attach(nets()["recurrent"], ULR(memory="replay"))
        ulr.backward(*data(), lengths=torch.tensor([23, 4, 9, 23, 17, 1]))


@pytest.mark.slow
def test_training_in_chunks_learns():
    limits = {"together": (2000,) * 2}
    torch.manual_seed(0)
    x, y = (torch.rand(40, 64, 12) < 0.3).float(), torch.arange(64) % 3
    for target in range(3):
        x[:, y == target, 4 * target : 4 * target + 4] *= 3
    loader = [(x[:, i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]
    model = nn.Sequential(nn.Linear(12, 16), LIF(), nn.Linear(16, 16), LIF(), TimeAverage(), nn.Linear(16, 3))
    result = ulr_snn.train(model, loader, epochs=15, estimator=ULR(memory=way("replay", **limits)), progress=False)
    assert ulr_snn.evaluate(model, loader)["accuracy"] > 0.95
    assert result.metrics["forward_passes"] >= 15 * 64 * 2


def test_the_plan_says_what_a_step_keeps():
    limits = {"together": (BATCH * 17 * 5,) * 2}
    x, y = data()
    for memory, says in (("auto", "the whole sequence"), ("replay", "chunks of 5 time steps")):
        text = str(ulr_snn.plan(nets()["dense"], (x, y), ULR(memory=way(memory, **limits))))
        assert says in text and "scans over time of ulr_snn's neurons: " in text
    with pytest.raises(UsageError, match="time step by itself"):
        ulr_snn.plan(nets()["dense"].insert(0, Backwards()), (x, y), ULR(memory=way("replay", **limits)))


def test_hooks_on_the_sequence_are_not_passed_over():
    model = nets()["dense"]
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    x, y = torch.rand(6, 4, 12), torch.zeros(4, dtype=torch.long)
    with pytest.raises(UsageError, match="Sequential is not known"), attach(model, ULR(memory="replay")) as ulr:
        ulr.backward(x.to(next(model.parameters()).dtype), y)


def test_a_readout_before_neurons_is_refused():
    model = nn.Sequential(nn.Linear(12, 4), LeakyReadout(), nn.Linear(4, 4), LIF(), TimeAverage(), nn.Linear(4, 3))
    with pytest.raises(UsageError, match="LeakyReadout to come after"), attach(model, ULR(memory="replay")) as ulr:
        ulr.backward(torch.rand(6, 4, 12), torch.zeros(4, dtype=torch.long))


def test_a_last_batch_of_one_sample_runs_whole():
    model = nn.Sequential(nn.Linear(12, 4), LIF(), TimeAverage(), nn.Linear(4, 3))
    with attach(model, ULR(memory="replay")) as ulr:
        ulr.backward(torch.rand(6, 4, 12), torch.zeros(4, dtype=torch.long))
        last = ulr.backward(torch.rand(6, 1, 12), torch.zeros(1, dtype=torch.long))
    assert "chunks" not in last.stats and torch.isfinite(last.loss).all()


@pytest.mark.parametrize("memory", ["auto", "replay"])
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
    with attach(model, ULR(memory="replay"), "ce_count", total_steps=20) as ulr:
        ulr.learner.step_sizes = StepSizes()
        ulr.backward(x, y)
        state = ulr.state_dict()
    with torch.no_grad():
        model[3].bias += torch.tensor([9.0, 0, 0])
    with attach(model, ULR(memory="replay"), "ce_count", total_steps=20) as ulr:
        ulr.load_state_dict(state)
        ulr.backward(x, y)
        assert ulr.learner.step_sizes.summed == state["step_sizes"]["summed"] > STEPS / 2


def test_a_module_may_be_replaced_by_one_that_needs_all_time_steps():
    limits = ChunkLimits(whole=0, short=0, roomy=1, least=2)
    model, (x, y) = nn.Sequential(nn.Flatten(2), nn.Linear(12, 5), LIF(), nn.Linear(5, 3)), data()
    with attach(model, ULR(memory=TimeChunks(asked=False, limits=limits)), "ce_rate") as ulr:
        assert ulr.backward(x, y).stats["chunks"] > 1
        model[0] = nn.Sequential(Backwards(), nn.Flatten(2))
        assert "chunks" not in ulr.backward(x, y).stats
