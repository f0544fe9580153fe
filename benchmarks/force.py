"""FORCE and full-FORCE: spiking reservoirs that learn to generate a signal by recursive least squares (RLS).

FORCE (Nicola & Clopath, Nature Communications 8:2208, 2017): fixed random recurrent weights, and feedback of the output
z = w r into the reservoir. RLS learns w on the error z - f.
full-FORCE (DePasquale et al., PLoS ONE 13:e0191527, 2018; spiking: arXiv 2205.13585): a teacher reservoir receives the
target f. RLS learns all recurrent weights J of a second net on the error J r - (J_D r_D + Q u f), and w on z - f.

The neurons are leaky integrate-and-fire, with the constants of Nicola & Clopath. They run in steps of 0.5 ms. Inputs,
targets and noise are held for a time step of the data, and weights are updated once in it.
"""

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

SUB = 0.0005  # seconds of a step of the simulation
MEMBRANE, RISE, DECAY, REFRACTORY = 0.010, 0.002, 0.020, 0.002  # time constants in seconds
RESET, THRESHOLD = -65.0, -40.0  # in mV; a constant current holds the membrane at the threshold
DENSITY = 0.1  # of the fixed recurrent weights
VOLTAGE, WAIT, CURRENT, CURRENT_RISE, RATE, RATE_RISE = range(6)  # rows of a state [6, N]
WAITS = round(REFRACTORY / SUB)


@dataclass
class Net:
    """A trained reservoir. Shapes: weights [N, N], feedback [N, D], readout [D, N], drive [N, C], start [6, N]."""

    weights: np.ndarray
    feedback: np.ndarray
    readout: np.ndarray
    drive: np.ndarray
    start: np.ndarray
    dt: float

    def run(self, x: np.ndarray, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, float]:
        """Returns outputs [T, B, D] for inputs [T, B, C] from the start state, and spikes of a neuron a second.

        noise: standard deviation that noise in the current alone gives a membrane, over threshold minus reset.
        """
        steps, samples = x.shape[:2]
        random, sigma = np.random.default_rng(seed), noise * noise_current(self.dt)
        outputs, spikes = np.empty((steps, samples, len(self.readout))), 0
        for b in range(samples):
            current = x[:, b] @ self.drive.T
            if noise:
                current += sigma * random.standard_normal(current.shape)
            learning = self.readout.copy(), np.zeros((1, 1)), np.zeros((steps, len(self.readout))), False
            net = self.weights, self.feedback
            spikes += force(self.start.copy(), *net, current, *learning, outputs[:, b], substeps(self.dt))
        return outputs, spikes / (self.weights.shape[0] * samples * steps * self.dt)


@dataclass(frozen=True)
class Force:
    """FORCE. gain: of the fixed weights. feedback: of the output, in mV. drive: of the inputs, in mV. rate: P starts as
    `rate` times the identity."""

    gain: float = 0.04
    feedback: float = 10.0
    drive: float = 10.0
    rate: float = 1e-5
    neurons: int = 400

    def fit(self, x: np.ndarray, y: np.ndarray, dt: float, seed: int) -> Net:
        """Learns from inputs [T, C] and targets [T, D] of one run without a reset. Raises FloatingPointError if the
        weights diverge."""
        random = np.random.default_rng(seed)
        net = untrained(self, random, x.shape[1], y.shape[1], dt)
        outputs, current, p = np.empty(y.shape), x @ net.drive.T, self.rate * np.eye(self.neurons)
        arguments = net.weights, net.feedback, current, net.readout, p, np.ascontiguousarray(y)
        force(net.start.copy(), *arguments, True, outputs, substeps(dt))
        return checked(net)


@dataclass(frozen=True)
class FullForce:
    """full-FORCE. gain: of the teacher's fixed weights. feedback: of the target into the teacher, in mV. drive: of the
    inputs into both nets, in mV. rate: as in `Force`."""

    gain: float = 0.04
    feedback: float = 10.0
    drive: float = 10.0
    rate: float = 1e-5
    neurons: int = 400

    def fit(self, x: np.ndarray, y: np.ndarray, dt: float, seed: int) -> Net:
        """Learns as `Force.fit`."""
        random = np.random.default_rng(seed)
        net = untrained(self, random, x.shape[1], y.shape[1], dt)
        teacher, hint = net.weights, y @ net.feedback.T
        net.weights, net.feedback = np.zeros_like(teacher), np.zeros_like(net.feedback)
        current, p = x @ net.drive.T, self.rate * np.eye(self.neurons)
        states = net.start.copy(), net.start.copy()
        full_force(*states, teacher, net.weights, net.readout, p, current, hint, y, substeps(dt))
        return checked(net)


def untrained(method: Force | FullForce, random: np.random.Generator, inputs: int, outputs: int, dt: float) -> Net:
    """Draws a net with a readout of zero. Columns of the weights are contiguous, since a spike reads a column."""
    n = method.neurons
    sparse = random.standard_normal((n, n)) * (random.random((n, n)) < DENSITY)
    weights = np.asfortranarray(method.gain * sparse / (math.sqrt(n) * DENSITY))
    feedback = method.feedback * random.uniform(-1, 1, (n, outputs))
    drive = method.drive * random.uniform(-1, 1, (n, inputs))
    start = np.zeros((6, n))
    start[VOLTAGE] = random.uniform(RESET, THRESHOLD, n)
    return Net(weights, feedback, np.zeros((outputs, n)), drive, start, dt)


def checked(net: Net) -> Net:
    if not (np.isfinite(net.readout).all() and np.isfinite(net.weights).all()):
        raise FloatingPointError("recursive least squares diverged")
    return net


def substeps(dt: float) -> int:
    return max(1, round(dt / SUB))


def noise_current(dt: float) -> float:
    """Returns the standard deviation of a current, held for dt each time, that alone gives the membrane a standard
    deviation of threshold minus reset."""
    a = math.exp(-dt / MEMBRANE)
    return (THRESHOLD - RESET) * math.sqrt((1 + a) / (1 - a))


@njit(cache=True)
def advance(state, weights, current):  # pragma: no cover
    """Makes one step of the simulation in place. Returns the number of spikes."""
    count, n = 0, state.shape[1]
    jump = 1 / (RISE * DECAY)
    rise, decay = math.exp(-SUB / RISE), math.exp(-SUB / DECAY)
    fired = np.empty(n, np.int64)
    for i in range(n):
        if state[WAIT, i] > 0:
            state[WAIT, i] -= 1
        else:
            total = state[CURRENT, i] + current[i] + THRESHOLD
            state[VOLTAGE, i] += SUB / MEMBRANE * (total - state[VOLTAGE, i])
        if state[VOLTAGE, i] >= THRESHOLD:
            state[VOLTAGE, i], state[WAIT, i] = RESET, WAITS
            fired[count] = i
            count += 1
        state[CURRENT, i] = state[CURRENT, i] * rise + state[CURRENT_RISE, i] * SUB
        state[CURRENT_RISE, i] *= decay
        state[RATE, i] = state[RATE, i] * rise + state[RATE_RISE, i] * SUB
        state[RATE_RISE, i] *= decay
    for k in range(count):
        j = fired[k]
        state[RATE_RISE, j] += jump
        for i in range(n):
            state[CURRENT_RISE, i] += jump * weights[i, j]
    return count


@njit(cache=True, fastmath=True)
def least_squares(p, r):  # pragma: no cover
    """Updates P by one row r, in place: P -= P r (P r)ᵀ / (1 + rᵀ P r). Returns the gain P r / (1 + rᵀ P r)."""
    k = p @ r
    scale = 1 / (1 + r @ k)
    for i in range(len(r)):
        by = scale * k[i]
        for j in range(len(r)):
            p[i, j] -= by * k[j]
    return scale * k


@njit(cache=True)
def force(state, weights, feedback, current, readout, p, targets, learn, outputs, substeps):  # pragma: no cover
    """Runs a reservoir on currents [T, N], in place. With `learn`, updates the readout and P at each time step."""
    count = 0
    z = readout @ state[RATE]
    for t in range(len(current)):
        for _ in range(substeps):
            count += advance(state, weights, current[t] + feedback @ z)
            z = readout @ state[RATE]
        outputs[t] = z
        if learn:
            gain = least_squares(p, state[RATE])
            for d in range(len(readout)):
                readout[d] -= (z[d] - targets[t, d]) * gain
            z = readout @ state[RATE]
    return count


@njit(cache=True, fastmath=True)
def full_force(state, other, teacher, weights, readout, p, current, hint, targets, substeps):  # pragma: no cover
    """Trains weights [N, N] and readout in place, on the currents of the teacher, whose state is `other`."""
    n = len(p)
    for t in range(len(current)):
        for _ in range(substeps):
            advance(other, teacher, current[t] + hint[t])
            advance(state, weights, current[t])
        r = state[RATE].copy()
        error = other[CURRENT] + hint[t] - state[CURRENT]
        wrong = readout @ r - targets[t]
        gain = least_squares(p, r)
        for j in range(n):
            for i in range(n):
                weights[i, j] += error[i] * gain[j]
        state[CURRENT] += error * (gain @ r)  # stays J r, with the new weights also for spikes of the past
        state[CURRENT_RISE] += error * (gain @ state[RATE_RISE])
        for d in range(len(readout)):
            readout[d] -= wrong[d] * gain
