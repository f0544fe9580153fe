"""The report of a run: well-formed HTML with the figures of `evaluate`, which a browser shows without a complaint."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import ulr_snn
from tests.helpers import averaging, batches, net, nets, separable, train
from ulr_snn.errors import UsageError
from ulr_snn.runs.cli import main
from ulr_snn.runs.directory import RunDirectory, read_config
from ulr_snn.runs.report import CONTENTS, write_report

for library in ("matplotlib", "safetensors", "jinja2", "sklearn"):
    pytest.importorskip(library)

VOID = {"meta", "link", "br", "hr", "img", "input"}
QUICK = ("--epochs", "1", "--max-steps", "12", "--no-progress", "--device", "cpu")


class Page(HTMLParser):
    """What a page holds: text by section, ids, addresses. Raises AssertionError for tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.section, self.ids, self.links, self.tags = "", [], [], []
        self.text: dict[str, str] = {}
        self.images: list[dict[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        if tag == "section":
            self.section = found["id"]
        if tag == "svg":
            self.images.append(found)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + " " + data.strip()


def read(path) -> Page:
    """The page, checked for all that every report keeps."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert list(page.text)[1:] == list(CONTENTS)
    assert len(set(page.ids)) == len(page.ids)
    assert {f"#{id}" for id in CONTENTS} <= set(page.links)
    inside = [link[1:] for link in page.links if link.startswith("#")]
    assert set(inside) <= set(page.ids)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert set(re.findall(r"url\((.)", text)) <= {"#"} and "@import" not in text
    assert "script" not in page.tags and page.tags.count("h1") == 1
    assert all(image["role"] == "img" and image["aria-label"] for image in page.images)
    return page


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of the command line on event data."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", "digits", *QUICK, "--run-dir", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def page_of_digits(digits):
    assert main(["report", str(digits), "--device", "cpu"]) == 0
    return digits / "report.html"


def test_report_has_the_figures_of_evaluate(digits, page_of_digits, capsys):
    page = read(page_of_digits)
    _, test_set = ulr_snn.data.load("digits")
    from ulr_snn.runs.directory import load_checkpoint
    from ulr_snn.runs.models import default_model

    model = default_model(test_set.sample_shape, test_set.classes)
    load_checkpoint(digits, model)
    found = ulr_snn.evaluate(model, ulr_snn.data.loader(test_set, batch_size=64), activity=True, device="cpu")
    summary = page.text["summary"]
    assert f"{100 * found['accuracy']:.2f} %" in summary and f"{found['loss']:.4f}" in summary
    activity = page.text["activity"]
    assert f"{found['spikes']:,.4g}" in activity and f"{found['operations']:,.0f}" in activity
    assert "359 samples" in activity and "silent" in activity
    assert main(["evaluate", str(digits), "--device", "cpu"]) == 0
    assert f"test accuracy {100 * found['accuracy']:.2f} %" in capsys.readouterr().out

    classes = [
        (int(samples), float(share) / 100)
        for samples, share in re.findall(r" \d +(\d+) +([\d.]+)% ", page.text["predictions"])
    ]
    assert len(classes) == 10 and sum(samples for samples, _ in classes) == 359
    right = sum(samples * share for samples, share in classes)
    assert right / 359 == pytest.approx(found["accuracy"], abs=1e-3)
    assert "credit at site 2" in page.text["plan"] and "exact, through the outputs" in page.text["plan"]
    assert "ulr-snn train digits --batch-size 64 --seed 0 --epochs 1" in page.text["settings"]
    assert torch.__version__ in page.text["settings"]
    assert "predicted" in page.text["examples"] and len(page.images) > 8
    metrics = json.loads((digits / "metrics.json").read_text())
    assert f"{metrics['history'][0]['train_loss']:.4g}" in page.text["curves"]


def test_files_alone_say_what_they_can(digits, tmp_path, capsys):
    out = tmp_path / "files.html"
    assert main(["report", str(digits), "--files-only", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    page = read(out)
    metrics = json.loads((digits / "metrics.json").read_text())
    assert f"{100 * metrics['test_accuracy']:.2f} %" in page.text["summary"]
    for section in ("plan", "activity", "predictions", "examples"):
        assert "was not run for this report" in page.text[section]
    assert len(page.images) == 2  # loss and accuracy


def test_an_unfinished_run_is_told_from_its_checkpoint(tmp_path):
    train(net(), epochs=2, val_loader=batches(), run_dir=tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    page = read(write_report(tmp_path / "run", net(1), batches(), device="cpu"))
    assert "unfinished" in page.text[""] and "after 2 whole epochs" in page.text["summary"]
    assert "by ulr_snn.train" in page.text["settings"].replace("  ", " ")
    assert "loss" in page.text["curves"]


def test_a_run_without_a_whole_epoch(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.save_checkpoint(net(), {"epoch": 0, "history": []})
    page = read(write_report(tmp_path / "run"))
    assert "no epoch yet" in page.text["curves"] and "after 0 whole epochs" in page.text["summary"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["snntorch", "norse", "spikingjelly"])
def test_reports_of_other_libraries(tmp_path, name):
    build = nets(surrogates=True)[name]
    torch.manual_seed(0)
    train(build(), separable(), 1, run_dir=tmp_path / "run")
    model = build()
    page = read(write_report(tmp_path / "run", model, separable(), device="cpu"))
    found = ulr_snn.evaluate(model, separable(), activity=True, device="cpu")  # with the weights of the checkpoint
    assert f"{found['loss']:.4f}" in page.text["summary"] and f"{found['spikes']:.4g}" in page.text["activity"]
    assert "48 samples" in page.text["activity"] and "membranes" in page.text["examples"]


def test_a_regression_has_no_classes(tmp_path):
    model = nn.Sequential(nn.Linear(5, 8), ulr_snn.LIF(), nn.Linear(8, 2))
    data = [(x, torch.zeros(12, 16, 2)) for x, _ in separable()]
    train(model, data, 1, loss="mse", run_dir=tmp_path / "run")
    page = read(write_report(tmp_path / "run", model, data, loss="mse", device="cpu"))
    assert "no classes" in page.text["predictions"] and "accuracy" not in page.text["summary"]
    assert "Test sample 0" in page.text["examples"]


def test_padding_does_not_count(tmp_path):
    lengths = torch.arange(16) % 12 + 1
    data = [(x, y, lengths) for x, y in separable()]
    model = nn.Sequential(nn.Linear(5, 8), ulr_snn.LIF(threshold=0.1), nn.Linear(8, 3))
    train(model, data, 1, run_dir=tmp_path / "run")
    page = read(write_report(tmp_path / "run", model, data, device="cpu"))
    found = ulr_snn.evaluate(model, data, activity=True, device="cpu")
    assert f"{found['spikes'] * 48 / (8 * 3 * int(lengths.sum())):.4f}" in page.text["activity"]


def test_names_are_text_and_not_html(tmp_path):
    """Names of the run, of modules and of settings, which others choose."""
    hostile = "<img src=x onerror=alert(1)>&\"'$x^2"
    layers = nn.ModuleDict({hostile: ulr_snn.LIF()})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.layers, self.out = nn.Linear(5, 4), layers, nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.layers[hostile](self.fc(x)))

    run = RunDirectory(tmp_path / hostile, config={"model": f"</script>{hostile}", hostile: hostile})
    model = Net()
    train(model, separable(), 1, run_dir=run)
    page = read(write_report(tmp_path / hostile, model, separable(), device="cpu"))
    assert "img" not in page.tags
    assert hostile in page.text[""] and f"</script>{hostile}" in page.text["settings"]
    assert f"layers.{hostile}" in page.text["activity"]


def test_what_is_no_run_is_told_in_one_line(digits, tmp_path, capsys):
    def fails(*arguments: str) -> str:
        assert main(["report", *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("ulr-snn: ")
        return said.err

    damaged = tmp_path / "damaged"
    assert "holds no checkpoint" in fails(str(tmp_path / "nothing"))
    assert "cannot be written" in fails(str(digits), "--files-only", "--out", str(tmp_path / "no" / "r.html"))
    for file in ("metrics.json", "state.pt", "model.safetensors", "config.json"):
        shutil.copytree(digits, damaged)
        (path,) = damaged.rglob(file)
        path.write_bytes(path.read_bytes()[:40])
        fails(str(damaged), "--files-only") if file != "config.json" else fails(str(damaged))
        assert not (tmp_path / "report.html").exists()
        shutil.rmtree(damaged)


def test_wrong_uses_from_python(digits, tmp_path):
    with pytest.raises(UsageError, match="together"):
        write_report(digits, net())
    with pytest.raises(UsageError, match="do not fit this model"):
        write_report(digits, averaging(3, 2), batches())
    with pytest.raises(UsageError, match="no batch"):
        model = averaging(8, 2)
        train(model, run_dir=tmp_path / "run")
        write_report(tmp_path / "run", model, [])
    assert read_config(digits)["data"] == "digits"


# -- in a browser ------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr --dump-dom"
)
# Shows the report on a screen and, dark, on a phone, and measures what is laid out.
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><title>frames</title>
<iframe src="{page}" width="1200" height="800"></iframe>
<iframe src="{page}" width="390" height="800" style="color-scheme: dark"></iframe>
<pre></pre>
<script>
addEventListener("load", () => {{
  const measured = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, box = item => item.getBoundingClientRect();
    return {{
      width: page.documentElement.clientWidth,
      content: page.documentElement.scrollWidth,
      background: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
      sections: Object.fromEntries([...page.querySelectorAll("section")].map(item => [item.id, box(item).height])),
      pictures: [...page.querySelectorAll("svg")].map(item => [box(item).width, box(item).height]),
    }};
  }});
  document.querySelector("pre").textContent = JSON.stringify(measured);
}});
</script>"""


def shown(page, folder) -> tuple[list[str], list[dict]]:
    """The console's lines, and what the browser has laid out in both frames."""
    if BROWSER is None:
        pytest.skip("no browser here: install chromium")
    frames = folder / "frames.html"
    frames.write_text(FRAMES.format(page=page.name))
    command = [BROWSER, *OPTIONS.split(), f"--user-data-dir={folder / 'profile'}", frames.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], json.loads(found)


def test_a_browser_shows_the_report_without_a_complaint(page_of_digits, tmp_path):
    page = tmp_path / "report.html"
    shutil.copy(page_of_digits, page)
    console, (screen, phone) = shown(page, tmp_path)
    assert console == []
    for frame in (screen, phone):
        assert list(frame["sections"]) == list(CONTENTS)
        assert all(height > 80 for height in frame["sections"].values())
        assert len(frame["pictures"]) > 8 and all(min(size) > 100 for size in frame["pictures"])
        assert frame["content"] == frame["width"]  # nothing hangs out at the side
        assert all(width <= frame["width"] for width, _ in frame["pictures"])
    assert phone["width"] < 400 < screen["width"]
    assert screen["background"] != phone["background"]  # light and dark
    assert phone["sections"]["examples"] > screen["sections"]["examples"]


@pytest.mark.slow
def test_the_browser_would_complain(page_of_digits, tmp_path):
    """A script in the page is refused by its own policy, and the console says so."""
    page = tmp_path / "report.html"
    text = page_of_digits.read_text(encoding="utf-8")
    page.write_text(text.replace("</main>", '<script>document.body.textContent = ""</script></main>'), encoding="utf-8")
    console, (screen, _) = shown(page, tmp_path)
    assert console and "Content Security Policy" in " ".join(console)
    assert list(screen["sections"]) == list(CONTENTS)
