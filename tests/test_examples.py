"""Every example runs and learns; `digits` meets the bound that the README states."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
REACHES = {"train_digits": (15, 0.90), "own_loop": (4, 0.85)}  # epochs, test accuracy


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    monkeypatch.setenv("ULR_SNN_CACHE", str(tmp_path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    epochs, accuracy = REACHES[path.stem]
    assert module.main(epochs) >= accuracy
