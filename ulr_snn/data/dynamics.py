"""Signals over time of eight dynamical systems, with a clock as the input.

Every system has a trial of 2 s, which repeats. A sample is a window of the repeated trial, from a random phase on. Its
target is the signal. Its input is a clock of the trial, as the high-dimensional temporal signals of Nicola & Clopath
(Nature Communications 8:2208, 2017): channel c is a half sine in part c of the trial, and zero elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ulr_snn.errors import UsageError

TRIAL = 2.0  # seconds until the signal repeats
CHANNELS = 10  # of the clock
FINE = 0.00025  # the longest step of the solver, in seconds
State = tuple[float, ...]
Name = Literal[
    "dynamics/sine",
    "dynamics/sawtooth",
    "dynamics/product",
    "dynamics/noisy-product",
    "dynamics/van-der-pol-harmonic",
    "dynamics/van-der-pol-relaxation",
    "dynamics/lorenz",
    "dynamics/accordion",
]


class SignalDataset(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a signal. Item i is `(x, y)`: x the clock `[T, channels]`, y the target signal `[T, dimensions]`.

    inputs: float32 `[T, n, channels]`. targets: float32 `[T, n, dimensions]`. dt: seconds of a time step.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, dt: float) -> None:
        self.inputs = inputs
        self.targets = targets
        self.dt = dt

    def __len__(self) -> int:
        return self.inputs.shape[1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.inputs[:, index], self.targets[:, index]


def sine(t: np.ndarray) -> np.ndarray:
    """Returns sin(2π 5 t)."""
    return np.sin(2 * np.pi * 5 * t)


def sawtooth(t: np.ndarray) -> np.ndarray:
    """Returns asin(sin(2π 5 t)) / (π / 2)."""
    return np.arcsin(np.sin(2 * np.pi * 5 * t)) * 2 / np.pi


def product(t: np.ndarray) -> np.ndarray:
    """Returns sin(8π t) sin(12π t)."""
    return np.sin(8 * np.pi * t) * np.sin(12 * np.pi * t)


def accordion(t: np.ndarray) -> np.ndarray:
    """Returns a sine whose frequency rises for 1 s, then the same backwards in time with its sign turned.

    For x = t mod 2: sin((2π + 4π x) x) if x <= 1, else -sin((6π - 4π (x - 1)) (2 - x)).
    """
    x = t % 2
    rising = np.sin((2 * np.pi + 4 * np.pi * x) * x)
    falling = -np.sin((6 * np.pi - 4 * np.pi * (x - 1)) * (2 - x))
    return np.where(x <= 1, rising, falling)


def van_der_pol(mu: float) -> Callable[[State], State]:
    """Returns the derivative of (x, y): (20 mu (x - x³ / 3 - y), 20 x / mu)."""

    def derivative(state: State) -> State:
        x, y = state
        return 20 * mu * (x - x**3 / 3 - y), 20 * x / mu

    return derivative


def lorenz(state: State) -> State:
    """Returns the derivative of (x, y, z): (10 (y - x), x (28 - z) - y, x y - 8/3 z)."""
    x, y, z = state
    return 10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z


def solve(derivative: Callable[[State], State], start: State, t: np.ndarray) -> np.ndarray:
    """Returns the states [T, D] at equidistant times t, from `start` at time 0, by Runge-Kutta of order 4."""

    def moved(state: State, slope: State, by: float) -> State:
        return tuple(a + by * b for a, b in zip(state, slope, strict=True))

    def run(state: State, seconds: float) -> State:
        count = math.ceil(seconds / FINE - 1e-9)
        for _ in range(count):
            h = seconds / count
            first = derivative(state)
            second = derivative(moved(state, first, h / 2))
            third = derivative(moved(state, second, h / 2))
            last = derivative(moved(state, third, h))
            mean = tuple((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(first, second, third, last, strict=True))
            state = moved(state, mean, h)
        return state

    states = [run(start, float(t[0]))]
    for seconds in np.diff(t):
        states.append(run(states[-1], float(seconds)))
    return np.array(states)


@dataclass(frozen=True)
class System:
    """A system. signal: the signal at times t, [T] or [T, D], about in [-1, 1]. noise: standard deviation of Gaussian
    noise, new at each time step of each window."""

    signal: Callable[[np.ndarray], np.ndarray]
    noise: float = 0.0


TRANSIENT = 5.0  # seconds before the trial of a differential equation
SYSTEMS = {
    "sine": System(sine),
    "sawtooth": System(sawtooth),
    "product": System(product),
    "noisy-product": System(product, noise=0.05),
    "van-der-pol-harmonic": System(lambda t: solve(van_der_pol(0.5), (0.1, 0.1), t + TRANSIENT)[:, 0] / 2),
    "van-der-pol-relaxation": System(lambda t: solve(van_der_pol(5.0), (0.1, 0.1), t + TRANSIENT)[:, 0] / 2),
    "lorenz": System(lambda t: (solve(lorenz, (-8.0, 8.0, 27.0), t + TRANSIENT) - [0, 0, 25]) / 20),
    "accordion": System(accordion),
}


@lru_cache(maxsize=32)
def trial(name: str, dt: float) -> np.ndarray:
    """Returns the signal of one trial without noise, [2 s / dt, dimensions]."""
    signal = SYSTEMS[name].signal(np.arange(round(TRIAL / dt)) * dt)
    return signal.reshape(len(signal), -1)


def clock(steps: int) -> np.ndarray:
    """Returns the clock [steps, channels] of a trial: a half sine a channel, one after another."""
    place = np.arange(steps) * CHANNELS / steps
    bump = np.sin(np.pi * (place % 1))
    return np.where(place.astype(int)[:, None] == np.arange(CHANNELS), bump[:, None], 0.0)


def _words(seed: int) -> list[int]:
    """Returns a seed in words of 32 bits, a single one for the seeds that fit."""
    return [seed] if 0 <= seed < 2**32 else [seed % 2**32, seed // 2**32 % 2**32]


def windows(
    name: str, seconds: float = 1.0, dt: float = 0.005, seed: int = 0, samples: int = 256
) -> tuple[SignalDataset, SignalDataset]:
    """Returns windows of a system's signal for training and for a test, as `(train, test)`.

    seconds: duration of a window. dt: seconds of a time step; 2 s is a whole number of steps, at least 10. seed: of the
    phases and of the noise; the test has other draws than the training. samples: number of windows for training; the
    test has a quarter of it. Raises UsageError for options that do not fit.
    """
    steps = round(TRIAL / dt) if dt > 0 else 0
    if steps < CHANNELS or abs(steps * dt - TRIAL) > 1e-6 * TRIAL:
        raise UsageError(f"dynamics got dt={dt}; a trial of {TRIAL:g} s has to be a whole number of steps, 10 or more")
    if not round(seconds / dt) >= 1:
        raise UsageError(f"dynamics got seconds={seconds}; a window has at least one step of {dt} s")
    if samples < 4:
        raise UsageError(f"dynamics got samples={samples}; give at least 4, of which the test has a quarter")
    drive, signal, noise = clock(steps), trial(name, dt), SYSTEMS[name].noise

    def part(number: int, count: int) -> SignalDataset:
        random = np.random.RandomState([*_words(seed), number])  # its draws are the same in all versions of NumPy
        places = (np.arange(round(seconds / dt))[:, None] + random.randint(steps, size=count)) % steps
        targets = signal[places]
        targets = targets + noise * random.standard_normal(targets.shape)
        return SignalDataset(torch.from_numpy(drive[places]).float(), torch.from_numpy(targets).float(), dt)

    return part(0, samples), part(1, samples // 4)
