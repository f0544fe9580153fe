"""The notebook runs from top to bottom as it is, shows progress as text, and is kept without outputs."""

import re
from pathlib import Path

import pytest

from tests.helpers import library_of

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
SECTIONS = ["Why", "Load data", "Define a model", "See the plan", "Train", "Evaluate and plot", "Export"]


def test_it_has_no_outputs_and_begins_with_the_installation():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    lines = code[0].source.splitlines()
    assert "# %pip install" in code[0].source and all(line.startswith("#") for line in lines)
    titles = re.findall("^## (.*)$", "\n".join(cell.source for cell in notebook.cells), re.MULTILINE)
    assert [title for title in titles if title in SECTIONS] == SECTIONS


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    for package in ("nbclient", "ipykernel", "nir", "matplotlib"):
        pytest.importorskip(package)
    library_of("snntorch")
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.get("text", "") for output in outputs)
    assert text.count("epoch 4/4: loss") == 2, "one line for each epoch of both trainings"
    assert "Warning" not in text and "%|" not in text and "\r" not in text, "a bar leaves nothing behind"
    accuracies = [float(found) for found in re.findall(r"^(?:test )?accuracy ([\d.]+)%$", text, re.MULTILINE)]
    assert len(accuracies) == 2 and min(accuracies) > 85
    (difference,) = re.findall(r"largest difference of outputs: (\S+)", text)
    assert float(difference) <= 1e-6 and "same outputs: True" in text
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
