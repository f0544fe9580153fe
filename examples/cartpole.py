"""Reward: a spiking policy learns to balance a pole. The model contains the simulator, and the loss is minus the
return. A spike of the last neuron pushes the cart to the right, silence to the left. No gradient passes through the
simulator.

    python examples/cartpole.py [updates]
"""

import sys

import gymnasium
import numpy
import snntorch as snn
import torch
from torch import Tensor, nn

import ulr_snn
from ulr_snn import ULR, Global, Independent

# 64 episodes an update. The baseline of an episode is, at every time step, the mean of the other episodes.
ESTIMATOR = ULR(credit=Global(reward_to_go=True), sampling=Independent(64))
SIZE = numpy.float32([2.4, 2.0, 0.2, 2.0])  # usual size of the position, its speed, the angle and its speed


class Balance(nn.Module):
    """Plays one episode a row. The input [T, B, ...] gives only the number of steps and episodes. The outputs are the
    rewards [T, B, 1], which are zero after the end of an episode."""

    def __init__(self, neurons: int = 64) -> None:
        super().__init__()
        self.senses, self.hidden = nn.Linear(4, neurons), snn.Leaky(beta=0.5)
        self.push, self.action = nn.Linear(neurons, 1), snn.Leaky(beta=0.0, reset_mechanism="none")
        nn.init.uniform_(self.senses.bias, 0, 1)  # at rest, membranes lie anywhere below the threshold of 1
        nn.init.ones_(self.push.bias)  # at the threshold: at first, either action is as likely

    def forward(self, x: Tensor) -> Tensor:
        steps, episodes = x.shape[:2]
        worlds = gymnasium.make_vec("CartPole-v1", num_envs=episodes, vectorization_mode="sync")
        state, _ = worlds.reset(seed=int(torch.randint(1 << 31, ())))
        running, rewards = numpy.ones(episodes, bool), []
        hidden, action = self.hidden.init_leaky(), self.action.init_leaky()
        for _ in range(steps):
            spikes, hidden = self.hidden(self.senses(torch.from_numpy(state / SIZE)), hidden)
            right, action = self.action(self.push(spikes), action)
            state, reward, failed, timed_out, _ = worlds.step(right[:, 0].detach().numpy().astype(int))
            rewards.append(reward * running)
            running &= ~(failed | timed_out)
        return torch.from_numpy(numpy.stack(rewards)[..., None]).float()


def trained(updates: int = 80, estimator: ULR = ESTIMATOR, samples: int = 1, seed: int = 0) -> Balance:
    """Returns a policy after this number of updates. Each update plays samples x copies episodes."""
    torch.manual_seed(seed)
    model = Balance()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, no_targets = torch.zeros(500, samples, 1), torch.zeros(samples)
    with ulr_snn.attach(model, estimator, "negative_return", seed=seed, total_steps=updates) as ulr:
        for update in range(updates):
            optimizer.zero_grad()
            estimate = ulr.backward(x, no_targets)
            optimizer.step()
            if (update + 1) % 10 == 0:
                print(f"update {update + 1}: return {-estimate.loss.mean():.0f}")
    return model


def returns(model: Balance, episodes: int = 100) -> Tensor:
    """Returns the return of each episode, with deterministic firing and new start states."""
    with torch.no_grad():
        return model(torch.zeros(500, episodes, 1)).sum((0, 2))


def main(updates: int = 80) -> float:
    found = returns(trained(updates))
    print(f"mean return {found.mean():.1f}, least {found.min():.0f}, over {len(found)} episodes")
    return found.mean().item()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
