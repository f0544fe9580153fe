"""The benchmark of long use, in short: nothing grows, and what grows is found."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import soak


@pytest.mark.slow
def test_nothing_grows(tmp_path: Path):
    assert soak.main(["--steps", "120", "--kinds", "dense", "workers", "--results", str(tmp_path)]) == 0
    lines = (tmp_path / "soak.csv").read_text().splitlines()
    assert lines[0].startswith("phase,step,memory_mb,files,threads,children,tensors,objects,folder_kb,machine,torch")
    assert len(lines) > 3 * 6


@pytest.mark.slow
def test_leaks_are_found():
    kept: list[Any] = []
    files: list[int] = []
    stop = threading.Event()

    def leak() -> None:
        kept.append(torch.zeros(1))
        kept.append(bytearray(b"1" * (4 << 20)))
        files.append(os.open(os.devnull, os.O_RDONLY))
        threading.Thread(target=stop.wait, daemon=True).start()

    try:
        rows = list(soak.soak(120, ["dense"], leak))
    finally:
        stop.set()
        for file in files:
            os.close(file)
    grown = {(found["phase"], found["figure"]) for found in soak.verdicts(rows) if found["growth"] > found["bound"]}
    figures = ("tensors", "memory_mb", "files", "threads")
    assert {(phase, figure) for phase in ("dense", "short trainings") for figure in figures} <= grown
