"""The documents: their code compiles, the API pages list what is public, and the README stays short."""

import ast
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import ulr_snn
from ulr_snn import data, losses, peers
from ulr_snn.runs import callbacks, pictures

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]


def public_names() -> set[str]:
    """Returns the full names of all that users may import."""
    names = {f"ulr_snn.{name}" for name in ulr_snn.__all__}
    names |= {f"ulr_snn.data.{name}" for name in exported(data) if not isinstance(getattr(data, name), ModuleType)}
    names |= {f"ulr_snn.peers.{name}" for name in exported(peers) if is_own(getattr(peers, name), peers)}
    names |= {f"ulr_snn.runs.pictures.{name}" for name in pictures.__all__} | {"ulr_snn.runs.report.write_report"}
    names |= {f"ulr_snn.losses.{loss.value.__name__}" for loss in losses.LOSSES.values()}
    names |= {
        f"ulr_snn.runs.callbacks.{name}" for name in exported(callbacks) if is_own(vars(callbacks)[name], callbacks)
    }
    return names | {"ulr_snn.peers.METHODS", "ulr_snn.losses.register", "ulr_snn.losses.NamedLoss"}


def exported(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]


def is_own(thing: object, package: ModuleType) -> bool:
    return isinstance(thing, type) and thing.__module__.startswith(package.__name__)


def documented_names() -> list[str]:
    """Returns what the API pages ask mkdocstrings for."""
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    return [name for text in pages for name in re.findall(r"^::: (\S+)", text, re.MULTILINE)]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_code_compiles(code):
    compile(code, "<document>", "exec")


@pytest.mark.parametrize("code", BLOCKS)
def test_python_code_uses_public_names(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ulr_snn":
            assert node.attr in ulr_snn.__all__
        if isinstance(node, ast.ImportFrom) and node.module == "ulr_snn":
            assert {alias.name for alias in node.names} <= set(ulr_snn.__all__)


def test_api_pages_list_all_public_names_once():
    assert Counter(documented_names()) == Counter(public_names())


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_citation_has_the_version_of_the_package():
    assert f"\nversion: {ulr_snn.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_api_pages_show_functions_where_a_submodule_has_the_same_name():
    griffe = pytest.importorskip("griffe")
    extension = ROOT / "docs" / "extensions" / "package.py"
    package = griffe.load("ulr_snn", search_paths=[ROOT], extensions=griffe.load_extensions(extension))
    for name in ulr_snn.__all__:
        assert package[name].is_module == isinstance(getattr(ulr_snn, name), ModuleType), name


def test_docstrings_are_read_as_lists_of_their_names():
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(ROOT / "docs" / "extensions" / "package.py")
    code = (
        'def f(a, b, c):\n    """Does it.\n\n    a: the first, if\n    c < 1. b, c: the others. Raises E.\n'
        '\n        f = a < b\n    """'
    )
    with griffe.temporary_visited_package("pkg", {"__init__.py": code}, extensions=extensions) as package:
        assert package["f"].docstring.value == (
            "Does it.\n\n- `a`: the first, if c &lt; 1.\n\n- `b`, `c`: the others.\n\nRaises E.\n\n    f = a < b"
        )
