"""Neurons that are written out in the model's code, with a surrogate gradient of their own: adaptive thresholds and
recurrent weights, in a loop over time. The same model object trains by ULR, which does not ask for the surrogate, and
by backpropagation through time, which does. No download.

python examples/written_out.py [epochs]
"""

import sys

import torch
from torch import Tensor, nn

import ulr_snn
from ulr_snn.peers import SurrogateBPTT


class Spike(torch.autograd.Function):
    """1 above the threshold. The backward is the derivative of a fast sigmoid."""

    @staticmethod
    def forward(ctx, distance: Tensor) -> Tensor:
        ctx.save_for_backward(distance)
        return (distance > 0).to(distance)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (distance,) = ctx.saved_tensors
        return gradient / (1 + 10 * distance.abs()) ** 2


class Net(nn.Module):
    """[T, B, 2, 16, 16] events -> [T, B, 10] by a readout that leaks. Leaks and adaptation are learned."""

    def __init__(self, neurons: int = 128) -> None:
        super().__init__()
        self.hidden, self.recurrent = nn.Linear(512, neurons), nn.Linear(neurons, neurons, bias=False)
        self.readout = nn.Linear(neurons, 10)
        self.leak, self.forgetting = (nn.Parameter(torch.full((neurons,), value)) for value in (2.0, 3.0))
        nn.init.normal_(self.recurrent.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        leak, forgetting = self.leak.sigmoid(), self.forgetting.sigmoid()
        spikes = membrane = adaptation = torch.zeros(x.shape[1], len(leak), device=x.device)
        y, outputs = torch.zeros(x.shape[1], 10, device=x.device), []
        for now in x:
            adaptation = forgetting * adaptation + (1 - forgetting) * spikes
            threshold = 1.0 + 1.8 * adaptation
            membrane = leak * membrane * (1 - spikes) + self.hidden(now.flatten(1)) + self.recurrent(spikes)
            spikes = Spike.apply(membrane - threshold)
            y = 0.9 * y + self.readout(spikes)
            outputs.append(y)
        return torch.stack(outputs)


def main(epochs: int = 10) -> float:
    train_set, test_set = ulr_snn.data.load("digits")
    loader, val = ulr_snn.data.loader(train_set, shuffle=True), ulr_snn.data.loader(test_set)
    torch.manual_seed(0)
    print(ulr_snn.plan(Net(), next(iter(loader))))
    reached = {}
    for name, estimator in (("ULR", ulr_snn.ULR()), ("BPTT", SurrogateBPTT())):
        torch.manual_seed(0)
        result = ulr_snn.train(Net(), loader, epochs, val_loader=val, estimator=estimator, device="cpu")
        reached[name] = result.metrics["test_accuracy"]
    print(", ".join(f"{name} {accuracy:.1%}" for name, accuracy in reached.items()))
    return reached["ULR"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
