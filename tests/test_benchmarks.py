"""The accuracy benchmark: its search, its nets, its table, and one quick run of all of it."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ulr_snn
from benchmarks import copies, memory, pictures, references, repositories, roofline, speed, streaming
from benchmarks.correction import Corrected
from benchmarks.nets import ours
from benchmarks.search import Block, key, search
from benchmarks.table import summarise
from benchmarks.tasks import TASKS, Rows
from ulr_snn import data
from ulr_snn.data import EventDataset
from ulr_snn.data.binning import Recordings, bin_recordings
from ulr_snn.sampling.kinds import Independent

ROOT = Path(__file__).resolve().parent.parent
CONFIG = json.loads((ROOT / "benchmarks" / "grid.json").read_text())


def bowl(optimum):
    """A stand-in for training whose best settings are known; keeps what it was asked for."""
    asked = []

    def evaluate(points, fraction):
        asked.extend((key(point), fraction) for point in points)
        away = [sum(math.log(point[axis] / best) ** 2 for axis, best in optimum.items()) for point in points]
        penalty = [0.1 * (point.get("clip") is None) for point in points]
        return [(-a - b, 0.0) for a, b in zip(away, penalty, strict=True)]

    return evaluate, asked


def block(**limits):
    written = {"ordered": {"lr": [1e-3, 2e-3, 4e-3], "slope": [2, 4, 8]}, "choices": {"clip": [None, 1.0]}}
    return Block.of({**written, "limits": limits})


@pytest.mark.parametrize("optimum", [{"lr": 2e-3, "slope": 4}, {"lr": 2.5e-4, "slope": 32}])
def test_the_search_finds_an_interior_optimum_inside_and_outside_the_grid(optimum):
    evaluate, asked = bowl(optimum)
    grid = block()
    best, interior = search([grid], evaluate, short=0.4, keep=1 / 3, rounds=10)
    assert interior and best["clip"] == 1.0
    for axis, value in optimum.items():
        assert best[axis] == pytest.approx(value)
        assert min(grid.ordered[axis]) < best[axis] < max(grid.ordered[axis])
        below, above = (grid.ordered[axis][grid.ordered[axis].index(best[axis]) + step] for step in (-1, 1))
        for neighbour in (below, above):
            assert (key({**best, axis: neighbour}), 1.0) in asked
    assert len(asked) == len(set(asked)), "a run was made twice"
    assert sum(fraction == 0.4 for _, fraction in asked) == 18


def test_the_search_says_when_rounds_run_out_and_keeps_to_limits():
    evaluate, _ = bowl({"lr": 2.5e-4, "slope": 4})
    assert search([block()], evaluate, 0.4, 0.3, rounds=0)[1] is False
    best, interior = search([block(lr=[1e-3, 1.0])], evaluate, 0.4, 0.3, rounds=10)
    assert interior and best["lr"] == 1e-3


def test_the_search_stays_in_the_block_of_its_best_point():
    def evaluate(points, fraction):
        return [(float(point["kind"] == "b") - abs(math.log(point["x"] / 16)), 0.0) for point in points]

    blocks = [Block.of({"ordered": {"x": [1, 2]}, "choices": {"kind": [kind]}}) for kind in "ab"]
    assert search(blocks, evaluate, 0.4, 0.5, rounds=10) == ({"x": 16.0, "kind": "b"}, True)


def test_both_methods_are_tuned_over_as_many_points():
    points = {
        method: [point for written in blocks for point in Block.of(written).points()]
        for method, blocks in CONFIG["tuned"].items()
    }
    assert len(points["bptt-tuned"]) == len(points["bptt-readout"]) == len(points["ulr-tuned"]) > 20
    assert all(len(set(map(key, p))) == len(p) for p in points.values())


@pytest.mark.parametrize(
    ("task", "shape", "weights"),
    [
        ("saccade-mnist-dense", (2, 34, 34), 2312 * 256 + 256 * 256 + 256 * 10),
        ("saccade-mnist-conv", (2, 34, 34), 12 * 2 * 25 + 24 * 12 * 9 + 1944 * 128 + 128 * 10),
        ("spoken-digits-ff", (128,), 128 * 256 + 256 * 10),
        ("spoken-digits-recurrent", (128,), 128 * 256 + 256 * 256 + 256 * 10),
        ("memory", (68,), 68 * 128 + 128 * 128 + 128 * 10),
        ("digits", (2, 16, 16), 512 * 256 + 256 * 256 + 256 * 10),
    ],
)
def test_the_nets_are_those_of_the_tasks(task, shape, weights):
    net = TASKS[task].net()
    assert net(torch.rand(6, 3, *shape)).shape == (3, 10)
    assert sum(p.numel() for p in net.parameters() if p.ndim > 1) == weights


def test_the_memory_task_shows_row_after_row_of_the_summed_events():
    on, y, x = 1, 5, 7
    feature = np.array([(on * 34 + y) * 34 + x] * 3)
    recordings = Recordings(np.array([0, 10, 250_000]), feature, np.array([0, 3]), np.array([4]))
    part = EventDataset(bin_recordings([recordings], 2 * 34 * 34, 1, 300_000), (2, 34, 34), 10, binary=False)
    rows, label = Rows(part)[0]
    assert rows.shape == (34, 68) and label == 4
    assert rows[y, on * 34 + x] == 3 and rows.sum() == 3


def test_the_table_pairs_seeds(tmp_path):
    def runs(method, accuracies):
        return [
            {"stage": "final", "task": "t", "method": method, "seed": str(seed), "accuracy": str(accuracy)}
            | {"accuracy_stochastic": "", "forward_passes": "100", "seconds": "2.0", "settings": "{}"}
            for seed, accuracy in enumerate(accuracies)
        ]

    table = summarise(runs("bptt-tuned", [0.90, 0.92, 0.94]) + runs("ulr", [0.91, 0.92, 0.96]), tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        peer, ours = csv.DictReader(file)
    assert (peer["accuracy"], peer["minus_bptt"]) == ("92.0", "")
    # differences 1, 0, 2: mean 1, standard error 1 / sqrt(3), t(0.975, 2) = 4.3027
    assert [ours[f"minus_bptt{name}"] for name in ("", "_low", "_high")] == ["1.0", "-1.48", "3.48"]
    assert "| +1.00 | -1.48 to +3.48 |" in table


@pytest.mark.slow
def test_a_quick_run_makes_every_row_once(tmp_path):
    command = [sys.executable, "-m", "benchmarks.accuracy", "--quick", "--tasks", "digits", "--workers", "1"]
    command += ["--methods", "bptt-tuned", "ulr", "logistic", "--results", str(tmp_path)]
    outputs = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        outputs.append((tmp_path / "accuracy_runs.csv").read_text())
    assert outputs[0] == outputs[1], "the second call made runs again"
    rows = list(csv.DictReader(outputs[0].splitlines()))
    assert [(r["stage"], r["method"]) for r in rows].count(("tune", "bptt-tuned")) == 2
    assert {(r["method"], r["seed"]) for r in rows if r["stage"] == "final"} == {
        *((method, seed) for method in ("bptt-tuned", "ulr") for seed in "01"),
        ("logistic", "0"),
    }
    assert all(0 < float(row["accuracy"]) < 1 for row in rows)
    for method in ("bptt-tuned", "ulr", "logistic"):
        assert f"| digits | {method} (" in done.stdout


# -- the paper's questions ---------------------------------------------------------------------------------


def test_questions_keep_their_rows_and_are_drawn(tmp_path, monkeypatch):
    from benchmarks import paper

    asked = []

    def stub(seed):
        asked.append(seed)
        for method in ("ulr", "surrogate"):
            yield "digits", method, "trained", "accuracy", 0.9 + 0.01 * seed
            yield "digits", method, "at first, all layers", "variance", 3.0

    monkeypatch.setattr(paper, "QUESTIONS", {"stub": stub})
    for seeds in (["0"], ["0", "1"]):
        monkeypatch.setattr(sys, "argv", ["paper", "--results", str(tmp_path), "--seeds", *seeds])
        paper.main()
    assert asked == [0, 1]
    rows = paper.read(tmp_path / "paper.csv")
    assert len(rows) == 8 and set(rows[0]) == set(paper.COLUMNS) and rows[-2]["value"] == "0.91"
    assert (tmp_path / "paper_stub.png").read_bytes()[:4] == b"\x89PNG"


def test_attacks_stay_within_their_strength_and_lower_accuracy():
    from benchmarks.paper import attacked, pruned

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 32), ulr_snn.LIF(), ulr_snn.TimeAverage(), torch.nn.Linear(32, 3))
    x = torch.rand(8, 256, 6)
    y = x.mean(0)[:, :3].argmax(1)
    ulr_snn.train(model, [(x, y)] * 40, 3, device="cpu", progress=False)
    before = ulr_snn.evaluate(model, [(x, y)], device="cpu")["accuracy"]
    for steps in (1, 10):
        moved = attacked(model, x, y, 0.1, steps)
        assert (moved - x).abs().max() <= 0.1 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
        assert ulr_snn.evaluate(model, [(moved, y)], device="cpu")["accuracy"] < before - 0.2
    share = (pruned(model, 0.75)[0].weight == 0).float().mean()
    assert share == pytest.approx(0.75, abs=0.02) and (model[0].weight != 0).all()


@pytest.mark.parametrize("name", ["dense", "recurrent", "conv"])
def test_speed_is_measured_in_turn(name, monkeypatch, capsys, device):
    pytest.importorskip("snntorch", reason="snntorch is what likelihood ratios are measured against here")
    monkeypatch.setattr(speed, "WARM_UP", 1)
    case = speed.CASES[name].at(steps=3, batch=4, width=8)
    rows = speed.rows_of(case, str(device), compiled=False, rounds=2, libraries=["snntorch"])
    loop = ["snntorch BPTT, own loop"] * (name == "recurrent")
    assert [row["method"] for row in rows] == ["ulr", "snntorch BPTT", *loop]
    assert 1 in [row["ratio"] for row in rows[1:]] and 0 < rows[0]["ms_low"] <= rows[0]["ms"] <= rows[0]["ms_high"]
    assert "of snntorch BPTT" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dense", "recurrent"])
def test_a_loop_over_time_is_the_same_net(name):
    pytest.importorskip("snntorch", reason="snntorch is not installed")
    case = speed.CASES[name].at(steps=5, batch=4, width=8)
    x = (torch.rand(5, 4, *case.sample) < 0.3).float()
    outputs = []
    for nets in (speed.NETS, speed.LOOPS):
        torch.manual_seed(0)
        outputs.append(nets["snntorch"](case)(x))
    torch.testing.assert_close(*outputs)
    assert outputs[0].std() > 0


def gpu_script(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    usual = {"DEVICE": "cpu", "OUT": str(folder), "WORKERS": "0", "PYTHON": sys.executable}
    environment = os.environ | usual | settings
    return subprocess.run(["benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_for_a_gpu_goes_on_after_a_part_that_fails(tmp_path):
    done = gpu_script(tmp_path, TESTS="tests/no_such_file.py")
    assert done.returncode == 1
    summary = done.stdout.partition("== summary")[2].splitlines()[1:]
    assert [line.partition(",")[0] for line in summary] == [
        "tests: failed with exit code 4",
        "speed: ok",
        "memory: ok",
        "roofline: ok",
    ]
    for name in ("speed", "memory", "roofline", "roofline_kernels"):
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows and all(row["machine"] and row["torch"] and row["library"] and row["date"] for row in rows)


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_parts(tmp_path):
    done = gpu_script(tmp_path, PARTS="tests", TESTS="tests/test_bits.py")
    assert done.returncode == 0, done.stdout
    assert re.search(r"tests: ok, \d+ s; \d+ (skipped|passed)", done.stdout)
    assert [file.name for file in tmp_path.iterdir()] == ["gpu_tests.log"]
    absent = gpu_script(tmp_path, DEVICE="cuda", PARTS="roofline", CUDA_VISIBLE_DEVICES="")
    assert absent.returncode == 2 and absent.stderr.strip().endswith("DEVICE=cpu tries the script at tiny sizes")


@pytest.mark.parametrize("name", roofline.KERNELS)
def test_a_kernel_is_measured_against_what_the_machine_can_do(name, device):
    if device.type == "cpu":
        pytest.importorskip("numba", reason="the kernels on a CPU are made by numba")
    (row,) = roofline.rows_of_kernels([name], str(device), roofline.TINY)
    numbers = 3 * 2 * 8
    assert row["bytes"] == 4 * numbers * {"leaky filter": 2, "scan": 3}.get(name, 4) + 4 * 8 * 8 * ("rec" in name)
    assert row["products"] <= numbers * 8 and (row["products"] > 0) == name.startswith("recurrent")
    assert row["ms"] > 0 and row["machine_bytes_a_second"] > 0 and row["device"] == str(device)


def test_a_step_is_measured_against_what_the_machine_can_do(device, monkeypatch):
    monkeypatch.setattr(roofline, "WARM_UP", 1)
    case = speed.CASES["recurrent"].at(steps=3, batch=4, width=8)
    (row,) = roofline.rows_of_steps([case], str(device), roofline.TINY)
    assert row["case"] == "recurrent" and row["ms"] > 0 and row["machine_products_a_second"] > 0


def test_pictures_of_speed_and_memory(tmp_path):
    for name in ("speed.csv", "memory.csv"):
        (tmp_path / name).write_bytes((speed.HERE / "results" / name).read_bytes())
    pictures.main(["--results", str(tmp_path)])
    for name in ("speed.png", "memory.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_memory_of_copies_is_measured_in_a_fresh_process():
    assert set(copies.KINDS) >= {"firing", "currents"}
    assert copies.estimator("firing, in turn", 8).memory == "replay"
    if Path("/proc/self/status").exists():
        assert abs(memory.in_fresh_process("copies", "firing, in turn", "2")) < 300  # MB


@pytest.mark.parametrize("library", ["snntorch", "norse", "spikingjelly"])
@pytest.mark.parametrize("name", ["dense", "recurrent", "conv"])
def test_the_peers_nets_have_the_same_shapes_and_gradients(name, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    case = speed.CASES[name].at(steps=3, batch=4, width=8)
    model, (x, _) = speed.NETS[library](case), speed.events_of(case, "cpu")
    outputs = model(x.float())
    outputs.sum().backward()
    assert outputs.shape == (4, 10) == ours(case)(x.float()).shape
    assert all(q.grad is not None for q in model.parameters() if q.ndim == 2)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_measured_in_a_fresh_process(device):
    assert abs(memory.fresh("recurrent", "ulr replay", 20, device=str(device))) < 200  # MB


@pytest.mark.slow
def test_the_zoo_trains_both_ways_and_sums_up(tmp_path):
    pytest.importorskip("spikingjelly")
    pytest.importorskip("snntorch")
    pytest.importorskip("norse")
    command = [sys.executable, "-m", "benchmarks.zoo", "--networks", "sj_seq_plain", "--steps", "3", "--seeds", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "zoo_runs.csv")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "zoo_runs.csv").read_text().splitlines()))
    cycles = ["bptt-cycle:1e-2", "bptt-cycle:1.5e-2"]
    assert [row["method"] for row in rows] == ["ulr", "bptt:1e-3", "bptt:3e-3", "bptt:1e-2", *cycles]
    assert all(float(row["accuracy"]) >= 0 and float(row["ms"]) > 0 and not row["note"] for row in rows)
    assert "| sj_seq_plain* | 1 |" in done.stdout and done.stdout.count("1 networks, mean") == 2
    assert (tmp_path / "zoo.png").stat().st_size > 1000


def test_the_corrected_feedback_with_the_whole_score_is_residual_credit():
    def gradient(estimator: ulr_snn.Estimator) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 20), ulr_snn.LIF(), torch.nn.Linear(20, 3))
        with ulr_snn.attach(model, estimator, seed=1) as ulr:
            ulr.backward(torch.rand(10, 8, 6), torch.arange(8) % 3)
        return torch.cat([q.grad.flatten() for q in model.parameters()])

    residual = gradient(ulr_snn.ULR(credit="residual", sampling=Independent(2)))
    assert torch.equal(gradient(Corrected(1.0, 2)), residual)
    assert not torch.allclose(gradient(Corrected(0.1, 2)), residual)


def test_a_limit_on_threads_is_kept():
    code = """
import torch
torch.set_num_threads(1)
import ulr_snn
model = torch.nn.Sequential(torch.nn.Linear(64, 96), ulr_snn.LIF(), torch.nn.Linear(96, 10))
batch = (torch.rand(12, 64, 64) < 0.3).float(), torch.randint(0, 10, (64,))
ulr_snn.train(model, [batch], 1, device="cpu", progress=False)
ulr_snn.evaluate(model, [batch])
assert torch.get_num_threads() == 1, torch.get_num_threads()
"""
    more = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=more)
    assert done.returncode == 0, done.stderr


def test_throughput_is_measured_from_memory_and_from_disk(tmp_path, monkeypatch):
    case = streaming.Case(recordings=12, events=500, side=8, span_us=10_000, bin_us=1_000, batch=4)
    monkeypatch.setattr(streaming, "CASES", {"tiny": case})
    monkeypatch.setattr(data.registry, "ENTRIES", dict(data.registry.ENTRIES))
    for mode in ("memory", "stream", "stream cold"):
        for augment in (False, True):
            row = streaming.measured("tiny", mode, sparse=False, augment=augment, folder=tmp_path)
            assert row["samples_a_second"] > 0 and row["mode"] == mode
    assert len(list(tmp_path.iterdir())) == 2


def test_every_data_set_has_figures_of_its_reference_network():
    with references.RESULTS.open() as file:
        rows = {row["data"] for row in csv.DictReader(file)}
    assert rows == set(references.SETS) == set(data.registry.ENTRIES)
    for name in rows:
        page = (references.RESULTS.parents[2] / "datasets" / name / "README.md").read_text()
        assert f"ulr-snn train {name}" in page and "## Provenance and licence" in page
        assert name == "digits" or "## Published accuracies" in page


def test_code_of_repositories_is_found_by_its_names_and_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(repositories, "CLONED", tmp_path)
    for name in "one", "other":
        (tmp_path / name / "parts").mkdir(parents=True)
        (tmp_path / name / "models.py").write_text(f"from parts import layers\nNAME = {name!r}, layers.NAME\n")
        (tmp_path / name / "parts" / "layers.py").write_text(f"NAME = {name!r}\n")
    paths, modules = list(sys.path), dict(sys.modules)
    for name in "one", "other":
        with repositories.code_of(name) as load:
            found = load("models").NAME
        assert found == (name, name)
    assert sys.path == paths
    assert sys.modules == modules
    with pytest.raises(FileNotFoundError, match="clone the repositories of CLONES"), repositories.code_of("none"):
        pass
