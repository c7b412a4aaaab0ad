"""``flowfactor benchmark``: methods compared on a data set, over seeds, with equal budgets."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowfactor._checks import did_you_mean
from flowfactor._methods import METHODS
from flowfactor._plugins import import_modules
from flowfactor.cli.arguments import IMPORT_HELP, read_train, train_settings
from flowfactor.cli.errors import INTERRUPTED, USER_ERRORS, fail, say
from flowfactor.comparison.variants import ABLATION_GROUPS, ABLATIONS, BENCHMARKS, choose_variants
from flowfactor.training.config import list_presets, preset_path
from flowfactor.training.process import prepare_process
from flowfactor.training.signatures import of_source

_OVERRIDDEN = ("data", "model", "train")
_EVALUATION = "training/evaluation.py:EvaluationConfig"

_DESCRIPTION = """Compare methods on a data set, over seeds, with an equal budget for every run, and report.

examples:
  flowfactor benchmark digits --methods ours free vae --steps 500
  flowfactor benchmark mnist --seeds 0 1 2 --minutes 5 --workers 2 --data.root ~/mnist
  flowfactor benchmark scenes --ablations field pde --minutes 5 --workers 2
  flowfactor benchmark digits --import mymethod.py --methods ours mine --steps 500
  flowfactor benchmark report runs/benchmark-mnist

Begun anew, it goes on where it was: finished runs are kept and interrupted trainings resumed. Any key of the preset's
data, model and train can be overridden, as in flowfactor train, and so can how much is measured (--evaluate.KEY)."""


def benchmark_parser() -> argparse.ArgumentParser:
    """Makes the parser of ``flowfactor benchmark``."""
    parser = argparse.ArgumentParser(
        prog="flowfactor benchmark",
        usage="flowfactor benchmark DATA [options] [--KEY VALUE ...]\n       flowfactor benchmark report DIR",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    presets = ", ".join([*BENCHMARKS, *(name for name in list_presets() if name not in BENCHMARKS)])
    parser.add_argument("data", metavar="DATA", help=f"{presets}, or a YAML file; or report, to write a report anew")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="folder of the benchmark to report on")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help=f"methods ({', '.join(METHODS)}) and ablations ({', '.join(ABLATIONS)}); all methods by default",
    )
    _add_import(parser)
    parser.add_argument(
        "--ablations",
        nargs="*",
        metavar="GROUP",
        help=f"add the ablations of these groups ({', '.join(ABLATION_GROUPS)}), or of all of them",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds (default: 0 1 2)")
    parser.add_argument("--steps", type=int, help="budget of every run in steps")
    parser.add_argument("--minutes", type=float, help="budget of every run in minutes of training")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, help="threads of all workers together (default: the number of cores)")
    parser.add_argument("--output", help="folder of the benchmark (default: runs/benchmark-DATA)")
    for name, entry in of_source(_EVALUATION).items():
        text = f"{entry.help} (default: {entry.default})".replace("%", "%%")
        parser.add_argument(f"--evaluate.{name}", type=int, default=entry.default, metavar="N", help=text)
    return parser


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--import", dest="imports", metavar="MODULE", action="append", default=[], help=IMPORT_HELP)


def run_benchmark(arguments: Sequence[str]) -> int:
    """Runs a benchmark, or reports on one.

    Args:
        arguments: What stands after ``flowfactor benchmark``.

    Returns:
        The exit code: 0, 1 where runs failed, 74 where a file cannot be written, or 130 after an interruption.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_import(first)
    try:
        import_modules(first.parse_known_args(arguments)[0].imports)  # before the help, which lists methods
    except USER_ERRORS as error:
        fail("benchmark", error)
    parsed, overrides = benchmark_parser().parse_known_args(arguments)
    try:
        if parsed.data == "report":
            if parsed.folder is None or overrides:
                raise ValueError("report takes the folder of a benchmark, and nothing else")
            return _report(parsed.folder)
        plan = _planned(parsed, overrides, shlex.join(["flowfactor", "benchmark", *arguments]))
    except USER_ERRORS as error:
        fail("benchmark", error)
    say(f"{len(plan.runs)} runs, {max(plan.workers, 1)} at a time, {plan.threads} threads each: {plan.folder}")
    try:
        finished = plan.run(say)
    except KeyboardInterrupt:
        say("interrupted. The same command goes on with it")
        return INTERRUPTED
    _report(plan.folder)
    return 0 if finished else 1


def _planned(parsed: argparse.Namespace, overrides: list[str], command: str) -> Any:
    if parsed.folder is not None:
        raise ValueError(f"unexpected {parsed.folder!r} after {parsed.data!r}")
    sections = tuple(f"--{section}." for section in _OVERRIDDEN)
    wrong = [a for a in overrides if a.startswith("--") and not a.startswith(sections)]
    if wrong:
        options = [option for action in benchmark_parser()._actions for option in action.option_strings]
        options += [f"--{section}.{entry.name}" for section in _OVERRIDDEN for entry in train_settings("ours")[section]]
        near = did_you_mean(wrong[0].partition("=")[0], options)
        raise ValueError(f"unknown option {wrong[0]}{near or ': see flowfactor benchmark --help'}")
    for budget in ("--train.steps", "--train.minutes", "--train.threads"):
        if any(argument.split("=")[0] == budget for argument in overrides):
            raise ValueError(f"{budget} is the same for all runs: give --{budget.removeprefix('--train.')}")
    if parsed.data not in BENCHMARKS:
        preset_path(parsed.data, BENCHMARKS)
    overrides += [word for entry in parsed.imports for word in ("--import", entry)]
    base, _, _ = read_train([BENCHMARKS.get(parsed.data, parsed.data), *overrides])
    variants = choose_variants(parsed.methods, parsed.ablations)
    prepare_process()  # without workers, the runs are this process's own
    from flowfactor.comparison import plan_benchmark
    from flowfactor.training import EvaluationConfig

    evaluation = EvaluationConfig(**{name: getattr(parsed, f"evaluate.{name}") for name in of_source(_EVALUATION)})
    return plan_benchmark(
        base,
        variants,
        parsed.output or f"runs/benchmark-{Path(parsed.data).stem}",
        seeds=parsed.seeds,
        steps=parsed.steps,
        minutes=parsed.minutes,
        workers=parsed.workers,
        threads=parsed.threads,
        evaluation=evaluation,
        command=command,
    )


def _report(folder: str | Path) -> int:
    from flowfactor.comparison import write_report
    from flowfactor.comparison.report import check_report, load_runs, markdown

    runs, others = load_runs(folder)
    check_report(Path(folder).expanduser())
    say(markdown(runs, others))  # before it is written, which may fail
    report, figure = write_report(folder)
    say(f"written to {report}" + ("" if figure is None else f" and {figure}"))
    return 0
