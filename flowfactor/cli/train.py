"""``flowfactor train``, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowfactor.cli._warnings import warnings_in_a_line
from flowfactor.cli.arguments import parse_train
from flowfactor.cli.errors import INTERRUPTED, USER_ERRORS, fail, say
from flowfactor.training.process import prepare_process


@warnings_in_a_line("train")
def run_train(arguments: Sequence[str]) -> int:
    """Trains by a preset or a file.

    Args:
        arguments: What follows ``flowfactor train``.

    Returns:
        The exit code.
    """
    try:
        config, resume, overwrite = parse_train(arguments)
        prepare_process()
        from flowfactor.training import prepare

        run = prepare(config, resume=resume, overwrite=overwrite)
    except USER_ERRORS as error:
        fail("train", error)
    try:
        result = run.fit(tell=report)
    except FileExistsError as error:  # another process is, or was, at work there
        fail("train", error)
    return ended(result, run.folder)


def report(result: dict[str, Any]) -> None:
    """Prints the result of a training, if it was not interrupted.

    Args:
        result: The result.
    """
    if result["finished"]:
        steps, seconds = result["steps"], result["seconds"]
        if result["ended"].startswith("no lower"):
            say(f"\nthe training ended early, after {steps:,} steps: {result['ended']}")
        say(f"\n{steps:,} steps in {seconds:,.0f} s, {result['steps_per_second']:.1f} a second\n\n{table(result)}")


def ended(result: dict[str, Any], folder: Path) -> int:
    """Says where a training's files are, or how to go on with it; of several processes the first one does.

    Args:
        result: The result.
        folder: Folder of the run.

    Returns:
        The exit code: 130 where it was interrupted.
    """
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from flowfactor.training.folder import CHECKPOINT, CONFIG, METRICS, MODEL, RESULT, resume_command

    if rank_zero_only.rank != 0:
        return 0  # it would be ended by another code of theirs
    if not result["finished"]:
        imports = result["config"].get("imports", ())
        say(f"interrupted after {result['steps']:,} steps. Go on: {resume_command(folder, imports)}")
        return INTERRUPTED
    # Short runs log nothing.
    names = [name for name in (RESULT, CONFIG, METRICS, CHECKPOINT) if (folder / name).is_file()]
    say(f"\n{folder}/ holds {MODEL}/, {', '.join(names[:-1])} and {names[-1]}")
    return 0


def table(result: dict[str, Any]) -> str:
    """Writes measurements as a small table.

    Args:
        result: With ``equivariance_error`` and ``doing_nothing`` by transformation, and perhaps ``latent_equivariance``,
            ``log_likelihood``, how flows move and how they combine.

    Returns:
        The table.

    Example:
        >>> print(table({"equivariance_error": {"turn": 120.25}, "doing_nothing": {"turn": 962.0}}))
        transformation            E_k   doing nothing
        turn                    120.2           962.0
    """
    latent = result.get("latent_equivariance", {}).get("mean")  # methods without flows have none
    lines = [
        f"{'transformation':<16}{'E_k':>13}{'doing nothing':>16}" + ("" if latent is None else f"{'latent error':>15}")
    ]
    if not result["equivariance_error"]:
        lines = ["no labels of what acts in the test sequences: no E_k"]
    for k, (name, value) in enumerate(result["equivariance_error"].items()):
        row = f"{name:<16}{value:>13.1f}{result['doing_nothing'][name]:>16.1f}"
        lines.append(row if latent is None else row + f"{latent[k]:>15.3f}")
    drawn = result.get("equivariance", {})
    if drawn.get("limit") is not None:
        lines.append(f"(of {drawn['limit']:,} test sequences each, drawn at random, seed {drawn['seed']})")
    lines += _motion(result) + _combining(result) + _group(result)
    rebuilt = result.get("reconstruction")
    if rebuilt is not None:
        lines.append(
            f"\nreconstruction {rebuilt['per_frame']:.1f} +- {rebuilt['standard_error']:.1f} a frame, in the L1 norm "
            f"({rebuilt['count']:,} sequences)"
        )
    factor = result.get("factor_accuracy")
    if factor is not None:
        lines.append(f"\nfactor accuracy {factor['value']:.2%} after matching ({factor['count']:,} sequences)")
    bound = result.get("log_likelihood")
    if bound is not None and "missing" in bound:
        lines.append(f"\nno ln p(x): {bound['missing']}")
    elif bound is not None:
        lines.append(
            f"\nln p(x) per frame >= {bound['per_frame']:.2f} +- {bound['standard_error']:.2f} nats "
            f"({bound['likelihood']}, {bound['objective']} bound, {bound['samples']} samples)"
        )
    return "\n".join(lines)


def _combining(result: dict[str, Any]) -> list[str]:
    """How flows run backwards and combine: lines of the table."""
    found = result.get("combining", {})
    backward = found.get("backward", {})
    lines = []
    if "error" in backward:
        lines = ["", f"{'backwards':<26}{'E':>10}{'forward':>12}{'doing nothing':>16}"]
        for name, value in backward["error"].items():
            forward, nothing = found["single"]["error"][name], backward["doing_nothing"][name]
            lines.append(f"{name:<26}{value:>10.1f}{forward:>12.1f}{nothing:>16.1f}")
    modes = {"superpose": "both at once", "switch": "one after another", "together": "three at once"}
    for mode, title in modes.items():
        pairs = found.get(mode, {})
        if "error" in pairs:
            lines += ["", f"{title:<26}{'E':>10}{'over singles':>14}{'doing nothing':>16}"]
            for name, value in pairs["error"].items():
                over, nothing = pairs["over_singles"][name], pairs["doing_nothing"][name]
                lines.append(f"{name:<26}{value:>10.1f}{over:>14.2f}{nothing:>16.1f}")
    if "error" in found.get("untouched", {}):
        lines += ["", f"{'from the untouched image':<26}{'E':>10}{'doing nothing':>28}"]
        nothing = found["untouched"]["doing_nothing"]
        lines += [
            f"{name:<26}{value:>10.1f}{nothing[name]:>28.1f}" for name, value in found["untouched"]["error"].items()
        ]
    if lines:
        start = "anywhere" if found["start"] == "any" else "where those of the test split do"
        lines.append(f"(of at most {found['count']:,} test sequences each, which begin {start})")
    return lines


def _group(result: dict[str, Any]) -> list[str]:
    """Whether the order of flows matters and each is a group: lines of the table."""
    order, group = result.get("commutator", {}), result.get("group", {})
    lines = []
    if "mean" in order:
        lines = ["", f"{'in either order':<26}{'apart':>10}"]
        for pair, value in zip(order["pairs"], order["mean"], strict=True):
            lines.append(f"{'+'.join(map(str, pair)):<26}{value:>10.3f}")
    if "addition" in group:
        columns = {"half twice": group["addition"], "there and back": group["inverse"]}
        if group["reconstruction"] is not None:
            columns["frame, over rebuilt"] = group["reconstruction"]
        lines += ["", f"{'as a group':<26}" + "".join(f"{title:>21}" for title in columns)]
        flows = group["addition"]["flows"] or [f"flow {k}" for k in range(len(group["addition"]["mean"]))]
        for k, flow in enumerate(flows):
            lines.append(f"{flow:<26}" + "".join(f"{made['mean'][k]:>21.3f}" for made in columns.values()))
    return [*lines, "(latents, relative to how far they go; the frame, to its reconstruction)"] if lines else []


_MOTION = {
    "gradient_share": ("grad u's share", "{:.2f}"),
    "arc_over_chord": ("arc/chord", "{:.2f}"),
    "translation_share": ("same for all", "{:.2f}"),
    "solver_gap": ("E_k if accurate", "{:+.1%}"),
}


def _motion(result: dict[str, Any]) -> list[str]:
    """How the flows move, a row a transformation: lines of the table."""
    found = {name: made for name in _MOTION if "mean" in (made := result.get(name, {}))}
    columns = [(*_MOTION[name], made["mean"]) for name, made in found.items()]
    gap = found.get("solver_gap", {})
    if gap.get("training", gap.get("mean")) != gap.get("mean"):  # a model that is evaluated by another solver
        columns.append(("from training's", "{:+.1%}", gap["training"]))
    if not columns:
        return []
    lines = ["", f"{'how it moves':<16}" + "".join(f"{title:>17}" for title, _, _ in columns)]
    for k, flow in enumerate(result["equivariance_error"]):
        lines.append(f"{flow:<16}" + "".join(f"{form.format(values[k]):>17}" for _, form, values in columns))
    return lines
