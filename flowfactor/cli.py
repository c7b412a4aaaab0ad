"""The command line: train, evaluate, traverse, demo."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import flowfactor
from flowfactor.errors import require
from flowfactor.training.config import Config, DataConfig, TrainConfig, list_presets, load_config, preset_path

USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    ImportError,
    ConnectionError,
)
"""What preparing a command may raise about what the user gave; the message says how to mend it."""

_TRAIN = """Train a model by a preset or by your own YAML file.

examples:
  flowfactor train demo
  flowfactor train mnist-small --data.root ~/mnist --seed 1
  flowfactor train mnist-small --train.minutes 5 --model.field gradient --output runs/gradient
  flowfactor train demo --method beta-vae --model.beta 8 --output runs/beta
  flowfactor train runs/gradient/config.yaml --resume

Any key can be overridden, in the order given. Ctrl-C ends the training behind the current step and saves it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments; the program's own where None.

    Returns:
        The exit code: 0, or 130 after an interruption.

    Raises:
        SystemExit: With code 2 where the arguments, or what they point to, are wrong.

    Example:
        >>> main(["train", "no-such-preset"])
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"]:
        return _train(given[1:])
    parsed = _parser().parse_args(given)
    return parsed.run(parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowfactor", description="Latent flows: train, measure and look at flow-factorized models."
    )
    parser.add_argument("--version", action="version", version=f"flowfactor {flowfactor.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    # `train` is parsed by jsonargparse; here it stands for the help alone.
    commands.add_parser("train", help=f"train by a preset ({', '.join(list_presets())}) or a YAML file", add_help=False)

    demo = commands.add_parser("demo", help="train a small model in three minutes, and look at it")
    demo.add_argument("--minutes", type=float, default=None, help="length of the training (default: the preset's)")
    demo.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    demo.add_argument("--output", default=None, help="folder, begun anew each time (default: demo_output)")
    demo.set_defaults(run=_demo)

    evaluate = commands.add_parser("evaluate", help="measure the model of a run on test data")
    evaluate.add_argument("run_dir", help="folder of a run")
    evaluate.add_argument("--limit", type=int, help="test sequences of each transformation (default: all)")
    evaluate.add_argument(
        "--samples", type=int, default=64, help="samples of the likelihood's bound; 0 leaves it out (default: 64)"
    )
    evaluate.add_argument("--root", help="folder of the data, where it has moved")
    evaluate.set_defaults(run=_evaluate)

    traverse = commands.add_parser("traverse", help="draw test images along every flow")
    traverse.add_argument("run_dir", help="folder of a run")
    traverse.add_argument("--output", help="picture to write (default: RUN_DIR/traversal.png)")
    traverse.add_argument("--gif", help="animation to write too")
    traverse.add_argument("--images", type=int, default=3, help="how many test images (default: 3)")
    traverse.add_argument("--steps", type=int, help="steps forwards (default: those of the training)")
    traverse.add_argument("--back", type=int, default=0, help="steps backwards, beyond what was trained (default: 0)")
    traverse.add_argument("--root", help="folder of the data, where it has moved")
    traverse.set_defaults(run=_traverse)
    return parser


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
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    parser.add_argument("--method", type=str, default="ours", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and of all draws")
    parser.add_argument("--output", type=str, default="runs/latest", help="folder of the run")
    parser.add_class_arguments(DataConfig, "data")
    parser.add_class_arguments(TrainConfig, "train")
    skip = {"image_shape", "num_flows", "num_frames", "generator", "force"}
    if build is build_vae:
        parser.add_function_arguments(build_vae, "model", skip=skip)
    elif method == "sta":
        parser.add_function_arguments(build_sparse_vae, "model", skip=skip)
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
        _fail("train", error)
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
    values = parser.parse_args(["--config", source, *arguments[1:]]).as_dict()
    values.pop("config")
    resume, overwrite = values.pop("resume"), values.pop("overwrite")
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


def _train(arguments: Sequence[str]) -> int:
    try:
        config, resume, overwrite = parse_train(arguments)
        from flowfactor.training import prepare

        run = prepare(config, resume=resume, overwrite=overwrite)
    except USER_ERRORS as error:
        _fail("train", error)
    return _report(run.fit(), config.output)


def _report(result: dict[str, Any], folder: str) -> int:
    steps, seconds = result["steps"], result["seconds"]
    if not result["finished"]:
        print(f"interrupted after {steps:,} steps. Go on: flowfactor train {folder}/config.yaml --resume")
        return 130
    print(f"\n{steps:,} steps in {seconds:,.0f} s, {result['steps_per_second']:.1f} a second\n")
    print(table(result))
    print(f"\n{folder}/ holds model/, result.json, config.yaml, metrics.csv and last.ckpt")
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


def _demo(arguments: argparse.Namespace) -> int:
    try:
        config = load_config("demo")
        values = config.as_dict() | {"seed": arguments.seed, "output": arguments.output or config.output}
        if arguments.minutes is not None:
            values["train"]["minutes"] = arguments.minutes
        config = Config.from_dict(values)
        for module in ("matplotlib", "PIL.Image"):
            require(module, extra="plot")
        from flowfactor.training import prepare

        run = prepare(config, overwrite=True)
    except USER_ERRORS as error:
        _fail("demo", error)
    minutes = config.train.minutes or 0
    print(f"training on {len(run.data.dataset):,} handwritten digits for {minutes:g} minutes ...", file=sys.stderr)
    code = _report(run.fit(), config.output)
    if code == 0:
        folder = Path(config.output)
        draw(run.model, run.test, folder / "traversal.png", folder / "transformations.gif")
        print(
            f"""
look at {folder}/traversal.png: every row follows one flow from a test digit;
{folder}/transformations.gif shows the same in motion.

what to try next
  flowfactor demo --minutes 10
  flowfactor evaluate {folder}
  flowfactor train demo --model.field gradient --output runs/gradient    # without the divergence-free part
  flowfactor train mnist-small --data.root DIR                           # coloured MNIST in 20 minutes"""
        )
    return code


def _evaluate(arguments: argparse.Namespace) -> int:
    try:
        if arguments.samples < 0 or (arguments.limit is not None and arguments.limit < 1):
            raise ValueError("--samples must not be negative, and --limit must be at least 1")
        model, test = _opened(arguments)
    except USER_ERRORS as error:
        _fail("evaluate", error)
    from flowfactor.training.run import evaluate, versions, write_text

    count = None if arguments.limit is None else arguments.limit * test.num_flows
    without = arguments.samples == 0
    result = evaluate(
        model, test, limit=arguments.limit, likelihood_limit=0 if without else count, samples=arguments.samples or 1
    )
    path = Path(arguments.run_dir) / "evaluation.json"
    write_text(path, json.dumps(result | {"versions": versions()}, indent=2) + "\n")
    print(f"{table(result)}\n\nwritten to {path}")
    return 0


def _traverse(arguments: argparse.Namespace) -> int:
    picture = Path(arguments.output or Path(arguments.run_dir) / "traversal.png")
    animation = None if arguments.gif is None else Path(arguments.gif)
    try:
        for path, suffix in ((picture, ".png"), (animation, ".gif")):
            if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
                raise ValueError(f"{path} must end in {suffix} and lie in a folder that exists")
        model, test = _opened(arguments)
        if not 1 <= arguments.images <= len(test) or (arguments.steps is not None and arguments.steps < 1):
            raise ValueError(f"--images must be between 1 and {len(test)}, and --steps at least 1")
        if arguments.back < 0:
            raise ValueError(f"--back must not be negative, got {arguments.back}")
        for module in ("matplotlib", "PIL.Image"):
            require(module, extra="plot")
    except USER_ERRORS as error:
        _fail("traverse", error)
    draw(model, test, picture, animation, images=arguments.images, steps=arguments.steps, back=arguments.back)
    print("\n".join(str(path) for path in (picture, animation) if path is not None))
    return 0


def draw(
    model: Any,
    test: Any,
    picture: Path,
    animation: Path | None = None,
    *,
    images: int = 3,
    steps: int | None = None,
    back: int = 0,
) -> None:
    """Draws test images along every flow of a model.

    Args:
        model: The model.
        test: The test split, for the images and the names of the flows.
        picture: PNG to write.
        animation: GIF to write too, or None.
        images: How many images, spread evenly over the split.
        steps: Steps forwards; those of the data where None.
        back: Steps backwards: sequences start at time 0, so these show how far the flows extrapolate.
    """
    from flowfactor import plot
    from flowfactor.training.matching import flow_names

    chosen = [index * len(test) // images for index in range(images)]
    x0 = test.batch(chosen)["frames"][:, 0]
    reach = test.num_steps if steps is None else steps
    whole = list(range(-back, reach + 1))
    halves = [half / 2 for half in range(-2 * back, 2 * reach + 1)]
    names = flow_names(model, test)
    plot.save(plot.traverse_figure(model, x0, t=whole, flow_names=names), picture)
    if animation is not None:
        plot.to_gif(plot.traversal_frames(model, x0, t=halves, scale=2), animation)


def _opened(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Loads the model of a run, and its test data."""
    from flowfactor.training import load_run

    model, config = load_run(arguments.run_dir)
    if arguments.root is not None:
        config.data.root = arguments.root
    return model, config.data.dataset("test")


def _fail(command: str, error: Exception) -> NoReturn:
    print(f"flowfactor {command}: error: {error}", file=sys.stderr)
    raise SystemExit(2)
