"""plan says how every parameter gets its gradient, and leaves no trace."""

import copy
import importlib
import re

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.helpers import averaging, errors
from ulr_snn import LIF, ULR, Fold, Gaussian, Logistic, RecurrentLIF, TimeAverage, UsageError, attach, plan
from ulr_snn.kernels.limits import limits
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.sites.binding import bind

STEPS, BATCH, PIXELS, CLASSES = 5, 6, 4, 3
FROZEN = "frozen (requires_grad is False, or by flow)"
WEIGHT_NOISE = "weight noise: loss minus baseline, times the score"


def dense() -> nn.Sequential:
    return averaging(PIXELS, CLASSES, (7, 8), 0)


def recurrent() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(PIXELS, 7),
        RecurrentLIF(7, learn_beta=True, learn_threshold=True),
        TimeAverage(),
        nn.Linear(7, CLASSES),
    )


def spiking() -> nn.Sequential:
    return nn.Sequential(*dense()[:4])


def normed() -> nn.Sequential:
    between = Fold(nn.BatchNorm1d(8), nn.Dropout(0.5))
    return nn.Sequential(nn.Linear(PIXELS, 8), between, LIF(), TimeAverage(), nn.Linear(8, CLASSES))


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(STEPS, BATCH, PIXELS, generator=generator) < 0.5).float()
    return x, torch.arange(BATCH) % CLASSES


def credits(found: ulr_snn.Plan) -> dict[str, str]:
    return {site: credit for site, _, credit in found.sites}


def sources(found: ulr_snn.Plan) -> dict[str, str]:
    return {name: source for name, _, source in found.rows}


# -- what it says ------------------------------------------------------------------------------------------


def test_dense():
    found = plan(dense(), data())
    assert (found.credit, found.copies, found.untrained) == ("feedback", 1, [])
    assert found.rows == [
        ("0.weight", "7x4", "credit at site 1"),
        ("0.bias", "7", "credit at site 1"),
        ("2.weight", "8x7", "credit at site 3"),
        ("2.bias", "8", "credit at site 3"),
        ("5.weight", "3x8", "exact, through the outputs"),
        ("5.bias", "3", "exact, through the outputs"),
    ]
    assert credits(found) == {"1": "exact map to layer 3", "3": "direct"}
    assert credits(plan(dense(), data(), ULR(maps="learned"))) == {"1": "learned from layer 3", "3": "direct"}
    assert found.notes == []
    printed = str(found)
    for row in [*found.rows, *found.sites]:
        line = next(line for line in printed.splitlines() if line.startswith(f"{row[0]} "))
        assert all(cell in line for cell in row)
    assert "credit feedback, 1 copy of every sample a step" in printed
    assert "not trained" not in printed


def test_recurrent():
    found = plan(recurrent(), data())
    assert not found.notes
    assert credits(found) == {"1": "direct + its recurrent weights"}
    learned = plan(recurrent(), data(), ULR(maps="learned"))
    assert credits(learned) == {"1": "direct + learned from its recurrent current"}
    assert sources(found) == {
        "0.weight": "credit at site 1",
        "0.bias": "credit at site 1",
        "1.beta": "credit at site 1",
        "1.threshold": "credit at site 1",
        "1.recurrent.weight": "credit at site 1",
        "3.weight": "exact, through the outputs",
        "3.bias": "exact, through the outputs",
    }
    assert ("1.beta", "1", "credit at site 1") in found.rows


def test_it_says_which_code_runs_recurrent_layers_on_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.import_module("ulr_snn.plan"), "choice", lambda like: ("gpu", "asked for"))
    said = "recurrent layers of more than 5 neurons: step by step, in plain torch"
    assert said not in str(plan(recurrent(), data()))
    monkeypatch.setattr(limits, "recurrent", 5)
    assert said in str(plan(recurrent(), data()))


def test_weights_with_two_sources_name_both():
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    torch.manual_seed(0)
    tied = nn.Linear(4, 4)
    found = plan(nn.Sequential(Twice(tied, LIF()), TimeAverage(), tied), data())
    site, again = (row[0] for row in found.sites)
    assert again == f"{site}#2"
    expected = f"exact, through the outputs + credit at site {site} + credit at site {again}"
    assert set(sources(found).values()) == {expected}


def test_a_frozen_parameter():
    model = dense()
    model[0].requires_grad_(False)
    model[5].bias.requires_grad_(False)
    found = plan(model, data())
    said = sources(found)
    assert [name for name, source in said.items() if source == FROZEN] == ["0.weight", "0.bias", "5.bias"]
    assert found.untrained == [] and said["2.weight"] == "credit at site 3"


@pytest.mark.parametrize("make", [dense, recurrent], ids=["dense", "recurrent"])
def test_a_loss_without_gradient(make):
    model = make()
    last = len(model) - 1
    found = plan(model, data(), ULR(noise={f"{last}": None, "outputs": None}), loss=errors)
    assert (found.credit, found.copies) == ("global", 8)
    assert [line.split(":")[0] for line in found.untrained] == [f"{last}.weight", f"{last}.bias"]
    assert all("end the model in a spiking layer" in line for line in found.untrained)
    said = sources(found)
    assert said.pop(f"{last}.weight") == said.pop(f"{last}.bias") == "none"
    assert all(source.startswith("credit at site") for source in said.values())
    assert set(credits(found).values()) == {"loss minus baseline, times the score"}
    assert f"not trained: {last}.weight" in str(found)
    assert plan(spiking(), data(), loss=errors).untrained == []
    noised = plan(model, data(), ULR(noise={"outputs": None}), loss=errors)
    assert noised.untrained == [] and sources(noised)[f"{last}.bias"] == WEIGHT_NOISE
    smooth = plan(model, data(), loss=errors)  # what it does of its own accord where the outputs are no spikes
    assert (smooth.credit, smooth.copies, smooth.untrained) == ("feedback", 1, [])
    assert sources(smooth)[f"{last}.bias"] == "exact, through the outputs"
    assert any("noise on the outputs" in note for note in smooth.notes)
    assert plan(spiking(), data(), loss=errors).credit == "global"


def test_a_parameter_that_nothing_depends_on():
    model = dense()
    model.idle = nn.Linear(2, 2, bias=False)
    model.forward = lambda x: nn.Sequential.forward(model[:6], x)
    (line,) = plan(model, data()).untrained
    assert line.startswith("idle.weight: nothing depends on it")


def test_spikes_that_reach_nothing():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.side = dense(), nn.Sequential(nn.Linear(PIXELS, 2), LIF())

        def forward(self, x: Tensor) -> Tensor:
            self.side(x)
            return self.net(x)

    found = plan(Aside(), data())
    assert credits(found)["side.1"].startswith("none, and no noise")
    assert [line.split(":")[0] for line in found.untrained] == ["side.0.weight", "side.0.bias"]


def test_estimators_and_noise():
    found = plan(dense(), data(), ULR(credit="residual", firing=Gaussian(0.3)))
    assert (found.credit, found.copies) == ("residual", 4)
    assert [noise for _, noise, _ in found.sites] == ["gaussian, scale 0.3"] * 2
    assert credits(found)["1"].startswith("loss times score, less exact map to layer 3")
    found = plan(dense(), data(), ULR(credit="global", copies=2))
    assert (found.credit, found.copies) == ("global", 2)
    assert all(note.startswith("site") for note in found.notes)
    with attach(dense(), total_steps=10) as ulr:
        ulr.backward(*data())
        starts = ulr.state_dict()["noise_starts"]
    assert len(starts) == 2
    expected = [f"logistic, {start:.2f} -> {Logistic().end:.2f} of the threshold" for start in starts.values()]
    assert [noise for _, noise, _ in plan(dense(), data()).sites] == expected


def test_batch_norm_that_sees_padding_is_noted():
    x, y = data()
    short = x, y, torch.full((len(y),), len(x) - 1)
    assert any("padding" in note for note in plan(normed(), short).notes)
    assert not any("padding" in note for note in [*plan(normed().eval(), short).notes, *plan(normed(), (x, y)).notes])


def test_copies_that_run_apart_are_noted():
    assert any("batch norm or dropout" in note for note in plan(normed(), data()).notes)
    assert not any("batch norm or dropout" in note for note in plan(normed().eval(), data()).notes)


@pytest.mark.parametrize("credit", ["auto", "global", "residual"])
@pytest.mark.parametrize("make", [dense, recurrent, normed, spiking])
@pytest.mark.parametrize("loss", ["ce_count", errors], ids=["ce_count", "errors"])
def test_what_it_says_is_what_happens(make, loss, credit, device):
    if loss is errors and credit == "residual":
        pytest.skip("refused: see the wrong uses")
    model, (x, y) = make().to(device), data()
    model[0].bias.requires_grad_(False)
    estimator = ULR(credit=credit)
    found = plan(model, (x, y), estimator, loss)
    with attach(model, estimator, loss) as ulr:
        told = ["no gradient reaches"] * bool(found.untrained)
        told += [note for note in found.notes if "gives the outputs no gradient" in note]
        assert len(told) <= 1 and (make is not spiking or bool(told) == (loss is errors and credit == "auto"))
        if told:
            with pytest.warns(UserWarning, match=re.escape(told[0])):
                copies = ulr.backward(x.to(device), y.to(device)).stats["copies"]
        else:
            copies = ulr.backward(x.to(device), y.to(device)).stats["copies"]
        model.zero_grad()  # and now that feedback has been learned:
        ulr.backward(x.to(device), y.to(device))
        learns = ulr.structure.needs_pairs and found.credit == "feedback"
    assert copies == (2 if learns else found.copies)
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert [name for name, source in sources(found).items() if source in ("none", FROZEN)] == without
    assert [line.split(":")[0] for line in found.untrained] == [n for n in without if n != "0.bias"]


def test_lengths_and_batch_first():
    x, y = data()
    lengths = torch.tensor([5, 1, 2, 3, 4, 5])
    expected = plan(dense(), (x, y))
    assert plan(dense(), (x.transpose(0, 1), y), time_first=False) == expected
    assert plan(dense(), [x.numpy().astype("uint8"), y.numpy()]) == expected
    assert plan(dense(), (x, y, lengths)).rows == expected.rows


# -- what it leaves behind: nothing ------------------------------------------------------------------------


def broken(outputs: Tensor, targets: Tensor) -> Tensor:
    raise ZeroDivisionError


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("loss", ["ce_count", errors, broken], ids=["ce_count", "errors", "broken"])
def test_it_leaves_no_trace(loss, training, device):
    model, batch = normed().to(device).train(training), data()
    model(batch[0].to(device))  # running statistics that are not those of a new model
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, attributes = copy.deepcopy(model.state_dict()), [set(vars(module)) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    buffers = [id(buffer) for buffer in model.buffers()]
    generator = torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None
    if loss is broken:
        with pytest.raises(ZeroDivisionError):
            plan(model, batch, loss=loss)
    else:
        assert str(plan(model, batch, loss=loss)) == str(plan(model, batch, loss=loss))
    assert torch.equal(torch.get_rng_state(), generator[0])
    assert device.type == "cpu" or torch.equal(torch.cuda.get_rng_state(), generator[1])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.weight"]
    assert (model[0].weight.grad == 1).all()


# -- wrong uses --------------------------------------------------------------------------------------------

X, Y = data()
NAN = torch.where(torch.arange(PIXELS) == 1, torch.nan, X)
WRONG = {
    "no spiking layer": ((nn.Linear(PIXELS, CLASSES), (X, Y)), {}, "no spiking layer"),
    "no gradient for feedback": ((dense(), (X, Y), ULR(credit="feedback"), errors), {}, "credit='global'"),
    "no gradient for residual": ((dense(), (X, Y), ULR(credit="residual"), errors), {}, "'residual'"),
    "unknown loss": ((dense(), (X, Y)), {"loss": "hinge"}, "'hinge'"),
    "scalar loss": ((dense(), (X, Y)), {"loss": lambda o, y: nn.functional.cross_entropy(o, y)}, "one value"),
    "labels out of range": ((dense(), (X, Y + 1)), {}, "1 to 3"),
    "labels that are not classes": ((dense(), (X, Y.float())), {}, "float32"),
    "axes swapped": ((dense(), (X.transpose(0, 1), Y)), {}, "time_first=False"),
    "axes swapped the other way": ((dense(), (X, Y)), {"time_first": False}, "time_first=True"),
    "one step only": ((dense(), (X[0], Y)), {}, "(6, 4)"),
    "nan": ((dense(), (NAN, Y)), {}, "NaN"),
    "lengths": ((dense(), (X, Y, torch.full((BATCH,), STEPS + 1))), {}, "lengths"),
    "no targets": ((dense(), (X,)), {}, "(x, y)"),
    "too much": ((dense(), (X, Y, torch.full((BATCH,), STEPS), Y)), {}, "(x, y, lengths)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_sentence_that_names_it(name):
    arguments, settings, says = WRONG[name]
    with pytest.raises(UsageError) as error:
        plan(*arguments, **settings)
    message = str(error.value)
    assert says in message
    assert "\n" not in message and ". " not in message and len(message) < 250


def test_a_bound_model_is_refused_and_stays_bound():
    model = dense()
    with bind(model, NoiseLevel(Logistic())):
        with pytest.raises(UsageError, match="already bound"):
            plan(model, (X, Y))
        assert model[1].site is not None
    plan(model, (X, Y))


def test_expected_variance_of_the_noise_where_losses_weight_it():
    torch.manual_seed(0)
    model = nn.Sequential(
        ulr_snn.Fold(nn.Conv1d(1, 2, 3, padding=1)), LIF(), nn.Flatten(2), nn.Linear(2 * PIXELS, 3), LIF()
    )
    x, y = data()
    assert not any(note.startswith("site") for note in plan(model, (x.unsqueeze(2), y)).notes)
    notes = plan(model, (x.unsqueeze(2), y), ULR(credit="global")).notes
    draws = {"1": len(x) * 2 * PIXELS, "4": 3 * len(x)}
    weights = {"1": 8, "4": 3 * (2 * PIXELS + 1)}
    expected = {}
    for note in notes:
        site, rest = note.removeprefix("site ").split(": ", 1)
        said = re.fullmatch(
            r"(\d+) draws of noise a sample, (\d+) weights that it alone trains, expected variance (\S+) "
            r"\((\S+) with WeightNoise\(per_sample=True\) on these\)",
            rest,
        )
        assert (int(said[1]), int(said[2])) == (draws[site], weights[site])
        expected[site] = float(said[3])
        own = list(model[int(site) - 1].parameters())
        assert float(said[4]) == pytest.approx(
            sum(q.numel() / (0.01 * float(q.detach().square().mean())) for q in own), rel=0.06
        )
    assert list(expected.values()) == sorted(expected.values(), reverse=True) and len(expected) == 2
