"""The source distribution and the wheel: what they hold, and that the wheel works where it is installed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import ulr_snn

ROOT = Path(__file__).resolve().parent.parent
TAKEN = "ulr_snn", "tests", "benchmarks", "datasets", "examples", "docs", "*.md", "*.toml", "*.in", "*.cff", "LICENSE"
NAME = f"ulr_snn-{ulr_snn.__version__}"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    environment = {**os.environ, **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the source distribution, and the wheel from it. Returns their folder."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("built")
    for path in [path for pattern in TAKEN for path in ROOT.glob(pattern)]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        (folder / "source").mkdir(exist_ok=True)
        copy(path, folder / "source" / path.name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "source", folder=folder)
    return folder


def packaged() -> set[str]:
    """Returns the files of the package: modules, py.typed, and data."""
    files = [file.relative_to(ROOT) for file in (ROOT / "ulr_snn").rglob("*") if file.is_file()]
    return {str(file) for file in files if "__pycache__" not in file.parts}


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(built):
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        metadata = Parser().parsestr(wheel.read(f"{NAME}.dist-info/METADATA").decode())
        scripts = wheel.read(f"{NAME}.dist-info/entry_points.txt").decode()
    about = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - about == packaged() and "ulr_snn/py.typed" in names
    assert f"{NAME}.dist-info/licenses/LICENSE" in about
    assert metadata["Version"] == ulr_snn.__version__ and metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert "ulr-snn = ulr_snn.runs.cli:main" in scripts
    assert metadata["License-Expression"] == "MIT" and "Install" in metadata.get_payload()


@pytest.mark.slow
def test_the_source_distribution_holds_what_a_wheel_is_made_of(built):
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if re.match(r"PKG-INFO|setup\.cfg|ulr_snn\.egg-info/", name)}
    assert names - made == packaged() | {"LICENSE", "README.md", "pyproject.toml", "MANIFEST.in"}


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(built, tmp_path):
    target = tmp_path / "target"
    install = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", target)
    run(sys.executable, *install, built / f"{NAME}-py3-none-any.whl", folder=tmp_path)
    code = f"""
import torch, ulr_snn
assert ulr_snn.__file__.startswith({str(target)!r}), ulr_snn.__file__
print(int(ulr_snn.LIF()(torch.full((9, 2, 3), 0.5)).sum()))
"""
    assert int(run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(target))) > 0
    assert "usage: ulr-snn" in run(target / "bin" / "ulr-snn", "--help", folder=tmp_path, PYTHONPATH=str(target))


def test_every_extra_is_documented():
    page = (ROOT / "docs" / "install.md").read_text()
    assert [extra for extra in PROJECT["optional-dependencies"] if f"`{extra}`" not in page] == []


def test_the_page_names_the_wheel_and_the_versions():
    page, torch = (ROOT / "docs" / "install.md").read_text(), PROJECT["dependencies"][0]
    assert (
        f"{NAME}-py3-none-any.whl" in page and "Python 3.11 or newer" in page and PROJECT["requires-python"] == ">=3.11"
    )
    assert "from 2.11 to 2.13" in page and torch == "torch>=2.11,<2.14"
