"""Imports run one way: the table below is the architecture, and these tests hold the source to it.

Read from the syntax tree, so an import inside a function counts like one at the top of a file.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "conmoe"

#: From the bottom up. A room (a file or folder of the package) may import its own row and the rows above it in this
#: table, so what many need stands first. A room that is not named is a verb: only verbs and the last row may use it.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"types"}),
    frozenset({"registry", "artifacts", "shards", "runtime"}),
    frozenset({"ops"}),
    frozenset({"statistics", "methods", "refinements"}),
    frozenset({"allocate", "refine"}),
    frozenset({"moe", "forms", "observe", "source", "stream", "checkpoint", "lowprec", "parallel"}),
    frozenset({"builtin_text", "documents", "encode", "data"}),
    frozenset({"<verbs>"}),
    frozenset({"api", "cli", "__main__", "<package>"}),
)

TENSORS_ONLY = ("torch", "numpy", "scipy", "conmoe.types", "conmoe.registry", "conmoe.ops")

#: What files may import besides the standard library. The first pattern is the module's, a name covers what is in it.
PURE: dict[str, tuple[str, ...]] = {
    "conmoe.types": ("torch",),
    "conmoe.registry": ("torch", "conmoe.types"),
    "conmoe.artifacts": ("torch", "numpy", "safetensors", "pydantic", "conmoe.types"),
    "conmoe.ops*": TENSORS_ONLY,
    "conmoe.statistics*": TENSORS_ONLY,
    "conmoe.methods*": TENSORS_ONLY,
    "conmoe.refinements*": TENSORS_ONLY,
    # These files travel beside the weights and are read on machines that do not have this package.
    "conmoe.runtime.modeling_*": ("torch", "transformers", "conmoe.runtime"),
}

#: Packages of the extras: whoever does not use the feature need not have them, so no file imports them at its top.
OPTIONAL = {"accelerate", "datasets", "jinja2", "lm_eval", "matplotlib", "pyarrow", "vllm"}


@dataclass(frozen=True)
class Import:
    """One module imports another; ``at_top``: by being imported itself, not only when a function is called."""

    source: str
    target: str
    line: int
    at_top: bool
    relative: bool

    def __str__(self) -> str:
        return f"{self.source} (line {self.line}) imports {self.target}"


def module_name(path: Path) -> str:
    parts = ("conmoe", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> Iterator[Import]:
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"), path.name)
    functions = (part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
    lazy = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            for target in targets(node, package):
                yield Import(module, target, node.lineno, at_top=node not in lazy, relative=relative)


def targets(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    """The modules that a statement imports. The version is the one thing that may be read off the package itself."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    parents = package.split(".")
    above = parents[: len(parents) - node.level + 1] if node.level else []
    base = ".".join([*above, *filter(None, [node.module])])
    for alias in node.names:
        if (base, alias.name) != ("conmoe", "__version__"):
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base


IMPORTS = [found for module in MODULES for found in imports_of(module)]
OURS = [found for found in IMPORTS if found.target.split(".")[0] == "conmoe"]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "<package>"


def layer(module: str) -> int:
    verbs = next(index for index, rooms in enumerate(LAYERS) if "<verbs>" in rooms)
    return next((index for index, rooms in enumerate(LAYERS) if room(module) in rooms), verbs)


def inside(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def test_imports_run_one_way():
    wrong = [str(found) for found in OURS if layer(found.target) > layer(found.source)]
    assert not wrong, "these imports point upwards:\n" + "\n".join(wrong)


def test_there_are_no_cycles():
    graph = {module: {found.target for found in OURS if found.source == module} - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("these modules import each other: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("pattern", PURE)
def test_pure_files_import_only_what_they_may(pattern: str):
    allowed = PURE[pattern]
    ours = [found for found in IMPORTS if fnmatch(found.source, pattern)]
    foreign = [found for found in ours if found.target.split(".")[0] not in sys.stdlib_module_names]
    wrong = [str(found) for found in foreign if not inside(found.target, allowed)]
    assert not wrong, f"{pattern} may import {', '.join(allowed)} and the standard library:\n" + "\n".join(wrong)


def test_modelling_files_name_their_neighbours_relatively():
    wrong = [str(found) for found in OURS if fnmatch(found.source, "*.modeling_*") and not found.relative]
    assert not wrong, "Transformers copies these files out of the package:\n" + "\n".join(wrong)


def test_nothing_imports_the_command_line():
    inside = {"cli", "__main__"}
    wrong = [str(found) for found in OURS if room(found.target) == "cli" and room(found.source) not in inside]
    assert not wrong, "\n".join(wrong)


def test_packages_of_the_extras_are_imported_where_they_are_used():
    wrong = [str(found) for found in IMPORTS if found.at_top and found.target.split(".")[0] in OPTIONAL]
    assert not wrong, "these belong inside the function that needs them:\n" + "\n".join(wrong)


def test_no_room_stands_in_two_rows():
    named = [name for rooms in LAYERS for name in rooms]
    assert len(named) == len(set(named))
