"""Learned feedback: linear maps from downstream gradients to the credit of spikes, learned from forward passes.

outputs   a_it = sum_r q_r(t) (B_r e)_i,     e = ∂L/∂o, o the outputs, q_r smooth functions of time.
          B ≈ E[∂o/∂spike] is a likelihood ratio. The residual r is the half-difference of o over two copies, minus
          all that the credit in use explains. It is regressed on z_r = sum_t q_r(t) ε_t of the innovations by small
          steps  B += α mean over samples of z r^T / v,     v = mean of z².
layers    a_it = (C g_t)_i,     g_t = ∂L/∂J_t, J the input current of a layer that the spikes feed.
          C ≈ E[∂J/∂spike] is the regression of J on the spikes Z of every pass, both minus their mean over the
          samples. The regression is nearly free of noise if J depends on nothing else that differs between samples.
          Otherwise half-differences over two copies replace the deviations. Each step solves for its residual r,
          C += η Z^T (Z Z^T + ridge)^-1 r, on three quarters of its rows, with the length η between 0 and 1 that
          explains the last quarter best. C follows moving weights. While they move slowly, as the variance that C
          explains shows, C is learned only every few steps.
          A recurrent layer feeds itself, one step later (recurrence.py).
          Between wide layers g is replaced by its projection on the q_r, which costs R products instead of T. g
          depends on the sample by the slopes of that layer's firing probabilities.
"""

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from ulr_snn.credit.maps import Path
from ulr_snn.credit.response import learned
from ulr_snn.kernels import ranks
from ulr_snn.kernels.precision import widened

RIDGE = 1e-3  # ridge, as a share of the mean eigenvalue
STALE = 0.01  # share of a current's variance: if C leaves more unexplained, it is learned at every step
HELPED = 0.8  # a regression has helped if the unexplained variance falls below this share of its old value
SELDOM = 8  # largest number of steps between two regressions


@dataclass(frozen=True)
class FeedbackLimits:
    """Sizes at which learned feedback becomes coarser, and effort that goes into learning it.

    entries: entries of the largest matrix between two layers; beyond it, feedback comes from the outputs.
    exact_in_time: multiply-adds up to which credit between layers is computed for every time step.
    products: multiply-adds that a step may spend on learning the feedback between two layers.
    large: factor on `products` while the feedback is unknown and more rows help.
    unexplained: share of a current's variance; if more is unexplained, positions do not share one kernel.
    warm_up: number of first steps that all refresh the feedback that needs pairs, because it starts from zero.
    """

    entries: int = 1 << 23
    exact_in_time: int = 1 << 30
    products: int = 1 << 27
    large: int = 16
    unexplained: float = 0.5
    warm_up: int = 8


Apply = Callable[[Tensor, Tensor], Tensor]


def time_basis(functions: int, steps: int, like: Tensor) -> Tensor:
    """Returns smooth orthogonal functions of time with mean square 1, [R, T]: a constant, then cosines. With fewer
    steps than functions, the functions past the number of steps are zero."""
    t = (torch.arange(steps, dtype=like.dtype, device=like.device) + 0.5) / steps
    r = torch.arange(functions, dtype=like.dtype, device=like.device)[:, None]
    basis = math.sqrt(2) * torch.cos(math.pi * r * t)
    basis[0] = 1
    basis[steps:] = 0
    return basis


@dataclass
class RegressionSchedule:
    """The schedule of the regressions of all C into a layer. every: steps from one regression to the next. due: step of
    the next regression. large: it may take more than the usual multiply-adds. large_helps: this helped the last
    time."""

    every: int = 1
    due: int = 0
    large: bool = True
    large_helps: bool = True

    def wants(self, step: int) -> bool:
        """Returns whether a regression is due at this step."""
        return self.every == 1 or step >= self.due

    def note(self, before: float, after: float, step: int) -> None:
        """Adapts the schedule after a regression. before, after: shares of the current's variance without explanation.
        `before` grows with the square of the distance that weights have moved since the last regression. If a
        regression hardly lowers it, the rest is not linear in these spikes, and more rows do not help."""
        if before > STALE:
            self.every = 1
        elif before < STALE / 4:
            self.every = min(2 * self.every, SELDOM)
        self.due = step + self.every
        if self.large or before <= STALE:
            self.large_helps = before <= STALE or after < HELPED * before
        self.large = before > STALE and self.large_helps


class LearnedFeedback:
    """The learned feedback matrices. Each is created at zero when it is first refreshed.

    outputs[site]: B [R, N, O]. layers[site -> target]: C, the weight of its path. responses[site]: D of a black box
    (response.py) and its number of passes. paces[target]: the schedule of all C into the target; the edge's name is the
    key for recurrent weights. functions: R, the number of functions of time. rate: bounds the step of B,
    α <= rate * samples / (neurons * functions), so that noise in B stays below the explained variance. α also stays
    well below the stable bound for the rows at hand, 2 / largest eigenvalue.
    """

    def __init__(self, functions: int, rate: float, limits: FeedbackLimits = FeedbackLimits()) -> None:
        self.functions, self.rate, self.limits = functions, rate, limits
        self.outputs: dict[str, Tensor] = {}
        self.layers: dict[str, Tensor] = {}
        self.responses: dict[str, tuple[Tensor, int]] = {}
        self.paces: dict[str, RegressionSchedule] = {}

    def from_outputs(self, site: str, drawn: Tensor, error: Tensor) -> Tensor | None:
        """Returns a [T, B, ...] in the shape of `drawn` from errors e [B, O]; None before the first refresh."""
        if site not in self.outputs:
            return None
        basis = time_basis(self.functions, len(drawn), drawn)
        spread = torch.einsum("rno,bo->rbn", self.outputs[site], error)
        return torch.einsum("rt,rbn->tbn", basis, spread).view(drawn.shape)

    def from_layer(self, name: str, path: Path, currents: Tensor) -> Tensor | None:
        """Returns a [T, B, *source] from ∂L/∂J [T, B, *target] of the fed layer; None before the first refresh."""
        return self._along(name, path, currents, path.backward)

    def to_outputs(self, site: str, spikes: Tensor) -> Tensor:
        """Returns B^T z [B, O], the change of outputs by changes of spikes [T, B, ...]: `from_outputs` transposed."""
        z = self.project(spikes.flatten(2))
        return torch.einsum("rbn,rno->bo", z, self.outputs[site])

    def to_layer(self, name: str, path: Path, spikes: Tensor) -> Tensor | None:
        """Returns the change of a layer's current by changes of spikes [T, B, *source]: `from_layer` transposed."""
        return self._along(name, path, spikes, path.forward)

    def _along(self, name: str, path: Path, sequence: Tensor, apply: Apply) -> Tensor | None:
        weight = self.weight(name, path)
        if weight is None:
            return None
        if path.products * sequence.shape[0] * sequence.shape[1] > self.limits.exact_in_time:
            basis = time_basis(self.functions, len(sequence), sequence)
            projected = self.project(sequence) / len(sequence)
            there = apply(weight, projected.flatten(0, 1)).unflatten(0, projected.shape[:2])
            return torch.einsum("rt,rb...->tb...", basis, there)
        return apply(weight, sequence.flatten(0, 1)).unflatten(0, sequence.shape[:2])

    def weight(self, name: str, path: Path) -> Tensor | None:
        """Returns C; None before the first refresh, or if C belongs to another path (an old one, or a checkpoint's)."""
        weight = self.layers.get(name)
        return weight if weight is not None and weight.shape == path.size else None

    def project(self, sequence: Tensor) -> Tensor:
        """Projects a sequence [T, B, ...] on the functions of time, z [R, B, ...]."""
        basis = time_basis(self.functions, len(sequence), sequence)
        return torch.einsum("rt,tb...->rb...", basis, sequence)

    def refresh_outputs(self, z: dict[str, Tensor], unexplained: Tensor) -> None:
        """Updates every B from half-differences of z[site] [R, B, N] and of the unexplained outputs [B, O]."""
        powers = {site: mean_square(zs) for site, zs in z.items()}
        white = [(zs / powers[site].sqrt()[:, None, None]).transpose(0, 1).flatten(1) for site, zs in z.items()]
        stable = 0.5 / largest_eigenvalue(white)
        for site, zs in z.items():
            functions, samples, neurons = len(zs), ranks.joined(zs.shape[1]), zs.shape[2]
            if site not in self.outputs:
                self.outputs[site] = zs.new_zeros(self.functions, neurons, unexplained.shape[1])
            step = min(stable, self.rate * samples / (neurons * functions))
            moved = ranks.sums(torch.einsum("rbn,bo->rno", zs, unexplained))[0] / samples
            self.outputs[site] += step * moved / powers[site][:, None, None]

    def refresh_layer(self, paths: dict[str, Path], spikes: dict[str, Tensor], change: Tensor) -> tuple[float, float]:
        """Updates all C into one layer from deviations of its current [n, *target] and of spikes[name] [n, *source].

        Rows of one sample are adjacent; `change` is overwritten. Returns the share of the current's variance that C
        leaves unexplained: before the update in all rows (1 if nothing varies), and after it in the last quarter, which
        the update is not solved for (0 if nothing varies). If anything is not finite, C stays and counts as unknown."""
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
        # The same numbers on all ranks, because they decide when the next regression is due.
        found = ranks.averaged([torch.stack([stale, varied, after, all_of_last])])[0]
        stale, varied, after, all_of_last = found.tolist()
        if not math.isfinite(stale + varied + after + all_of_last):
            return 1.0, 0.0
        return stale / varied if varied > 0 else 1.0, after / all_of_last if all_of_last > 0 else 0.0

    def learn_response(self, site: str, spikes: Tensor, z: Tensor, valid: Tensor) -> None:
        """Updates D with one more pass, see `response.learned`."""
        kernel, passes = self.responses.get(site, (None, 0))
        self.responses[site] = learned(kernel, passes, spikes, z, valid), passes + 1

    def state_dict(self) -> dict[str, dict[str, Any]]:
        return {
            "outputs": {name: matrix.clone() for name, matrix in self.outputs.items()},
            "layers": {name: matrix.clone() for name, matrix in self.layers.items()},
            "responses": {site: (kernel.clone(), passes) for site, (kernel, passes) in self.responses.items()},
            "paces": {target: astuple(pace) for target, pace in self.paces.items()},
        }

    def load_state_dict(self, state: dict[str, dict[str, Any]], device: torch.device) -> None:
        found = state["responses"].items()
        self.responses = {site: (kernel.clone().to(device), passes) for site, (kernel, passes) in found}
        self.paces = {target: RegressionSchedule(*pace) for target, pace in state.get("paces", {}).items()}
        self.outputs = {name: matrix.clone().to(device) for name, matrix in state["outputs"].items()}
        self.layers = {name: matrix.clone().to(device) for name, matrix in state["layers"].items()}


def edge(site: str, target: str) -> str:
    """Returns the name of the path from a site to a target."""
    return f"{site} -> {target}"


def mean_square(z: Tensor) -> Tensor:
    """Returns v [R] of z [R, B, N]; 1 where the copies drew the same, so that nothing is learned there."""
    (power,) = ranks.averaged([z.square().mean((1, 2))])
    return torch.where(power > 0, power, 1.0)


def total_square(values: Tensor) -> Tensor:
    """Returns the sum of squares in at least single precision, because half precision overflows at 65504."""
    return widened(values).square().sum()


def ridge_solution(inputs: Tensor, results: Tensor) -> Tensor:
    """Returns the ridge solution [D, M] of results [m, M] ≈ inputs [m, D] @ weight, by the smaller Gram matrix. It is
    zero if nothing deviates. It is computed in at least single precision."""
    z, y = widened(inputs), widened(results)
    wide = len(z) < z.shape[1]
    gram = z @ z.T if wide else z.T @ z
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    move = y.clone() if wide else z.T @ y
    failed = solve_in_place(gram, move)
    move = z.T @ move if wide else move
    return torch.where(failed == 0, move, 0.0).to(results.dtype)


def solve_in_place(gram: Tensor, right: Tensor) -> Tensor:
    """Overwrites right [D, M] by gram^-1 right, and the symmetric gram [D, D] by its Cholesky factor, both row-major.
    Returns 0 if the factorisation succeeds. `torch.cholesky_solve` needs the memory of four more matrices."""
    factor, rows = gram.mT, right.mT  # column-major, as LAPACK needs them, so that nothing is copied
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, failed))
    torch.linalg.solve_triangular(factor.mT, rows, upper=True, left=False, out=rows)
    torch.linalg.solve_triangular(factor, rows, upper=False, left=False, out=rows)
    return failed


def held_out(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Splits rows into three quarters to learn from, and the last quarter to measure on."""
    known = len(rows) - len(rows) // 4
    return rows[:known], rows[known:]


def best_length(effect: Tensor, wanted: Tensor) -> Tensor:
    """Returns η in [0, 1] for which η * effect is the least-squares fit of `wanted`; 1 if the effect is zero."""
    power = total_square(effect)
    return torch.where(power > 0, (widened(effect) * widened(wanted)).sum() / power, 1.0).clamp(0, 1)


def largest_eigenvalue(blocks: list[Tensor], iterations: int = 6) -> float:
    """Returns the largest eigenvalue of the empirical covariance of features [S, D], given as blocks of columns.

    All matrices are updated together, so their common step must stay below 2 / eigenvalue. In wide layers the
    eigenvalue is about D / S; in small layers it shows how correlated the innovations are. The method is power
    iteration from the row sums.
    """
    samples = ranks.joined(len(blocks[0]))

    def norm(row: Tensor) -> Tensor:
        return ranks.sums(row.square().sum())[0].sqrt()

    row = torch.stack([block.sum(1) for block in blocks]).sum(0)
    row = row + ranks.mean(row.abs()) + 1.0  # not zero, and not orthogonal to all features
    size = norm(row)
    value = 0.0
    for _ in range(iterations):
        row = row / size
        features = ranks.sums(*[block.T @ row for block in blocks])
        row = torch.stack([block @ each for block, each in zip(blocks, features, strict=True)]).sum(0) / samples
        size = norm(row)
        value = size.item()
        if value == 0.0:  # no copies differ: any step is stable and has no effect
            return 1.0
    return value
