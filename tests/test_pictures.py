"""Recordings of a pass, equal to the model's own states, and pictures that draw what is in them."""

import pytest
import torch
from torch import nn

import ulr_snn
from tests.helpers import averaging, currents, library_of, nets, separable
from ulr_snn.errors import UsageError
from ulr_snn.runs import pictures
from ulr_snn.runs.pictures import LayerRecording, Recording, record

pytest.importorskip("matplotlib")


def convolutional() -> nn.Module:
    """A convolution and a recurrent layer."""
    torch.manual_seed(0)
    front = nn.Unflatten(2, (1, 5, 1)), ulr_snn.Fold(nn.Conv2d(1, 4, 3, padding=1)), ulr_snn.LIF(), nn.Flatten(2)
    return nn.Sequential(*front, nn.Linear(20, 6), ulr_snn.RecurrentLIF(6), nn.Linear(6, 3))


MODELS = {**nets(surrogates=True), "own": lambda: averaging(5, 3), "convolutional": convolutional}


def made_up(spikes: list[list[int]], **more) -> Recording:
    """A recording of one sample with a layer whose spikes are [T, N]."""
    sequence = torch.tensor(spikes, dtype=torch.float32)[:, None]
    return Recording(sequence, {"lif": LayerRecording(sequence, **more)}, sequence)


# -- recordings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_recorded_spikes_are_those_that_evaluate_counts(name):
    torch.manual_seed(0)
    model, batch = MODELS[name](), separable()[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = record(model, batch)
    counted = ulr_snn.evaluate(model, [batch], activity=True, device="cpu")
    spikes = sum(layer.spikes.flatten(2).sum((0, 2)) for layer in found.layers.values())
    assert spikes.sum() > 0 and spikes.mean().item() == counted["spikes"]
    assert found.totals(torch.device("cpu"))["operations"].mean().item() == counted["operations"]
    assert all((layer.spikes.shape == layer.membranes.shape) for layer in found.layers.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name != "norse":  # whose refractory neurons are silent above their threshold
        assert all(torch.equal(la.membranes > la.threshold, la.spikes > 0) for la in found.layers.values())


def test_membranes_follow_the_equation_of_the_neuron():
    model, batch = averaging(5, 3), separable()[0]
    found = record(model, batch)
    lif, layer = model[1], found.layers["1"]
    u = spikes = torch.zeros(16, 7)
    for t, current in enumerate(model[0](batch[0])):
        u = lif.beta * u + current - lif.threshold * spikes
        spikes = (u > lif.threshold).float()
        torch.testing.assert_close(layer.membranes[t], u)
        assert torch.equal(layer.spikes[t], spikes)
    assert torch.equal(found.outputs, model(batch[0])) and torch.equal(found.events, batch[0])


def test_operations_are_told_by_module():
    found = record(averaging(5, 3), separable()[0])
    spikes = [found.layers[name].spikes.sum((0, 2)) for name in ("1", "3")]
    assert torch.equal(found.activity["0", "operations"], 7 * found.events.sum((0, 2)))
    assert torch.equal(found.activity["2", "operations"], 6 * spikes[0])
    assert [torch.equal(found.activity[name, "spikes"], n) for name, n in zip("13", spikes, strict=True)] == [True] * 2


def test_membranes_of_another_library_are_its_own():
    library_of("snntorch")
    model, batch = MODELS["snntorch"](), separable()[0]
    found = record(model, batch)
    outputs, membranes = model(batch[0])
    torch.testing.assert_close(found.layers["lif2"].membranes, membranes)
    assert torch.equal(found.outputs, outputs)


def test_padding_is_neither_spikes_nor_membranes():
    x, y = currents(6, 4, 5, 3)
    lengths = torch.tensor([6, 2, 4, 1])
    model = nn.Sequential(nn.Linear(5, 7), ulr_snn.LIF(threshold=0.1), nn.Linear(7, 3))
    found = record(model, (x, y, lengths))
    layer, padding = found.layers["1"], torch.arange(6)[:, None] >= lengths
    assert not layer.spikes[padding].any() and layer.membranes[padding].isnan().all()
    assert not layer.membranes[~padding].isnan().any()
    torch.testing.assert_close(found.rates()["1"], layer.spikes.sum((0, 1)) / 13)
    one = found.sample(2)
    assert len(one.events) == 4 and one.samples == 1 and torch.equal(one.layers["1"].spikes[:, 0], layer.spikes[:4, 2])


def test_inputs_alone_and_a_layer_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lif = nn.Linear(5, 5), ulr_snn.LIF()

        def forward(self, x):
            return self.lif(self.first(self.lif(self.first(x))))

    found = record(Twice(), separable()[0][0])
    assert list(found.layers) == ["lif", "lif#2"]
    assert torch.equal(found.layers["lif#2"].spikes, found.outputs)


def test_static_inputs_are_repeated():
    class Repeats(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lif = nn.Linear(5, 4), ulr_snn.LIF()

        def forward(self, x):
            return self.lif(self.fc(x).expand(9, *x.shape[:1], 4))

    found = record(Repeats(), torch.ones(3, 5), layout="B")
    assert found.events.shape == (9, 3, 5) and found.layers["lif"].spikes.shape == (9, 3, 4)


def test_black_boxes_have_spikes_and_no_membranes():
    class Box(nn.Module):
        def forward(self, x):
            return torch.from_numpy((x.detach().numpy() > 0.5).astype("float32"))

    model, x = nn.Sequential(nn.Linear(5, 4), Box(), nn.Linear(4, 3)), separable()[0]
    found = record(model, x)
    layer = found.layers["1"]
    assert layer.membranes is None and torch.equal(layer.spikes, (model[0](x[0]) > 0.5).float())
    with pytest.raises(UsageError, match="no layer of this recording"):
        pictures.membranes(found)


def test_what_cannot_be_recorded():
    with pytest.raises(UsageError, match="no spiking layer"):
        record(nn.Linear(5, 3), separable()[0])
    with pytest.raises(UsageError, match="sample=1 is not recorded; the batch has 1"):
        pictures.raster(made_up([[0, 1]]), 1)


# -- pictures ----------------------------------------------------------------------------------------------


def marks(line) -> set[tuple[float, float]]:
    """Time and row of each mark of a raster, which is a line with gaps."""
    x, y = line.get_xdata(), line.get_ydata()
    return {(t, (low + high) / 2) for t, low, high in zip(x[::3], y[::3], y[1::3], strict=True)}


def test_raster_marks_every_spike():
    found = record(convolutional(), separable()[0])
    panels = pictures.raster(found, 3).axes
    assert [axes.get_title("left").split(":")[0] for axes in panels] == ["input", "layer 2", "layer 5"]
    for axes, layer in zip(panels[1:], found.layers.values(), strict=True):
        spikes = layer.spikes[:, 3].flatten(1)
        assert marks(axes.lines[0]) == {(t, n) for t, n in spikes.nonzero().tolist()}
        assert f"rate {spikes.mean():.3f}" in axes.get_title("left")
    assert marks(panels[0].lines[0]) == {(t, n) for t, n in found.events[:, 3].nonzero().tolist()}
    assert panels[-1].get_xlim() == (-0.5, 11.5)


def test_currents_are_an_image():
    values = torch.tensor([[-1.0, 0.5], [0.0, 1.0], [0.25, 0.0]])
    silent = LayerRecording(torch.zeros(3, 1, 2))
    axes, below = pictures.raster(Recording(values[:, None], {"lif": silent}, values)).axes
    opacity = axes.images[0].get_array()[..., 3]
    assert [text.get_text() for text in below.texts] == ["no spikes"]
    assert opacity.shape == (2, 3) and opacity.argmax() == 4 and opacity[0, 0] == 0


def test_raster_tells_polarities_apart():
    events = torch.zeros(4, 1, 2, 3, 3)
    events[1, 0, 0, 2, 2] = events[3, 0, 1, 0, 1] = 1
    off, on = pictures.raster(Recording(events, {}, events)).axes[0].lines
    assert (marks(off), marks(on)) == ({(1, 8)}, {(3, 10)})
    assert (off.get_color(), on.get_color()) == (pictures.RED, pictures.BLUE)


def test_membranes_show_the_neurons_that_fire_most():
    spikes = [[1, 0, 0, 1], [1, 0, 1, 0], [1, 0, 1, 0]]
    traces = torch.arange(12.0).view(3, 1, 4)
    found = made_up(spikes, membranes=traces, threshold=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    (axes,) = pictures.membranes(found, neurons=2).axes
    first, ticks, second, _, *thresholds = axes.lines
    assert first.get_label() == "neuron 0" and second.get_label() == "neuron 2"
    assert list(first.get_ydata()) == [0, 4, 8] and list(second.get_ydata()) == [2, 6, 10]
    assert list(ticks.get_xdata()) == [0, 1, 2]
    assert [line.get_ydata()[0] for line in thresholds] == [1, 3]


def test_histogram_counts_every_neuron_once():
    rates = {"a": torch.tensor([0.0, 0.0, 0.1, 0.9]), "b": torch.tensor([[0.5, 0.25]])}
    panels = pictures.rates_histogram(rates, bins=10).axes
    for axes, rate in zip(panels, rates.values(), strict=True):
        *bars, silent = axes.patches
        assert sum(bar.get_height() for bar in bars) + silent.get_height() == rate.numel()
        assert silent.get_height() == (rate == 0).sum() and silent.get_x() < 0
    assert panels[0].patches[9].get_height() == 1 and "2 silent" in panels[0].get_title("left")


def test_confusion_has_counts_and_shares():
    matrix = torch.tensor([[3, 1], [0, 2]])
    (axes,) = pictures.confusion(matrix).axes
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "3", (1, 0): "1", (1, 1): "2"}
    opacity = axes.images[0].get_array()[..., 3]
    assert opacity[0, 0] > opacity[0, 1] > opacity[1, 0] == 0 and opacity[1, 1] == 1
    assert not pictures.confusion(torch.eye(40)).axes[0].texts  # too many to read


def test_event_image_sums_each_polarity():
    events = torch.zeros(5, 2, 4, 6)
    events[:, 1, 2, 3] = 1
    off, on = pictures.event_image(events).axes
    assert [axes.get_title("left") for axes in (off, on)] == ["OFF", "ON"]
    assert not off.images[0].get_array()[..., 3].any() and on.images[0].get_array()[2, 3, 3] == 1


@pytest.mark.parametrize("shape", [(4, 2, 8, 8), (4, 8, 8), (4, 30)])
def test_animation_has_a_frame_for_each_time_step(tmp_path, shape):
    from PIL import Image

    events = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    pictures.animate_events(events, tmp_path / "events.gif", fps=5)
    with Image.open(tmp_path / "events.gif") as film:
        frames = [film.seek(i) or film.convert("RGB").tobytes() for i in range(film.n_frames)]
        assert len(set(frames)) == 4 and film.info["duration"] == 200


def test_wrong_uses_are_told(tmp_path):
    events = torch.ones(2, 3, 3)
    with pytest.raises(UsageError, match="units are no image"):
        pictures.event_image(torch.ones(2, 3))
    with pytest.raises(UsageError, match=r"events have shape \(3,\)"):
        pictures.animate_events(torch.ones(3), tmp_path / "a.gif")
    for path in (tmp_path / "none" / "a.gif", tmp_path / "a.nothing"):
        with pytest.raises(UsageError, match=r"cannot be written"):
            pictures.animate_events(events, path)
    with pytest.raises(UsageError, match="shape"):
        pictures.confusion(torch.ones(2, 3))
    with pytest.raises(UsageError, match="no rates"):
        pictures.rates_histogram({})


def test_matplotlib_stays_as_it_is(tmp_path):
    import sys

    import matplotlib

    before, loaded = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    backend = matplotlib.get_backend(auto_select=False)
    found = record(averaging(5, 3), separable()[0])
    pictures.raster(found).savefig(tmp_path / "raster.png")
    pictures.membranes(found).savefig(tmp_path / "membranes.svg")
    pictures.animate_events(found.events[:, 0], tmp_path / "events.gif")
    assert dict(matplotlib.rcParams) == before and ("matplotlib.pyplot" in sys.modules) == loaded
    assert matplotlib.get_backend(auto_select=False) == backend


def test_arguments_are_checked(tmp_path):
    recording = record(averaging(5, 2), currents(6, 4, 5, 2))
    for wrong in (
        lambda: pictures.raster(recording, sample=-1),
        lambda: pictures.membranes(recording, neurons=0),
        lambda: pictures.animate_events(torch.rand(3, 4, 4), tmp_path / "a.gif", fps=0),
    ):
        with pytest.raises(UsageError, match="it must be a whole number"):
            wrong()
