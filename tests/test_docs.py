"""The build of the documentation that `make test` runs fails where a page has a fault."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra docs")

ROOT = Path(__file__).parents[1]

FAULTS = {  # what a page says, and what the build is to say about it
    "an unknown command of LaTeX": (r"$\nosuchcommand$", r"no MathML for \nosuchcommand"),
    "a formula that is not recognised as one": ("Set $ x$ to 1.", "a formula is left as it was written"),
    "a link to no page": ("[text](nowhere.md)", "nowhere.md"),
    "a link to no heading": ("[text](#no-such-heading)", "#no-such-heading"),
    "a link to no heading of another page": ("[text](other.md#not-there)", "#not-there"),
    "a missing picture": ("![text](missing.png)", "missing.png"),
    "a reference to no name": ("[text][flowfactor.nosuchname]", "flowfactor.nosuchname"),
    "a link in HTML": ('<a href="absent/">text</a>', "absent/"),
    "a file that is not shown": ('```python\n--8 < --"README.md"\n```', "a file is not shown"),
    "something loaded from elsewhere": ('<img src="https://example.org/far.png" alt="">', "far.png"),
}
NOTEBOOK_FAULTS = {
    "a link to no page": ("[text](nobook.ipynb)", "nobook.ipynb"),
    "an unknown command of LaTeX": (r"$\nosuchbookcommand$", r"no MathML for \nosuchbookcommand"),
}


def make_recipe(target: str) -> list[str]:
    """The commands that a target of the Makefile runs, with the tools beside the running Python."""
    dry_run = ["make", "--dry-run", "--assume-old=.venv/.installed", target, f"BIN={Path(sys.executable).parent}"]
    run = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def build_docs(pages: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Builds other pages than the project's by its own settings and command."""
    (folder / "docs").mkdir()
    for part in ("hooks.py", "checks.py", "docstrings.py", "stylesheets"):
        source, copy = ROOT / "docs" / part, folder / "docs" / part
        if source.is_dir():
            shutil.copytree(source, copy)
        elif source.exists():
            shutil.copy(source, copy)
    for name, text in pages.items():
        (folder / "docs" / name).write_text(text, encoding="utf-8")
    navigation = "nav: [" + ", ".join(pages) + "]\n\n"
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    settings, replaced = re.subn(r"^nav:\n(?:[ ].*\n)+\n", navigation, settings, flags=re.MULTILINE)
    assert replaced == 1
    (folder / "mkdocs.yml").write_text(settings, encoding="utf-8")
    commands = [command for command in make_recipe("test") if "mkdocs build" in command]
    assert len(commands) == 1
    return subprocess.run(commands[0], shell=True, cwd=folder, capture_output=True, text=True, check=False)


def notebook(text: str) -> str:
    cell = {"cell_type": "markdown", "id": "one", "metadata": {}, "source": text}
    return json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def test_every_fault_of_a_page_is_told_and_fails_the_build(tmp_path: Path) -> None:
    page = "# Page\n\n" + "\n\n".join(text for text, _ in FAULTS.values()) + "\n"
    book = notebook("# Book\n\n" + "\n\n".join(text for text, _ in NOTEBOOK_FAULTS.values()))
    run = build_docs({"index.md": page, "other.md": "# Other\n", "book.ipynb": book}, tmp_path)
    told = [line for line in run.stderr.splitlines() if line.startswith("WARNING")]
    silent = [
        fault
        for fault, (_, expected) in (*FAULTS.items(), *NOTEBOOK_FAULTS.items())
        if not any(expected in line for line in told)
    ]
    assert silent == [], run.stderr
    assert run.returncode != 0


def test_one_fault_is_enough_and_none_is_none(tmp_path: Path) -> None:
    for text, fails in ((r"$\alpha$ [text](index.md#page)", False), (r"$\nosuchcommand$", True)):
        folder = tmp_path / str(fails)
        folder.mkdir()
        run = build_docs({"index.md": f"# Page\n\n{text}\n"}, folder)
        assert (run.returncode != 0) == fails, run.stderr


@pytest.mark.parametrize("target", ["test", "test-all", "docs"])
def test_all_targets_build_strictly_and_hear_warnings(target: str) -> None:
    (command,) = [command for command in make_recipe(target) if "mkdocs build" in command]
    assert "--strict" in command.split()
    assert not {"--quiet", "-q"} & set(command.split()), "mkdocs counts no warnings where it prints none"
