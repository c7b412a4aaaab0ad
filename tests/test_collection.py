"""What `make test` is to run is found by pytest: every docstring's example, every file of tests, every notebook."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def examples(path: Path) -> Iterator[str]:
    """The dotted names whose docstrings hold an example."""
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")

    def walk(node: ast.AST, name: str) -> Iterator[str]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ">>> " in (ast.get_docstring(node) or ""):
                yield name
            for child in node.body:
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from walk(child, f"{name}.{child.name}")

    return walk(ast.parse(path.read_text(encoding="utf-8")), module)


def collected(*options: str) -> set[str]:
    """What pytest collects, by the project's own settings."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return set(run.stdout.splitlines())


def test_every_example_of_a_docstring_is_run() -> None:
    for module in ("lightning", "matplotlib", "yaml"):
        pytest.importorskip(module, reason="needs the extras train and plot")
    run = {line.partition("::")[2] for line in collected("flowfactor") if "::" in line}
    shown = {name for path in sorted((ROOT / "flowfactor").rglob("*.py")) for name in examples(path)}
    assert len(shown) > 100
    assert sorted(shown - run) == []


def test_files_of_tests_have_names_that_are_collected_and_names_of_their_own() -> None:
    paths = [path for path in (ROOT / "tests").rglob("*.py") if "__pycache__" not in path.parts]
    tests = [
        path for path in paths if any(line.startswith("def test_") for line in path.read_text("utf-8").splitlines())
    ]
    assert [path.name for path in tests if not path.name.startswith("test_")] == []
    assert len({path.name for path in tests}) == len(tests), "without packages, equal names would hide one another"
    for path in tests:
        names = [node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
        assert len(names) == len(set(names)), f"{path.name} defines a test twice: the later hides the earlier"


def test_warnings_are_errors(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("filterwarnings")[0] == "error"
    assert pytestconfig.getoption("doctestmodules") and pytestconfig.getoption("strict_markers")
