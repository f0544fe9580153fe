"""The package as a whole: imports without optional libraries, dependencies point one way, one version."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ulr_snn
from ulr_snn.adapters import libraries

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ulr_snn"
# All modules of the package: each imports only what stands before it, and nothing imports in a circle.
ORDER = [
    "errors",
    "errors.arguments",
    "kernels",
    "kernels.bits",
    "kernels.cpu",
    "kernels.layout",
    "kernels.limits",
    "kernels.pool",
    "kernels.precision",
    "kernels.ranks",
    "kernels.state",
    "kernels.team",
    "kernels.triton",
    "kernels.walk",
    "kernels.gpu",
    "kernels.weight_cache",
    "kernels.windows",
    "kernels.dispatch",
    "kernels.reference",
    "kernels.sparse",
    "kernels.stateless",
    "noise",
    "noise.kinds",
    "noise.firing",
    "noise.random",
    "noise.secant",
    "noise.level",
    "model.neurons",
    "model.entry",
    "model.event_list",
    "model.events",
    "model",
    "model.chain",
    "model.graph",
    "model.glue",
    "model.mode",
    "adapters.base",
    "adapters.blackbox",
    "adapters.memories",
    "adapters.intercept",
    "adapters.comparisons",
    "adapters.stairs",
    "adapters.places",
    "adapters",
    "adapters.norse",
    "adapters.rockpool",
    "adapters.sinabs",
    "adapters.snntorch",
    "adapters.spikingjelly",
    "sites",
    "sites.flipout",
    "sites.records",
    "sites.step",
    "sites.current",
    "sites.binding",
    "sites.weights",
    "sites.flow",
    "sites.variance",
    "model.trees",
    "model.view",
    "model.interface",
    "model.targets",
    "losses.brought",
    "losses.named",
    "losses",
    "losses.evaluation",
    "credit",
    "credit.base",
    "credit.baseline",
    "credit.direct",
    "credit.maps",
    "credit.pooling",
    "credit.recurrence",
    "credit.linked",
    "credit.response",
    "credit.feedback",
    "sampling",
    "sampling.adaptive",
    "model.activity",
    "model.reading",
    "model.batch",
    "losses.metrics",
    "model.passes",
    "model.recording",
    "model.shape_errors",
    "model.call",
    "model.habits",
    "model.equivalence",
    "model.links",
    "model.tail",
    "model.recorded_pass",
    "model.finding",
    "model.staircase",
    "model.tracing",
    "model.comparison_search",
    "model.place_search",
    "model.discovery",
    "model.recognition",
    "model.bound",
    "adapters.nir",
    "adapters.nir.graph",
    "adapters.nir.export",
    "adapters.nir.reader",
    "model.runner",
    "credit.residual",
    "sampling.kinds",
    "credit.kinds",
    "credit.formula",
    "credit.structure",
    "credit.map_learning",
    "credit.prediction",
    "model.forward",
    "model.replay",
    "memory",
    "memory.chunk",
    "memory.split",
    "memory.chunked",
    "estimators",
    "estimators.base",
    "estimators.config",
    "estimators.observe",
    "estimators.step_sizes",
    "estimators.learner",
    "memory.step",
    "memory.whole",
    "memory.chunks",
    "memory.one_step",
    "memory.over_ranks",
    "estimators.attachment",
    "estimators.ulr",
    "estimators.online",
    "evaluate",
    "data.binning",
    "data.mapped",
    "data.cache",
    "data.augment",
    "data.view",
    "data.events",
    "data.splits",
    "data.entry",
    "data.files",
    "data.readers",
    "data.child",
    "data.assemble",
    "data.digits",
    "data.dynamics",
    "data.tonic",
    "data.sets",
    "data.sets.asldvs",
    "data.sets.cifar10dvs",
    "data.sets.dvsgesture",
    "data.sets.ncaltech101",
    "data.sets.ncars",
    "data.sets.smnist",
    "data.registry",
    "data.columns",
    "data.identity",
    "data.sequences",
    "data",
    "peers.attachment",
    "peers.evolution",
    "peers.surrogate",
    "peers.alignment",
    "peers.expected",
    "peers",
    "runs",
    "runs.models",
    "runs.optim",
    "runs.recording",
    "runs.quiet",
    "runs.progress",
    "runs.order",
    "runs.callbacks",
    "runs.plots",
    "runs.checkpoints",
    "runs.directory",
    "runs.interrupts",
    "runs.settings",
    "runs.keeping",
    "runs.steps",
    "runs.session",
    "train",
    "compare",
    "plan",
    "diagnose",
    "runs.pictures",
    "runs.measure",
    "runs.report",
    "ulr_snn",
    "runs.commands",
    "runs.cli",
    "__main__",
]
ROOMS = 22  # entries of the package's top folder, at most
LINES, BODY = 400, 60  # of a file and of a function, at most, kernels aside
# Imported where they are needed, so that the library loads quickly and works with what is installed.
LAZY = (
    "aedat",
    "filelock",
    "h5py",
    "jinja2",
    "matplotlib",
    "nir",
    "numba",
    "requests",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "tonic",
    "tqdm",
    "triton",
    *libraries(),
)


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(file): ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST) -> set[str]:
    """What a module imports of this package, anywhere in it; 'ulr_snn' for names of the package itself."""
    found = set()
    for node in ast.walk(tree):  # nothing is exempt, imports for type checking either
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module for name in below}
    return {name for name in found if name.split(".")[0] == "ulr_snn"}


def test_every_module_imports_without_the_optional_libraries():
    theirs = {f"ulr_snn.adapters.{library}" for library in libraries()} | {
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


def full(name: str) -> str:
    return name if name == "ulr_snn" else f"ulr_snn.{name}"


def test_all_modules_have_a_place():
    assert sorted(map(full, ORDER)) == sorted(SOURCES) and len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_downwards(name):
    before = set(map(full, ORDER[: ORDER.index(name)]))
    assert imports(SOURCES[full(name)]) <= before, name


def test_a_stranger_can_hold_it_in_the_head():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= ROOMS, sorted(path.name for path in entries)
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "kernels":
            continue
        source = file.read_text()
        assert source.count("\n") <= LINES, file
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < BODY, f"{file}: {node.name}"


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


def test_the_package_loads_what_type_checkers_see():
    """The names stand three times: in SOURCES for Python, under TYPE_CHECKING, and in `__all__`."""
    shown = {
        (node.module.removeprefix("ulr_snn").lstrip("."), alias.name)
        for node in ast.walk(SOURCES["ulr_snn"])
        if isinstance(node, ast.ImportFrom) and node.module.startswith("ulr_snn")
        for alias in node.names
    }
    loaded = {(source, name) for source, names in ulr_snn.SOURCES.items() for name in names}
    assert shown - {("", "data")} == loaded
    assert sorted(name for _, name in shown) == sorted(ulr_snn.__all__)
    assert set(ulr_snn.__all__) <= set(dir(ulr_snn))


def test_the_package_loads_without_torch():
    """Neither it, nor what the command line needs to parse its options, nor `dir` and probes of editors."""
    code = """
import sys
import ulr_snn, ulr_snn.errors.arguments, ulr_snn.runs.cli
assert {"train", "LIF", "data"} <= set(dir(ulr_snn)) and ulr_snn.__version__
assert not hasattr(ulr_snn, "__wrapped__")
assert sys.modules.keys().isdisjoint({"torch", "numpy", "numba", "tqdm"})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_verbs_are_functions_in_every_order_of_imports():
    """Python's import sets a submodule as an attribute of its package, which would hide the function of its name."""
    code = """
import importlib, sys, types
import torch
VERBS = ("train", "evaluate", "compare", "plan", "diagnose")
WAYS = {
    "attribute": "import ulr_snn; ulr_snn.{verb}",
    "name": "from ulr_snn import {verb}; assert callable({verb})",
    "module": "import ulr_snn.{verb}",
    "as": "import ulr_snn.{verb} as found; assert callable(found)",
    "of module": "from ulr_snn.{verb} import {verb}; assert callable({verb})",
    "by name": "importlib.import_module('ulr_snn.{verb}')",
    "another name": "from ulr_snn import LIF",
    "below": "from ulr_snn.runs.directory import RunDirectory",
    "star": "from ulr_snn import *; assert callable({verb})",
}
def check(*ways):
    package = sys.modules["ulr_snn"]
    for verb in VERBS:
        found = getattr(package, verb)
        assert isinstance(found, types.FunctionType) and found.__name__ == verb, (ways, verb)
        module = sys.modules["ulr_snn." + verb]
        assert isinstance(module, types.ModuleType) and getattr(module, verb) is found, (ways, verb)
    assert isinstance(package.data, types.ModuleType) and package.UsageError is package.errors.UsageError
for i, first in enumerate(("name", "module", "of module", "below")):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ulr_snn"]:
        del sys.modules[name]
    names, verb = {"importlib": importlib}, VERBS[i]
    exec(WAYS[first].format(verb=verb), names)
    for second in WAYS:
        exec(WAYS[second].format(verb=verb), names)
        check(first, second, verb)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_ci_runs_what_the_readme_says():
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    command = next(line for line in readme.splitlines() if "-m pytest" in line)
    script = script.replace('"$environment/bin/', '".venv/bin/').replace('"$environment"', ".venv")
    for step in command.split(" && "):
        assert step in re.sub(r'"(\.venv\S*)"', r"\1", script)


def test_no_test_file_imports_another():
    names = {file.stem for file in (ROOT / "tests").glob("test_*.py")}
    for name in sorted(names):
        for node in ast.walk(ast.parse((ROOT / "tests" / f"{name}.py").read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                line = ast.unparse(node)
                assert names.isdisjoint(re.findall(r"\w+", line)), f"{name}.py: {line}: share it in a helper module"


def test_checked_arguments_have_annotations_that_are_no_text():
    """`checked` reads annotations, which `from __future__ import annotations` would make text."""
    for name, tree in SOURCES.items():
        uses = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & {"checked", "check_fields"}
        future = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in ast.walk(tree))
        assert not (uses and future), name
