"""A Griffe extension that reads the package's docstrings and exports as mkdocstrings cannot by itself."""

import re
from typing import Any

from griffe import Alias, Class, Docstring, Extension, Function, Module, Object


class Package(Extension):
    """Prepares the package for the API pages, once it has been read."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        for item in objects(pkg):
            if item.docstring is not None and isinstance(item, Function | Class):
                item.docstring.value = listed(item.docstring, names_of(item))
        prefer_exports(pkg)


def objects(module: Module) -> list[Object]:
    """Returns all classes, functions and modules below a module."""
    found: list[Object] = []
    for member in module.members.values():
        if not member.is_alias:
            found += [member, *objects(member)]
    return found


def prefer_exports(package: Module) -> None:
    """Lets an exported function hide the submodule of the same name, as Python does after the package's imports.

    Griffe gives precedence to the submodule, so `ulr_snn.train` would be the page of a file.
    """
    found = {}
    for name, path in package.imports.items():
        if name in package.members and path.startswith(f"{package.path}."):
            target = package
            for part in path.split(".")[1:]:
                target = target.members[part]
                target = target.final_target if target.is_alias else target
            found[name] = target
    for name, target in found.items():
        if not target.is_module:
            package.set_member(name, Alias(name, target, parent=package))


def names_of(item: Function | Class) -> set[str]:
    """Returns the parameters of a function, or the parameters and attributes of a class."""
    if isinstance(item, Function):
        return {parameter.name for parameter in item.parameters}
    attributes = {name for name, member in item.members.items() if member.is_attribute}
    return attributes | {parameter.name for parameter in item.parameters}


def listed(docstring: Docstring, names: set[str]) -> str:
    """Returns the docstring in Markdown: sentences that begin with `name:` become the items of a list.

    Only names of parameters and attributes count. Indented paragraphs are formulas and stay as they are.
    """
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or r"(?!)"
    start = re.compile(rf"(?:^|\n|(?<=[.);])\s)((?:{one})(?:, (?:{one}))*): ")
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", docstring.value):
        if paragraph.startswith(" "):
            paragraphs.append(paragraph)
            continue
        text = re.sub(r"\n +", " ", paragraph).replace("<", "&lt;")
        lead, *items = (part.replace("\n", " ") for part in start.split(text))
        if lead.strip():
            paragraphs.append(lead.strip())
        tail = ""
        for i in range(0, len(items), 2):
            body = items[i + 1].strip().removesuffix(";")
            if i + 2 == len(items):  # what follows the last item belongs to the whole
                body, separator, rest = body.partition(" Raises ")
                tail = separator.lstrip() + rest
            names_here = ", ".join(f"`{name}`" for name in items[i].split(", "))
            paragraphs.append(f"- {names_here}: {body}")
        if tail:
            paragraphs.append(tail)
    return "\n\n".join(paragraphs)
