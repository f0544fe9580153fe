"""The command line in several processes, started by torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc, as on Linux"),
]
QUICK = ("train", "digits", "--device", "cpu", "--no-progress", "--batch-size", "256")


def started(folder: Path, processes: int, *options: str) -> subprocess.Popen:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    command = [sys.executable, *(launcher if processes > 1 else ()), "-m", "ulr_snn", *QUICK, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, "--run-dir", str(folder)], env=environment, **pipes)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started."""
    tasks = Path(f"/proc/{process.pid}/task")
    return [int(n) for task in tasks.iterdir() for n in (task / "children").read_text().split()]


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"))


def test_two_processes_make_the_steps_of_one(tmp_path):
    for processes in (1, 2):
        code, out, err = ended(started(tmp_path / str(processes), processes, "--max-steps", "4"))
        assert code == 0 and out.count("test accuracy") == 1, err
    one, two = (load_file(newest(tmp_path / str(n)) / "model.safetensors") for n in (1, 2))
    for name, value in one.items():
        assert (two[name] - value).abs().max() <= 1e-4 * value.abs().max(), name
    one, two = (json.loads((tmp_path / str(n) / "metrics.json").read_text()) for n in (1, 2))
    for key in ("train_loss", "train_accuracy", "val_accuracy", "forward_passes"):
        assert two["history"][0][key] == pytest.approx(one["history"][0][key], rel=1e-4), key


def test_a_process_that_is_killed_ends_the_run_and_it_goes_on(tmp_path):
    long = ("--epochs", "400", "--save-every", "1")
    run = started(tmp_path, 2, *long)
    end = time.monotonic() + 200
    while len(list(tmp_path.glob("checkpoint-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(workers(run)[-1], signal.SIGKILL)
    code, out, err = ended(run)
    assert code != 0 and "test accuracy" not in out
    steps = int(newest(tmp_path).name[-4:])
    code, out, err = ended(started(tmp_path, 2, "--resume", "--epochs", "400", "--max-steps", str(steps + 8)))
    assert code == 0 and out.count("test accuracy") == 1, err
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == steps + 8


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, code, tmp_path):
    run = started(tmp_path, 1, "--epochs", "400", "--save-every", "1")
    end = time.monotonic() + 200
    while len(list(tmp_path.glob("checkpoint-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    run.send_signal(number)
    found, out, err = ended(run)
    lines = [line for line in err.splitlines() if line.startswith("ulr-snn: ")]
    assert found == code and out == "" and "Traceback" not in err
    assert len(lines) == 1 and f"which is saved: go on with --resume --run-dir '{tmp_path}'" in lines[0]
    steps = int(newest(tmp_path).name[-4:])
    assert f"after step {steps}," in lines[0]
    if number == signal.SIGINT:
        return  # what was saved is the same
    assert ended(started(tmp_path, 1, "--resume", "--epochs", "400", "--max-steps", str(steps + 2)))[0] == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == steps + 2
