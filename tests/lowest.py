"""Prints the lowest versions that pyproject.toml declares, as constraints of pip: what `make test-lowest` installs."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")


def lowest(text: str) -> list[str]:
    """``name==floor`` of every requirement ``"name>=floor,..."`` of the package and its extras, once each."""
    declared = text.partition("[project.scripts]")[0].partition("dependencies = [")[2]
    found = re.findall(r'"([A-Za-z0-9_-]+)(?:\[[^\]]*\])?>=([0-9.]+)[^"]*"', declared)
    return sorted({f"{name}=={floor}" for name, floor in found})


if __name__ == "__main__":
    print(*lowest(TEXT), sep="\n")
