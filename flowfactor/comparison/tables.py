"""Tables of a benchmark: figures over seeds, row by row, the best in bold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

Record = dict[str, Any]
"""What a run's ``benchmark.json`` holds."""


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds.

    Attributes:
        values: The figure of each seed.

    Example:
        >>> Spread((1.0, 2.0, 3.0)).mean, Spread((1.0, 2.0, 3.0)).deviation
        (2.0, 1.0)
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return mean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds; NaN for a single one."""
        return stdev(self.values) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: Its title.
        get: Gives the figure of a run, or None where it has none.
        better: 1 where higher is better, -1 where lower is, 0 where neither.
        form: How a figure is written.
    """

    title: str
    get: Callable[[Record], float | None]
    better: int = 0
    form: str = ".1f"


def spread(runs: Sequence[Record], get: Callable[[Record], float | None]) -> Spread | None:
    """Gives the figure of runs that differ by their seed; None where none of them has it."""
    values = tuple(value for value in map(get, runs) if value is not None)
    return Spread(values) if values else None


def by_variant(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs by what they are runs of, in their order."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        groups.setdefault(run["variant"], []).append(run)
    return groups


def table(
    runs: Sequence[Record], columns: Sequence[Column], doing_nothing: Sequence[float | None] | None = None
) -> str:
    """Writes a table, one row a variant, the best of each column in bold; columns without any figure are left out.

    Args:
        runs: Runs whose figures can be compared.
        columns: The columns.
        doing_nothing: The errors of doing nothing, one a column, for a row of their own; none where None.

    Returns:
        The table, in Markdown.
    """
    groups = by_variant(runs)
    cells = {name: [spread(group, column.get) for column in columns] for name, group in groups.items()}
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in cells.values())]
    best = {i: _best(cells, i, columns[i].better) for i in kept if columns[i].better}
    lines = [
        "| method | seeds | " + " | ".join(columns[i].title for i in kept) + " |",
        "|---|---|" + "---|" * len(kept),
    ]
    for name, row in cells.items():
        texts = []
        for i in kept:
            text = _written(row[i], columns[i].form)
            texts.append(f"**{text}**" if name in best.get(i, ()) else text)
        lines.append(f"| `{name}` | {len(groups[name])} | " + " | ".join(texts) + " |")
    if doing_nothing is not None:
        still = ["-" if value is None else f"{value:.1f}" for value in doing_nothing]
        lines.append("| doing nothing | | " + " | ".join(still[i] for i in kept) + " |")
    return "\n".join(lines)


def _best(cells: dict[str, list[Spread | None]], index: int, better: int) -> list[str]:
    means = {name: row[index].mean for name, row in cells.items() if row[index] is not None}  # type: ignore[union-attr]
    top = max(better * value for value in means.values())
    return [name for name, value in means.items() if better * value == top]


def _written(value: Spread | None, form: str) -> str:
    if value is None:
        return "-"
    if len(value.values) == 1 or (value.deviation == 0 and form == ",.0f"):
        return format(value.mean, form)
    return f"{value.mean:{form}} ± {value.deviation:{form}}"
