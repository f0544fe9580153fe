"""Models of tutorials, and loops of other libraries, train as they are, and report what their users' own code gives."""

import importlib
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

import ulr_snn
from tests.helpers import beside_torchvision, library_of

for library in ("snntorch", "norse.torch", "spikingjelly", "sklearn"):
    library_of(library)


from benchmarks import brought  # noqa: E402
from benchmarks.brought_models import CASES, Case, Tutorial5, images  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
TRAINED = [name for name, case in CASES.items() if case.loop is None]
LOOPS = [name for name, case in CASES.items() if case.loop is not None]


pytestmark = pytest.mark.usefixtures("own_instances")


def few(case: Case, train: int = 96, test: int = 80) -> tuple[Subset, Subset]:
    """The first samples of both parts; those of the test part make batches of unequal size."""
    return tuple(Subset(part, range(size)) for part, size in zip(case.data(), (train, test), strict=True))


@pytest.mark.product
@pytest.mark.parametrize("name", TRAINED)
def test_train_reports_what_the_users_own_code_gives(name):
    case = CASES[name]
    train_set, test_set = few(case)
    torch.manual_seed(0)
    model, val = case.make(), case.loader(test_set)
    before = [q.detach().clone() for q in model.parameters()]
    options = {"loss": case.loss, "progress": False, "device": "cpu", **case.options}
    result = ulr_snn.train(model, case.loader(train_set, 0), 2, val_loader=val, **options)
    assert any((q != old).any() for q, old in zip(model.parameters(), before, strict=True))
    reported, own = result.history[-1], case.own_figures(model, val)
    assert reported["val_loss"] == pytest.approx(own["loss"], rel=1e-4)
    measured = next(iter(case.options.get("metrics", {"accuracy": None})))
    if own["accuracy"] is None:
        assert reported["val_accuracy"] is None
    else:
        assert reported[f"val_{measured}"] == pytest.approx(own["accuracy"], rel=1e-4)
    assert result.metrics[f"test_{measured}"] == reported[f"val_{measured}"]
    options = {key: case.options[key] for key in ("layout", "output") if key in case.options}
    again = ulr_snn.evaluate(model, val, loss=case.loss, device="cpu", **options)
    assert again["loss"] == pytest.approx(own["loss"], rel=1e-4)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_other_libraries(name):
    beside_torchvision(name)
    case = CASES[name]
    train_set, test_set = few(case)
    loop = importlib.import_module(f"examples.{case.loop}")
    torch.manual_seed(0)
    model, val = case.make(), case.loader(test_set)
    before = case.own_figures(model, val)
    found = loop.fit(model.train(), case.loader(train_set, 0), val, 4)
    own = case.own_figures(model, val)
    assert own["loss"] < before["loss"]
    reported = found if isinstance(found, dict) else {"val_accuracy": found}
    assert reported["val_accuracy"] == pytest.approx(own["accuracy"], rel=1e-4)
    assert reported.get("val_loss", own["loss"]) == pytest.approx(own["loss"], rel=1e-4)
    evaluated = ulr_snn.evaluate(model, val, device="cpu")
    assert evaluated["loss"] == pytest.approx(own["loss"], rel=1e-4)
    assert evaluated["accuracy"] == pytest.approx(own["accuracy"])


def test_a_loss_of_membranes_and_an_accuracy_of_spikes():
    """Tutorial 5 trains on membranes and counts spikes: output='all' and a metric report both."""

    def loss(result: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(mem, targets, reduction="none") for mem in result[1]]).sum(0)

    def accuracy(result: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        return (result[0].sum(0).argmax(1) == targets).float()

    torch.manual_seed(0)
    case, model = CASES["snntorch-5"], Tutorial5(steps=10)
    train_set, test_set = (Subset(part, range(128)) for part in images())
    options = {"loss": loss, "metrics": {"by_spikes": accuracy}, "output": "all", "layout": "B"}
    val = case.loader(test_set)
    result = ulr_snn.train(model, case.loader(train_set, 0), 4, val_loader=val, progress=False, device="cpu", **options)
    x, y = test_set.dataset[:128]
    with torch.no_grad():
        own = model(x)
    last = result.history[-1]
    assert last["val_loss"] == pytest.approx(loss(own, y).mean().item(), rel=1e-4)
    assert last["val_by_spikes"] == pytest.approx(accuracy(own, y).mean().item()) and last["val_by_spikes"] > 0.5


MARGINS = {  # what ULR may be behind BPTT in accuracy or loss; the regression's targets have a power of 0.24
    "snntorch-5": 0.02,
    "snntorch-regression-1": 0.003,
    "snntorch-regression-2": 0.04,
    "snntorch-population": 0.02,
    "snntorch-autoencoder": 0.01,
    "norse-memory": 0.03,
    "norse-speech": 0.02,
    "spikingjelly-csnn": 0.04,
    "spikingjelly-sew": 0.02,
}
SEEDS = dict.fromkeys(("snntorch-5", "snntorch-regression-1"), (10, 11))  # whose seeds differ by half of it or more


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINS)
def test_ulr_is_behind_bptt_by_no_more_than_a_margin(name):
    """One seed at the learning rate that the benchmark chose, or the mean of some, to BPTT's mean in the benchmark."""
    found = brought.rows(brought.RESULTS)
    lr = brought.best_rate(found, name, "ulr-rate")
    ours = mean(brought.run(name, "ulr-rate", "test", lr, seed)["value"] for seed in SEEDS.get(name, (10,)))
    tested = [r for r in found if (r["case"], r["method"], r["part"]) == (name, "bptt", "test")]
    peer = mean(float(r["value"]) for r in tested)
    behind = ours - peer if CASES[name].metric == "loss" else peer - ours
    assert behind <= MARGINS[name]


def test_every_case_has_its_runs_and_stands_in_the_documents():
    """The documents have the figures of the CSV."""
    found = brought.rows(brought.RESULTS)
    page = (DOCS / "examples.md").read_text()
    for line in brought.table(brought.RESULTS).splitlines()[2:]:
        name, _, seeds, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        row = next(row for row in page.splitlines() if f"| `{name}` |" in row)
        assert int(seeds) >= 2 and row.endswith(f"| {' | '.join(figures)} |"), name
    for name in CASES:
        assert {r["method"] for r in found if r["case"] == name and r["part"] == "test"} == set(brought.METHODS)


def test_a_run_that_has_a_row_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "snntorch-population", Case(*few_epochs()))
    path, name = tmp_path / "brought.csv", "snntorch-population"
    for found in brought.missing(path, [name], [0]):
        brought.append(path, brought.run(*found), brought.COLUMNS)
    kept = brought.rows(path)
    tuned = {method: [f"validation {method}"] * 3 + [f"test {method}"] for method in ("ulr-rate", "bptt")}
    assert [f"{r['part']} {r['method']}" for r in kept] == ["test ulr", *tuned["ulr-rate"], *tuned["bptt"]]
    assert kept[0]["lr"] == "" and float(kept[-1]["lr"]) == brought.best_rate(kept, name, "bptt")
    assert not list(brought.missing(path, [name], [0]))
    assert f"| {name} | accuracy | 1 |" in brought.table(path)


def few_epochs() -> tuple:
    """The arguments of the case of population codes, with little data."""
    case = CASES["snntorch-population"]
    data = [torch.utils.data.TensorDataset(*part[:]) for part in few(case)]
    return case.make, lambda: data, case.loss, case.own_loss, case.own_accuracy, case.options, 1


def test_cases_leave_no_state_behind():
    """A model of snnTorch or Norse gives the same outputs after training as its weights do in a new model."""
    for name in ("snntorch-6", "norse-speech"):
        case = CASES[name]
        train_set, test_set = few(case, 64, 16)
        model, twin = case.make(), case.make()
        options = {"loss": case.loss, "progress": False, "device": "cpu", **case.options}
        ulr_snn.train(model, case.loader(train_set, 0), 1, **options)
        twin.load_state_dict(model.state_dict())
        x, _ = next(iter(case.loader(test_set)))
        with torch.no_grad():
            ours, fresh = (tensor_of(case.own_pass(m, x)) for m in (model, twin))
        assert torch.equal(ours, fresh), name


def tensor_of(result: object) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
