"""The search for a method's settings: a grid, halved once, then neighbours until the optimum is interior."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]
Score = tuple[float, float]  # validation accuracy, minus validation loss: the loss decides between equals
Evaluate = Callable[[list[Settings], float], list[Score]]  # settings, fraction of the epochs -> scores


def key(settings: Settings) -> str:
    """Settings as one line that is the same for equal settings."""
    return json.dumps(settings, sort_keys=True)


@dataclass
class Block:
    """A grid: every combination of values. Ordered axes are geometric and may be extended, choices may not.

    limits: bounds that an axis is never extended beyond, {axis: [low, high]}.
    """

    ordered: dict[str, list[float]]
    choices: dict[str, list[Any]]
    limits: dict[str, list[float]]

    @classmethod
    def of(cls, written: dict[str, Any]) -> "Block":
        """From a block of grid.json."""
        ordered = {axis: sorted(values) for axis, values in written["ordered"].items()}
        return cls(ordered, written.get("choices", {}), written.get("limits", {}))

    def points(self) -> list[Settings]:
        axes = {**self.ordered, **self.choices}
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]

    def holds(self, point: Settings) -> bool:
        same = set(point) == {*self.ordered, *self.choices}
        return same and all(point[axis] in values for axis, values in self.choices.items())

    def neighbours(self, point: Settings) -> Iterator[Settings]:
        """One step down and up each ordered axis, extending the axis where the point lies on its edge."""
        for axis, values in self.ordered.items():
            self._extend(axis, point[axis])
            at = values.index(point[axis])
            for value in values[max(0, at - 1) : at] + values[at + 1 : at + 2]:
                yield {**point, axis: value}

    def _extend(self, axis: str, value: float) -> None:
        values = self.ordered[axis]
        low, high = self.limits.get(axis, (0.0, float("inf")))
        if value == values[0]:
            lower = _rounded(value * value / values[1])
            values[:0] = [lower] if lower >= low and lower > 0 else []
        if value == values[-1]:
            upper = _rounded(value * value / values[-2])
            values += [upper] if upper <= high else []


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def search(blocks: list[Block], evaluate: Evaluate, short: float, keep: float, rounds: int) -> tuple[Settings, bool]:
    """The best settings, and whether they beat their neighbours on every ordered axis (else rounds ran out).

    All points run for the fraction `short` of the epochs, the best `keep` of them for all epochs; then the
    neighbours of the best so far, and so on until no neighbour is better. So the optimum is never on an edge.
    """
    points = [point for block in blocks for point in block.points()]
    first = evaluate(points, short)
    ranked = sorted(range(len(points)), key=lambda i: first[i], reverse=True)
    fresh = [points[i] for i in ranked[: max(1, round(keep * len(points)))]]
    scores: dict[str, Score] = {}
    for _ in range(rounds + 1):
        scores.update(zip(map(key, fresh), evaluate(fresh, 1.0), strict=True))
        best = json.loads(max(scores, key=scores.__getitem__))
        block = next(block for block in blocks if block.holds(best))
        fresh = [point for point in block.neighbours(best) if key(point) not in scores]
        if not fresh:
            return best, True
    return best, False
