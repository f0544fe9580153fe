"""Learned feedback: linear maps from what happens downstream to spikes, learned from forward passes.

outputs   a_it = sum_r q_r(t) (B_r e)_i,     e = ∂L/∂o, o the outputs, q_r smooth functions of time.
          B ≈ E[∂o/∂spike] is a likelihood ratio: o's half-differences over two copies, less all that the credit in
          use explains, are regressed on the innovations' z_r = sum_t q_r(t) ε_t.
layers    a_it = (C g_t)_i,     g_t = ∂L/∂J_t, J the input current of a layer that the spikes feed.
          C ≈ E[∂J/∂spike] is regressed, one row a time step, on the spikes' half-differences z = s_t, which
          leave less unexplained than innovations do: nothing but these spikes differs between the copies there.
          Between wide layers g is replaced by its projection on the q_r: R products where every step by itself
          would cost T. g depends on the sample by the slopes of that layer's firing probabilities.

Both by  M += α mean over rows of z (what is unexplained)^T / v,     v = mean of z².
"""

import math

import torch
from torch import Tensor

PRODUCTS = 1 << 31  # multiply-adds that one refresh may spend on the feedback into one layer
EXACT_IN_TIME = 1 << 29  # multiply-adds up to which credit between layers takes every time step by itself
ENTRIES = 1 << 23  # entries of the largest matrix between two layers; beyond it, feedback comes from the outputs


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


class Feedback:
    """The feedback matrices; each is created at zero when it is first refreshed.

    outputs[site]: B [R, N, O]. layers[site -> target]: C [N, N_target]. functions: R, smooth functions of time.
    rate: bounds the step of B, α <= rate * samples / (neurons * functions), so that noise in B stays below what it
    explains. Every step also stays well inside what is stable for the rows at hand, 2 / largest eigenvalue.
    """

    def __init__(self, functions: int, rate: float) -> None:
        self.functions, self.rate = functions, rate
        self.outputs: dict[str, Tensor] = {}
        self.layers: dict[str, Tensor] = {}

    def from_outputs(self, site: str, spikes: Tensor, error: Tensor) -> Tensor | None:
        """a [T, B, ...] in the shape of `spikes`, from errors e [B, O]; None before the first refresh."""
        if site not in self.outputs:
            return None
        basis = time_basis(self.functions, len(spikes), spikes)
        spread = torch.einsum("rno,bo->rbn", self.outputs[site], error)
        return torch.einsum("rt,rbn->tbn", basis, spread).view(spikes.shape)

    def from_layer(self, site: str, target: str, spikes: Tensor, currents: Tensor) -> Tensor | None:
        """a [T, B, ...] in the shape of `spikes`, from ∂L/∂J [T, B, ...] of the layer they feed."""
        matrix = self.layers.get(edge(site, target))
        if matrix is None:
            return None
        currents = currents.flatten(2)
        if exact_in_time(matrix, spikes):
            return (currents @ matrix.T).view(spikes.shape)
        basis = time_basis(self.functions, len(spikes), spikes)
        mean = torch.einsum("rt,tbn->rbn", basis / len(spikes), currents)
        return torch.einsum("rt,rbn->tbn", basis, mean @ matrix.T).view(spikes.shape)

    def to_outputs(self, site: str, spikes: Tensor) -> Tensor:
        """B^T z [B, O]: what changes of spikes [T, B, ...] do to the outputs; `from_outputs` the other way."""
        z = self.project(spikes.flatten(2))
        return torch.einsum("rbn,rno->bo", z, self.outputs[site])

    def to_layer(self, site: str, target: str, spikes: Tensor) -> Tensor | None:
        """C^T z [T, B, N_target]: what changes of spikes do to a layer's input current; `from_layer` the other way."""
        matrix = self.layers.get(edge(site, target))
        if matrix is None:
            return None
        spikes = spikes.flatten(2)
        if exact_in_time(matrix, spikes):
            return spikes @ matrix
        basis = time_basis(self.functions, len(spikes), spikes)
        return torch.einsum("rt,rbn->tbn", basis / len(spikes), self.project(spikes) @ matrix)

    def project(self, innovations: Tensor) -> Tensor:
        """z [R, B, N] of innovations [T, B, N]."""
        basis = time_basis(self.functions, len(innovations), innovations)
        return torch.einsum("rt,tbn->rbn", basis, innovations)

    def refresh_outputs(self, z: dict[str, Tensor], unexplained: Tensor) -> None:
        """One step of every B from half-differences of z[site] [R, B, N] and of what is unexplained [B, O]."""
        powers = {site: mean_square(zs, (1, 2)) for site, zs in z.items()}
        white = [(zs / powers[site].sqrt()[:, None, None]).transpose(0, 1).flatten(1) for site, zs in z.items()]
        stable = 0.5 / largest_eigenvalue(white)
        for site, zs in z.items():
            functions, samples, neurons = zs.shape
            if site not in self.outputs:
                self.outputs[site] = zs.new_zeros(self.functions, neurons, unexplained.shape[1])
            step = min(stable, self.rate * samples / (neurons * functions))
            moved = torch.einsum("rbn,bo->rno", zs, unexplained) / samples
            self.outputs[site] += step * moved / powers[site][:, None, None]

    def refresh_layer(self, target: str, z: dict[str, Tensor], change: Tensor, times: Tensor) -> None:
        """Steps of every C into `target`, one for each of `times`, from z[site] [T, B, N] and ΔJ [T, B, N_target]."""
        for site, zs in z.items():
            if edge(site, target) not in self.layers:
                self.layers[edge(site, target)] = change.new_zeros(zs.shape[2], change.shape[2])
        matrices = {site: self.layers[edge(site, target)] for site in z}
        for t in times.tolist():
            rows = {site: zs[t] for site, zs in z.items()}
            unexplained = change[t] - torch.stack([row @ matrices[site] for site, row in rows.items()]).sum(0)
            powers = {site: mean_square(row, (0, 1)) for site, row in rows.items()}
            step = 1.0 / largest_eigenvalue([row / powers[site].sqrt() for site, row in rows.items()])
            for site, row in rows.items():
                matrices[site].addmm_(row.T, unexplained, alpha=step / (len(row) * powers[site].item()))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        copies = ({name: m.clone() for name, m in kind.items()} for kind in (self.outputs, self.layers))
        return dict(zip(("outputs", "layers"), copies, strict=True))

    def load_state_dict(self, state: dict[str, dict[str, Tensor]], device: torch.device) -> None:
        self.outputs = {name: matrix.clone().to(device) for name, matrix in state["outputs"].items()}
        self.layers = {name: matrix.clone().to(device) for name, matrix in state["layers"].items()}


def exact_in_time(matrix: Tensor, sequence: Tensor) -> bool:
    """Whether every time step of a sequence [T, B, ...] may go through the matrix by itself."""
    return matrix.numel() * sequence.shape[0] * sequence.shape[1] <= EXACT_IN_TIME


def edge(site: str, target: str) -> str:
    return f"{site} -> {target}"


def mean_square(z: Tensor, dims: tuple[int, ...]) -> Tensor:
    """v; 1 where nothing was drawn differently, so that nothing is learned there."""
    power = z.square().mean(dims)
    return torch.where(power > 0, power, 1.0)


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
