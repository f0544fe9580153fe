"""Uses at the edge: each gave a wrong result without a word, or an error that did not say what to do."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import ulr_snn
from ulr_snn import LIF, ULR, Logistic, RecurrentLIF, UsageError


def events(steps: int = 6, batch: int = 16, features: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(steps, batch, features, generator=generator) < 0.5).float()
    return x, torch.randint(0, 3, (batch,), generator=generator)


class Hard(nn.Module):
    """What no derivative passes."""

    def forward(self, spikes: torch.Tensor) -> torch.Tensor:
        return (spikes > 0.5).float()


@pytest.mark.parametrize(
    "layers",
    [
        lambda: [nn.Linear(5, 8), LIF(), Hard(), nn.Linear(8, 8), LIF(), nn.Linear(8, 3)],
        lambda: [nn.Linear(5, 3), LIF(), Hard()],
        lambda: [nn.Linear(5, 3), RecurrentLIF(3), Hard()],
    ],
    ids=["between layers", "before the loss", "after a recurrent layer"],
)
def test_layers_before_something_hard_learn_from_the_outputs(layers) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*layers())
    x, y = events()
    ulr = ulr_snn.attach(model, ULR(firing=Logistic(0.3)))
    for _ in range(3):
        ulr.backward(x, y)
    assert model[0].weight.grad.abs().sum() > 0
    assert "learned from the outputs" in str(ulr_snn.plan(model, (x, y)))


def test_a_loss_whose_gradient_is_zero_everywhere_gets_global_credit() -> None:
    model = nn.Sequential(nn.Linear(5, 3), LIF())
    loss = lambda outputs, targets: torch.sign(outputs.sum(0)).sum(1)  # noqa: E731
    assert ulr_snn.plan(model, events(), loss=loss).credit == "global"


def test_a_loss_may_change_between_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), LIF())
    ulr = ulr_snn.attach(model, ULR(firing=Logistic(0.3)))
    x, y = events()
    wrong = lambda outputs, targets: (outputs.sum(0).argmax(1) != targets).float()  # noqa: E731
    with pytest.warns(UserWarning, match="gives the outputs no gradient") as told:
        assert [ulr.backward(x, y, loss).stats["copies"] for loss in (None, wrong, None, wrong)] == [1, 8, 1, 8]
    assert len(told) == 1


def test_gradients_of_parameters_that_the_optimizer_leaves_out_do_not_pile_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), LIF(), nn.Linear(8, 3))
    loader = [events()] * 4
    ulr_snn.train(
        model, loader, 2, optimizer=torch.optim.SGD(model[2].parameters(), 0.1), clip=1.0, progress=False, device="cpu"
    )
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("shape", [(16,), (16, 1), (6, 16, 1)])
def test_mse_does_not_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="mse got targets of shape"):
        ulr_snn.losses.named.mse(torch.zeros(6, 16, 3), torch.zeros(shape))


def test_real_targets_are_kept() -> None:
    items = [(torch.zeros(4, 5), 0.7), (torch.zeros(4, 5), 0.2)]
    assert torch.equal(ulr_snn.data.collate(items)[1], torch.tensor([0.7, 0.2]))


def test_fewer_steps_than_functions_of_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), RecurrentLIF(8), nn.Linear(8, 3))
    ulr = ulr_snn.attach(model, ULR(firing=Logistic(0.3)), loss="ce_rate")
    for steps in (12, 5, 1, 12):
        ulr.backward(*events(steps))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(6, 5), 1


def test_a_loader_without_a_length() -> None:
    model = nn.Sequential(nn.Linear(5, 8), LIF(), nn.Linear(8, 3))
    loader = DataLoader(Endless(), 4, collate_fn=ulr_snn.data.collate)
    result = ulr_snn.train(model, loader, max_steps=3, progress=False, device="cpu")
    assert result.metrics["steps"] == 3
    with pytest.raises(UsageError, match="number of steps"):
        ulr_snn.train(model, loader, progress=False, device="cpu")


def test_backward_under_no_grad_and_with_int32_labels() -> None:
    model = nn.Sequential(nn.Linear(5, 8), LIF(), nn.Linear(8, 3))
    x, y = events()
    with torch.no_grad():
        ulr_snn.attach(model).backward(x, y.int())
    assert model[2].weight.grad.abs().sum() > 0


def test_empty_batches_and_outputs_without_features_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 8), LIF(), nn.Linear(8, 3))
    with pytest.raises(UsageError, match="without a step, a sample or a feature"):
        ulr_snn.attach(model).backward(torch.zeros(6, 0, 5), torch.zeros(0, dtype=torch.long))

    class Flat(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sum((0, 2))

    with pytest.raises(UsageError, match="the model has 1 outputs"):
        ulr_snn.attach(Flat(*model)).backward(*events())
