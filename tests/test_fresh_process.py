"""What is written after `import flowfactor as ff` works in a process that has imported nothing else before.

Lazy imports hide mistakes: a test that ran earlier has imported the part that a name needs. Here the names of each part are
looked up in a process of its own, which is forked from one that has imported PyTorch and nothing of flowfactor.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SOURCES = sorted((ROOT / "flowfactor").rglob("*.py"))

LOOKUP = """
import importlib.util, json, os, sys, warnings
import geomloss, numpy, torch, torchdiffeq  # what every part needs; nothing of flowfactor
if importlib.util.find_spec("lightning"):
    import lightning.pytorch

assert not [name for name in sys.modules if name.split(".")[0] == "flowfactor"]
missing = {}
for names in json.load(sys.stdin):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        reasons = {}
        warnings.simplefilter("error", DeprecationWarning)  # no page shows a name that is to go
        import flowfactor as ff

        for name in names:
            try:
                found = ff
                for part in name.split("."):
                    found = getattr(found, part)
            except BaseException as error:
                reasons[name] = f"{type(error).__name__}: {error}"[:300]
        os.write(write, json.dumps(reasons).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        reasons = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    missing |= json.loads(reasons) if reasons else dict.fromkeys(names, f"its process ended with {status}")
print(json.dumps(missing))
"""


def unresolved(names: set[str]) -> dict[str, str]:
    """Those of the names that ``import flowfactor as ff`` alone does not give, with the reasons."""
    parts: dict[str, list[str]] = {}
    for name in sorted(names):
        parts.setdefault(name.rpartition(".")[0] or name, []).append(name)
    run = subprocess.run(
        [sys.executable, "-c", LOOKUP],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        input=json.dumps(list(parts.values())),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def docstrings(path: Path) -> str:
    """All docstrings of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds))
    return "\n".join(ast.get_docstring(node) or "" for node in nodes)


def shown(text: str) -> set[str]:
    """The dotted names after ``ff.`` in a text."""
    return {name.rstrip(".") for name in re.findall(r"(?<![\w.])ff\.([A-Za-z_][\w.]*)", text)}


def shown_everywhere() -> set[str]:
    names: set[str] = set()
    for path in (*PAGES, *NOTEBOOKS):
        names |= shown(path.read_text(encoding="utf-8"))
    for path in SOURCES:
        names |= shown(docstrings(path))
    return names


def documented() -> set[str]:
    """The names that have a line in the API's pages."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    return set(re.findall(r"^::: flowfactor\.(\S+)$", pages, re.MULTILINE))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_name_that_a_page_or_an_example_shows_is_there_after_the_import_alone() -> None:
    for module in ("lightning", "matplotlib", "PIL"):
        pytest.importorskip(module, reason="needs the extras train and plot")
    names = shown_everywhere() | documented()
    assert len(names) > 150 and {"training.prepare_process", "LatentFlow"} <= names
    wrong = {"models.VEA", "trainings", "solver.METHODS"}  # the last is an old name, which no page should show
    missing = unresolved(names | wrong)
    assert {name: reason for name, reason in missing.items() if name not in wrong} == {}
    assert set(missing) == wrong, "a name that is not there has to be found"


def test_every_public_module_is_offered_by_the_package() -> None:
    import flowfactor as ff

    paths = (ROOT / "flowfactor").iterdir()
    there = {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").exists()}
    public = {name for name in there if not name.startswith("_")} - {"cli"}
    assert public == ff._MODULES, "flowfactor/__init__.py lists what is imported on first use"
    assert public <= set(dir(ff))
