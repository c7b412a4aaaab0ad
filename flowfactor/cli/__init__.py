"""The command line: train, benchmark, evaluate, traverse, demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import flowfactor
from flowfactor._checks import choices, did_you_mean
from flowfactor.cli.errors import guarded
from flowfactor.training.config import list_presets

# What a command needs is imported when it runs: help and mistakes are shown at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments; the program's own where None.

    Returns:
        The exit code: 0, 1 where runs of a benchmark failed or a training diverged, 74 where a file cannot be read or
        written, or 130 after an interruption.

    Raises:
        SystemExit: With code 2 where the arguments, or what they point to, are wrong.

    Example:
        >>> main(["train", "no-such-preset"])
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(" ".join(given[:1]), lambda: _run(given))


def _run(given: list[str]) -> int:
    if not given or given[0].startswith("-"):
        _parser().parse_args(given)
        _parser().error("a command is required")
    name, rest = given[0], given[1:]
    if name == "train":
        from flowfactor.cli.train import run_train

        return run_train(rest)
    if name == "benchmark":
        from flowfactor.cli.benchmark import run_benchmark

        return run_benchmark(rest)
    if name not in _COMMANDS:
        _parser().error(f"there is no command {name!r}{choices(name, _COMMANDS)}")
    parsed = _COMMANDS[name][1]().parse_args(rest)
    if name == "demo":
        from flowfactor.cli.demo import run_demo

        return run_demo(parsed)
    from flowfactor.cli import runs

    return getattr(runs, f"run_{name}")(parsed)


class _Parser(argparse.ArgumentParser):
    """The parser of one command, which offers the option that an unknown one was meant to be."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"flowfactor {command}", description=f"{_COMMANDS[command][0]}.", allow_abbrev=False)

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:
        parsed, left = self.parse_known_args(args)
        if left:
            known = [option for action in self._actions for option in action.option_strings]
            self.error(f"unexpected {' '.join(left)}{did_you_mean(left[0].partition('=')[0], known)}")
        return parsed


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _parser() -> argparse.ArgumentParser:
    """The parser of the program itself, for its help and its version."""
    parser = argparse.ArgumentParser(
        prog="flowfactor",
        usage="flowfactor COMMAND ...",
        description="Latent flows: train, measure and look at flow-factorized models.",
        epilog="Each command has --help.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flowfactor {flowfactor.__version__}")
    commands = parser.add_argument_group("commands")
    for name, (text, _) in _COMMANDS.items():
        commands.add_argument(name, nargs="?", metavar=name, help=text)
    return parser


def _demo() -> argparse.ArgumentParser:
    parser = _Parser("demo")
    parser.add_argument(
        "--minutes", type=float, default=None, help="length of each of the two trainings (default: theirs)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument(
        "--output", type=_path, default=None, help="folder; a demo in it is begun anew (default: demo_output)"
    )
    return parser


def _evaluate() -> argparse.ArgumentParser:
    parser = _Parser("evaluate")
    parser.add_argument("run_dir", type=_path, help="folder of a run")
    parser.add_argument(
        "--limit", type=int, help="test sequences of each transformation, drawn at random (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn (default: 0)")
    parser.add_argument(
        "--samples", type=int, default=64, help="samples of the likelihood's bound; 0 leaves it out (default: 64)"
    )
    parser.add_argument("--output", type=_path, help="JSON file to write (default: RUN_DIR/evaluation.json)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    _of_a_run(parser)
    return parser


def _traverse() -> argparse.ArgumentParser:
    parser = _Parser("traverse")
    parser.add_argument("run_dir", type=_path, help="folder of a run")
    parser.add_argument("--output", type=_path, help="picture to write (default: RUN_DIR/traversal.png, or grid.png)")
    parser.add_argument("--gif", type=_path, help="animation to write too")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    text = "two flows, by name or number: draw one test image carried by the first across and by the second down"
    parser.add_argument("--grid", nargs=2, metavar=("FLOW", "FLOW"), help=text)
    parser.add_argument("--images", type=int, help="how many test images (default: 3; 1 for a grid)")
    parser.add_argument("--steps", type=int, help="steps forwards (default: those of the training)")
    parser.add_argument("--back", type=int, default=0, help="steps backwards, beyond what was trained (default: 0)")
    _of_a_run(parser)
    return parser


def _of_a_run(parser: argparse.ArgumentParser) -> None:
    """Adds what all commands on a run take."""
    parser.add_argument("--root", help="folder of the data, where it has moved")
    parser.add_argument("--other-data", action="store_true", help="take data other than the run's on purpose")
    text = "module of yours that the run was made with, which is run: a name or a .py file; may be given again"
    parser.add_argument("--import", dest="imports", metavar="MODULE", action="append", default=[], help=text)


def _of_its_own() -> NoReturn:
    raise NotImplementedError("this command reads its arguments itself")


_COMMANDS: dict[str, tuple[str, Callable[[], argparse.ArgumentParser]]] = {
    "train": (f"train by a preset ({', '.join(list_presets())}) or a YAML file", _of_its_own),
    "benchmark": ("compare methods: data set x methods x seeds", _of_its_own),
    "demo": ("train two small models in under five minutes, and look at them", _demo),
    "evaluate": ("measure the model of a run on test data", _evaluate),
    "traverse": ("draw test images along every flow", _traverse),
}
"""What each command does, and its parser."""
