"""``flowfactor demo``: two small models, one that carries digits along from how they were written, one that composes."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowfactor.cli.errors import USER_ERRORS, fail, say
from flowfactor.cli.runs import draw, draw_grid
from flowfactor.cli.train import ended, report
from flowfactor.errors import require
from flowfactor.training.config import Config, load_config
from flowfactor.training.folder import ANIMATION, GRID, TRAVERSAL, claimed, holds_run, kind_of, owned
from flowfactor.training.process import prepare_process

if TYPE_CHECKING:
    from flowfactor.training.run import Run

COMPOSING = "composing"
"""Folder of the second model, inside of the first one's."""

_ACROSS, _DOWN = "rotation", "colouring"
_BACK = 4

_WAYS = {
    "backward": "backwards, over forwards",
    "superpose": "two at once, over one",
    "switch": "one after another, over one",
    "together": "three at once, over one",
}
"""What flows can do beside acting alone and forwards, by what results call it."""


def run_demo(arguments: argparse.Namespace) -> int:
    """Trains both models of the demo, measures and draws them, and sets them side by side.

    Args:
        arguments: Its arguments.

    Returns:
        The exit code.
    """
    prepare_process()
    try:
        first, second = _settings(arguments)
        require("matplotlib", extra="plot")
        require("PIL.Image", extra="plot")
        _prepare(second)  # what is wrong with it shall not be found after minutes of work
        run = _prepare(first)
    except USER_ERRORS as error:
        fail("demo", error)
    folder, times = run.folder, [f"{config.train.minutes or 0:g}" for config in (first, second)]
    print(
        f"training on {len(run.data.dataset):,} handwritten digits for {times[0]} minutes, "
        f"and then a second model for {times[1]} ...",
        file=sys.stderr,
    )
    try:
        with claimed(folder):  # until both are trained
            result = run.fit(tell=report)
            code = ended(result, folder)
            if code:
                say(f"The second model comes after it: {_command(second)}")
                return code
            _draw_first(run)
            print(f"training flows that run back, and compose, for {times[1]} minutes ...", file=sys.stderr)
            other = _prepare(second)
            composed = other.fit(tell=report)
            code = ended(composed, other.folder)
    except FileExistsError as error:  # another process is, or was, at work there, or files of the user's came
        fail("demo", error)
    if code == 0:
        say(f"\n{side_by_side(result, composed, _untouched(run, other))}")
        _draw_second(other)
        say(f"\n{_what_next(folder)}")
    return code


def _settings(arguments: argparse.Namespace) -> tuple[Config, Config]:
    """The settings of both trainings."""
    first, second = (load_config(preset).as_dict() for preset in ("demo", "demo-any"))
    first["output"] = str(arguments.output or first["output"])
    second["output"] = str(Path(first["output"]) / COMPOSING)
    for values in (first, second):
        values["seed"] = arguments.seed
        if arguments.minutes is not None:
            values["train"]["minutes"] = arguments.minutes
    return Config.from_dict(first), Config.from_dict(second)


def _prepare(config: Config) -> Run:
    """Makes a training, which takes the place of a demo alone."""
    from flowfactor.training import prepare

    folder = Path(config.output).expanduser()
    kind = kind_of(folder)
    if kind not in ("", "demo"):
        raise FileExistsError(f"{folder} holds a run that is no demo: choose another folder by --output")
    run = prepare(config, overwrite=kind == "demo")
    run.kind = "demo"
    return run


def _command(config: Config) -> str:
    """The command that makes the second training alone."""
    folder = Path(config.output).expanduser().absolute()
    words = f"flowfactor train demo-any --seed {config.seed} --train.minutes {config.train.minutes}".split()
    return shlex.join([*words, "--output", str(folder), *(["--overwrite"] if holds_run(folder) else [])])


def _draw_first(run: Run) -> None:
    """Draws test digits along each flow."""
    picture, animation = run.folder / TRAVERSAL, run.folder / ANIMATION
    _drawn(run, (TRAVERSAL, ANIMATION), lambda: draw(run.model, run.test, picture, animation), [""])
    say(f"\nlook at {picture}: every row follows one flow from a test digit;\n{animation} shows the same in motion.\n")


def _draw_second(run: Run) -> None:
    """Draws test digits along each flow both ways, and one along two flows."""
    picture, animation, grid = (run.folder / name for name in (TRAVERSAL, ANIMATION, GRID))
    names = list(run.test.flow_names)
    flows = names.index(_ACROSS), names.index(_DOWN)

    def work() -> None:
        draw(run.model, run.test, picture, animation, back=run.test.num_steps)
        draw_grid(run.model, run.test, flows, grid, steps=_BACK, back=_BACK)

    again = [f" --back {run.test.num_steps}", f" --grid {_ACROSS} {_DOWN} --steps {_BACK} --back {_BACK}"]
    _drawn(run, (TRAVERSAL, ANIMATION, GRID), work, again)
    say(
        f"\nlook at {grid}: a test digit turned across and recoloured down, back and forth; training had one at a time;\n"
        f"{picture} follows every flow both ways, {animation} in motion."
    )


def _drawn(run: Run, names: tuple[str, ...], work: Callable[[], None], again: Sequence[str]) -> None:
    """Has pictures drawn into a run's folder; interrupted, it says by which options of a command each can be drawn."""
    try:
        with owned(run.folder, *names):
            work()
    except KeyboardInterrupt:
        command = f"flowfactor traverse {shlex.quote(str(run.folder.absolute()))}"
        how = "; ".join(command + options for options in again)
        raise KeyboardInterrupt(f"The model is trained and measured, but not drawn. Draw it: {how}") from None


def _untouched(first: Run, second: Run) -> dict[str, float]:
    """The error of the second model on the sequences of the first one's kind, by transformation."""
    from flowfactor.metrics import equivariance_error

    test = first.test
    return dict(zip(test.flow_names, equivariance_error(second.model, test).mean.tolist(), strict=True))


def side_by_side(first: Mapping[str, Any], second: Mapping[str, Any], untouched: Mapping[str, float]) -> str:
    """Writes what both models of the demo do as a small table.

    Args:
        first: Result of the model that is trained from the untouched digit, forwards.
        second: Result of the one that is trained from any state, both ways.
        untouched: E_k of the second on the test sequences of the first, by transformation.

    Returns:
        The table: E_k from the untouched digit; and how the errors backwards, of two flows at once, of one after another and
        of all three at once compare with that of one flow forwards, each model's on sequences of the kind it was trained on.

    Example:
        >>> ways = {"single": {"error": {"a": 2.0, "b": 4.0}}, "backward": {"error": {"a": 12.0, "b": 6.0}}}
        >>> one = {"equivariance_error": {"a": 2.0}, "doing_nothing": {"a": 9.0}, "combining": ways}
        >>> print(side_by_side(one, {"combining": {}}, {"a": 2.5}))
        side by side                       from the digit, forwards   from any state, both ways   doing nothing
        E_k from the untouched digit, a                         2.0                         2.5             9.0
        backwards, over forwards                               3.00                           -
        two at once, over one                                     -                           -
        one after another, over one                               -                           -
        three at once, over one                                   -                           -
    """
    titles = "from the digit, forwards", "from any state, both ways", "doing nothing"
    rows = []
    for name, error in first["equivariance_error"].items():
        values = error, untouched[name], first["doing_nothing"][name]
        rows.append((f"E_k from the untouched digit, {name}", [f"{value:.1f}" for value in values]))
    for way, title in _WAYS.items():
        over = [_over(result["combining"], way) for result in (first, second)]
        rows.append((title, ["-" if value is None else f"{value:.2f}" for value in over]))
    wide = max(len(title) for title, _ in rows)
    lines = [
        title.ljust(wide) + "".join(cell.rjust(len(t) + 3) for cell, t in zip(cells, titles, strict=False))
        for title, cells in [("side by side", titles), *rows]
    ]
    return "\n".join(lines)


def _over(ways: Mapping[str, Any], way: str) -> float | None:
    """The mean error of a way over that of one flow forwards, on sequences of the same kind; None where it is missing."""
    made = ways.get(way, {})
    if "over_singles" in made:
        over = list(made["over_singles"].values())
        return sum(over) / len(over)
    errors, single = made.get("error", {}), ways.get("single", {}).get("error", {})
    return sum(errors.values()) / max(sum(single.values()), 1e-12) if errors and single else None


def _what_next(folder: Path) -> str:
    own, composing = (shlex.quote(str(path)) for path in (folder, folder / COMPOSING))
    return f"""what to try next
  flowfactor demo --minutes 10                                             # for each of the two
  flowfactor evaluate {own}
  flowfactor traverse {composing} --grid scaling rotation --back 4 --output scaled.png
  flowfactor train demo --model.augment_dim 0 --output runs/no-room        # without room at rest
  flowfactor train mnist-small --data.root DIR                             # coloured MNIST in 20 minutes
  flowfactor train mnist-any --data.root DIR                               # flows that run back, and compose"""
