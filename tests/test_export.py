"""Trained models leave PyTorch: TorchScript, torch.export, ONNX and torch.compile compute what the model computes."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import batches, train
from ulr_snn import LIF, Fold, LeakyReadout, RecurrentLIF, TimeAverage

pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecated|legacy|will be removed)")  # jit.trace, and ONNX by it
STEPS, BATCH = 5, 3
Run = Callable[[Tensor], Tensor]


def events(steps: int = STEPS, batch: int = BATCH, seed: int = 0) -> Tensor:
    """[T, B, 2, 8, 8]"""
    return (torch.rand(steps, batch, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) < 0.3).float()


def everything() -> nn.Sequential:
    """A net with every kind of neuron and reset."""
    torch.manual_seed(1)
    layers: list[nn.Module] = [
        Fold(nn.Conv2d(2, 4, 3, padding=1), nn.AvgPool2d(2)),
        LIF(0.8, 0.2, learn_beta=True),
        nn.Flatten(2),
        nn.Linear(64, 12),
        RecurrentLIF(12, 0.9, 0.3, "zero", learn_threshold=True),
        nn.Linear(12, 9),
        LIF(torch.rand(9), 0.2, "none"),
        nn.Linear(9, 5),
        LeakyReadout(0.7),
    ]
    return nn.Sequential(*layers).eval()


def averaged() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(2), nn.Linear(128, 9), LIF(0.9, 0.5), TimeAverage(), nn.Linear(9, 5)).eval()


def onnx_run(content: io.BytesIO) -> Run:
    session = pytest.importorskip("onnxruntime").InferenceSession(content.getvalue())
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def torchscript(model: nn.Module, x: Tensor) -> Run:
    return torch.jit.trace(model, x)


def exported(model: nn.Module, x: Tensor) -> Run:
    return torch.export.export(model, (x,), dynamic_shapes=({1: torch.export.Dim("batch")},)).module()


def compiled(model: nn.Module, x: Tensor) -> Run:
    torch._dynamo.reset()  # a model of an earlier test
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def onnx(model: nn.Module, x: Tensor) -> Run:
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({1: "batch"},), verbose=False)
    assert program is not None
    content = io.BytesIO()
    program.save(content)
    return onnx_run(content)


def onnx_of_torchscript(model: nn.Module, x: Tensor) -> Run:
    pytest.importorskip("onnx")
    content = io.BytesIO()
    axes = {1: "batch"} if any(isinstance(module, TimeAverage) for module in model) else {}  # not with a `Fold`
    torch.onnx.export(model, (x,), content, dynamo=False, input_names=["x"], dynamic_axes={"x": axes})
    return onnx_run(content)


WAYS = [
    (everything, torchscript),
    (everything, onnx_of_torchscript),
    (averaged, torchscript),
    (averaged, exported),
    *(pytest.param(everything, way, marks=pytest.mark.slow) for way in (exported, compiled, onnx)),
    *(pytest.param(averaged, way, marks=pytest.mark.slow) for way in (compiled, onnx_of_torchscript)),
]


def outputs_agree(model: nn.Module, run: Run, x: Tensor) -> None:
    with torch.no_grad():
        expected, found = model(x), run(x)
    assert expected.any() and torch.allclose(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("net", "way"), WAYS, ids=lambda function: function.__name__)
def test_an_exported_model_computes_the_same_also_for_other_events_and_batches(net, way):
    model = net()
    run = way(model, events())
    outputs_agree(model, run, events())
    outputs_agree(model, run, events(seed=1))
    if (net, way) != (everything, onnx_of_torchscript):
        outputs_agree(model, run, events(batch=5, seed=2))
    with torch.no_grad():
        assert not torch.equal(run(events(seed=1)), run(events(seed=3)))


@pytest.mark.parametrize("way", [torchscript, exported, onnx_of_torchscript], ids=lambda way: way.__name__)
def test_an_exported_model_refuses_another_number_of_time_steps(way):
    model = averaged()
    run = way(model, events())
    for steps in (STEPS - 1, STEPS + 1):
        with pytest.raises(Exception, match=r"[Gg]uard|elements|[Ss]plit|[Dd]imension"):
            run(events(steps))


def test_time_cannot_be_a_dynamic_axis():
    with pytest.raises(Exception, match="specialized it to be a constant"):
        torch.export.export(averaged(), (events(),), dynamic_shapes=({0: torch.export.Dim("steps")},))


def test_a_trained_model_exports_with_deterministic_firing():
    model = train(epochs=1).model
    x = batches(32, 16, seed=3)[0][0]
    run = torchscript(model, x)
    outputs_agree(model, run, x)
    with torch.no_grad():
        assert torch.equal(run(x), run(x))


@pytest.mark.slow
def test_a_program_on_disk_needs_no_ulr_snn(tmp_path: Path):
    model = averaged()
    torch.export.save(torch.export.export(model, (events(),)), tmp_path / "model.pt2")
    torch.save({"x": events(seed=4), "y": model(events(seed=4)).detach()}, tmp_path / "case.pt")
    code = """
import sys, torch
case = torch.load("case.pt")
found = torch.export.load("model.pt2").module()(case["x"])
assert torch.allclose(found, case["y"], atol=1e-6) and "ulr_snn" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_shipped_weights_give_the_same_outputs_in_a_fresh_process(tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = everything()
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    torch.save({"x": events(seed=4), "y": model(events(seed=4)).detach()}, tmp_path / "case.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from safetensors.torch import load_model
from tests.test_export import everything
case, model = torch.load({str(tmp_path / "case.pt")!r}), everything()
with torch.no_grad():
    for tensor in model.state_dict().values():
        tensor.zero_()
load_model(model, {str(tmp_path / "model.safetensors")!r})
assert torch.equal(model(case["x"]), case["y"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
