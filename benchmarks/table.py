"""From runs to the table: means over seeds, and paired differences with 95 % intervals."""

import csv
import math
from pathlib import Path
from statistics import mean, stdev

PEER = "bptt-tuned"
COLUMNS = (
    "task",
    "method",
    "seeds",
    "accuracy",
    "accuracy_sd",
    "accuracy_stochastic",
    "minus_bptt",
    "minus_bptt_low",
    "minus_bptt_high",
    "forward_passes",
    "seconds",
    "settings",
)
Rows = list[dict[str, str]]


def summarise(runs: Rows, path: Path) -> str:
    """Writes the summary of the final runs as CSV; returns it as a table in Markdown, accuracies in %."""
    summary = [
        line(runs, task, method)
        for task in unique(runs, "task")
        for method in unique(runs, "method")
        if any(run["stage"] == "final" and (run["task"], run["method"]) == (task, method) for run in runs)
    ]
    if not summary:
        return "no final runs yet"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(summary)
    return markdown(summary)


def unique(runs: Rows, column: str) -> list[str]:
    return list(dict.fromkeys(run[column] for run in runs))


def line(runs: Rows, task: str, method: str) -> dict[str, object]:
    """One row of the summary. Accuracies and differences in percent and percentage points."""
    mine, peers = by_seed(runs, task, method), by_seed(runs, task, PEER)
    accuracies = [100 * float(run["accuracy"]) for run in mine.values()]
    differences = [
        100 * (float(run["accuracy"]) - float(peers[seed]["accuracy"]))
        for seed, run in mine.items()
        if seed in peers and method != PEER
    ]
    low, high = interval(differences)
    return {
        "task": task,
        "method": method,
        "seeds": len(mine),
        "accuracy": rounded(mean(accuracies)),
        "accuracy_sd": rounded(stdev(accuracies)) if len(accuracies) > 1 else "",
        "accuracy_stochastic": average(mine, "accuracy_stochastic", 100),
        "minus_bptt": rounded(mean(differences)) if differences else "",
        "minus_bptt_low": low,
        "minus_bptt_high": high,
        "forward_passes": average(mine, "forward_passes"),
        "seconds": average(mine, "seconds"),
        "settings": next(iter(mine.values()))["settings"],
    }


def by_seed(runs: Rows, task: str, method: str) -> dict[str, dict[str, str]]:
    """The final runs of one method; of several with the same seed (after another tuning) the latest."""
    return {run["seed"]: run for run in runs if (run["stage"], run["task"], run["method"]) == ("final", task, method)}


def average(runs: dict[str, dict[str, str]], column: str, factor: float = 1.0) -> float | str:
    values = [factor * float(run[column]) for run in runs.values() if run[column]]
    return rounded(mean(values)) if values else ""


def interval(differences: list[float]) -> tuple[float | str, float | str]:
    """Student's t-interval of the mean, 95 %."""
    if len(differences) < 2:
        return "", ""
    from scipy.stats import t

    half = t.ppf(0.975, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return rounded(mean(differences) - half), rounded(mean(differences) + half)


def rounded(value: float) -> float:
    return round(value, 2)


def markdown(summary: list[dict[str, object]]) -> str:
    header = ("task", "method", "accuracy", "stochastic", "minus BPTT", "95 %", "forward passes", "seconds")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in summary:
        spread = f" ± {row['accuracy_sd']:.2f}" if row["accuracy_sd"] != "" else ""
        cells = (
            row["task"],
            f"{row['method']} ({row['seeds']})",
            f"{row['accuracy']:.2f}{spread}",
            row["accuracy_stochastic"],
            f"{row['minus_bptt']:+.2f}" if row["minus_bptt"] != "" else "",
            f"{row['minus_bptt_low']:+.2f} to {row['minus_bptt_high']:+.2f}" if row["minus_bptt_low"] != "" else "",
            f"{row['forward_passes']:,.0f}" if row["forward_passes"] != "" else "",
            f"{row['seconds']:.0f}" if row["seconds"] != "" else "",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
