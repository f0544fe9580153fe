"""The command line: its verbs on real data, and wrong uses told in one line."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import pytest

import ulr_snn
from ulr_snn.errors import UsageError
from ulr_snn.runs.cli import main

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--epochs", "1", "--no-progress", "--device", "cpu")


@pytest.fixture
def needs_data_and_runs():
    for library in ("sklearn", "safetensors", "matplotlib", "tqdm"):
        pytest.importorskip(library)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, importable as the command line makes it and as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def fails(capsys, *arguments: str, code: int = 2) -> str:
    """Runs a command that must end with one line on stderr and this exit code; returns the line."""
    try:
        returned = main(arguments)
    except SystemExit as error:  # argparse's way out
        returned = error.code
    captured = capsys.readouterr()
    assert returned == code
    assert captured.err.count("\n") == 1 and captured.err.startswith("ulr-snn: "), captured.err
    assert captured.out == ""
    return captured.err


def metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def test_train_then_evaluate(here, capsys, needs_data_and_runs):
    assert main(["train", "digits", *QUICK, "--seed", "3"]) == 0
    run = here / "runs" / "digits-001"
    assert {path.name for path in run.iterdir()} == {
        "checkpoint-0001",
        "best.safetensors",
        "curves.png",
        "metrics.json",
    }
    written = metrics(run)
    assert written["epochs"] == 1 and written["seed"] == 3 and len(written["history"]) == 1
    assert written["seconds"] > 0 and written["peak_memory_bytes"] > 0 and written["forward_passes"] > 1000
    assert set(written["versions"]) >= {"ulr_snn", "torch", "numpy", "python"}
    accuracy = f"test accuracy {100 * written['test_accuracy']:.2f} %"
    assert accuracy in capsys.readouterr().out

    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert accuracy in capsys.readouterr().out
    assert main(["evaluate", str(run), "--best", "--device", "cpu"]) == 0
    assert accuracy in capsys.readouterr().out
    assert main(["evaluate", str(run), "--mode", "stochastic", "--copies", "2", "--device", "cpu"]) == 0
    assert "stochastic firing" in capsys.readouterr().out


def test_runs_are_numbered_and_go_on(here, capsys, needs_data_and_runs):
    quick = ("train", "digits", *QUICK, "--max-steps", "3")
    assert main(quick) == main(quick) == 0
    assert {path.name for path in (here / "runs").iterdir()} == {"digits-001", "digits-002"}
    run = ("--run-dir", "runs/digits-001")
    capsys.readouterr()
    assert "holds a run already" in fails(capsys, *quick, *run)
    assert "--seed 0, not 1" in fails(capsys, *quick, *run, "--resume", "--seed", "1")
    assert "--changed" in fails(capsys, *quick, *run, "--resume", "--lr", "0.1")
    assert (
        main(["train", "digits", *QUICK, "--epochs", "2", *run, "--changed", "--lr", "0.1", "--save-every", "1"]) == 0
    )
    assert main(["train", "digits", *QUICK, "--epochs", "3", *run, "--resume", "--lr", "0.1"]) == 0
    written = metrics(here / "runs" / "digits-001")
    assert written["epochs"] == 3 and [entry["epoch"] for entry in written["history"]] == [1, 2, 3]


def test_own_model_from_the_current_directory(here, capsys, needs_data_and_runs):
    (here / "own_nets.py").write_text(
        "from torch import nn\n"
        "import ulr_snn\n"
        "def small(sample_shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(2), nn.Linear(512, 20), ulr_snn.LIF(), nn.Linear(20, classes))\n"
        "def none(sample_shape, classes):\n"
        "    return None\n"
    )
    options = (*QUICK, "--max-steps", "2")
    assert main(["train", "digits", "--model", "own_nets:small", "--run-dir", "run", *options]) == 0
    assert main(["evaluate", "run", "--device", "cpu"]) == 0
    capsys.readouterr()
    train = ("train", "digits", *options, "--model")
    assert "not a torch.nn.Module" in fails(capsys, *train, "own_nets:none")
    assert "no function 'large'" in fails(capsys, *train, "own_nets:large")


def test_error_inside_own_model_keeps_its_traceback(here, needs_data_and_runs):
    (here / "broken_nets.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        main(["train", "digits", "--model", "broken_nets:net", *QUICK])


def test_compare_writes_a_table_and_a_picture(here, capsys, needs_data_and_runs):
    assert main(["compare", "digits", *QUICK, "--max-steps", "2", "--lr", "0.01", "0.02"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| ulr |") == shown.count("| surrogate |") == 2
    found = json.loads((here / "runs" / "compare-digits-001" / "compare.json").read_text())
    assert [row["lr"] for row in found["rows"]] == [0.01, 0.02] * 2
    assert (here / "runs" / "compare-digits-001" / "compare.png").stat().st_size > 10_000


def test_a_failed_comparison_leaves_nothing(here, capsys, needs_data_and_runs):
    assert "methods=" in fails(capsys, "compare", "digits", *QUICK, "--methods", "genetic")
    assert not list((here / "runs").iterdir())


@pytest.mark.parametrize(
    "folder, told",
    [("file", "cannot be made"), ("file/below", "cannot be made"), ("old", "holds a"), ("locked", "cannot be written")],
)
def test_a_comparison_has_its_folder_before_it_trains(here, capsys, monkeypatch, needs_data_and_runs, folder, told):
    (here / "file").write_text("mine")
    (here / "old").mkdir()
    (here / "old" / "compare.json").write_text("{}")
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode)
    )  # also by root
    monkeypatch.setattr(ulr_snn, "compare", lambda *_, **__: pytest.fail("trained"))
    assert told in fails(capsys, "compare", "digits", *QUICK, "--run-dir", folder)
    assert (here / "file").read_text() == "mine" and (here / "old" / "compare.json").read_text() == "{}"
    assert {path.name for path in here.iterdir()} <= {"file", "old", "locked"}


def test_diagnose_prints_a_table_and_draws_it(here, capsys, needs_data_and_runs):
    options = ["--draws", "4", "--picture", "diagnosis.png", "--batch-size", "8"]
    assert main(["diagnose", "digits", *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("| estimator | layer |") and "| surrogate | all layers |" in said
    assert (here / "diagnosis.png").exists()


def test_plan_shows_every_parameter(here, capsys, needs_data_and_runs):
    assert main(["plan", "digits"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{layer}.weight" in shown for layer in (1, 3, 6))
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((), "train|evaluate|compare|plan|diagnose"),
        (("teach",), "teach"),
        (("train",), "DATA"),
        (("train", "digits", "--epochs", "0"), "at least 1"),
        (("train", "digits", "--epochs", "few"), "few"),
        (("train", "digits", "--credit", "luck"), "luck"),
        (("train", "digits", "--fast"), "--fast (see ulr-snn train --help)"),
        (("train", "digits", "--resume"), "--run-dir"),
        (("train", "no-such-set"), "no-such-set"),
        (("plan", "no-such-set"), "no-such-set"),
        (("evaluate", "no/such/run"), "no/such/run"),
        (("evaluate", ".", "--mode", "loud"), "loud"),
        (("train", "nmnist", "--data-root", "no/such"), "another --data-root, or let tonic fetch them (--download)"),
    ],
)
def test_wrong_use_is_one_line(here, capsys, arguments, told):
    assert told in fails(capsys, *arguments)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("--model", "net"), "module:factory"),
        (("--model", "no_such_module:net"), "no_such_module"),
        (("--run-dir", "file"), "is a file"),
        (("--device", "abacus"), "abacus"),
        (("--lr", "-1"), "lr"),
        (("--copies", "3"), "use an even number\n"),
    ],
)
def test_wrong_training_is_one_line_and_leaves_nothing(here, capsys, needs_data_and_runs, arguments, told):
    (here / "file").write_text("")
    assert told in fails(capsys, "train", "digits", *QUICK, *arguments)
    assert not [path for path in here.rglob("*") if path.name not in ("file", "runs")]


@pytest.mark.parametrize(
    "failure, code",
    [
        (UsageError("one thing\nis wrong"), 2),
        (FileNotFoundError("no such file"), 2),
        (FloatingPointError("the loss is not finite"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failed_run_leaves_no_run_directory(here, capsys, monkeypatch, needs_data_and_runs, failure, code):
    def fail(*_args, **_kwargs):
        assert list((here / "runs").iterdir())  # it was there
        raise failure

    monkeypatch.setattr(ulr_snn, "train", fail)
    fails(capsys, "train", "digits", *QUICK, code=code)
    assert list((here / "runs").iterdir()) == []


@pytest.mark.parametrize(
    "arguments, code, told",
    [
        (
            ("--version",),
            0,
            f"ulr-snn {ulr_snn.__version__} (torch {version('torch')}, numpy {version('numpy')}, Python ",
        ),
        (("--help",), 0, "usage: ulr-snn"),
        (("train", "--help"), 0, "usage: ulr-snn train"),
        (("teach",), 2, "ulr-snn: "),
        (("train", "digits", "--wrong"), 2, "ulr-snn: "),
        (("train", "digits", "--epochs", "-1"), 2, "ulr-snn: "),
        (("train", "digits", "--lr", "nan"), 2, "ulr-snn: "),
        (("train", "digits", "--resume"), 2, "ulr-snn: "),
        (("diagnose", "digits", "--draws", "3"), 2, "ulr-snn: "),
    ],
)
def test_answers_that_need_no_torch_come_at_once(arguments, code, told):
    """torch alone would take longer. `python -m ulr_snn` is the command line, too."""
    seconds = []
    for _ in range(3):
        start = perf_counter()
        done = subprocess.run([sys.executable, "-m", "ulr_snn", *arguments], cwd=ROOT, capture_output=True, text=True)
        seconds.append(perf_counter() - start)
        assert done.returncode == code and (done.stderr if code else done.stdout).startswith(told)
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1
    alone = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; from ulr_snn.runs.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", alone, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and (done.stderr if code else done.stdout).startswith(told), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for another process")
@pytest.mark.parametrize("loading", ["pass", "raise ImportError('torch is half loaded')"])
def test_an_interrupt_while_torch_loads_is_one_line(tmp_path, loading):
    """Here loading swallows the interrupt, or makes another error of it, as extension modules do."""
    (tmp_path / "torch.py").write_text(
        "import time\nprint('loading', flush=True)\n"
        f"try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    {loading}\n"
    )
    code = (
        f"import signal, sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
        "from ulr_snn.runs.cli import main\nraise SystemExit(main())"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, "plan", "digits"], **pipes) as process:
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "ulr-snn: interrupted\n")
    assert process.returncode == 130


@pytest.mark.slow
def test_digits_reach_ninety_percent(here, needs_data_and_runs):
    """What the README promises: the defaults, within a minute of training (here on one thread)."""
    assert main(["train", "digits", "--no-progress", "--device", "cpu", "--threads", "1"]) == 0
    written = metrics(here / "runs" / "digits-001")
    assert written["test_accuracy"] >= 0.9
    assert written["seconds"] < 60
