"""How flows move, in the report of a benchmark: a table a figure, a row a method, a column a transformation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowfactor.comparison.tables import Column, Record, table

_TABLES = (
    ("gradient_share", "mean", "Share of grad u in the squared speed", ".2f"),
    ("arc_over_chord", "mean", "Arc over chord", ".2f"),
    ("translation_share", "mean", "Share of the displacement that is the same for all", ".2f"),
    ("solver_gap", "mean", "Change of E_k where flows are solved accurately", "+.1%"),
    ("solver_gap", "path", "Distance from the accurate paths, relative to the way", ".2%"),
    ("solver_gap", "training", "Change of E_k from the solver of the training to an accurate one", "+.1%"),
)
_MEANT = {
    "gradient_share": "Share of grad u: of the flow's squared speed along its paths; 1 for the gradient of a potential.",
    "arc_over_chord": "Arc over chord: length of the paths over the distance of their ends; 1 is straight.",
    "translation_share": "Share that is the same for all: of the mean squared displacement; a flow "
    "of 1 only tells the time.",
    "solver_gap": "Solved accurately: E_k and paths of the same field by dopri5 at {tolerance:.0e}; a change says that the "
    "model is another map than the flow of its field.",
}


def latent_table(runs: Sequence[Record]) -> str:
    """Writes the table of latent errors, which stands beside that of E_k.

    Args:
        runs: Runs whose figures can be compared.

    Returns:
        Its Markdown; empty where no run has such figures.
    """
    columns = [
        Column(f"latent {name}", _of("latent_equivariance", "mean", k), -1, ".3f")
        for k, name in enumerate(runs[0]["flows"])
    ]
    if not any(column.get(run) is not None for run in runs for column in columns):
        return ""
    return "Latent errors, 1 for leaving the code as it is:\n\n" + table(runs, columns)


def motion_tables(runs: Sequence[Record]) -> str:
    """Writes the tables of how flows move.

    Args:
        runs: Runs whose figures can be compared.

    Returns:
        Their Markdown; empty where no run has such figures.
    """
    parts = []
    for figure, entry, title, form in _TABLES:
        columns = [Column(name, _of(figure, entry, k), 0, form) for k, name in enumerate(runs[0]["flows"])]
        if any(column.get(run) is not None for run in runs for column in columns) and not (
            entry == "training" and all(_one_solver(run) for run in runs)
        ):
            parts.append(f"{title}:\n\n{table(runs, columns)}")
    return "\n\n".join(["### How flows move", *parts]) if parts else ""


def motion_explained(runs: Sequence[Record]) -> list[str]:
    """Says what the figures of these tables are, of those that some run has."""
    lines = []
    for figure, text in _MEANT.items():
        made = next((m for run in runs if "mean" in (m := run["figures"].get(figure, {}))), None)
        if made is not None:
            lines.append("- " + text.format(tolerance=made.get("tolerance", 0)))
    return lines


def _one_solver(run: Record) -> bool:
    """Whether a run is evaluated by the solver of its training, whose figures are then in the other tables."""
    gap = run["figures"].get("solver_gap", {})
    return gap.get("training") == gap.get("mean")


def _of(figure: str, entry: str, k: int) -> Callable[[Record], float | None]:
    def get(run: Record) -> float | None:
        values = run["figures"].get(figure, {}).get(entry)  # earlier releases did not measure it
        return None if values is None else values[k]

    return get
