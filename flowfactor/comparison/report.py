"""The report of a benchmark: tables, what they say, and a figure, from the runs' files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowfactor._files import read_json
from flowfactor.comparison.composition import composition_explained, composition_summary, composition_tables
from flowfactor.comparison.missing import missing_reasons
from flowfactor.comparison.motion import latent_table, motion_explained, motion_tables
from flowfactor.comparison.tables import Column, Record, by_variant, spread, table
from flowfactor.errors import require
from flowfactor.training.datasets import data_identity
from flowfactor.training.evaluation import EvaluationConfig
from flowfactor.training.folder import ERROR, FIGURE, FIGURES, REPORT, SETTINGS, check_free, check_writable, owned

_OURS = "ours"
_BOUNDS = {
    "path": "path: z_0 is the one latent",
    "marginal": "marginal: sum of the frames' own bounds",
    "frame": "frame: every frame alone",
    "chain": "chain: a latent for each frame, tied to the one before",
    "sequence": "sequence: latents of all frames at once",
}


_KEYS = {"variant", "seed", "figures", "config", "flows", "title", "command", "machine", "versions"}


def load_runs(folder: str | Path) -> tuple[list[Record], dict[str, str]]:
    """Reads the runs of a benchmark.

    Args:
        folder: Its folder.

    Returns:
        The finished runs, and why each of the others is not, by its folder's name.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a file is damaged.
    """
    folder = Path(folder).expanduser()
    places = sorted(path.parent for path in folder.glob(f"*/{SETTINGS}"))
    if not places:
        raise FileNotFoundError(f"{folder} is not the folder of a benchmark: no folder in it holds {SETTINGS}")
    runs, others = [], {}
    for place in places:
        if not (place / FIGURES).is_file():
            error = place / ERROR
            others[place.name] = error.read_text(encoding="utf-8").strip() if error.is_file() else "not finished"
            continue
        made = read_json(place / FIGURES, ": delete it to have it made again")
        if not set(made) >= _KEYS:
            raise ValueError(
                f"{place / FIGURES} does not hold the figures of a benchmark's run: is {folder} one's folder?"
            )
        _check_record(made, place / FIGURES)
        runs.append(made)
    order = _order()
    runs.sort(key=lambda run: (order.index(run["variant"]) if run["variant"] in order else len(order), run["seed"]))
    return runs, others


def _check_record(run: Record, path: Path) -> None:
    """Checks that a run's figures can be reported, so that what is wrong with them is reported with their file."""
    kinds = {"variant": str, "seed": int, "flows": list, "figures": dict, "config": dict, "title": str, "command": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(run[name], kind)]
    try:
        if not wrong:
            markdown([run]).encode()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        wrong = [f"{type(error).__name__}: {error}"]
    if wrong:
        raise ValueError(
            f"{path} is damaged: figures cannot be reported from it ({', '.join(wrong)}): delete it to have it made again"
        )


def _order() -> list[str]:
    from flowfactor.comparison.variants import ABLATIONS
    from flowfactor.models import METHODS

    return [*METHODS, *ABLATIONS]


def write_report(folder: str | Path) -> tuple[Path, Path | None]:
    """Writes the report of a benchmark, ``report.md``, and its figure, ``report.png``.

    Args:
        folder: Folder of the benchmark.

    Returns:
        The report, and the figure, or None where matplotlib is not installed; the report then says so.

    Raises:
        FileNotFoundError: If the folder holds no run.
        FileExistsError: If files by these names are there that are not ours.
        OSError: If a file cannot be written.
        ValueError: If a file is damaged.
    """
    from flowfactor.training.folder import write_text

    folder = Path(folder).expanduser()
    runs, others = load_runs(folder)
    check_report(folder)
    figure: Path | None = None
    note = "no run is finished yet, so there is no figure"
    with owned(folder, REPORT, FIGURE):
        if runs and not any(run["flows"] for run in runs):
            note = "the sequences have no labels of what acts in them, so there are no errors to draw"
        elif runs:
            try:
                figure = _draw(runs, folder / FIGURE)
            except ImportError as error:
                note = f"No figure: {error}"
        picture = f"![Equivariance errors; a dot is a seed]({FIGURE})" if figure is not None else note
        write_text(folder / REPORT, markdown(runs, others, picture))
    return folder / REPORT, figure


def check_report(folder: Path) -> None:
    """Checks that the report of a benchmark may be written, and can be.

    Args:
        folder: Folder of the benchmark.

    Raises:
        OSError: If files by its names are there that are not ours, or the folder cannot be written in.
    """
    check_free(folder, (REPORT, FIGURE))
    check_writable(folder)


def markdown(runs: Sequence[Record], others: dict[str, str] | None = None, picture: str = "") -> str:
    """Writes the report of runs as Markdown.

    Args:
        runs: The finished runs.
        others: Why the others are not finished, by name.
        picture: A line that shows the figure.

    Returns:
        The text.
    """
    parts = [f"# Benchmark: {', '.join(dict.fromkeys(_data_name(run) for run in runs)) or 'no finished run'}"]
    for group in _by_data(runs).values():
        first = group[0]
        parts.append(f"## {_data_name(first)}, T = {first['config']['data']['steps']}, {_budget(first)} a run")
        if first["flows"]:
            parts.append(table(group, _errors(group), first["figures"]["equivariance"]["doing_nothing"]))
            parts.append(_lowest(group))
            parts.append(latent_table(group))
        parts.append(composition_summary(group))
        parts.append("### Other figures")
        parts.append(table(group, _figures()))
        parts.append(composition_tables(group))
        parts.append(motion_tables(group))
        parts.append(_disentanglement(group))
    if picture:
        parts.append(picture)
    parts.append(_explained(runs))
    if others:
        parts.append("## Not finished\n\n" + "\n".join(f"- {name}: {why}" for name, why in others.items()))
    parts.append(_made(runs))
    return "\n\n".join(part for part in parts if part) + "\n"


def _data_name(run: Record) -> str:
    return run["config"]["data"]["name"]


def _budget(run: Record) -> str:
    budget = run["budget"]
    each = ((budget["steps"], "steps"), (budget["minutes"], "minutes" if budget["minutes"] != 1 else "minute"))
    length = " or ".join(f"{value:g} {unit}" for value, unit in each if value is not None)
    processor = budget["minutes"] is not None and run["config"]["train"]["clock"] == "processor"
    return f"{length} of processor time" if processor else length


def _by_data(runs: Sequence[Record]) -> dict[str, list[Record]]:
    """Runs whose figures can be compared: of the same sequences, evaluated alike, with the same budget."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        key = json.dumps(
            [data_identity(run["config"]["data"]), run["flows"], run["evaluate"], run["budget"]], sort_keys=True
        )
        groups.setdefault(key, []).append(run)
    return groups


def _errors(runs: Sequence[Record]) -> list[Column]:
    def column(k: int, name: str) -> Column:
        return Column(f"E_k {name}", lambda run: run["figures"]["equivariance"]["mean"][k], -1)

    return [column(k, name) for k, name in enumerate(runs[0]["flows"])]


def _figures() -> list[Column]:
    return [
        Column("ln p(x) per frame, at least", _of("likelihood", "per_frame"), 1, ".2f"),
        Column("reconstruction, a frame", _of("reconstruction", "per_frame"), -1),
        Column("factor accuracy", _of("factor_accuracy", "value"), 1, ".2%"),
        Column("spikes, precision", _of("spikes", "precision", "value"), 1, ".1%"),
        Column("spikes, recall", _of("spikes", "recall", "value"), 1, ".1%"),
        Column("VP score", _of("vp", "value"), 1, ".2%"),
        Column("steps", lambda run: run["steps_made"], 0, ",.0f"),
        Column("seconds", lambda run: run["seconds"], 0, ",.0f"),
        Column("parameters", lambda run: run["parameters"], 0, ",.0f"),
    ]


def _of(figure: str, *path: str) -> Callable[[Record], float | None]:
    def get(run: Record) -> float | None:
        value: Any = run["figures"].get(figure)  # not all figures are of every method
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    return get


def _lowest(runs: Sequence[Record]) -> str:
    """Says which method has the lowest error on each transformation, by how much, and how ours does."""
    groups, lines = by_variant(runs), []
    for k, name in enumerate(runs[0]["flows"]):
        means = {
            variant: made.mean
            for variant, group in groups.items()
            if (made := spread(group, lambda run, k=k: run["figures"]["equivariance"]["mean"][k])) is not None
        }
        ranked = sorted(means, key=lambda variant: means[variant])
        if not ranked:
            continue
        text = f"- {name}: the lowest E_k is that of `{ranked[0]}` ({means[ranked[0]]:.1f})"
        if len(ranked) > 1:
            text += f", followed by `{ranked[1]}` ({means[ranked[1]]:.1f})"
        if _OURS in ranked[1:]:
            more = means[_OURS] / means[ranked[0]] - 1
            text += f"; `{_OURS}` comes {_ordinal(ranked.index(_OURS) + 1)}, {more:.0%} above the lowest"
        lines.append(text + ".")
    return "\n".join(lines)


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if 10 <= number % 100 <= 20 else endings.get(number % 10, 'th')}"


def _disentanglement(runs: Sequence[Record]) -> str:
    columns = [
        Column("MIG", _of("mig", "value"), 1, ".3f"),
        Column("DCI disentanglement", _of("dci", "disentanglement", "value"), 1, ".3f"),
        Column("DCI completeness", _of("dci", "completeness", "value"), 1, ".3f"),
        Column("DCI informativeness", _of("dci", "informativeness", "value"), 1, ".3f"),
        Column("SAP", _of("sap", "value"), 1, ".3f"),
    ]
    if not any(column.get(run) is not None for run in runs for column in columns):
        return ""
    return "### Disentanglement of single latent dimensions\n\n" + table(runs, columns)


def _explained(runs: Sequence[Record]) -> str:
    """What the figures are, how many samples they are based on, and what is missing where."""
    if not runs:
        return ""
    evaluate = EvaluationConfig(**runs[0]["evaluate"])
    images = next((n for run in runs if (n := run["figures"]["equivariance"].get("count"))), None)
    lines = [
        "## What the figures are",
        "Figures are means over seeds ± their standard deviation over seeds; the best mean of a column is in bold. All are "
        "of test data. Intervals over test samples stand in each run's `benchmark.json`.",
    ]
    if all("seed" in run["evaluate"] for run in runs):
        lines[-1] += (
            f" Where not all of them are taken, they are drawn at random, the same for all runs (seed {evaluate.seed})."
        )
    else:
        lines[-1] += " Some were measured by an earlier release, on the first of them, which may be alike."
    if images is not None:
        lines.append(
            f"- E_k: the equivariance error, summed over frames, pixels and channels, over {images:,} "
            'test images under every transformation; "doing nothing" predicts that every frame equals the first. For '
            "methods without transformations it is that of the best single latent dimension and range, searched on "
            f"{evaluate.search_images} training images a transformation."
        )
    bounds = {run["variant"]: run["figures"]["likelihood"] for run in runs}
    kinds = sorted({made["objective"] for made in bounds.values() if "objective" in made})
    if kinds:
        counted = next(made for made in bounds.values() if "objective" in made)
        families = sorted({made["likelihood"] for made in bounds.values() if "likelihood" in made})
        lines.append(
            f"- ln p(x): the importance-weighted bound, {counted['samples']} samples, {counted['count']:,} test sequences, "
            f"{' and '.join(families)} likelihood, in nats. Every one is of whole sequences, and divided by their frames. "
            "What the models take for latent differs: "
            + "; ".join(f"{_BOUNDS.get(kind, kind)} ({_who(bounds, kind)})" for kind in kinds)
            + ". Methods that are given k bound ln p(x|k); so do those that infer it under the flow that was matched."
        )
        if len(families) > 1:
            lines.append("- Bounds under different likelihoods cannot be compared, in spite of the bold one.")
    if any("reconstruction" in run["figures"] for run in runs):
        lines.append(
            "- Reconstruction: the L1 norm between a frame and its reconstruction from the mean of the posterior, mean over "
            "frames."
        )
    if images is not None:
        lines += [
            "- Latent errors: distance between the flowed code of the first frame and the codes of the others, relative to "
            "leaving it as it is; latent error is their mean over transformations.",
            "- VP score: accuracy of a small classifier that is trained on a tenth of the pairs [x_0, x_T] to tell k.",
        ]
    lines += composition_explained(runs) + motion_explained(runs)
    if any("spikes" in run["figures"] for run in runs):
        lines.append(
            "- Spikes: whether each flow acts between each two frames, inferred with a probability above a half, against "
            "what does; flows are those that were matched."
        )
    lines += [f"- {text}" for text in missing_reasons(runs)]
    return lines[0] + "\n\n" + lines[1] + "\n\n" + "\n".join(lines[2:])


def _who(bounds: dict[str, Any], kind: str) -> str:
    return ", ".join(f"`{name}`" for name, made in bounds.items() if made.get("objective") == kind)


def _made(runs: Sequence[Record]) -> str:
    """The commands, machines and versions that the figures come from."""
    if not runs:
        return ""
    commands = dict.fromkeys(run["command"] for run in runs if run["command"])
    titles = {run["variant"]: run["title"] for run in runs}
    lines = (
        ["## How it was made", "```console\n" + "\n".join(commands) + "\n```"] if commands else ["## How it was made"]
    )
    for run in {json.dumps([run["machine"], run["versions"]], sort_keys=True): run for run in runs}.values():
        machine, versions = run["machine"], run["versions"]
        with_ = f", {machine['accelerator']}" if machine.get("accelerator") else ""
        named = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "machine")
        lines.append(
            f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads a run{with_}, "
            f"{machine['system']}; {named}."
        )
    lines.append("\n".join(f"- `{name}`: {title}" for name, title in titles.items()))
    return "\n\n".join(lines)


def _draw(runs: Sequence[Record], path: Path) -> Path:
    """Draws the errors of the largest group: a panel a transformation, a row a variant, a dot a seed, a bar the mean."""
    require("matplotlib", extra="plot")
    from matplotlib.figure import Figure

    from flowfactor.plot import save

    group = max(_by_data([run for run in runs if run["flows"]]).values(), key=len)
    variants, flows = by_variant(group), group[0]["flows"]
    still = group[0]["figures"]["equivariance"]["doing_nothing"]
    figure = Figure(figsize=(3.2 * len(flows) + 1, 0.32 * len(variants) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(flows), sharey=True, squeeze=False)[0]
    for k, (panel, flow) in enumerate(zip(panels, flows, strict=True)):
        for row, made in enumerate(variants.values()):
            over = spread(made, lambda run, k=k: run["figures"]["equivariance"]["mean"][k])
            if over is not None:
                panel.barh(row, over.mean, color="#9db7d5", height=0.7)
                panel.plot(over.values, [row] * len(over.values), "o", color="#1f3b5c", markersize=3)
        panel.axvline(still[k], color="#888888", linestyle=":", linewidth=1)
        panel.set_title(f"E_k {flow}", fontsize=9)
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(variants)), list(variants))
    panels[0].invert_yaxis()
    return save(figure, path)
