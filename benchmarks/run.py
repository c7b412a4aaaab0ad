"""Runs the speed benchmarks, prints Markdown tables and writes the readings to ``benchmarks/results``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    compiled,
    data,
    growth,
    laplacians,
    memory,
    potentials,
    precision,
    processes,
    report,
    solves,
    steered,
    training_step,
)
from benchmarks.report import RESULTS
from benchmarks.timing import Row

__all__ = ["CASES", "RESULTS", "machine", "main"]
Case = Callable[[int, int], list[Row]]
# What is timed by turns with other processes comes first: a machine grows warm.
CASES: dict[str, Case] = {
    "solve-32": lambda n, threads: solves.solves(32, "hutchinson", n, threads),
    "solve-324": lambda n, threads: solves.solves(324, "hutchinson", n, threads),
    "solve-32-exact": lambda n, threads: solves.solves(32, "exact", n, threads),
    "laplacian": lambda n, threads: (
        potentials.hessian_trace(n) + potentials.hessian_trace(n, 324) + potentials.over_gradient(n)
    ),
    "laplacian-small": lambda n, threads: laplacians.over_sizes(n),
    "steered": lambda n, threads: steered.steered(n),
    "scenes": lambda n, threads: data.scenes(n),
    "sequences": lambda n, threads: data.sequences(n),
    "memory": lambda n, threads: memory.memory(n),
    "compile": compiled.compiled,
    "compiled-solves": compiled.compiled_solves,
    "processes": lambda n, threads: processes.processes(n),
    "growth": lambda n, threads: growth.growth(min(n, 5)),
    "precision": lambda n, threads: precision.precision(min(n, 5), threads),
    # After the others: these change how memory is kept.
    "paper": lambda n, threads: potentials.paper_step(n),
    "training": lambda n, threads: training_step.training_step(n),
    "training-adaptive": lambda n, threads: training_step.adaptive_step(n),
    "import": lambda n, threads: potentials.import_time(n),
}


def main() -> None:
    """The command line."""
    args = arguments()
    if args.docs is not None:
        documents(args.docs)
        return
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # as in all training programs, before there are threads
    about, rows, begin = machine(args.threads), [], time.monotonic()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    for name in args.only:
        print(f"{name} ...", flush=True)
        try:
            found = CASES[name](args.repeats, args.threads)
        except Exception as error:  # one that fails must not take the others' readings with it
            print(f"  FAILED: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed = True
        else:
            failed = False
            for row in found:  # at once, so that an interrupted run has not been for nothing
                ratio = f", ratio {row.ratio}" if row.ratio else ""
                print(f"  {row.name}: {row.ours} {row.ours.unit}{ratio}", flush=True)
            rows += found
        args.failed = [*args.failed, name] if failed else args.failed
    about["seconds for all"] = round(time.monotonic() - begin)
    path = report.write(about, args.repeats, rows)
    for name, text in report.tables(report.load([path])).items():
        print(f"\n{name}\n\n{text}")
    missed = [f"{row.name} ({row.other_name})" if row.other else row.name for row in rows if row.met is False]
    print("\nTargets missed: " + ("; ".join(missed) or "none"))
    print(f"Written to {path}")
    if args.failed:
        sys.exit(f"failed: {', '.join(args.failed)}")


def arguments() -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="which benchmarks to run")
    parser.add_argument("--repeats", type=int, default=7, help="readings of each side (at least 7 to report)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--docs", nargs="*", type=Path, metavar="RESULTS",
        help="measure nothing: write the tables and figures of these results, or of the newest, into the documentation",
    )  # fmt: skip
    args = parser.parse_args()
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    args.failed = []
    return args


def documents(paths: list[Path]) -> None:
    """Writes tables and figures into the documentation."""
    from benchmarks import curves

    run = report.load(paths)
    made = report.tables(run)
    page = report.PAGE.read_text(encoding="utf-8")
    report.replace(report.PAGE, report.insert(page, made))
    names = [name for name in report.marks(page) if name in made]
    print(f"{report.PAGE}: {', '.join(names)}")
    for path in curves.draw(run["results"]):
        print(path)


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchdiffeq", "geomloss", "diffrax", "jax")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
