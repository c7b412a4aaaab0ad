"""``flowfactor train``: its parser, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from flowfactor.cli._warnings import warnings_in_a_line
from flowfactor.cli.errors import INTERRUPTED, USER_ERRORS, fail, say
from flowfactor.errors import require
from flowfactor.training._folder import run_folder
from flowfactor.training._process import prepare_process
from flowfactor.training.config import Config, DataConfig, TrainConfig, list_presets, load_config, preset_path

_TRAIN = """Train a model by a preset or by your own YAML file.

examples:
  flowfactor train demo
  flowfactor train mnist-small --data.root ~/mnist --seed 1
  flowfactor train mnist-small --train.minutes 5 --model.field gradient --output runs/gradient
  flowfactor train demo --method beta-vae --model.beta 8 --output runs/beta
  flowfactor train runs/gradient/config.yaml --resume

Any key can be overridden, in the order given. Ctrl-C ends the training after the current step and saves it."""


def train_parser(method: str = "ours") -> Any:
    """Makes the parser of ``flowfactor train``: every key of a configuration, with its type and help.

    Args:
        method: The method, whose model's settings the parser takes.

    Returns:
        A ``jsonargparse.ArgumentParser``.

    Raises:
        ImportError: If jsonargparse is not installed.
    """
    jsonargparse = require("jsonargparse", extra="train")
    from flowfactor.models import METHODS, build_sparse_vae, build_vae, get_method

    build = get_method(method).build
    parser = jsonargparse.ArgumentParser(
        prog="flowfactor train",
        usage=f"flowfactor train {{{','.join(list_presets())},FILE.yaml}} [--KEY VALUE ...] [--resume | --overwrite]",
        description=_TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="show this help and exit")
    parser.add_argument("--config", action="config", help="further YAML file, which overrides what stands before it")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="begin anew in a folder that holds a run, which goes when the new one has its first checkpoint",
    )
    parser.add_argument("--method", type=str, default="ours", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of all draws")
    parser.add_argument("--output", type=str, default="runs/latest", help="folder of the run")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(TrainConfig, "train")
    skip = {"image_shape", "num_flows", "num_frames", "generator", "force"}
    if build is build_vae or method == "sta":
        parser.add_function_arguments(build_vae if build is build_vae else build_sparse_vae, "model", skip=skip)
        # Skipped above for its type: a module cannot be written down, and a name or null can.
        parser.add_argument(
            "--model.force",
            type=Literal["negative_square"] | None,
            default="negative_square",
            help="force f of the Hamilton-Jacobi equation: negative_square for a learned one, null for f = 0",
        )
    else:  # the builder of the baselines checks its settings by itself: which there are depends on the name
        parser.add_argument(
            "--model", type=dict[str, Any], default={}, help="settings of build_baseline and of the model's class"
        )
    return parser


def parse_train(arguments: Sequence[str]) -> tuple[Config, bool, bool]:
    """Reads the arguments of ``flowfactor train``.

    Args:
        arguments: A preset or the path of a YAML file, and overrides.

    Returns:
        The configuration, whether to resume, and whether to overwrite.

    Raises:
        SystemExit: With code 2 where a preset or key is unknown, or a value is wrong.
        ImportError: If jsonargparse is not installed.

    Example:
        >>> config, resume, overwrite = parse_train(["demo", "--train.steps", "10", "--model.field", "gradient"])
        >>> config.train.steps, config.model["field"], resume
        (10, 'gradient', False)
    """
    arguments = list(arguments)
    try:
        parser = train_parser(_method(arguments))
    except ValueError as error:
        fail("train", error)
    if "-h" in arguments or "--help" in arguments:
        parser.parse_args(["--help"])
    if not arguments or arguments[0].startswith("-"):
        parser.error(f"begin with a preset ({', '.join(list_presets())}) or the path of a YAML file")
    try:
        path = preset_path(arguments[0])
    except ValueError as error:
        _refuse(parser, error)
    source = str(path)
    if (method := _method(arguments)) != (own := load_config(path)).method:
        source = json.dumps(own.with_method(method).as_dict())
    # The settings of a run mean the folder that they lie in, unless another one is named.
    folder = run_folder(path)
    output = [] if folder is None else ["--output", str(folder)]
    values = parser.parse_args(["--config", source, *output, *arguments[1:]]).as_dict()
    values.pop("config")
    resume, overwrite = values.pop("resume"), values.pop("overwrite")
    if resume and folder is not None and Path(values["output"]).expanduser().resolve() != folder.resolve():
        parser.error(
            f"{path} belongs to the run in {folder}, and the output is {values['output']}: leave --output out to go on with "
            f"that run, or give {Path(values['output']) / path.name} to go on with the other one"
        )
    values["model"] = _typed(values["model"])
    # What is at its default stays out, so that files of settings remain short.
    defaults = parser.get_defaults().as_dict()["model"]
    values["model"] = {name: value for name, value in values["model"].items() if value != defaults.get(name, ...)}
    try:
        return Config.from_dict(values), resume, overwrite
    except ValueError as error:
        _refuse(parser, error)


def _method(arguments: Sequence[str]) -> str:
    """The method that arguments ask for, before they can be parsed: as an option, or in the file."""
    for index, argument in reversed(list(enumerate(arguments))):
        if argument.startswith("--method="):
            return argument.removeprefix("--method=")
        if argument == "--method" and index + 1 < len(arguments):
            return arguments[index + 1]
    try:
        return load_config(arguments[0]).method if arguments else "ours"
    except ValueError:  # what is wrong with the first argument is told by the parser
        return "ours"


def _typed(value: Any) -> Any:
    """Reads the numbers that stand deep in settings of no declared type, which the parser leaves as text."""
    if isinstance(value, dict):
        return {name: _typed(entry) for name, entry in value.items()}
    return require("yaml", extra="train").safe_load(value) if isinstance(value, str) else value


def _refuse(parser: Any, error: ValueError) -> NoReturn:
    parser.error(str(error))
    raise SystemExit(2)  # `error` has ended the program already, which jsonargparse's types do not say


@warnings_in_a_line("train")
def run_train(arguments: Sequence[str]) -> int:
    """Trains by a preset or a file.

    Args:
        arguments: What stands behind ``flowfactor train``.

    Returns:
        The exit code.
    """
    prepare_process()
    try:
        config, resume, overwrite = parse_train(arguments)
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

    from flowfactor.training._folder import resume_command

    if rank_zero_only.rank != 0:
        return 0  # it would be ended by another code of theirs
    if not result["finished"]:
        say(f"interrupted after {result['steps']:,} steps. Go on: {resume_command(folder)}")
        return INTERRUPTED
    say(f"\n{folder}/ holds model/, result.json, config.yaml, metrics.csv and last.ckpt")
    return 0


def table(result: dict[str, Any]) -> str:
    """Writes measurements as a small table.

    Args:
        result: With ``equivariance_error`` and ``doing_nothing`` by transformation, and perhaps ``log_likelihood``.

    Returns:
        The table.

    Example:
        >>> print(table({"equivariance_error": {"turn": 120.25}, "doing_nothing": {"turn": 962.0}}))
        transformation            E_k   doing nothing
        turn                    120.2           962.0
    """
    lines = [f"{'transformation':<16}{'E_k':>13}{'doing nothing':>16}"]
    for name, value in result["equivariance_error"].items():
        lines.append(f"{name:<16}{value:>13.1f}{result['doing_nothing'][name]:>16.1f}")
    factor = result.get("factor_accuracy")
    if factor is not None:
        lines.append(f"\nfactor accuracy {factor['value']:.2%} after matching ({factor['count']:,} sequences)")
    bound = result.get("log_likelihood")
    if bound is not None:
        lines.append(
            f"\nln p(x) per frame >= {bound['per_frame']:.2f} +- {bound['standard_error']:.2f} nats "
            f"({bound['likelihood']}, {bound['objective']} bound, {bound['samples']} samples)"
        )
    return "\n".join(lines)
