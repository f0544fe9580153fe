"""What users call, on every device: the same results on a GPU as on a CPU, by the code that is meant for it.

Other files run their own tests on a GPU as well (`device`): estimators, credit, noise, padding, states, `plan`. Kernels
are in test_triton.py.
"""

import contextlib

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.helpers import batches, net, nets, samples, separable, train
from ulr_snn import (
    LIF,
    ULR,
    CurrentNoise,
    Fold,
    LeakyReadout,
    Logistic,
    Online,
    RecurrentLIF,
    Sobol,
    TimeAverage,
    WeightNoise,
    attach,
)
from ulr_snn.kernels import dispatch
from ulr_snn.kernels.limits import limits
from ulr_snn.runs.cli import main

CPU = torch.device("cpu")
FIXED = Logistic(scale=0.3)


def conv() -> nn.Sequential:
    torch.manual_seed(0)
    between = Fold(nn.Conv2d(2, 4, 3, padding=1)), LIF(0.8), Fold(nn.MaxPool2d(2)), nn.Flatten(2)
    return nn.Sequential(*between, nn.Linear(16, 9), LIF(reset="zero"), TimeAverage(), nn.Linear(9, 3))


def recurrent() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = RecurrentLIF(9)
    first = nn.Sequential(nn.Flatten(2), nn.Linear(32, 9))
    return nn.Sequential(first, hidden, nn.Linear(9, 5), LIF(), nn.Linear(5, 3), TimeAverage())


def holding() -> nn.Sequential:
    """Learned leaks and thresholds, and a readout that keeps its membrane through padding."""
    torch.manual_seed(0)
    neuron = LIF(learn_beta=True, learn_threshold=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(32, 9), neuron, nn.Linear(9, 3), LeakyReadout())


def frames(count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(6, count, 2, 4, 4, generator=generator) < 0.4).to(torch.uint8), torch.arange(count) % 3


# -- gradients ---------------------------------------------------------------------------------------------

ESTIMATORS = {
    "default": ULR(firing=FIXED),
    "calibrated": ULR(),
    "learned maps": ULR(firing=FIXED, maps="learned"),
    "residual": ULR(firing=FIXED, credit="residual", copies=4),
    "global": ULR(firing=FIXED, credit="global", copies=4),
    "replay": ULR(firing=FIXED, memory="replay"),
    "copies in turn": ULR(firing=FIXED, credit="global", copies=4, memory="replay"),
    "Sobol": ULR(firing=FIXED, credit="global", sampling=Sobol(4)),
    "noise on weights": ULR(firing=FIXED, copies=2, noise={"0": WeightNoise()}),
    "noise on currents": ULR(copies=2, noise={"0": CurrentNoise(0.5)}),
}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions on a GPU in float32, so that spikes are those of a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def gradients(make, estimator, device: torch.device, listed: bool = False) -> list[Tensor]:
    """The gradients after two steps, on the CPU."""
    model, (x, y), lengths = make().to(device), frames(), torch.tensor([6, 3, 6, 1, 2, 6, 5, 4])
    with attach(model, estimator, seed=3, total_steps=20) as ulr:
        for _ in range(2):
            model.zero_grad()
            ulr.backward(x.to_sparse() if listed else x, y, lengths=lengths)
    assert all(q.grad.device.type == device.type for q in model.parameters())
    return [q.grad.cpu() for q in model.parameters()]


def assert_same(ours: list[Tensor], others: list[Tensor]) -> None:
    assert any(other.any() for other in others)
    for mine, other in zip(ours, others, strict=True):
        assert (mine - other).norm() <= 1e-3 * other.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "make"), [*((name, make) for name in ESTIMATORS for make in (conv, recurrent)), ("default", holding)]
)
def test_gradients_are_those_of_the_cpu(name, make):
    assert_same(gradients(make, ESTIMATORS[name], torch.device("cuda")), gradients(make, ESTIMATORS[name], CPU))


def test_lists_of_events_are_their_frames(device, monkeypatch):
    monkeypatch.setattr(limits, "fewest", 0)
    assert_same(gradients(recurrent, ULR(), device, listed=True), gradients(recurrent, ULR(), device))


def test_batches_may_be_on_the_device_or_not(device):
    (x, y), model = frames(), recurrent().to(device)
    found = []
    for place in "cpu", device:
        with attach(model, ULR(), seed=3) as ulr:
            found.append(ulr.backward(x.to(place), y.to(place), lengths=torch.full((8,), 6, device=place)).outputs)
    assert torch.equal(*found) and found[0].device.type == device.type


@pytest.mark.gpu
def test_kernels_run_on_a_gpu():
    assert dispatch.choice(torch.zeros(1, device="cuda"))[0] == "gpu", "install triton"
    assert "fused, by Triton" in str(ulr_snn.plan(recurrent().cuda(), frames()))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [conv, recurrent])
def test_another_stream_computes_the_same(make):
    expected = gradients(make, ULR(), torch.device("cuda"))
    with torch.cuda.stream(torch.cuda.Stream()):
        ours = gradients(make, ULR(), torch.device("cuda"))
    assert_same(ours, expected)


def test_generators_stay_as_they_were(device):
    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if device.type == "cuda" else [])]

    model = conv().to(device)
    before = states()
    with attach(model, ULR(copies=2)) as ulr:
        ulr.backward(*frames())
    assert all(torch.equal(now, then) for now, then in zip(states(), before, strict=True))


# -- the verbs ---------------------------------------------------------------------------------------------


def test_training_evaluation_and_its_figures(device, tmp_path):
    data = batches()
    result = train(loader=data, epochs=3, val_loader=data, device=str(device), run_dir=tmp_path / "run")
    assert all(q.device.type == device.type for q in result.model.parameters())
    assert result.metrics["test_accuracy"] > 0.7
    assert result.metrics["peak_memory_bytes"] > 0
    found = ulr_snn.evaluate(result.model, data, device=device)
    assert found["accuracy"] == pytest.approx(result.metrics["test_accuracy"])
    elsewhere = ulr_snn.evaluate(result.model, data, device="cpu")
    assert elsewhere["accuracy"] == pytest.approx(found["accuracy"], abs=0.02)
    assert elsewhere["loss"] == pytest.approx(found["loss"], rel=1e-3)


@pytest.mark.gpu
def test_a_gpu_is_found():
    assert next(train(epochs=1, device="auto").model.parameters()).is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("places", [("cuda", "cpu"), ("cpu", "cuda")], ids=" to ".join)
@pytest.mark.parametrize("estimator", [ULR(), Online()], ids=["ULR", "Online"])
def test_a_training_goes_on_on_another_device(places, estimator, tmp_path):
    settings = {"estimator": estimator, "loss": "ce_rate", "run_dir": tmp_path / "run", "max_steps": 12}
    model = lambda: nn.Sequential(*net()[:-2], net()[-1])  # noqa: E731  # outputs at every time step

    def stop(entry, model):
        raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(model(), epochs=3, device=places[0], callbacks=[stop], **settings)
    result = train(model(), epochs=3, device=places[1], resume=True, **settings)
    assert result.history[0]["epoch"] == 1 and result.metrics["steps"] == 12
    assert {q.device.type for q in result.model.parameters()} == {places[1]}


def test_updates_at_every_time_step(device):
    result = train(nn.Sequential(*net()[:-2], net()[-1]), estimator=Online(), loss="ce_rate", device=device)
    assert all(torch.isfinite(q).all() for q in result.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(dtype, device):
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("products in float16 are slow on a CPU")
    result = train(epochs=3, val_loader=batches(), autocast=dtype, device=device)
    assert result.metrics["test_accuracy"] > 0.7
    assert all(q.dtype == torch.float32 for q in result.model.parameters())


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_in_pinned_memory(workers, device):
    x, y = samples(64)
    data = torch.utils.data.TensorDataset(x.transpose(0, 1).contiguous(), y)
    loader = ulr_snn.data.loader(data, 16, shuffle=True, num_workers=workers)
    first, _ = next(iter(loader))[:2]
    assert first.is_pinned() == torch.cuda.is_available()
    assert train(loader=loader, epochs=1, device=device).metrics["steps"] == 4


def test_comparison_and_diagnosis(device):
    data = batches(32)
    found = ulr_snn.compare(net(), data, data, epochs=1, device=device, progress=False)
    assert [row["method"] for row in found.rows] == ["ulr", "surrogate"]
    assert device.type == "cpu" or all(row["peak_memory_bytes"] > 0 for row in found.rows)
    found = ulr_snn.diagnose(net().to(device), data[0], {"mine": ULR()}, draws=4, reference_draws=4, warm_up=2)
    assert {row["estimator"] for row in found.rows} == {"mine"}


@pytest.mark.parametrize("library", ["snntorch", "norse", "spikingjelly"])
def test_models_of_other_libraries(library, device):
    torch.manual_seed(0)
    result = train(nets()[library](), separable(), epochs=2, val_loader=separable(), device=device)
    assert {q.device.type for q in result.model.parameters()} == {device.type}
    assert 0 <= result.metrics["test_accuracy"] <= 1


def test_the_command_line(device, tmp_path, capsys):
    with contextlib.suppress(SystemExit):
        main(
            [
                "train",
                "digits",
                "--epochs",
                "1",
                "--max-steps",
                "2",
                "--device",
                str(device),
                "--run-dir",
                str(tmp_path),
            ]
        )
    assert (tmp_path / "metrics.json").exists(), capsys.readouterr()
