"""Runs the speed benchmarks, prints a Markdown table and writes the readings to ``benchmarks/results``."""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases

RESULTS = Path(__file__).parent / "results"
CASES = {
    "train-32-exact": lambda n: cases.train_step(32, "exact", n),
    "train-32-hutchinson": lambda n: cases.train_step(32, "hutchinson", n),
    "train-324-hutchinson": lambda n: cases.train_step(324, "hutchinson", n),
    "laplacian": cases.exact_laplacian,
    "paper": cases.paper_step,
    "import": cases.import_time,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="which benchmarks to run")
    parser.add_argument("--repeats", type=int, default=7, help="readings of each side (at least 7 to report)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    rows: list[cases.Row] = []
    for name in args.only:
        print(f"{name} ...", flush=True)
        found = CASES[name](args.repeats)
        for row in found:  # at once, so that an interrupted run has not been for nothing
            print(f"  {row.name}: {row.ours} ms{f', ratio {row.ratio}' if row.ratio else ''}", flush=True)
        rows += found
    about = machine(args.threads)
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print(table(rows))
    missed = [row.name for row in rows if row.met is False]
    print(f"\nTargets missed: {', '.join(missed) if missed else 'none'}")
    print(f"Written to {write(about, args.repeats, rows)}")


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchdiffeq", "geomloss")},
    }


def processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(rows: list[cases.Row]) -> str:
    """The rows as Markdown: medians, with the smallest and the largest reading behind them."""
    lines = [
        "| what | flowfactor, ms | against | its ms | times faster | target | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = "" if row.met is None else f"{row.target}: {'met' if row.met else 'MISSED'}"
        notes = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.notes.items())
        other, ratio = (str(row.other or ""), str(row.ratio or ""))
        lines.append(f"| {row.name} | {row.ours} | {row.other_name} | {other} | {ratio} | {verdict} | {notes} |")
    return "\n".join(lines)


def write(about: dict[str, Any], repeats: int, rows: list[cases.Row]) -> Path:
    """Writes all readings as JSON, whole or not at all."""
    now = datetime.now(timezone.utc)
    results = [
        {
            "name": row.name,
            "ours": row.ours.as_dict(),
            "against": row.other_name,
            "other": row.other.as_dict() if row.other else None,
            "ratio": row.ratio.as_dict() if row.ratio else None,
            "target": row.target,
            "met": row.met,
            "notes": row.notes,
        }
        for row in rows
    ]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"speed-{now:%Y%m%dT%H%M%S}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    text = json.dumps({"time": now.isoformat(), "machine": about, "repeats": repeats, "results": results}, indent=1)
    temporary.write_text(text + "\n")
    temporary.replace(path)
    return path


if __name__ == "__main__":
    main()
