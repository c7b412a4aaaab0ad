"""Results on paper: tables, the JSON file of a run, and the tables of a page of documentation."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.timing import short

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "speed.md"
TABLES = (
    "machine", "step", "forward", "laplacian", "sizes", "steered", "paper", "data", "training", "parts", "adaptive",
    "memory", "compile", "compiled", "processes", "growth", "import",
)  # fmt: skip
"""The tables of the page, in its order."""
CURVES = ("growth", "precision")  # groups that are drawn; of growth, the exponents are a table too

Result = Mapping[str, Any]


def write(about: Result, repeats: int, rows: Sequence[Any], folder: Path = RESULTS) -> Path:
    """Writes all readings of a run as JSON, whole or not at all."""
    now = datetime.now(timezone.utc)
    results = [row.as_dict() for row in rows]
    folder.mkdir(exist_ok=True)
    path = folder / f"speed-{now:%Y%m%dT%H%M%S}.json"
    text = json.dumps({"time": now.isoformat(), "machine": about, "repeats": repeats, "results": results}, indent=1)
    replace(path, text + "\n")
    return path


def replace(path: Path, text: str) -> None:
    """Writes a file under a temporary name first, so that it is whole at any moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def load(paths: Sequence[Path] = ()) -> dict[str, Any]:
    """Reads runs: those given, else the newest; of a group that several hold, the last one counts.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = list(paths) or sorted(RESULTS.glob("speed-*.json"))[-1:]
    if not found:
        raise FileNotFoundError(f"{RESULTS} holds no results: run python -m benchmarks first")
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    groups: dict[str | None, list[Result]] = {}
    for run in runs:
        for group in {result.get("group"): None for result in run["results"]}:
            groups[group] = [result for result in run["results"] if result.get("group") == group]
    groups.pop(None, None)  # files of older versions name no group
    results = [result for group in groups.values() for result in group]
    return {**runs[-1], "results": results}


def readings(found: Result | None, unit: bool = True) -> str:
    """Median with the smallest and the largest reading."""
    if not found:
        return ""
    if found["median"] != found["median"]:
        return found["unit"]
    name = f" {found['unit']}" if unit and found["unit"] not in ("ms", "") else ""
    if found["min"] == found["max"]:
        return short(found["median"]) + name
    return f"{short(found['median'])} ({short(found['min'])}..{short(found['max'])}){name}"


def table(results: Sequence[Result]) -> str:
    """Results as a Markdown table; times are in milliseconds, a ratio is ours over the other's."""
    versus = any(result["other"] for result in results)
    asked, noted = any(result["target"] for result in results), any(result["notes"] for result in results)
    heads = ["what", "flowfactor"] + ["against", "its figure", "ratio"] * versus + ["asked"] * asked + ["notes"] * noted
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in results:
        cells = [r["name"].replace("|", "\\|"), readings(r["ours"])]
        if versus:
            cells += [r["against"], readings(r["other"]), f"**{readings(r['ratio'])}**" if r["ratio"] else ""]
        if asked:
            cells.append(verdict(r))
        if noted:
            cells.append("; ".join(f"{name}: {note(value)}" for name, value in r["notes"].items() if value is not None))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(result: Result) -> str:
    """What was asked, and whether it is met."""
    if not result["target"]:
        return ""
    return f"{result['target']}: {'met' if result['met'] else 'MISSED'}"


def note(value: Any) -> str:
    """A further figure, as a reader wants it."""
    if isinstance(value, float):
        return short(value)
    if isinstance(value, list):
        return "/".join(note(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {note(part)}" for name, part in value.items())
    return str(value)


def exponents(results: Sequence[Result]) -> str:
    """The exponents of the curves of growth as a Markdown table."""
    lines = ["| grows | fitted over | time, to the power of | per evaluation |", "|---|---|---|---|"]
    for result in results:
        notes = result["notes"]
        if "exponent" in notes:
            span = f"{notes['fitted from']:g} to {notes['fitted to']:g}"
            lines.append(f"| {notes['label']} | {span} | {notes['exponent']:.2f} | {notes['per evaluation']:.2f} |")
    return "\n".join(lines)


def tables(run: Result) -> dict[str, str]:
    """The text of each table of the page, by its name."""
    groups: dict[str, list[Result]] = {}
    for result in run["results"]:
        groups.setdefault(result["group"], []).append(result)
    made = {name: table(results) for name, results in groups.items() if name not in CURVES}
    if "growth" in groups:
        made["growth"] = exponents(groups["growth"])
    about = ", ".join(f"{name} {value}" for name, value in run["machine"].items() if value is not None)
    made["machine"] = f"Measured on {run['time'][:10]}: {about}; {run['repeats']} readings of each side."
    return made


def insert(page: str, made: Mapping[str, str]) -> str:
    """Puts tables between their marks, ``<!-- table: NAME -->`` and ``<!-- end -->``; others stay as they are."""

    def filled(match: re.Match[str]) -> str:
        text = made.get(match[1])
        return match[0] if text is None else f"<!-- table: {match[1]} -->\n\n{text}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", filled, page, flags=re.DOTALL)


def marks(page: str) -> list[str]:
    """The names of a page's tables."""
    return re.findall(r"<!-- table: (\w+) -->", page)
