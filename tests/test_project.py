"""What holds the project together: versions, documentation, the README and a light import."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flowfactor

ROOT = Path(__file__).parents[1]
PACKAGES = ["flowfactor"] + [f"flowfactor.{p.parent.name}" for p in sorted(ROOT.glob("flowfactor/*/__init__.py"))]
EXTRAS = ("matplotlib", "lightning", "PIL", "h5py", "sklearn", "safetensors", "yaml", "tensorboard")
PYTHON_PAGES = ("README.md", "docs/index.md", "docs/irregular.md")


def public_names(package: str) -> list[str]:
    """The names in a package's ``__all__``, less its subpackages, which have pages of their own."""
    exported = getattr(importlib.import_module(package), "__all__", [])
    return [f"{package}.{name}" for name in exported if f"{package}.{name}" not in PACKAGES]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package: str) -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    documented = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    missing = set(public_names(package)) - set(documented)
    assert not missing, f"give each a line '::: NAME' in docs/api/{package.rpartition('.')[2]}.md: {sorted(missing)}"


def test_documented_names_exist_and_stand_once() -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    documented = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(documented) == len(set(documented)), "a name is documented twice"
    for name in documented:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), f"{name} is documented and does not exist"


def test_every_documentation_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    pages += [f"examples/{p.name}" for p in (ROOT / "examples").glob("*.ipynb")]
    assert [page for page in pages if not re.search(rf"[ :]{re.escape(page)}$", navigation, re.MULTILINE)] == []


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(page)
    assert blocks, f"{page} shows no Python"
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks:  # in order and together, as a reader would run them
        exec(compile(block, page, "exec"), namespace)
    assert {p.name for p in tmp_path.iterdir()} == set()


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "experiments/README.md"]
)
def test_links_outside_of_the_documentation_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_python_of_the_other_pages_names_what_exists() -> None:
    """Examples of the API's pages may need files or hours: their syntax is checked, and the names that they take."""
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        for block in python_blocks(page.relative_to(ROOT).as_posix()):
            compile(block, page.name, "exec")
            for name in re.findall(r"\bff\.([\w.]+)", block):
                found: object = flowfactor
                for part in name.split("."):
                    found = getattr(found, part, None)
                assert found is not None, f"{page.name} shows ff.{name}, which does not exist"
            for module, names in re.findall(r"^from (flowfactor[\w.]*) import ([\w, ]+)$", block, re.MULTILINE):
                missing = [name for name in names.split(", ") if not hasattr(importlib.import_module(module), name)]
                assert missing == [], f"{page.name} imports what {module} has not"


def test_every_part_is_there_at_once_and_loaded_on_first_use() -> None:
    script = (
        "import sys, flowfactor as ff; early = 'flowfactor.models' in sys.modules; "
        "print(early, {'data', 'metrics', 'models', 'plot'} <= set(dir(ff)), ff.models.VAE.__name__, hasattr(ff, 'model'))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True", "VAE", "False"]


def test_import_needs_no_extra() -> None:
    script = f"import sys, flowfactor; print(*[m for m in {EXTRAS!r} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stderr
    loaded = run.stdout.split()
    assert loaded == [], f"import flowfactor also imports {loaded}"


def test_versions_agree() -> None:
    version = flowfactor.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(\d\S*)\]", changelog, re.MULTILINE)[0] == version
    assert re.findall(r"^version: (\S+)$", citation, re.MULTILINE) == [version]


@pytest.mark.parametrize("notebook", sorted(p.name for p in (ROOT / "examples").glob("*.ipynb")))
def test_notebooks_are_small(notebook: str) -> None:
    assert (ROOT / "examples" / notebook).stat().st_size < 300_000, "clear its outputs"
