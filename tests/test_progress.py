"""Progress on stderr: plain lines in a log, bars in a terminal, nothing if it is switched off."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ulr_snn import LIF, train
from ulr_snn.runs.progress import progress_bar, report

ROOT = Path(__file__).resolve().parent.parent
BATCHES = [(torch.ones(4, 8, 3), torch.zeros(8, dtype=torch.long))] * 3
VALUES = [(torch.ones(4, 8, 3), torch.zeros(8, 2))] * 3
ENTRY = {"epoch": 2, "train_loss": 0.5, "train_accuracy": None, "val_loss": 0.25, "val_accuracy": None, "seconds": 1.0}


def net() -> nn.Module:
    torch.manual_seed(0)  # a silent layer would be told in a line of its own
    return nn.Sequential(nn.Linear(3, 6), LIF(), nn.Linear(6, 2))


def test_a_log_has_one_line_an_epoch(capsys):
    train(net(), BATCHES, 3, device="cpu")
    said = capsys.readouterr()
    assert said.out == "" and "\r" not in said.err and "\x1b" not in said.err
    lines = said.err.splitlines()
    assert [re.match(r"epoch \d/3: loss [\d.e-]+, accuracy [\d.]+%, [\d.]+ s$", line) is None for line in lines] == [
        False
    ] * 3


def test_without_progress_nothing_is_written(capsys):
    train(net(), BATCHES, 1, device="cpu", progress=False)
    with progress_bar(range(3), "epoch 1/1", False, every=0.0) as bar:
        assert list(bar) == [0, 1, 2]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_regression_shows_its_loss_alone(capsys):
    train(net(), VALUES, 1, loss="mse", device="cpu")
    assert re.fullmatch(r"epoch 1/1: loss [\d.e-]+, [\d.]+ s\n", capsys.readouterr().err)
    report(ENTRY, 3, ["r2"])
    assert capsys.readouterr().err == "epoch 2/3: loss 0.5, validation loss 0.25, 1.0 s\n"


@pytest.mark.parametrize("known", [True, False])
def test_a_long_epoch_says_where_it_is(capsys, known):
    """Here a line is due at every step. Remaining time needs a known number of steps."""
    with progress_bar(range(3) if known else iter(range(3)), "epoch 1/2", True, every=0.0) as bar:
        for i in bar:
            bar.set_postfix({"loss": i / 2}, refresh=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and not any("\r" in line for line in lines)
    last = r"epoch 1/2, step 3/3, loss=1, 00:00 left" if known else r"epoch 1/2, step 3/\?, loss=1, 00:0\d"
    assert re.fullmatch(last, lines[-1])


def test_a_short_epoch_says_nothing_before_its_end(capsys):
    with progress_bar(range(3), "epoch 1/2", True) as bar:
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_has_bars():
    termios = pytest.importorskip("termios")
    code = "from ulr_snn.runs.progress import *\nfor _ in progress_bar(range(3), 'epoch 1/2', True): pass\nsay('done')"
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=follower, check=True)
    os.close(follower)
    said = os.read(leader, 10_000).decode()
    os.close(leader)
    assert "epoch 1/2:   0%|" in said and said.endswith("done\r\n")


@pytest.mark.parametrize("widgets", [True, False])
def test_notebooks(widgets):
    """With ipywidgets the bar is a widget. Without, there are lines, and no advice to install something."""
    code = f"""
import sys, types, warnings
warnings.simplefilter("error")
for name in ("IPython", "IPython.display", "ipykernel.zmqshell", "ipywidgets"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["IPython"].get_ipython = lambda: None
sys.modules["IPython.display"].display = lambda bar: print("widget", file=sys.stderr)
class Widget:
    bar_style = ""
    def __init__(self, *_, children=(), **__):
        self.children, self.layout, self.style = children, types.SimpleNamespace(), types.SimpleNamespace()
    def close(self):
        pass
if {widgets}:
    sys.modules["ipywidgets"].HTML = sys.modules["ipywidgets"].FloatProgress = sys.modules["ipywidgets"].HBox = Widget
else:
    sys.modules["ipywidgets"] = None
from ulr_snn.runs.progress import *
for _ in progress_bar(range(3), "epoch 1/2", True, every=0.0):
    pass
say("epoch 1")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if widgets:
        assert (done.stdout, done.stderr) == ("epoch 1\n", "widget\n")
    else:
        assert done.stdout == "" and done.stderr.splitlines()[-2:] == ["epoch 1/2, step 3/3, 00:00 left", "epoch 1"]


@pytest.mark.parametrize("shown", [True, False])
def test_a_loader_draws_its_order_once(shown):
    begun = []

    class Loader:
        def __len__(self):
            return 2

        def __iter__(self):
            begun.append(1)
            return iter([1, 2])

    with progress_bar(Loader(), "epoch", shown) as bar:
        assert list(bar) == [1, 2] and bar.total == 2
    assert begun == [1]
