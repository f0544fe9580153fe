"""Paths between two layers: found in the graph by shape alone, exact as linear maps, learned by regression."""

import pytest
import torch
from torch import Tensor, nn

from ulr_snn import LIF, ULR, Fold, Logistic, TimeAverage, attach, plan
from ulr_snn.credit.feedback import FeedbackLimits, LearnedFeedback, RegressionSchedule, best_length, ridge_solution
from ulr_snn.credit.kinds import Auto
from ulr_snn.credit.map_learning import MapLearning
from ulr_snn.credit.maps import Full, Shared, window

LOCAL = {
    "3x3, stride 2": (nn.Conv2d(2, 3, 3, 2, 1), (2, 13, 11)),
    "5x5, no padding": (nn.Conv2d(2, 3, 5), (2, 12, 12)),
    "even kernel, stride 3": (nn.Conv2d(2, 3, (4, 2), 3, (1, 0)), (2, 17, 14)),
    "dilated": (nn.Conv2d(1, 2, 3, dilation=2, padding=2), (1, 11, 11)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 9, 9)),
    "one axis": (nn.Conv1d(3, 2, 5, 2, 2), (3, 16)),
    "three axes": (nn.Conv3d(1, 2, 3, padding=1), (1, 7, 6, 7)),
    "mean of 2x2": (nn.AvgPool2d(2), (3, 10, 10)),
    "pooled convolution": (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2)), (2, 12, 12)),
    "block": (nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2).eval()), (2, 8, 8)),
}


def between(module: nn.Module, shape: tuple[int, ...], device: torch.device, rows: int = 24) -> tuple[Tensor, Tensor]:
    """spikes [3, rows, *shape] and x [3, rows, ...], the module's output of them, in float64."""
    torch.manual_seed(0)
    spikes = (torch.rand(3, rows, *shape, device=device) < 0.3).double().requires_grad_()
    return spikes, Fold(module.double().to(device))(spikes)


def window_of(spikes: Tensor, x: Tensor) -> Shared | None:
    return window(x, spikes, tuple(spikes.shape[2:]), tuple(x.shape[2:]))


def likeness(learned: Tensor, weight: Tensor) -> float:
    """Cosine between the two over the inputs that deviated, nearly all; of those that never fire nothing is learned."""
    fired = learned.abs().sum(1) > 0.05 * weight.abs().sum(1)
    assert fired.float().mean() > 0.75
    return torch.nn.functional.cosine_similarity(learned[fired].flatten(), weight[fired].flatten(), 0).item()


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_module_is_found_and_learned_exactly(name, device):
    module, shape = LOCAL[name]
    spikes, x = between(module, shape, device)
    path = window_of(spikes, x)
    assert isinstance(path, Shared)
    assert path.products < Full(path.source, path.target).products
    rows = spikes.detach().flatten(0, 1)
    change = torch.func.jvp(module, (rows,), (rows,))[1]  # its linear part, of biases free
    inputs, results = path.inputs(rows), path.results(change)
    assert inputs.shape[0] == results.shape[0] == len(rows) * path.positions
    assert (inputs.shape[1], results.shape[1]) == path.size
    weight = torch.linalg.lstsq(inputs.cpu(), results.cpu(), driver="gelsd").solution.to(device)
    torch.testing.assert_close(inputs @ weight, results, rtol=0, atol=1e-9)
    torch.testing.assert_close(path.forward(weight, rows), change, rtol=0, atol=1e-9)
    g = torch.randn_like(change)
    expected = torch.func.vjp(module, rows)[1](g)[0]
    torch.testing.assert_close(path.backward(weight, g), expected, rtol=0, atol=1e-9)
    assert not torch.allclose(path.backward(weight.flip(0), g), expected, atol=1e-3)


def test_the_margins_of_a_window_are_those_of_the_convolution(device):
    spikes, x = between(nn.Conv2d(2, 3, 5, stride=2, padding=2), (2, 15, 14), device)
    path = window_of(spikes, x)
    assert (path.stride, path.offset, path.extent) == ((2, 2), (-2, -2), (5, 5))


def test_maximum_pooling_and_batch_statistics_are_local_too(device):
    """A maximum depends on one spike of its window at a time, batch statistics a little on everything."""
    module = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.MaxPool2d(2))
    path = window_of(*between(module, (2, 12, 12), device))
    assert (path.stride, path.offset, path.extent) == ((2, 2), (-1, -1), (4, 4))


@pytest.mark.parametrize(
    "module, shape",
    [
        (nn.Linear(9, 8), (2, 9)),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()), (2, 8, 8)),
        (nn.Upsample(scale_factor=2), (2, 6, 6)),
        (nn.AdaptiveAvgPool2d(1), (2, 6, 6)),
        (nn.LocalResponseNorm(3), (6,)),
    ],
    ids=["linear over an axis", "flattened", "finer than its source", "one position", "no axis"],
)
def test_what_is_not_local_gets_a_full_matrix(module, shape, device):
    if len(shape) == 1:
        module = nn.Linear(6, 5)
    assert window_of(*between(module, shape, device)) is None


def test_forward_and_backward_are_one_linear_map(device):
    for path in (
        Full((2, 3), (4,)),
        Shared((2, 9, 7), (3, 4, 4), (2, 2), (-1, 0), (3, 2)),
        Shared((1, 9), (2, 3), (2,), (1,), (3,)),  # a window that leaves margins of the source unseen
    ):
        generator = torch.Generator().manual_seed(1)
        weight, z, g = (
            torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)
            for shape in (path.size, (5, *path.source), (5, *path.target))
        )
        torch.testing.assert_close((path.forward(weight, z) * g).sum(), (z * path.backward(weight, g)).sum())
        torch.testing.assert_close(path.inputs(z) @ weight, path.results(path.forward(weight, z)))


# -- the regression ----------------------------------------------------------------------------------------


def test_a_refresh_never_loses_what_was_learned_and_soon_knows_a_map_without_noise(device):
    """With fewer rows than unknowns each refresh projects the error, so that it can only shrink."""
    torch.manual_seed(0)
    truth, feedback = torch.randn(60, 7, dtype=torch.float64, device=device), LearnedFeedback(1, 0.1)
    path, left = Full((60,), (7,)), [float("inf")]
    for _ in range(40):
        z = torch.randn(24, 60, dtype=torch.float64, device=device)
        feedback.refresh_layer({"a -> b": path}, {"a -> b": z}, z @ truth)
        left.append(float((feedback.layers["a -> b"] - truth).norm() / truth.norm()))
        assert left[-1] < left[-2] + 0.02  # the length is an estimate
    assert left[1] > 0.5 and left[-1] < 0.05


def test_two_sources_of_one_layer_share_what_is_to_be_explained(device):
    torch.manual_seed(0)
    truths = {name: torch.randn(20, 5, dtype=torch.float64, device=device) for name in ("a -> c", "b -> c")}
    paths, feedback = {name: Full((20,), (5,)) for name in truths}, LearnedFeedback(1, 0.1)
    for _ in range(30):
        z = {name: torch.randn(64, 20, dtype=torch.float64, device=device) for name in truths}
        feedback.refresh_layer(paths, z, sum(z[name] @ truth for name, truth in truths.items()))
    for name, truth in truths.items():
        torch.testing.assert_close(feedback.layers[name], truth, rtol=0, atol=1e-2)


def test_lessons_become_rare_while_the_weights_keep_still_and_frequent_when_they_move():
    pace, taken = RegressionSchedule(), []
    for step in range(40):
        if pace.wants(step):
            taken.append(step)
            pace.note(before=0.5 if step in (0, 24) else 0.001, after=0.0005, step=step)
    assert taken == [0, 1, 3, 7, 15, 23, 31, 39]  # 24 saw nothing, for it was not asked
    pace.note(before=0.5, after=0.48, step=39)
    assert pace.wants(40) and pace.large  # of few rows it could not know more
    pace.note(before=0.48, after=0.47, step=40)
    pace.note(before=0.47, after=0.46, step=41)
    assert pace.wants(42) and not pace.large  # more rows did not help
    pace.note(before=0.008, after=0.001, step=42)  # good enough as it is, but not to wait longer
    assert pace.wants(43) and not pace.large
    pace.note(before=0.1, after=0.09, step=43)
    assert pace.large


def test_what_a_wide_layer_does_is_known_after_few_steps_and_then_seldom_learned(device, monkeypatch):
    """Of 1400 neurons a usual regression would see 240 rows; those of the first steps see more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1400), LIF(), nn.Linear(1400, 80), LIF(), TimeAverage(), nn.Linear(80, 3))
    model.to(device)
    x, y = 3 * torch.rand(16, 96, 6, device=device), torch.arange(96, device=device) % 3
    rows, learn = [], MapLearning.learn

    def watched(maps, regression, spikes, current):
        rows.append(len(current))
        learn(maps, regression, spikes, current)

    monkeypatch.setattr(MapLearning, "learn", watched)
    with attach(model, ULR(maps="learned", firing=Logistic(2.0))) as ulr:
        for _ in range(6):
            ulr.backward(x, y)
        assert rows[0] > 1000
        assert likeness(ulr.learner.feedback.layers["1 -> 3"], model[2].weight.detach().T) > 0.98
        for _ in range(40):
            ulr.backward(x, y)
        rows.clear()
        for _ in range(24):
            ulr.backward(x, y)
        assert 3 <= len(rows) <= 6 and max(rows) < 400
        with torch.no_grad():
            model[2].weight.add_(0.1 * torch.randn_like(model[2].weight))
        rows.clear()
        for _ in range(20):
            ulr.backward(x, y)
        assert len(rows) > 5 and max(rows) > 1000
        assert likeness(ulr.learner.feedback.layers["1 -> 3"], model[2].weight.detach().T) > 0.98


def test_what_does_not_repeat_on_other_samples_is_not_learned(device):
    """Pure noise: the last quarter of the samples does not confirm what the others say."""
    torch.manual_seed(0)
    feedback, path = LearnedFeedback(1, 0.1), Full((30,), (4,))
    noise = torch.randn(400, 4, dtype=torch.float64, device=device)
    z = torch.randn(400, 30, dtype=torch.float64, device=device)
    whole = ridge_solution(z[:300], noise[:300])
    feedback.refresh_layer({"a -> b": path}, {"a -> b": z}, noise)
    assert feedback.layers["a -> b"].norm() < 0.5 * whole.norm()


def test_the_best_length_lies_between_nothing_and_everything():
    effect = torch.tensor([1.0, 2.0])
    assert [best_length(effect, k * effect).item() for k in (-1, 0, 0.25, 1, 3)] == [0, 0, 0.25, 1, 1]
    assert best_length(torch.zeros(2), effect) == 1


def test_copies_that_fire_alike_teach_nothing(device):
    zero = torch.zeros(8, 6, dtype=torch.float64, device=device)
    assert not ridge_solution(zero, torch.zeros(8, 2, dtype=torch.float64, device=device)).any()


def test_maps_learn_kernels_from_training(device):
    torch.manual_seed(0)
    model = nn.Sequential(Fold(nn.Conv2d(1, 4, 3, padding=1)), LIF(), Fold(nn.Conv2d(4, 5, 3, 2, 1)), LIF())
    model = nn.Sequential(*model, nn.Flatten(2), TimeAverage(), nn.Linear(5 * 16, 3)).to(device)
    x = 2 * torch.rand(6, 32, 1, 8, 8, device=device)
    with attach(model, ULR(maps="learned", firing=Logistic(0.5)), seed=1) as ulr:
        for _ in range(40):  # eight regressions: with weights that keep still, one in eight steps
            ulr.backward(x, torch.arange(32, device=device) % 3)
        learned = ulr.learner.feedback.layers["1 -> 3"]
        assert isinstance(ulr.structure.feeds["1"]["3"], Shared)
    kernel = model[2][0].weight.detach().flatten(1).T
    assert likeness(learned, kernel) > 0.99


class Gains(nn.Module):
    """A gain of its own for every neuron: local, but not the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(4 * torch.randn(2, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_map_that_differs_from_place_to_place_gets_a_full_matrix(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(6, 60), nn.Unflatten(2, (2, 5, 6)), LIF(), Gains(), LIF())
    model = nn.Sequential(*model, nn.Flatten(2), TimeAverage(), nn.Linear(60, 3)).to(device)
    x, y = 3 * torch.rand(8, 64, 6, device=device), torch.arange(64, device=device) % 3
    with attach(model, ULR(maps="learned", firing=Logistic(0.5)), seed=1) as ulr:
        for _ in range(16):
            ulr.backward(x, y)
        assert isinstance(ulr.structure.feeds["3"]["5"], Full)
        learned = ulr.learner.feedback.layers["3 -> 5"]
    expected = torch.diag(model[4].gain.detach().flatten())
    assert likeness(learned, expected) > 0.98
    with attach(model, ULR(maps="learned", firing=Logistic(0.5)), seed=1) as resumed:
        resumed.load_state_dict(ulr.state_dict())
        resumed.backward(x, y)
        assert isinstance(resumed.structure.feeds["3"]["5"], Full)  # it is not found out anew
        torch.testing.assert_close(resumed.learner.feedback.layers["3 -> 5"], learned, rtol=0, atol=0.2)


def test_a_state_is_taken_by_an_attachment_that_has_stepped(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 60), nn.Unflatten(2, (2, 5, 6)), LIF(), Gains(), LIF(), nn.Flatten(2))
    model = nn.Sequential(*model, TimeAverage(), nn.Linear(60, 3)).to(device)
    x, y = 3 * torch.rand(8, 64, 6, device=device), torch.arange(64, device=device) % 3
    with attach(model, ULR(maps="learned", firing=Logistic(0.5)), seed=1) as ulr:
        for _ in range(4):
            ulr.backward(x, y)
        state = ulr.state_dict()
    credit = Auto(limits=FeedbackLimits(unexplained=2.0))  # nothing finds out that it is not shared
    with attach(model, ULR(credit=credit, maps="learned", firing=Logistic(0.5)), seed=1) as ulr:
        ulr.backward(x, y)
        assert isinstance(ulr.structure.feeds["2"]["4"], Shared)
        ulr.load_state_dict(state)
        assert ulr.structure is None  # so that the next pass takes what the state says
        ulr.backward(x, y)
        assert isinstance(ulr.structure.feeds["2"]["4"], Full)


def test_a_matrix_that_is_not_known_is_learned_though_no_lesson_is_due(device):
    model = nn.Sequential(nn.Linear(6, 8), LIF(), nn.Linear(8, 7), LIF(), TimeAverage(), nn.Linear(7, 3)).to(device)
    x, y = 3 * torch.rand(8, 32, 6, device=device), torch.arange(32, device=device) % 3
    with attach(model, ULR(maps="learned")) as ulr:
        ulr.learner.feedback.paces["3"] = RegressionSchedule(every=8, due=100)
        ulr.backward(x, y)
        assert "1 -> 3" in ulr.learner.feedback.layers


class OtherWayRound(nn.Module):
    """Modules that are defined in another order than they run, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.lif = LIF(), LIF()
        self.read, self.again, self.first = nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        once = self.lif(self.first(x))
        return self.read(self.lif(self.again(self.last(self.second(once)))).mean(0))


def test_credit_follows_the_order_of_running_not_of_definition(device):
    torch.manual_seed(0)
    model = OtherWayRound().to(device)
    x, y = 3 * torch.rand(8, 32, 6, device=device), torch.arange(32, device=device) % 3
    with attach(model, ULR(maps="learned", firing=Logistic(0.5))) as ulr:
        ulr.backward(x, y)
        feeds = {site: list(paths) for site, paths in ulr.structure.feeds.items()}
    assert feeds == {"lif": ["last"], "last": ["lif#2"], "lif#2": []}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_learns_too(dtype, device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), LIF(), nn.Linear(8, 7), LIF(), TimeAverage(), nn.Linear(7, 3)).to(
        device, dtype
    )
    x, y = 3 * torch.rand(8, 32, 6, device=device), torch.arange(32, device=device) % 3
    with attach(model, ULR(maps="learned", firing=Logistic(0.5))) as ulr:
        for _ in range(3):
            ulr.backward(x, y)
        learned, weight = ulr.learner.feedback.layers["1 -> 3"].float(), model[2].weight.detach().T.float()
    assert likeness(learned, weight) > 0.95


def test_a_path_of_another_shape_than_a_checkpoints_is_learned_anew(device):
    feedback, name = LearnedFeedback(1, 0.1), "a -> b"
    feedback.load_state_dict({"outputs": {}, "layers": {name: torch.ones(3, 2)}, "responses": {}}, device)
    path = Full((4,), (2,))
    assert feedback.to_layer(name, path, torch.ones(5, 6, 4, device=device)) is None
    z, truth = torch.randn(40, 4, device=device), torch.randn(4, 2, device=device)
    assert feedback.refresh_layer({name: path}, {name: z}, z @ truth)[1] < 0.01
    torch.testing.assert_close(feedback.layers[name], truth, rtol=0, atol=0.02)


class Shortcut(nn.Module):
    """The current of the second layer: of the first layer's spikes, and of the events themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.past = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(6, 7)
        self.lif, self.last, self.readout = LIF(), LIF(), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(1.0)  # a model may change its input in place
        beside = self.past(torch.from_numpy(x.cpu().numpy()).to(x))  # nor need autograd see what depends on it
        return self.readout(self.last(self.second(self.lif(self.first(x))) + beside).mean(0))


def test_where_events_take_a_shortcut_only_pairs_tell_what_spikes_do(device):
    """Spikes follow the events, and so does the current by the shortcut: a regression over samples would take the
    one for the other."""
    torch.manual_seed(0)
    model = Shortcut().to(device)
    x, y = 2 * torch.rand(8, 64, 6, device=device), torch.arange(64, device=device) % 3
    assert "every 4 steps" in str(plan(model, (x, y), ULR(maps="learned")))
    with attach(model, ULR(maps="learned", firing=Logistic(0.5)), seed=1) as ulr:
        copies = [ulr.backward(x, y).stats["copies"] for _ in range(40)]
        assert ulr.structure.paired == {"last"}
        # The first regression, and those of weights that keep still: where both one is due and the step is a fourth one
        assert copies[0] == 2 and sum(copies) - len(copies) in range(4, 12)
        assert all(n == 1 or step < 8 or step % 4 == 0 for step, n in enumerate(copies))
        ulr.backward(x, y)
        learned = ulr.learner.feedback.layers["lif -> last"]
        weight = model.second.weight.detach().T
        assert likeness(learned, weight) > 0.98
        ulr.structure.paired = set()
        for _ in range(9):
            ulr.backward(x, y)
        assert likeness(learned, weight) < 0.95


def test_a_current_that_is_not_finite_spoils_no_feedback(device):
    feedback, path = LearnedFeedback(1, 0.1), Full((4,), (2,))
    z, truth = torch.randn(40, 4, device=device), torch.randn(4, 2, device=device)
    change = z @ truth
    change[3, 1] = torch.inf
    assert feedback.refresh_layer({"a -> b": path}, {"a -> b": z}, change) == (1.0, 0.0)
    assert feedback.layers["a -> b"].count_nonzero() == 0
    feedback.refresh_layer({"a -> b": path}, {"a -> b": z}, z @ truth)
    torch.testing.assert_close(feedback.layers["a -> b"], truth, rtol=0, atol=0.02)


def test_half_precision_is_wide_enough_for_the_sums_of_a_lesson(device):
    feedback, path = LearnedFeedback(1, 0.1), Full((8,), (16,))
    z = torch.randn(1200, 8, device=device).half()
    before, after = feedback.refresh_layer({"a -> b": path}, {"a -> b": z}, 20 * z.repeat(1, 2))
    assert before == 1.0 and after < 0.01
