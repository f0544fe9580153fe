"""train and evaluate on a task that takes a second."""

import copy
import json
import math
import re
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ulr_snn
from tests.helpers import CLASSES, PIXELS, STEPS, batches, errors, net, samples, train
from ulr_snn import LIF, ULR, Fold, Logistic, Online, RecurrentLIF, TimeAverage, UsageError
from ulr_snn.noise.level import NoiseLevel
from ulr_snn.noise.random import Noise
from ulr_snn.peers import SurrogateBPTT
from ulr_snn.runs.directory import load_checkpoint
from ulr_snn.runs.optim import cosine, make_optimizer, one_cycle
from ulr_snn.sites.binding import bind


def shallow() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(PIXELS, 8), LIF(reset="none"), TimeAverage(), nn.Linear(8, CLASSES))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


# -- it learns ---------------------------------------------------------------------------------------------

ESTIMATORS = {
    "default": None,
    "global": ULR(credit="global", copies=8),
    "residual": ULR(credit="residual", copies=4),
    "feedback": ULR(credit="feedback"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_training_learns_the_task(name, device):
    validation = batches(64, seed=1)
    settings = {"estimator": ESTIMATORS[name], "val_loader": validation, "device": device}
    result = train(epochs=8, lr=0.02, **settings)
    first, last = result.history[0], result.history[-1]
    assert last["train_loss"] < 0.5 * first["train_loss"]
    assert last["val_accuracy"] > 0.95 and result.metrics["test_accuracy"] == last["val_accuracy"]
    measured = ulr_snn.evaluate(result.model, validation, device=device)
    assert measured["accuracy"] == last["val_accuracy"] and measured["samples"] == 64


@pytest.mark.slow
def test_a_loss_without_gradient_trains_too():
    estimator = ULR(firing=Logistic(0.3), copies=8, noise={"3": None, "outputs": None})
    optimizer = partial(torch.optim.Adam, lr=0.05)
    with pytest.warns(UserWarning, match=r"no gradient reaches 3\.weight, 3\.bias"):  # the linear readout
        result = train(shallow(), epochs=10, estimator=estimator, loss=errors, optimizer=optimizer, scheduler=None)
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]


@pytest.mark.slow
def test_regression_and_recurrence():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(PIXELS, 16), RecurrentLIF(16), TimeAverage(), nn.Linear(16, 1))
    loader = [(x, y[:, None].float()) for x, y in batches()]
    result = train(model, loader, epochs=8, loss="mse", lr=0.02)
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert result.history[-1]["train_accuracy"] is None
    assert ulr_snn.evaluate(model, loader, loss="mse", device="cpu")["accuracy"] is None


# -- what it gives back ------------------------------------------------------------------------------------


def test_history_and_metrics_tell_what_happened(tmp_path):
    model, before = net(), weights(net())
    result = train(model, epochs=3, val_loader=batches(32, seed=1), seed=7, lr=0.01)
    assert result.model is model and isinstance(result.estimator, ULR)
    assert not torch.equal(weights(model), before)
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3]
    for entry in result.history:
        assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "seconds", "lr"} <= entry.keys()
        assert math.isfinite(entry["train_loss"]) and 0 <= entry["train_accuracy"] <= 1
    metrics = result.metrics
    assert (metrics["epochs"], metrics["steps"], metrics["seed"]) == (3, 18, 7)
    assert metrics["forward_passes"] == sum(entry["forward_passes"] for entry in result.history)
    assert metrics["forward_passes"] >= 3 * 96 and metrics["peak_memory_bytes"] > 0 and metrics["seconds"] > 0
    assert {"torch", "ulr_snn", "python"} <= metrics["versions"].keys()
    json.dumps(metrics)
    result.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert train().metrics["test_accuracy"] is None


def test_the_same_seed_gives_the_same_weights():
    one, again, other = (weights(train(seed=seed).model) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_forward_passes_are_counted_honestly():
    calls = []
    model = net()
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape[1]))
    result = train(model, estimator=ULR(credit="residual", copies=4))
    tried = calls.pop(0)  # samples on which binding tries the model
    looked = [calls.pop(7) for _ in range(2)]  # at silent layers after the first epoch
    assert tried == looked[0] == 3 and looked[1] == 16
    assert result.metrics["forward_passes"] == sum(calls) == 2 * 96 * 4
    calls.clear()
    result = train(model, estimator=ULR(credit="residual", maps="learned", copies=4))
    assert [calls.pop(0), calls.pop(8), calls.pop(8)] == [3, 3, 16]
    replay = 16  # the first batch once more, to see which layers the events reach otherwise than by spikes
    assert result.metrics["forward_passes"] == sum(calls) == 2 * 96 * 4 + replay


# -- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("max_steps", [None, 4])
def test_noise_is_annealed_over_the_whole_run(max_steps, accumulate, monkeypatch):
    progress = []
    right = NoiseLevel.scale

    def scale(self, *arguments):
        progress.append(self.progress)
        return right(self, *arguments)

    monkeypatch.setattr(NoiseLevel, "scale", scale)
    settings = {"estimator": ULR(credit="residual", copies=2, antithetic=False), "accumulate": accumulate}
    train(epochs=2, max_steps=max_steps, **settings)
    steps = 12 if max_steps is None else min(12, max_steps * accumulate)
    expected = [step / steps for step in range(steps)]
    assert sorted(set(progress)) == pytest.approx(expected) and progress == sorted(progress)


def test_the_default_learning_rate():
    named = train(lr=0.015)
    assert torch.equal(weights(train().model), weights(named.model))
    assert not torch.equal(weights(train(lr=0.001).model), weights(named.model))


def test_optimizers_as_instance_and_factory():
    model = net()
    instance = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer=instance, scheduler=None)
    other = net()
    train(other, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1), scheduler=None)
    assert torch.equal(weights(model), weights(other)) and not torch.equal(weights(model), weights(net()))
    third = net()
    train(third, lr=0.1, scheduler=None)
    assert not torch.equal(weights(third), weights(other))


def test_an_optimizer_of_some_parameters_trains_only_those():
    model = net()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    train(model)
    assert torch.equal(model[0].weight, before[0].weight) and model[0].weight.grad is None
    assert not torch.equal(model[2].weight, before[2].weight)


def test_layers_that_thaw_are_trained_and_new_ones_asked_for():
    def thaw(entry, model):
        model[0].requires_grad_(True)

    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model, callbacks=[thaw])
    assert not torch.equal(model[0].weight, before)

    def replace(entry, model):
        model[0] = nn.Linear(PIXELS, 16)

    for optimizer in (None, torch.optim.SGD):
        with pytest.raises(UsageError, match=r"0.weight became trainable .* \(add_param_group\)"):
            train(net(), callbacks=[replace], optimizer=optimizer)

    def hold(entry, model):
        if entry["epoch"] == 1:
            replace(entry, model)
            held.add_param_group({"params": list(model[0].parameters())})
            new.append(model[0].weight.clone())

    model, new = net(), []
    held = torch.optim.SGD(model.parameters(), 0.1)
    train(model, callbacks=[hold], optimizer=held, scheduler=None)
    assert not torch.equal(model[0].weight, new[0])


@pytest.mark.parametrize("scheduler", ["auto", "cosine", "one-cycle"])
def test_an_optimizer_has_its_rates_back_after_a_schedule(scheduler):
    model = net()
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}], 0.1)
    for _ in range(2):  # torch keeps the first rates for other schedules, in the group
        train(model, optimizer=optimizer, scheduler=scheduler, epochs=1)
        assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]
    optimizer.param_groups[0]["lr"] = 0.05
    with pytest.raises(KeyError, match="lost"):
        train(model, optimizer=optimizer, scheduler=scheduler, callbacks=[lambda entry, model: {}["lost"]])
    assert optimizer.param_groups[0]["lr"] == 0.05 and "initial_lr" not in optimizer.param_groups[0]
    train(model, optimizer=optimizer, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))
    assert optimizer.param_groups[0]["lr"] == 0.05 * 0.5**12


def test_a_compiled_model_trains_as_the_one_inside(tmp_path):
    compiled = torch.compile(net(), backend="eager")
    result = train(compiled, val_loader=batches(32), run_dir=tmp_path)
    assert torch.equal(weights(compiled), weights(train(net()).model))
    loaded = net(seed=5)
    for model in (loaded, torch.compile(net(seed=5), backend="eager")):
        load_checkpoint(tmp_path, model)
        assert torch.equal(weights(model), weights(compiled))
    assert ulr_snn.evaluate(compiled, batches(32))["loss"] == result.history[-1]["val_loss"]
    assert [row[0] for row in ulr_snn.plan(compiled, batches(32)[0]).rows][:2] == ["0.weight", "0.bias"]


def test_schedules():
    rates = []
    train(epochs=4, lr=0.1, scheduler="cosine", callbacks=[lambda entry, model: rates.append(entry["lr"])])
    last = [6 * epoch - 1 for epoch in (1, 2, 3, 4)]  # steps of the epochs
    expected = [0.1 * 0.5 * (1 + math.cos(math.pi * step / 24)) for step in last]
    assert rates == pytest.approx(expected, abs=1e-9)
    assert [e["lr"] for e in train(lr=0.1, scheduler=None).history] == [0.1, 0.1]
    assert cosine(0, 100) == pytest.approx(0.1)  # of the warm-up, a tenth of the steps
    warm = [cosine(step, 100) / (0.5 * (1 + math.cos(math.pi * step / 100))) for step in range(12)]
    assert warm == pytest.approx([min(1, (step + 1) / 10) for step in range(12)])
    halves = train(lr=0.1, scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5))
    assert [e["lr"] for e in halves.history] == pytest.approx([0.1, 0.05])


def test_one_cycle_is_half_a_cosine_up_to_the_highest_rate_and_another_down_to_nothing():
    factors = [one_cycle(step, 1000) for step in range(1001)]
    highest = factors.index(max(factors))
    assert factors[0] == pytest.approx(1 / 25, rel=1e-3) and factors[-1] == 0
    assert max(factors) == pytest.approx(1, abs=1e-5) and highest in (399, 400)
    assert factors[:400] == sorted(factors[:400]) and factors[400:] == sorted(factors[400:], reverse=True)
    assert one_cycle(199, 1000) + one_cycle(200, 1000) == pytest.approx(1 + 1 / 25)  # the middle of the rise
    assert one_cycle(699, 1000) + one_cycle(700, 1000) == pytest.approx(1)


@pytest.mark.parametrize(
    ("options", "factor", "lr"),
    [
        ({}, one_cycle, 1.5e-2),
        ({"lr": 0.1}, one_cycle, 0.1),
        ({"scheduler": "cosine"}, cosine, 1.5e-2),
        ({"estimator": SurrogateBPTT()}, cosine, 1e-2),
        ({"estimator": SurrogateBPTT(), "scheduler": "one-cycle"}, one_cycle, 1e-2),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, 0.1)}, cosine, 0.1),
    ],
    ids=["ULR", "a rate", "cosine", "BPTT", "BPTT in one cycle", "another optimizer"],
)
def test_estimators_with_step_sizes_of_their_own_have_one_cycle(options, factor, lr):
    rates = [entry["lr"] for entry in train(epochs=3, **options).history]
    assert rates == pytest.approx([lr * factor(step, 18) for step in (5, 11, 17)])


def test_momentum_is_shorter_for_estimators_with_step_sizes_of_their_own():
    momentum = {kind: make_optimizer(net(), None, None, kind()).param_groups[0]["betas"] for kind in (ULR, Online)}
    assert momentum == {ULR: (0.8, 0.999), Online: (0.8, 0.999)}
    assert make_optimizer(net(), None, None, SurrogateBPTT()).param_groups[0]["betas"] == (0.9, 0.999)


def test_the_history_has_the_learning_rate_of_the_last_step():
    used = []

    def stepping(parameters) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(parameters, 0.1)
        optimizer.register_step_pre_hook(lambda own, *_: used.append(own.param_groups[0]["lr"]))
        return optimizer

    history = train(epochs=3, optimizer=stepping, accumulate=4).history  # a step of four batches, and one of two
    assert [entry["lr"] for entry in history] == used[1::2] and len(used) == 6
    history = train(epochs=5, lr=0.1, max_steps=8).history
    assert history[-1]["lr"] == pytest.approx(0.1 * one_cycle(7, 8))


def test_clipping_bounds_the_step():
    def moved(clip: float | None) -> float:
        model = net()
        train(
            model,
            max_steps=1,
            clip=clip,
            scheduler=None,
            optimizer=lambda parameters: torch.optim.SGD(parameters, 1.0),
        )
        return float((weights(model) - weights(net())).norm())

    assert moved(None) > 0.02
    assert moved(0.01) == pytest.approx(0.01, rel=1e-3)


def test_accumulated_batches_are_one_big_batch():
    """With firing noise too small to matter, so that the noise of another step changes nothing."""
    settings = {
        "estimator": ULR(credit="feedback", copies=1, firing=Logistic(1e-9, secants=0)),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, 0.5),
        "epochs": 1,
    }
    big, small, wrong = shallow(), shallow(), shallow()
    one = train(big, batches(96, 32), **settings)
    two = train(small, batches(96, 16), accumulate=2, **settings)
    train(wrong, batches(96, 16), **settings)
    assert one.metrics["steps"] == two.metrics["steps"] == 3
    torch.testing.assert_close(weights(small), weights(big), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights(wrong), weights(big), rtol=1e-3)
    assert train(net(), batches(96, 16), epochs=1, accumulate=4).metrics["steps"] == 2


def test_max_steps_ends_the_run():
    result = train(epochs=5, max_steps=8)
    assert result.metrics["steps"] == 8 and [e["epoch"] for e in result.history] == [1, 2]


def test_callbacks_see_every_epoch():
    seen = []
    model = net()
    callbacks = [lambda *arguments: seen.append(arguments), lambda entry, _: entry.update(own=1)]
    result = train(model, epochs=3, callbacks=callbacks)
    assert [entry for entry, _ in seen] == result.history and all(m is model for _, m in seen)
    assert all(entry["own"] == 1 for entry in result.history)


def test_batches_with_lengths_and_batch_first():
    x, y = samples(32)
    lengths = torch.randint(3, STEPS + 1, (32,), generator=torch.Generator().manual_seed(0))
    noisy = x.clone()
    for sample, length in enumerate(lengths):
        noisy[length:, sample] = 5.0
    runs = [train(net(), [(events, y, lengths)]) for events in (x, noisy)]
    assert torch.equal(*(weights(run.model) for run in runs))
    assert not torch.equal(weights(train(net(), [(noisy, y)]).model), weights(runs[0].model))
    metrics = [
        ulr_snn.evaluate(runs[0].model, [(events, y, lengths)], device="cpu", mode=mode)
        for events in (x, noisy)
        for mode in ("deterministic", "stochastic")
    ]
    assert metrics[:2] == metrics[2:]
    first = train(net(), [(x.transpose(0, 1), y, lengths)], time_first=False)
    assert torch.equal(weights(first.model), weights(runs[0].model))


def test_any_iterable_will_do():
    generator = (batch for batch in batches())
    settings = {"epochs": 1, "scheduler": None}
    result = train(net(), generator, max_steps=6, **settings)  # a length, over which the noise is annealed
    assert torch.equal(weights(result.model), weights(train(net(), batches(), **settings).model))
    constant = {"estimator": ULR(firing=Logistic(0.3)), **settings}
    result = train(net(), (batch for batch in batches()), **constant)
    assert torch.equal(weights(result.model), weights(train(net(), batches(), **constant).model))
    assert train(net(), (batch for batch in batches()), epochs=1, max_steps=3).metrics["steps"] == 3
    x, y = samples(96)
    set_ = torch.utils.data.TensorDataset(x.transpose(0, 1), y)
    loaded = train(net(), torch.utils.data.DataLoader(set_, 16), time_first=False)
    torch.testing.assert_close(weights(loaded.model), weights(train().model), rtol=1e-4, atol=1e-5)


# -- run directories ---------------------------------------------------------------------------------------


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*")} if folder.exists() else set()


class Interrupted(RuntimeError):
    pass


def interrupt(entry, model):
    if entry["epoch"] == 3:
        raise Interrupted


def shuffled() -> torch.utils.data.DataLoader:
    x, y = samples(96)
    set_ = torch.utils.data.TensorDataset(x.transpose(0, 1), y)
    generator = torch.Generator().manual_seed(4)
    return torch.utils.data.DataLoader(set_, 16, shuffle=True, generator=generator)


@pytest.mark.parametrize("credit", ["auto", "residual"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, credit):
    settings = {"epochs": 5, "time_first": False, "estimator": ULR(credit=credit), "lr": 0.01}
    whole = train(net(), shuffled(), **settings)
    with pytest.raises(Interrupted):
        train(net(), shuffled(), run_dir=tmp_path, callbacks=[interrupt], **settings)
    assert "metrics.json" not in files(tmp_path) and "state.pt" in files(tmp_path)
    resumed = train(net(seed=9), shuffled(), run_dir=tmp_path, resume=True, **settings)
    assert [e["epoch"] for e in resumed.history] == [1, 2, 3, 4, 5]
    kept = ("epoch", "lr", "forward_passes")
    assert [[e[k] for k in kept] for e in resumed.history] == [[e[k] for k in kept] for e in whole.history]
    assert resumed.metrics["steps"] == whole.metrics["steps"]
    assert resumed.metrics["forward_passes"] == whole.metrics["forward_passes"]
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=1e-4, atol=1e-5)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["steps"] == 30 and len(written["history"]) == 5
    again = train(net(), shuffled(), run_dir=tmp_path, resume=True, **settings)
    assert torch.equal(weights(again.model), weights(resumed.model)) and again.metrics["steps"] == 30


def test_a_run_directory_holds_checkpoint_metrics_and_curves(tmp_path):
    result = train(run_dir=tmp_path / "run", val_loader=batches(32, seed=1))
    assert {"metrics.json", "curves.png", "model.safetensors", "state.pt"} <= files(tmp_path / "run")
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["test_accuracy"] == result.metrics["test_accuracy"]
    with pytest.raises(UsageError, match="resume"):
        train(run_dir=tmp_path / "run")


def nan_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.sum(1) * float("nan")


def failing_loader():
    yield from batches()[:2]
    raise Interrupted


FAILURES = {
    "nan loss": (FloatingPointError, {"loss": nan_loss}),
    "callback": (Interrupted, {"callbacks": [lambda entry, model: (_ for _ in ()).throw(Interrupted())]}),
    "loader": (Interrupted, {"loader": failing_loader, "scheduler": None}),
    "labels": (UsageError, {"loader": lambda: [(x, y + 1) for x, y in batches()]}),
    "validation": (UsageError, {"val_loader": [(x, y + 1) for x, y in batches()]}),
    "estimator": (UsageError, {"estimator": "global"}),
    "optimizer": (UsageError, {"optimizer": "adam"}),
    "interrupt": (KeyboardInterrupt, {"callbacks": [lambda *_: (_ for _ in ()).throw(KeyboardInterrupt())]}),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_run_leaves_nothing_half_written(failure, tmp_path):
    saved = failure in ("callback", "loader", "validation", "interrupt")  # which fail after steps
    error, settings = FAILURES[failure]
    settings = dict(settings)
    loader = settings.pop("loader", batches)()
    model = net()
    attributes = [set(vars(module)) for module in model.modules()]
    with pytest.raises(error):
        train(model, loader, run_dir=tmp_path, **settings)
    whole = {"checkpoint-0001", "model.safetensors", "state.pt", "config.json", "manifest.json"}
    assert files(tmp_path) == (whole if saved else set())
    assert [set(vars(module)) for module in model.modules()] == attributes
    train(model, batches(), run_dir=tmp_path, resume="changed" if saved else False)  # it serves the next run


def test_what_is_no_estimator_is_told_wherever_one_is_taken():
    x, y = batches()[0]
    for use in (
        lambda: ulr_snn.attach(net(), "global"),
        lambda: ulr_snn.plan(net(), (x, y), "global"),
        lambda: ulr_snn.evaluate(net(), batches(), estimator="global"),
    ):
        with pytest.raises(UsageError, match="'global' is no estimator"):
            use()


def test_steps_that_are_not_finite_can_be_skipped():
    loader = batches()
    spoilt = torch.full((16,), 7)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = nn.functional.cross_entropy(outputs, targets % 2, reduction="none")
        return value * float("nan") if (targets == 7).all() else value

    loader[2] = (loader[2][0], spoilt)
    result = train(net(), loader, loss=loss, estimator=ULR(on_nonfinite="skip"), scheduler=None)
    assert torch.isfinite(weights(result.model)).all()
    assert result.metrics["steps"] == 2 * 5
    with pytest.raises(FloatingPointError, match="not finite"):
        train(net(), loader, loss=loss, estimator=ULR(on_nonfinite="stop"))


# -- evaluate ----------------------------------------------------------------------------------------------


def test_deterministic_evaluation_is_the_models_own_output():
    model, (x, y) = net(), samples(48)
    outputs = model(x)
    expected = {
        "loss": nn.functional.cross_entropy(outputs, y).item(),
        "accuracy": (outputs.argmax(1) == y).double().mean().item(),
    }
    measured = ulr_snn.evaluate(model, [(x, y)], device="cpu")
    assert {key: measured[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    split = ulr_snn.evaluate(model, [(x[:, :20], y[:20]), (x[:, 20:], y[20:])], device="cpu")
    assert split == pytest.approx(measured, rel=1e-5)


def test_stochastic_evaluation_averages_copies(device):
    model, (x, y) = net().to(device), samples(48)
    estimator = ULR(firing=Logistic(0.3))
    settings = {"mode": "stochastic", "estimator": estimator, "device": device}
    one = ulr_snn.evaluate(model, [(x, y)], seed=1, **settings)
    assert ulr_snn.evaluate(model, [(x, y)], seed=1, **settings) == one
    assert ulr_snn.evaluate(model, [(x, y)], seed=2, **settings)["loss"] != one["loss"]
    assert ulr_snn.evaluate(model, [(x, y)], device=device)["loss"] != one["loss"]
    outputs = []
    sample = torch.arange(48, dtype=torch.int32, device=device)
    for copy_ in range(3):
        noise = Noise(1, 0, sample, torch.full_like(sample, copy_))
        with bind(model, NoiseLevel(estimator.firing), noise), torch.no_grad():
            outputs.append(model(x.to(device)))
    loss = nn.functional.cross_entropy(sum(outputs) / 3, y.to(device)).item()
    averaged = ulr_snn.evaluate(model, [(x, y)], copies=3, seed=1, **settings)
    assert averaged["loss"] == pytest.approx(loss, rel=1e-5)


def normed() -> nn.Sequential:
    between = Fold(nn.BatchNorm1d(8), nn.Dropout(0.5))
    return nn.Sequential(nn.Linear(PIXELS, 8), between, LIF(), TimeAverage(), nn.Linear(8, CLASSES))


@pytest.mark.parametrize("mode", ["deterministic", "stochastic"])
def test_evaluation_leaves_the_model_as_it_was(mode):
    model, batch = normed(), samples(32)
    model[1][0].eval()  # frozen statistics in a model that trains
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    attributes = [set(vars(module)) for module in model.modules()]
    generator = torch.get_rng_state()
    ulr_snn.evaluate(model, [batch], mode=mode, device="cpu")
    with pytest.raises(UsageError):
        ulr_snn.evaluate(model, [batch, (batch[0], batch[1] + 5)], mode=mode, device="cpu")
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(p.grad is not None for p in model.parameters())
    assert [module.training for module in model.modules()] == modes


def test_training_leaves_no_attributes_and_keeps_the_mode():
    for training in (True, False):
        model = normed().train(training)
        attributes, keys = [set(vars(module)) for module in model.modules()], list(model.state_dict())
        train(model)
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert list(model.state_dict()) == keys
        assert model.training == training


def test_progress_is_a_line_for_each_epoch(capsys):
    ulr_snn.train(net(), batches(), 2, val_loader=batches(32), device="cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation" in line]
    shape = r"epoch %d/2: loss \S+, accuracy \S+%%, validation loss \S+, validation accuracy \S+%%, \S+ s"
    assert len(lines) == 2 and all(re.fullmatch(shape % epoch, line) for epoch, line in enumerate(lines, 1))
    train(epochs=1, progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("length, warned", [(10, True), (2, True), (6, False), (None, False)])
def test_a_loader_of_another_length_than_it_says_is_told(length, warned):
    class Loader:
        def __iter__(self):
            return iter(batches())

    if length is not None:
        Loader.__len__ = lambda self: length
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(loader=Loader(), epochs=1, scheduler=None)
    assert ["gave 6 batches" in str(each.message) for each in caught] == [True] * warned


def test_parameters_of_a_loss_that_no_optimizer_holds_are_told():
    head = nn.Linear(CLASSES, CLASSES)

    def loss(outputs, targets):
        return nn.functional.cross_entropy(head(outputs), targets, reduction="none")

    before = head.weight.clone()
    with pytest.warns(UserWarning, match=r"of its own, of shape \(2, 2\), \(2,\), that Adam does not hold"):
        train(loss=loss)
    assert torch.equal(head.weight, before)
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, loss=loss, optimizer=torch.optim.SGD([*model.parameters(), *head.parameters()], 0.1))
        assert not torch.equal(head.weight, before)
        head.requires_grad_(False)
        train(loss=loss)


def test_parameters_that_the_first_call_makes_are_asked_for():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = None, nn.Sequential(LIF(), nn.Linear(7, CLASSES))

        def forward(self, x):
            self.first = nn.Linear(x.shape[-1], 7) if self.first is None else self.first
            return self.rest(self.first(x))

    model = Lazy()
    with pytest.raises(UsageError, match=r"first.weight became trainable .* begin another training"):
        train(model, epochs=1)
    before = model.first.weight.clone()
    train(model, epochs=1)
    assert not torch.equal(model.first.weight, before)
