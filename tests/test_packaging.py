"""The package as a whole: imports without optional libraries, dependencies point one way, one version."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ulr_snn
from ulr_snn.adapters import LIBRARIES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ulr_snn"
LAYERS = (
    "kernels",
    "noise",
    "model.neurons/adapters/credit.pooling",
    "sites.records/sites.step/sites.binding/model.events/model.event_list",
    "model.forward",
    "credit.prediction/credit.structure",
    "estimators.ulr",
    "plan/train",
    "runs.cli",
)
# Imported where they are needed, so that the library loads quickly and works with what is installed.
LAZY = ("h5py", "matplotlib", "numba", "requests", "safetensors", "sklearn", "tonic", "tqdm", "triton", *LIBRARIES)


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(file): ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those in `if TYPE_CHECKING:`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from statements(node)


def imports(tree: ast.AST) -> set[str]:
    """What a module imports of this package, anywhere in it; 'ulr_snn' for names of the package itself."""
    found = set()
    for node in statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module for name in below}
    return {name for name in found if name.split(".")[0] == "ulr_snn"}


def reachable(start: str) -> set[str]:
    """What a module imports, and what that imports, and so on, leaving aside the package's own re-exports."""
    found, left = set(), [start]
    while left:
        for name in imports(SOURCES[left.pop()]) - found - {"ulr_snn"}:
            found.add(name)
            left.append(name)
    return found


def in_layer(layer: str) -> list[str]:
    parts = tuple(f"ulr_snn.{part}." for part in layer.split("/"))
    for part in parts:
        assert any(f"{name}.".startswith(part) for name in SOURCES), f"{part} has no module: nothing is checked"
    return [name for name in SOURCES if f"{name}.".startswith(parts)]


def test_every_module_imports_without_the_optional_libraries():
    theirs = {f"ulr_snn.adapters.{library}" for library in LIBRARIES} | {
        f"ulr_snn.kernels.{kind}" for kind in ("cpu", "windows", "gpu", "triton")
    }
    names = [name for name in SOURCES if not name.endswith("__main__") and name not in theirs]
    code = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {LAZY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
import torch  # it may use some of them itself
for name in [name for name in sys.modules if name.partition(".")[0] in {LAZY!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
for name in {names!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lower", range(len(LAYERS) - 1))
def test_dependencies_point_one_way(lower):
    above = {name for layer in LAYERS[lower + 1 :] for name in in_layer(layer)}
    for name in in_layer(LAYERS[lower]):
        assert not reachable(name) & above, name


def test_no_module_imports_the_command_line_or_itself():
    for name in SOURCES:
        found = reachable(name)
        assert "ulr_snn.runs.cli" not in found or name == "ulr_snn.__main__", name
        assert name not in found, f"{name} imports itself in a circle"


def test_surrogate_gradients_appear_nowhere_outside_peers():
    for name, tree in SOURCES.items():
        # An adapter has to name what it replaces.
        if not f"{name}.".startswith(("ulr_snn.peers.", "ulr_snn.adapters.")):
            for node in ast.walk(tree):
                defined = isinstance(node, ast.ClassDef | ast.FunctionDef)
                used = node.name if defined else getattr(node, "id", getattr(node, "attr", ""))
                assert "surrogate" not in str(used).lower(), f"{name}: {used}"
            loaded = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not any("peers" in line for line in loaded), name


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ulr_snn.__version__"}
    assigned = [node.value.value for node in SOURCES["ulr_snn"].body if assigns(node, "__version__")]
    assert assigned == [ulr_snn.__version__]  # a literal: the build reads it without importing torch


def assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]


def test_all_public_names_exist():
    assert len(set(ulr_snn.__all__)) == len(ulr_snn.__all__)
    for name in ulr_snn.__all__:
        assert hasattr(ulr_snn, name), name


def test_ci_runs_what_the_readme_says():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = next(line for line in readme.splitlines() if "-m pytest" in line)
    script = script.replace('"$environment/bin/', '".venv/bin/').replace('"$environment"', ".venv")
    for step in command.split(" && "):
        assert step in re.sub(r'"(\.venv\S*)"', r"\1", script)
