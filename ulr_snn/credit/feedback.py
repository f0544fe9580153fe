"""Learned feedback: linear maps from what happens downstream to spikes, learned from forward passes.

outputs   a_it = sum_r q_r(t) (B_r e)_i,     e = ∂L/∂o, o the outputs, q_r smooth functions of time.
          B ≈ E[∂o/∂spike] is a likelihood ratio: o's half-differences over two copies, less all that the credit in
          use explains, are regressed on the innovations' z_r = sum_t q_r(t) ε_t, by small steps
          B += α mean over samples of z (what is unexplained)^T / v,     v = mean of z².
layers    a_it = (C g_t)_i,     g_t = ∂L/∂J_t, J the input current of a layer that the spikes feed.
          C ≈ E[∂J/∂spike] is regressed on the spikes of every pass, both less their mean over the samples: where J
          depends on nothing else that differs between samples, hardly anything is noise. Where it does, half-
          differences over two copies take the deviations' place. So each step solves its rows,
          C += η Z^T (Z Z^T + ridge)^-1 (what is unexplained), from three quarters of them, with the length η,
          between 0 and 1, that explains the last quarter best. It follows weights that move: where what it still
          explains shows that they do so slowly, it is learned every few steps only.
          A recurrent layer feeds itself, one step later (recurrence.py).
          Between wide layers g is replaced by its projection on the q_r: R products where every step by itself
          would cost T. g depends on the sample by the slopes of that layer's firing probabilities.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from ulr_snn.credit.maps import Path
from ulr_snn.credit.response import learned
from ulr_snn.kernels.precision import widened

PRODUCTS = 1 << 27  # multiply-adds that a step may spend on learning the feedback between two layers,
RICH = 16  # and so many times as many, while it is not known yet and rows make it known
RIDGE = 1e-3  # of the mean eigenvalue
UNEXPLAINED = 0.5  # of a current's variance: more than this, and one kernel does not do for all positions
EXACT_IN_TIME = 1 << 30  # multiply-adds up to which credit between layers takes every time step by itself
STALE = 0.01  # of a current's variance: C that leaves more than this unexplained is learned at every step
HELPED = 0.8  # of what was unexplained: a regression that leaves less than this has helped
SELDOM = 8  # steps from one regression to the next, at most
ENTRIES = 1 << 23  # entries of the largest matrix between two layers; beyond it, feedback comes from the outputs


Apply = Callable[[Tensor, Tensor], Tensor]


def time_basis(functions: int, steps: int, like: Tensor) -> Tensor:
    """Smooth orthogonal functions of time with mean square 1, [R, T]: a constant, then cosines.

    Of fewer steps than functions, the functions past the number of steps are zero.
    """
    t = (torch.arange(steps, dtype=like.dtype, device=like.device) + 0.5) / steps
    r = torch.arange(functions, dtype=like.dtype, device=like.device)[:, None]
    basis = math.sqrt(2) * torch.cos(math.pi * r * t)
    basis[0] = 1
    basis[steps:] = 0
    return basis


@dataclass
class Pace:
    """How often C into a layer is learned, and from how much. every: steps from one regression to the next; due: the
    step of that; rich: whether it may take more than the usual multiply-adds; helps: whether that helped the last
    time."""

    every: int = 1
    due: int = 0
    rich: bool = True
    helps: bool = True

    def wants(self, step: int) -> bool:
        """Whether a regression is due at this step."""
        return self.every == 1 or step >= self.due

    def see(self, before: float, after: float, step: int) -> None:
        """A regression at this step; C left these parts of the current's variance unexplained. Before it, that goes
        with the square of the distance that weights have moved since the last one. What a regression hardly lowers is
        not linear in the spikes, or not theirs, and more rows do not help."""
        if before > STALE:
            self.every = 1
        elif before < STALE / 4:
            self.every = min(2 * self.every, SELDOM)
        self.due = step + self.every
        if self.rich or before <= STALE:
            self.helps = before <= STALE or after < HELPED * before
        self.rich = before > STALE and self.helps


class LearnedFeedback:
    """The feedback matrices; each is created at zero when it is first refreshed.

    outputs[site]: B [R, N, O]. layers[site -> target]: C, the weight of its path. responses[site]: D of a black box
    (response.py), and the passes that it was learned from. paces[target]: how often all C into it are learned, by the
    edge's name where that is to itself. functions: R, smooth functions of time. rate: bounds the step of B,
    α <= rate * samples / (neurons * functions), so that noise in B stays below what it explains. It also stays well
    inside what is stable for the rows at hand, 2 / largest eigenvalue.
    """

    def __init__(self, functions: int, rate: float) -> None:
        self.functions, self.rate = functions, rate
        self.outputs: dict[str, Tensor] = {}
        self.layers: dict[str, Tensor] = {}
        self.responses: dict[str, tuple[Tensor, int]] = {}
        self.paces: dict[str, Pace] = {}

    def from_outputs(self, site: str, drawn: Tensor, error: Tensor) -> Tensor | None:
        """a [T, B, ...] in the shape of what the site draws, from errors e [B, O]; None before the first refresh."""
        if site not in self.outputs:
            return None
        basis = time_basis(self.functions, len(drawn), drawn)
        spread = torch.einsum("rno,bo->rbn", self.outputs[site], error)
        return torch.einsum("rt,rbn->tbn", basis, spread).view(drawn.shape)

    def from_layer(self, name: str, path: Path, currents: Tensor) -> Tensor | None:
        """a [T, B, *source] from ∂L/∂J [T, B, *target] of the layer they feed; None before the first refresh."""
        return self._along(name, path, currents, path.backward)

    def to_outputs(self, site: str, spikes: Tensor) -> Tensor:
        """B^T z [B, O]: what changes of spikes [T, B, ...] do to the outputs; `from_outputs` the other way."""
        z = self.project(spikes.flatten(2))
        return torch.einsum("rbn,rno->bo", z, self.outputs[site])

    def to_layer(self, name: str, path: Path, spikes: Tensor) -> Tensor | None:
        """What changes of spikes [T, B, *source] do to a layer's input current; `from_layer` the other way."""
        return self._along(name, path, spikes, path.forward)

    def _along(self, name: str, path: Path, sequence: Tensor, apply: Apply) -> Tensor | None:
        weight = self.weight(name, path)
        if weight is None:
            return None
        if path.products * sequence.shape[0] * sequence.shape[1] > EXACT_IN_TIME:
            basis = time_basis(self.functions, len(sequence), sequence)
            projected = self.project(sequence) / len(sequence)
            there = apply(weight, projected.flatten(0, 1)).unflatten(0, projected.shape[:2])
            return torch.einsum("rt,rb...->tb...", basis, there)
        return apply(weight, sequence.flatten(0, 1)).unflatten(0, sequence.shape[:2])

    def weight(self, name: str, path: Path) -> Tensor | None:
        """C; None before the first refresh, and where it belongs to another path (of a checkpoint, or given up)."""
        weight = self.layers.get(name)
        return weight if weight is not None and weight.shape == path.size else None

    def project(self, sequence: Tensor) -> Tensor:
        """z [R, B, ...] of a sequence [T, B, ...], on the functions of time."""
        basis = time_basis(self.functions, len(sequence), sequence)
        return torch.einsum("rt,tb...->rb...", basis, sequence)

    def refresh_outputs(self, z: dict[str, Tensor], unexplained: Tensor) -> None:
        """One step of every B from half-differences of z[site] [R, B, N] and of what is unexplained [B, O]."""
        powers = {site: mean_square(zs) for site, zs in z.items()}
        white = [(zs / powers[site].sqrt()[:, None, None]).transpose(0, 1).flatten(1) for site, zs in z.items()]
        stable = 0.5 / largest_eigenvalue(white)
        for site, zs in z.items():
            functions, samples, neurons = zs.shape
            if site not in self.outputs:
                self.outputs[site] = zs.new_zeros(self.functions, neurons, unexplained.shape[1])
            step = min(stable, self.rate * samples / (neurons * functions))
            moved = torch.einsum("rbn,bo->rno", zs, unexplained) / samples
            self.outputs[site] += step * moved / powers[site][:, None, None]

    def refresh_layer(self, paths: dict[str, Path], spikes: dict[str, Tensor], change: Tensor) -> tuple[float, float]:
        """Refreshes all C into one layer from what its input current [n, *target] and the spikes[name] [n, *source]
        deviate by; rows of one sample side by side; `change` is used up. Returns the part of the current's variance
        that C leaves unexplained: before, in all rows (1 where nothing varies), and after, in those that the step was
        not solved for, the last quarter (0 there). Where anything is not finite C stays, and counts as unknown."""
        varied, all_of_last = total_square(change), total_square(held_out([*paths.values()][-1].results(change))[1])
        left = change
        for name, path in paths.items():
            if self.weight(name, path) is None:
                self.layers[name] = change.new_zeros(path.size)
            left -= path.forward(self.layers[name], spikes[name])
        stale = total_square(left)
        for i, (name, path) in enumerate(paths.items(), 1):
            (inputs, last_inputs), (results, last) = held_out(path.inputs(spikes[name])), held_out(path.results(left))
            move = ridge_solution(inputs, results)
            effect = last_inputs @ move
            length = best_length(effect, last)
            move *= length
            move = torch.where(move.isfinite().all(), move, 0.0)
            self.layers[name] += move
            if i < len(paths):
                left -= path.forward(move, spikes[name])
        after = total_square(last - length * effect)
        stale, varied, after, all_of_last = torch.stack([stale, varied, after, all_of_last]).tolist()
        if not math.isfinite(stale + varied + after + all_of_last):
            return 1.0, 0.0
        return stale / varied if varied > 0 else 1.0, after / all_of_last if all_of_last > 0 else 0.0

    def learn_response(self, site: str, spikes: Tensor, z: Tensor, valid: Tensor) -> None:
        """One more pass for D: see `response.learned`."""
        kernel, passes = self.responses.get(site, (None, 0))
        self.responses[site] = learned(kernel, passes, spikes, z, valid), passes + 1

    def state_dict(self) -> dict[str, dict[str, Any]]:
        copies = ({name: m.clone() for name, m in kind.items()} for kind in (self.outputs, self.layers))
        responses = {site: (kernel.clone(), passes) for site, (kernel, passes) in self.responses.items()}
        paces = {target: astuple(pace) for target, pace in self.paces.items()}
        return dict(zip(("outputs", "layers"), copies, strict=True)) | {"responses": responses, "paces": paces}

    def load_state_dict(self, state: dict[str, dict[str, Any]], device: torch.device) -> None:
        found = state["responses"].items()
        self.responses = {site: (kernel.clone().to(device), passes) for site, (kernel, passes) in found}
        self.paces = {target: Pace(*pace) for target, pace in state.get("paces", {}).items()}
        self.outputs = {name: matrix.clone().to(device) for name, matrix in state["outputs"].items()}
        self.layers = {name: matrix.clone().to(device) for name, matrix in state["layers"].items()}


def edge(site: str, target: str) -> str:
    return f"{site} -> {target}"


def mean_square(z: Tensor) -> Tensor:
    """v [R] of z [R, B, N]; 1 where nothing was drawn differently, so that nothing is learned there."""
    power = z.square().mean((1, 2))
    return torch.where(power > 0, power, 1.0)


def total_square(values: Tensor) -> Tensor:
    """In at least single precision: half of it overflows at 65504."""
    return widened(values).square().sum()


def ridge_solution(inputs: Tensor, results: Tensor) -> Tensor:
    """The smallest weight [D, M] that gives results [m, M] from inputs [m, D], nearly; by the smaller Gram matrix.

    Zero where nothing deviates. In at least single precision, whatever the model's is.
    """
    z, y = widened(inputs), widened(results)
    wide = len(z) < z.shape[1]
    gram = z @ z.T if wide else z.T @ z
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    move = y.clone() if wide else z.T @ y
    failed = solve_in_place(gram, move)
    move = z.T @ move if wide else move
    return torch.where(failed == 0, move, 0.0).to(results.dtype)


def solve_in_place(gram: Tensor, right: Tensor) -> Tensor:
    """right [D, M] becomes gram^-1 right, of a symmetric gram [D, D] that becomes its Cholesky factor; both lie in
    memory by rows. Returns how the factorisation failed, if not 0. `torch.cholesky_solve` takes four matrices more."""
    factor, rows = gram.mT, right.mT  # by columns, as LAPACK has them: nothing is copied
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False, out=rows)
    torch.linalg.solve_triangular(factor, rows, upper=False, left=False, out=rows)
    return failed


def held_out(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Three quarters of rows to learn from, and the last to measure on."""
    known = len(rows) - len(rows) // 4
    return rows[:known], rows[known:]


def best_length(effect: Tensor, wanted: Tensor) -> Tensor:
    """η in [0, 1] for which η * effect comes closest to what is wanted, in the least squares; 1 where there is
    nothing to compare."""
    power = total_square(effect)
    return torch.where(power > 0, (widened(effect) * widened(wanted)).sum() / power, 1.0).clamp(0, 1)


def largest_eigenvalue(blocks: list[Tensor], iterations: int = 6) -> float:
    """Largest eigenvalue of the empirical covariance of features [S, D], given as blocks of columns.

    All matrices are updated together, so their common step must stay below 2 / this: in wide layers it is about
    D / S, in small ones it shows how correlated the innovations are. By power iteration from the row sums.
    """
    samples = len(blocks[0])
    row = torch.stack([block.sum(1) for block in blocks]).sum(0)
    row = row + row.abs().mean() + 1.0  # not orthogonal to everything, nor zero
    value = 0.0
    for _ in range(iterations):
        row = row / row.norm()
        row = torch.stack([block @ (block.T @ row) for block in blocks]).sum(0) / samples
        value = row.norm().item()
        if value == 0.0:  # no copy fired differently: any step is stable, and none moves anything
            return 1.0
    return value
