"""Draws growth and work-precision from the results of a run: ``python -m benchmarks.curves [RESULTS ...]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
_BLUE, _RED, _GREEN, _ORANGE, _PURPLE, _GREY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#9467bd", "#6e7781"
_STYLES: dict[str, tuple[str, str]] = {
    "dopri5, batch norm": (_BLUE, "o"),
    "dopri5, sample norm": (_PURPLE, "D"),
    "dopri8, batch norm": (_GREEN, "s"),
    "bosh3, batch norm": (_ORANGE, "^"),
    "rk4": (_GREY, "v"),
    "plain torchdiffeq dopri5": (_RED, "X"),
    "diffrax dopri5": ("black", "P"),
}
_PANELS = (
    ("flowfactor's methods", "error", ("dopri5, batch norm", "dopri8, batch norm", "bosh3, batch norm", "rk4")),
    ("dopri5, root mean square", "error", ("dopri5, batch norm", "plain torchdiffeq dopri5", "diffrax dopri5")),
    (
        "dopri5, the worst sample",
        "error of the worst sample",
        ("dopri5, batch norm", "dopri5, sample norm", "plain torchdiffeq dopri5", "diffrax dopri5"),
    ),
)


def draw(results: Sequence[Mapping[str, Any]], folder: Path = ASSETS) -> list[Path]:
    """Draws what the results hold.

    Args:
        results: Results of a run.
        folder: Where the pictures go.

    Returns:
        The pictures written.
    """
    written = []
    for group, picture, name in (("growth", _growth, "growth.png"), ("precision", _precision, "work_precision.png")):
        chosen = [result for result in results if result["group"] == group]
        if chosen:
            folder.mkdir(parents=True, exist_ok=True)
            figure = picture(chosen)
            part = folder / f".{name}"
            figure.savefig(part, dpi=125, format="png", metadata={"Software": None})
            part.replace(folder / name)
            written.append(folder / name)
    return written


def _figure(panels: int, width: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=True)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.tick_params(labelsize=8.5)
        axis.minorticks_off()
    return figure, axes


def _growth(results: Sequence[Mapping[str, Any]]) -> Any:
    curves = list(dict.fromkeys(result["notes"]["curve"] for result in results))
    figure, axes = _figure(len(curves), 11.0)
    for axis, curve in zip(axes, curves, strict=True):
        points = [result for result in results if result["notes"]["curve"] == curve]
        notes = points[-1]["notes"]
        inverted = curve == "tolerance"
        x = np.array([1 / p["notes"]["at"] if inverted else p["notes"]["at"] for p in points])
        y = np.array([p["ours"]["median"] for p in points])
        spread = [y - [p["ours"]["min"] for p in points], [p["ours"]["max"] for p in points] - y]
        axis.errorbar(x, y, yerr=spread, color=_BLUE, marker="o", markersize=4, linewidth=1.6, capsize=2, zorder=3)
        ends = [1 / notes[k] if inverted else notes[k] for k in ("fitted from", "fitted to")]
        chosen = (x >= ends[0] * (1 - 1e-9)) & (x <= ends[1] * (1 + 1e-9))
        slope = notes["exponent"]
        level = np.exp(np.mean(np.log(y[chosen]) - slope * np.log(x[chosen])))
        line = np.array([x[chosen][0], x[chosen][-1]])
        axis.plot(line, level * line**slope, "--", color=_RED, linewidth=1.4, zorder=4, label="least squares")
        axis.set_title(f"exponent {slope:.2f}", fontsize=10, color=_RED)
        axis.set_xlabel(notes["label"])
        _powers(axis, x, 10 if inverted else 2)
    axes[0].set_ylabel("training step, ms")
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    _plain_ticks(axes[0])
    return figure


def _powers(axis: Any, x: np.ndarray, base: int) -> None:
    """Marks sizes by powers of two, tolerances by powers of ten."""
    axis.set_xscale("log", base=base)
    axis.minorticks_off()
    if base == 10:
        axis.set_xticks(x)
        return
    marks = [value for value in x if round(np.log2(value)) % 2 == round(np.log2(x[0])) % 2]
    axis.set_xticks(marks, [f"{value:g}" for value in marks])


def _plain_ticks(axis: Any) -> None:
    """Numbers, not powers: milliseconds between 1 and 1,000 are read at a glance."""
    low, high = axis.get_ylim()
    marks = [m * 10.0**e for e in range(-2, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axis.set_yticks(marks, [f"{mark:,g}" for mark in marks])
    axis.set_ylim(low, high)


def _precision(results: Sequence[Mapping[str, Any]]) -> Any:
    figure, axes = _figure(len(_PANELS), 10.0)
    for axis, (title, error, curves) in zip(axes, _PANELS, strict=True):
        shown = []
        for curve in curves:
            points = [result for result in results if result["notes"]["curve"] == curve]
            if not points:  # diffrax, where it was absent
                continue
            colour, marker = _STYLES[curve]
            x = [point["notes"][error] for point in points]
            y = [point["ours"]["median"] for point in points]
            shown += x
            style = "--" if curve.startswith(("plain", "diffrax")) else "-"
            axis.plot(x, y, style, color=colour, marker=marker, markersize=5, linewidth=1.5, label=curve)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("relative error of the path")
        axis.set_xticks([10.0**-e for e in range(1, 11)])
        axis.set_xlim(max(shown) * 2.5, min(shown) / 2.5)  # precision grows to the right
        axis.legend(fontsize=7.5, frameon=False, loc="upper left")
    axes[0].set_ylabel("solve, ms")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low, high * 4)  # room for the legends
    _plain_ticks(axes[0])
    return figure


def main() -> None:
    """Draws the results named on the command line, or the newest."""
    for path in draw(report.load([Path(name) for name in sys.argv[1:]])["results"]):
        print(path)


if __name__ == "__main__":
    main()
