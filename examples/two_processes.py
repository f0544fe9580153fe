"""Two processes train two halves of a network. Spikes go forward, the loss of each sample comes back, and nothing else:
the first half learns by likelihood ratios from these losses alone (95 %; 88 % with its weights as they began).

    python examples/two_processes.py [epochs]
"""

import multiprocessing
import sys
from multiprocessing.connection import Connection

import torch
from torch import Tensor, nn

import ulr_snn
from ulr_snn import LIF, ULR, TimeAverage


def second_half(link: Connection) -> None:
    """Gets spikes and labels; learns, and answers with losses. A first item of None ends it."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(64, 64), LIF(), TimeAverage(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with ulr_snn.attach(model, seed=1) as ulr:
        while (message := link.recv())[0] is not None:
            kind, spikes, labels = message
            if kind == "train":
                optimizer.zero_grad()
                link.send(ulr.backward(spikes, labels).loss)
                optimizer.step()
            else:
                with torch.no_grad():
                    link.send(model(spikes).argmax(1))


def main(epochs: int = 20) -> float:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=second_half, args=(there,), daemon=True)
    process.start()
    there.close()  # so that the end of the other process ends this one, too

    def remote_loss(spikes: Tensor, labels: Tensor) -> Tensor:
        here.send(("train", spikes.detach(), labels))
        return here.recv()

    torch.manual_seed(0)
    train_set, test_set = ulr_snn.data.load("digits")
    loader = ulr_snn.data.loader(train_set, shuffle=True)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(512, 64), LIF())
    with torch.no_grad():
        model[1].weight *= 3  # events are sparse: the first layer would begin all but silent
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    estimator = ULR(credit="global", copies=8)
    with ulr_snn.attach(model, estimator, remote_loss, seed=0, total_steps=epochs * len(loader)) as ulr:
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                ulr.backward(x, y)
                optimizer.step()
    right = 0
    for x, y in ulr_snn.data.loader(test_set):
        with torch.no_grad():
            here.send(("test", model(x.float()), y))
        right += int((here.recv() == y).sum())
    here.send((None, None, None))
    process.join(10)
    print(f"test accuracy {right / len(test_set):.1%}")
    return right / len(test_set)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
