"""`compare`: the same start, batches and order for every method, and honest figures."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import ulr_snn
from tests.helpers import averaging, nets, separable
from ulr_snn import LIF, ULR, TimeAverage, UsageError, compare, train
from ulr_snn.peers.surrogate import SurrogateBPTT


def model() -> nn.Sequential:
    return averaging(5, 3, (16, 16), 0)


def quiet(*arguments, **options):
    return compare(*arguments, progress=False, **options)


def test_a_comparison_is_what_train_gives_by_each_method(tmp_path):
    net, batches = model(), separable()
    before = [p.detach().clone() for p in net.parameters()]
    found = quiet(net, batches, batches, epochs=4, lr={"surrogate": [5e-3, 2e-2]}, seed=3)
    assert [(row["method"], row["lr"]) for row in found.rows] == [
        ("ulr", 1.5e-2),
        ("surrogate", 5e-3),
        ("surrogate", 2e-2),
    ]
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    for row, estimator in zip(found.rows, (ULR(), SurrogateBPTT(), SurrogateBPTT()), strict=True):
        alone = train(
            model(), batches, 4, val_loader=batches, estimator=estimator, lr=row["lr"], seed=3, progress=False
        )
        assert [entry["val_loss"] for entry in row["history"]] == [entry["val_loss"] for entry in alone.history]
        assert row["forward_passes"] == alone.metrics["forward_passes"]
        assert row["seconds_a_step"] > 0
        assert row["accuracy"] == row["history"][-1]["val_accuracy"]
    assert found.best("surrogate")["accuracy"] == max(row["accuracy"] for row in found.rows[1:])
    assert str(found).count("\n") == 4 and "| surrogate | 0.005 |" in str(found)
    found.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == found.rows
    found.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 10_000


def test_every_method_sees_the_same_batches_in_the_same_order():
    dataset = torch.utils.data.TensorDataset(torch.rand(48, 12, 5), torch.randint(0, 3, (48,)))
    orders = []

    class Recording(torch.utils.data.DataLoader):
        def __iter__(self):
            for x, y in super().__iter__():
                orders.append(x.sum().item())
                yield x.transpose(0, 1), y

    shuffled = Recording(dataset, 16, shuffle=True, generator=torch.Generator().manual_seed(1))
    quiet(model(), shuffled, separable(), epochs=2)
    assert orders[0] == orders[1] == orders[2]  # a step of each method comes first
    assert orders[2:8] == orders[8:] and orders[2:5] != orders[5:8]
    orders.clear()
    quiet(model(), Recording(dataset, 16, shuffle=True), separable(), epochs=2)  # by torch's own generator
    assert orders[0] == orders[1] == orders[2]  # a step of each method comes first
    assert orders[2:8] == orders[8:] and orders[2:5] != orders[5:8]


@pytest.mark.parametrize("library", ["snntorch", "norse", "spikingjelly"])
def test_a_model_of_another_library_by_its_own_surrogate(library):
    """The gradient is that of backpropagation through the library's own forward pass, by hand."""
    net = nets(surrogates=True)[library]()
    x, y = separable()[0]
    peer = SurrogateBPTT().attach(net, "ce_count", 0, True)
    for _ in range(2):  # from the initial state every time
        net.zero_grad()
        peer.backward(x, y)
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    outputs = net(x)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    nn.functional.cross_entropy(outputs.sum(0), y).backward()
    assert found and sum(float(g.abs().sum()) for g in found.values()) > 0
    for name, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, msg=name)


def test_memory_is_that_of_the_training_alone():
    """A list that was there before does not count, what is kept for the backward pass does."""
    ballast = torch.ones(30_000_000)
    steps = [(torch.rand(200, 64, 200).round(), torch.randint(0, 3, (64,)))]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 200), LIF(), TimeAverage(), nn.Linear(200, 3))
    (row,) = quiet(net, steps, steps, methods=("surrogate",), epochs=1).rows
    if row["peak_memory_bytes"] is None:
        pytest.skip("this system does not tell the peak of memory anew")
    sequence = 200 * 64 * 200 * 4
    assert sequence < row["peak_memory_bytes"] < 40 * sequence
    assert ballast.sum() > 0


def test_what_a_process_loads_once_counts_for_no_method():
    """Of two trainings alike the first takes no more than the second, in a process that has not trained yet."""
    code = """
import torch
from torch import nn
from ulr_snn import LIF, TimeAverage, ULR, compare
steps = [(torch.rand(20, 64, 20).round(), torch.randint(0, 3, (64,)))] * 4
net = nn.Sequential(nn.Linear(20, 20), LIF(), TimeAverage(), nn.Linear(20, 3))
found = compare(net, steps, steps, {"first": ULR(), "second": ULR()}, 1, device="cpu", progress=False)
print(*(row["peak_memory_bytes"] for row in found.rows))
"""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    if "None" in out:
        pytest.skip("this system does not tell the peak of memory anew")
    first, second = map(int, out.split())
    assert first < second + 8e6


def test_callbacks_see_the_trainings_alone():
    seen = []
    quiet(model(), separable(), separable(), epochs=2, callbacks=[lambda entry, _: seen.append(entry["val_accuracy"])])
    assert len(seen) == 4


@pytest.mark.parametrize("methods", ["ulr", (), ("ulr", "genetic")])
def test_methods_that_are_not_known_are_refused(methods):
    with pytest.raises(UsageError, match="compare got methods="):
        quiet(model(), separable(), separable(), methods=methods)


def test_learning_rates_of_methods_that_are_not_compared_are_refused():
    with pytest.raises(UsageError, match="compare got lr for 'ULR'; the methods are ulr, surrogate"):
        quiet(model(), separable(), separable(), lr={"ULR": 1e-3, "surrogate": 1e-2})


def test_estimators_by_name_of_ones_own():
    found = quiet(model(), separable(), separable(), {"pairs": ulr_snn.ULR(copies=2)}, epochs=1)
    assert [row["method"] for row in found.rows] == ["pairs"]
    assert found.rows[0]["forward_passes"] >= 2 * 48


def test_surrogate_options_are_not_for_other_libraries():
    net = nets()["norse"]()
    with pytest.raises(UsageError, match="give its neurons a surrogate there"):
        quiet(net, separable(), separable(), {"steep": SurrogateBPTT(slope=8)}, epochs=1)


def test_an_optimizer_of_ones_own_makes_the_learning_rate():
    batches = separable()
    found = quiet(model(), batches, batches, epochs=1, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    assert [row["lr"] for row in found.rows] == [None, None] and "| ulr |  |" in str(found)
    with pytest.raises(UsageError, match="every training starts anew"):
        quiet(model(), batches, batches, epochs=1, run_dir="somewhere")


def test_a_training_that_diverges_leaves_the_others_their_rows(tmp_path):
    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs**2).sum(1) * 1e30

    def stepping(parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 1.0)

    found = quiet(model(), separable(), separable(), epochs=1, loss=loss, optimizer=stepping)
    assert [row["loss"] for row in found.rows] == [None, None] and str(found).count("diverged") == 2
    assert found.rows[0]["history"] is not found.rows[1]["history"]
    found.rows.append(quiet(model(), separable(), separable(), ("ulr",), epochs=1).rows[0])
    assert found.best("ulr") is found.rows[-1]
    found.plot(tmp_path / "found.png")
    json.loads(json.dumps(found.rows, allow_nan=False))


def test_the_global_generators_are_as_they_were(device):
    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == "cuda" else [])]

    net = model().to(device)
    before = states()
    quiet(net, separable(), separable(), epochs=1, device=device)
    assert all(torch.equal(state, old) for state, old in zip(states(), before, strict=True))
    with pytest.raises(UsageError, match="scheduler='line'"):
        quiet(net, separable(), separable(), epochs=1, device=device, scheduler="line")
    assert all(torch.equal(state, old) for state, old in zip(states(), before, strict=True))
