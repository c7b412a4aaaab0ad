"""The plan of the house: imports point down in the list of CONTRIBUTING.md, stay out of others' insides, make no circle.

Files are parsed, not imported, so that imports of functions and of type checkers count like any others.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "flowfactor"

# What is against the plan and stands nevertheless, "kind: importer -> imported"; one that has gone has to go from here.
EXCEPTIONS: frozenset[str] = frozenset()
# Modules that import by a string what stands above them, or what a variable names, and why they may.
BY_NAME = {
    "flowfactor": "gives every part on first use",
    "flowfactor._config": "makes saved parts again, from the package that their type names",
    "flowfactor._datasets": "opens a data set on first use: its name and options are known before PyTorch is imported",
    "flowfactor._methods": "builds a model on first use, likewise",
    "flowfactor._plugins": "imports what users name",
    "flowfactor.cli.runs": "asks for optional dependencies",
    "flowfactor.errors": "imports optional dependencies",
    "flowfactor.training": "aliases of what has moved to flowfactor.comparison, for this release",
}


@dataclass(frozen=True)
class Import:
    """One import of a module; ``name`` is what is taken from it, if anything."""

    importer: str
    imported: str
    name: str = ""
    by_string: bool = False


def plan(text: str) -> dict[str, int]:
    """The layer of each name in the list of CONTRIBUTING.md; higher ones may import lower ones."""
    blocks = re.findall(r"^```layers\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, "CONTRIBUTING.md has one block ```layers"
    lines = [re.match(r"\S+(?:  ?\S+)*?(?=\s{3,})", line) for line in blocks[0].splitlines()]
    assert all(lines), "a line of the list is: names, two spaces between them, three before what they are"
    layers = [line.group().split() for line in lines if line]
    names = [name for layer in layers for name in layer]
    assert len(names) == len(set(names)), "a name has one place in the list"
    return {name: len(layers) - i for i, layer in enumerate(layers) for name in layer}


def modules(root: Path) -> dict[str, Path]:
    """The files of a package by their modules."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def nodes(text: str) -> list[ast.AST]:
    """The parts of a file that may import something."""
    kept = (ast.Import, ast.ImportFrom, ast.Call, ast.Attribute)
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, kept)]


def imports(module: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """All imports of the package's own modules in a file, wherever they stand."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            yield from (Import(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield Import(module, whole) if whole in known else Import(module, source, alias.name)
        elif isinstance(node, ast.Call) and (asked := by_string(node)) is not None:
            yield Import(module, asked, by_string=True)


def by_string(node: ast.Call) -> str | None:
    """What a call imports by a string; "" where a variable says what."""
    called = ast.unparse(node.func).removeprefix("importlib.").removeprefix("errors.")
    if called not in ("import_module", "__import__", "require") or not node.args:
        return None
    argument = node.args[0]
    if isinstance(argument, ast.Constant):
        return str(argument.value)
    start = argument.values[0] if isinstance(argument, ast.JoinedStr) else None
    # f"flowfactor.training.{name}" stays within flowfactor.training; f"flowfactor.{name}" may lead anywhere.
    text = str(start.value) if isinstance(start, ast.Constant) else ""
    return text.rpartition(".")[0] if text.count(".") > 1 else ""


def floor(module: str) -> str:
    """The name in the list that a module belongs to."""
    name = module.split(".")[1] if "." in module else ""
    return "_*" if name.startswith("_") and name != "__main__" else name


def faults(root: Path, layers: dict[str, int]) -> set[str]:
    """All that is against the plan."""
    known, found, graph = modules(root), set(), {}
    for module, path in known.items():
        graph[module] = set()
        for entry in imports(module, path, known):
            if entry.imported and (entry.imported.partition(".")[0] != PACKAGE or module == PACKAGE):
                continue
            wrong = {f"{kind}: {module} -> {entry.imported}" for kind in kinds(entry, path, layers)}
            if entry.by_string:
                found |= {f"by name: {module}"} if wrong else set()
            else:
                found |= wrong
                graph[module] |= {entry.imported} - {module}
    return found | {f"circle: {', '.join(circle)}" for circle in circles(graph)}


def kinds(entry: Import, path: Path, layers: dict[str, int]) -> Iterator[str]:
    """What is wrong with one import, if anything."""
    here, there = floor(entry.importer), floor(entry.imported)
    if not entry.imported:
        yield "anything"
    elif not there:
        if not takes_version_alone(entry, path):
            yield "root"
    elif here != there:
        inside = entry.imported.split(".")[2:]
        if any(part.startswith("_") for part in (*inside, entry.name) if not part.startswith("__")):
            yield "private"
        if layers[there] >= layers[here]:
            yield "up"


def takes_version_alone(entry: Import, path: Path) -> bool:
    """Whether all that a file takes from the package itself, which stands above all, is its version."""
    if entry.name:
        return entry.name == "__version__"
    tree = nodes(path.read_text(encoding="utf-8"))
    taken = {
        n.attr for n in tree if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == PACKAGE
    }
    return taken == {"__version__"}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, ahead = set(), [start]
        while ahead:
            for after in graph.get(ahead.pop(), ()):
                if after not in seen:
                    seen.add(after)
                    ahead.append(after)
        reach[start] = seen
    groups = {tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


@pytest.fixture(scope="module")
def layers() -> dict[str, int]:
    return plan((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_every_module_has_its_place_in_the_list(layers: dict[str, int]) -> None:
    there = {floor(module) for module in modules(ROOT / PACKAGE)} - {""}
    assert set(layers) == there, "the list of CONTRIBUTING.md names what stands at the top of the package, and no more"


def test_imports_point_down_keep_out_of_private_modules_and_make_no_circle(layers: dict[str, int]) -> None:
    allowed = EXCEPTIONS | {f"by name: {module}" for module in BY_NAME}
    found = faults(ROOT / PACKAGE, layers)
    assert sorted(found - allowed) == [], "see the layers in CONTRIBUTING.md"
    assert sorted(allowed - found) == [], "these exceptions are needed no more: take them out"


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("potentials/base.py", "import flowfactor.models", "up: flowfactor.potentials.base -> flowfactor.models"),
        ("control.py", "from flowfactor.solver import Solver", "up: flowfactor.control -> flowfactor.solver"),
        ("_checks.py", "from flowfactor import control", "up: flowfactor._checks -> flowfactor.control"),
        ("fields/base.py", "def f():\n    from ..models import VAE", "up: flowfactor.fields.base -> flowfactor.models"),
        (
            "solver.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flowfactor.latent_flow import LatentFlow",
            "up: flowfactor.solver -> flowfactor.latent_flow",
        ),
        (
            "path.py",
            "import importlib\nimportlib.import_module('flowfactor.training.config')",
            "by name: flowfactor.path",
        ),
        ("path.py", "__import__('flowfactor.' + 'cli')", "by name: flowfactor.path"),
        (
            "models/sparse.py",
            "import importlib\nx = 'cli'\nimportlib.import_module(f'flowfactor.{x}')",
            "by name: flowfactor.models.sparse",
        ),
        (
            "models/sparse.py",
            "from flowfactor.potentials import _stacked",
            "private: flowfactor.models.sparse -> flowfactor.potentials._stacked",
        ),
        (
            "models/sparse.py",
            "from flowfactor.potentials.mlp import _inside",
            "private: flowfactor.models.sparse -> flowfactor.potentials.mlp",
        ),
        ("metrics/gaps.py", "from flowfactor import LatentFlow", "root: flowfactor.metrics.gaps -> flowfactor"),
        ("metrics/gaps.py", "import flowfactor\nflowfactor.models", "root: flowfactor.metrics.gaps -> flowfactor"),
        (
            "priors/base.py",
            "def f():\n    from flowfactor.priors.diffusion import Diffusion",
            "circle: flowfactor.priors.base, flowfactor.priors.diffusion",
        ),
        (
            "path.py",
            "from flowfactor.control import Control\nfrom flowfactor import errors",
            "up: flowfactor.path -> flowfactor.control",
        ),
    ],
)
def test_a_forbidden_import_is_found(
    file: str, line: str, expected: str, layers: dict[str, int], tmp_path: Path
) -> None:
    copy = tmp_path / PACKAGE
    shutil.copytree(ROOT / PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = faults(ROOT / PACKAGE, layers)
    with (copy / file).open("a", encoding="utf-8") as out:
        out.write(f"\n{line}\n")
    new = faults(copy, layers) - before
    assert any(fault == expected or _same_circle(fault, expected) for fault in new), sorted(new)


def _same_circle(fault: str, expected: str) -> bool:
    """Whether a circle that was found holds the modules of the expected one."""
    return fault.startswith("circle: ") and set(re.findall(PACKAGE + r"[\w.]*", expected)) <= set(
        re.findall(PACKAGE + r"[\w.]*", fault)
    )


def test_the_version_is_all_that_may_be_taken_from_the_top(layers: dict[str, int], tmp_path: Path) -> None:
    for name, text, wrong in (
        ("one", "import flowfactor\nprint(flowfactor.__version__)\n", False),
        ("two", "from flowfactor import __version__\n", False),
        ("three", "import flowfactor\nprint(flowfactor.__version__, flowfactor.LatentFlow)\n", True),
    ):
        folder = tmp_path / name / PACKAGE
        (folder / "cli").mkdir(parents=True)
        (folder / "cli/__init__.py").write_text(text, encoding="utf-8")
        assert bool(faults(folder, layers)) is wrong


@pytest.mark.parametrize(
    "text",
    [
        "",
        "```layers\na   one\n```\n```layers\nb   two\n```\n",
        "```layers\na   one\na   two\n```\n",
        "```layers\na\n```\n",
    ],
)
def test_a_list_that_cannot_be_read_is_no_plan(text: str) -> None:
    with pytest.raises(AssertionError):
        plan(text)


def test_a_list_is_read_from_the_top_down() -> None:
    assert plan("```layers\na  b   above\n_*      below\n```\n") == {"a": 2, "b": 2, "_*": 1}
