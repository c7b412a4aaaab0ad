"""How flows compose, in the report of a benchmark: errors backwards and together, beside E_k and in proportion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from statistics import mean
from typing import NamedTuple

from flowfactor.comparison.tables import Column, Record, table

Get = Callable[[Record], float | None]

WAYS = {
    "single": ("forward", 1),
    "backward": ("backward", 1),
    "superpose": ("two at once", 2),
    "switch": ("one after another", 2),
    "together": ("three at once", 3),
}
"""Entries of ``combining``: what they are called, and of how many transformations each figure is."""
_OVER = "transformations, or over pairs and threes of these"
_GROUP = {"addition": "Half twice", "inverse": "There and back", "reconstruction": "The frame there and back"}
_MEANT = (
    "Backward: E of flows that run back from the encoded last frame. Two at once, one after another, three at once: E of "
    "pairs superposed all along, of pairs switched midway, and of threes superposed. All begin where the test sequences do, "
    "on up to {count:,} of them each, and each at its usual pace, so that two go further than one.",
    "Over forward, over singles: that E over the one of the same flows alone; 1 costs nothing. It tells how flows compose, "
    "and not how well they do what they should: a model that does next to nothing has 1 too.",
    "Order: how far apart the latents of two flows end in either order, relative to how far they go. Half twice: half the "
    "time and half again, against all of it; there and back: against where it began; likewise. The frame there and back: "
    "its error over that of the reconstruction. Traversals of single latent dimensions commute, and are groups, as they are "
    "made.",
)


class _Table(NamedTuple):
    """A table of one figure: its title, how its entries are written, and a figure for each column."""

    title: str
    form: str
    columns: dict[str, Get]

    @property
    def mean(self) -> Get:
        """The mean over the columns; None where one is missing."""

        def get(run: Record) -> float | None:
            return _mean([column(run) for column in self.columns.values()])

        return get


def composition_summary(runs: Sequence[Record]) -> str:
    """Writes the tables that stand beside E_k: errors of flows that combine, and what tells whether they compose.

    Args:
        runs: Runs whose figures can be compared.

    Returns:
        Their Markdown; empty where no run has such figures.
    """
    errors = [Column(f"E {title}", _mean_of(way, "error"), -1) for way, (title, _) in WAYS.items()]
    still = [_first(runs, _mean_of(way, "doing_nothing")) for way in WAYS]
    latent = Column("latent error", latent_error, -1, ".3f")
    relative = [latent, *(Column(made.title.lower(), made.mean, 0, made.form) for made in _tables(runs))]
    parts = []
    if _any(runs, errors[1:]):
        parts.append(f"E backwards and together, means over {_OVER}:\n\n" + table(runs, errors, still))
    if _any(runs, relative):
        parts.append(f"In proportion, means over {_OVER}:\n\n" + table(runs, relative))
    return "\n\n".join(parts)


def composition_tables(runs: Sequence[Record]) -> str:
    """Writes a table a figure: a row a method, a column a transformation, or a pair or three of these.

    Args:
        runs: Runs whose figures can be compared.

    Returns:
        Their Markdown; empty where no run has such figures.
    """
    parts = []
    for title, form, gets in _tables(runs) if runs[0]["flows"] else ():
        if len(gets) > 1:  # a single one stands in the summary
            columns = [Column(name, get, 0, form) for name, get in gets.items()]
            parts.append(f"{title}:\n\n{table(runs, columns)}")
    return "\n\n".join(["### How flows compose", *parts]) if parts else ""


def composition_explained(runs: Sequence[Record]) -> list[str]:
    """Says what the figures of these tables are, where some run has them."""
    found = [run["figures"].get("combining", {}) for run in runs]
    lines = []
    if any("error" in made.get(way, {}) for made in found for way in ("backward", "superpose")):
        lines = [_MEANT[0].format(count=max(made.get("count", 0) for made in found)), _MEANT[1]]
    if any(run["figures"].get(name, {}).keys() - {"missing"} for run in runs for name in ("commutator", "group")):
        lines.append(_MEANT[2])
    return [f"- {line}" for line in lines]


def latent_error(run: Record) -> float | None:
    """The mean of a run's latent errors over transformations."""
    return _mean(run["figures"]["latent_equivariance"].get("mean", ()))


def _tables(runs: Sequence[Record]) -> list[_Table]:
    """The tables of what is relative, of those columns that some run has."""
    flows = _flows(runs)
    sets = {size: ["+".join(names) for names in combinations(flows, size)] for size in (1, 2, 3)}
    made = [_Table("Backward over forward", ".2f", {name: _over_forward(name) for name in flows})]
    for way, (title, size) in WAYS.items():
        if size > 1:
            gets = {name: _of_set(way, "over_singles", name) for name in sets[size]}
            made.append(_Table(f"{title} over singles".capitalize(), ".2f", gets))
    made.append(_Table("Order", ".3f", {name: _order(name) for name in sets[2]}))
    for entry, title in _GROUP.items():
        made.append(_Table(title, ".3f", {name: _of_group(entry, k) for k, name in enumerate(flows)}))
    met = [{name: get for name, get in one.columns.items() if _first(runs, get) is not None} for one in made]
    return [one._replace(columns=columns) for one, columns in zip(made, met, strict=True) if columns]


def _flows(runs: Sequence[Record]) -> list[str]:
    """The transformations; where the data name none the numbers of the models' flows."""
    counts = [len(run["figures"].get("group", {}).get("addition", {}).get("mean", ())) for run in runs]
    return runs[0]["flows"] or [str(k) for k in range(max(counts))]


def _of_set(way: str, entry: str, name: str) -> Get:
    return lambda run: _values(run, way, entry).get(name)


def _over_forward(name: str) -> Get:
    def get(run: Record) -> float | None:
        back, forward = (_values(run, way, "error").get(name) for way in ("backward", "single"))
        return back / forward if back is not None and forward else None

    return get


def _mean_of(way: str, entry: str) -> Get:
    return lambda run: _mean(_values(run, way, entry).values())


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean, or None where one of them is missing, or all."""
    values = list(values)
    kept = [value for value in values if value is not None]
    return mean(kept) if kept and len(kept) == len(values) else None


def _values(run: Record, way: str, entry: str) -> dict[str, float | None]:
    return run["figures"].get("combining", {}).get(way, {}).get(entry, {})


def _order(name: str) -> Get:
    def get(run: Record) -> float | None:
        made = run["figures"].get("commutator", {})  # earlier releases did not measure it
        pairs = ["+".join(map(str, pair)) for pair in made.get("pairs", ())]
        return made["mean"][pairs.index(name)] if name in pairs else None

    return get


def _of_group(entry: str, k: int) -> Get:
    def get(run: Record) -> float | None:
        values = (run["figures"].get("group", {}).get(entry) or {}).get("mean")
        return None if values is None else values[k]

    return get


def _first(runs: Sequence[Record], get: Get) -> float | None:
    return next((value for run in runs if (value := get(run)) is not None), None)


def _any(runs: Sequence[Record], columns: Sequence[Column]) -> bool:
    return any(column.get(run) is not None for run in runs for column in columns)
