"""The command line: train, benchmark, evaluate, traverse, demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import flowfactor
from flowfactor.cli.benchmark import run_benchmark
from flowfactor.cli.runs import run_demo, run_evaluate, run_traverse
from flowfactor.cli.train import run_train
from flowfactor.training.config import list_presets


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments; the program's own where None.

    Returns:
        The exit code: 0, 1 where runs of a benchmark failed, or 130 after an interruption.

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
        return run_train(given[1:])
    if given[:1] == ["benchmark"]:
        return run_benchmark(given[1:])
    parsed = _parser().parse_args(given)
    return parsed.run(parsed)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowfactor", description="Latent flows: train, measure and look at flow-factorized models."
    )
    parser.add_argument("--version", action="version", version=f"flowfactor {flowfactor.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    # `train` and `benchmark` have parsers of their own; here they stand for the help alone.
    commands.add_parser("train", help=f"train by a preset ({', '.join(list_presets())}) or a YAML file", add_help=False)
    commands.add_parser("benchmark", help="compare methods: data set x methods x seeds", add_help=False)

    demo = commands.add_parser("demo", help="train a small model in three minutes, and look at it")
    demo.add_argument("--minutes", type=float, default=None, help="length of the training (default: the preset's)")
    demo.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    demo.add_argument("--output", type=_path, default=None, help="folder, begun anew each time (default: demo_output)")
    demo.set_defaults(run=run_demo)

    evaluate = commands.add_parser("evaluate", help="measure the model of a run on test data")
    evaluate.add_argument("run_dir", type=_path, help="folder of a run")
    evaluate.add_argument("--limit", type=int, help="test sequences of each transformation (default: all)")
    evaluate.add_argument(
        "--samples", type=int, default=64, help="samples of the likelihood's bound; 0 leaves it out (default: 64)"
    )
    evaluate.add_argument("--root", help="folder of the data, where it has moved")
    evaluate.add_argument("--other-data", action="store_true", help="take data other than the run's on purpose")
    evaluate.set_defaults(run=run_evaluate)

    traverse = commands.add_parser("traverse", help="draw test images along every flow")
    traverse.add_argument("run_dir", type=_path, help="folder of a run")
    traverse.add_argument("--output", type=_path, help="picture to write (default: RUN_DIR/traversal.png)")
    traverse.add_argument("--gif", type=_path, help="animation to write too")
    traverse.add_argument("--images", type=int, default=3, help="how many test images (default: 3)")
    traverse.add_argument("--steps", type=int, help="steps forwards (default: those of the training)")
    traverse.add_argument("--back", type=int, default=0, help="steps backwards, beyond what was trained (default: 0)")
    traverse.add_argument("--root", help="folder of the data, where it has moved")
    traverse.add_argument("--other-data", action="store_true", help="take data other than the run's on purpose")
    traverse.set_defaults(run=run_traverse)
    return parser
