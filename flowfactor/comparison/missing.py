"""What is missing in the report of a benchmark: which figures, whose, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from flowfactor.comparison.composition import WAYS
from flowfactor.comparison.tables import Record, by_variant

_EARLIER = {"missing": "measured by an earlier release"}


def missing_reasons(runs: Sequence[Record]) -> list[str]:
    """Says which figures are missing, whose, and why.

    Args:
        runs: The runs of a report.

    Returns:
        A sentence for each reason.
    """
    reasons: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for figure, made in _figures(run, runs):
            if "missing" in made and figure != "factor_accuracy":
                names = reasons.setdefault((figure, made["missing"]), [])
                if run["variant"] not in names:
                    names.append(run["variant"])
    joined: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (figure, reason), names in reasons.items():
        joined.setdefault((reason, tuple(names)), []).append(figure.replace("_", " "))
    every = len(by_variant(runs))
    lines = []
    for (reason, names), figures in joined.items():
        whom = "any method" if len(names) == every else ", ".join(f"`{name}`" for name in names)
        lines.append(f"No {', '.join(figures)} of {whom}: {reason}.")
    return lines


def _figures(run: Record, among: Sequence[Record]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The figures of a run one by one, with those that only others have."""
    own = run["figures"]
    yield from ((name, made) for name, made in own.items() if name != "combining")
    for name in ("commutator", "group"):
        if name not in own and any(name in other["figures"] for other in among):
            yield name, _EARLIER
    for way, (title, _) in WAYS.items():
        made = _way(run, way)
        if made is not None or any(_way(other, way) is not None for other in among):
            yield f"E {title}", made or _EARLIER


def _way(run: Record, way: str) -> dict[str, Any] | None:
    whole = run["figures"].get("combining", {})
    return whole if "missing" in whole else whole.get(way)
