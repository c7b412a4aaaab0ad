"""Benchmarks: data set x methods x seeds with equal budgets, run by run, in parallel, resumable."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowfactor._checks import check_count
from flowfactor._files import read_json
from flowfactor.comparison.variants import Variant, configure
from flowfactor.comparison.worker import BUSY, INTERRUPTED, main, write_error
from flowfactor.training.building import make_model
from flowfactor.training.config import Config
from flowfactor.training.data import SequenceData
from flowfactor.training.datasets import data_identity
from flowfactor.training.duration import format_duration
from flowfactor.training.evaluation import EvaluationConfig
from flowfactor.training.folder import (
    ERROR,
    FIGURE,
    FIGURES,
    LOG,
    OF_A_BENCHMARKS_RUN,
    OF_A_RUN,
    REPORT,
    SETTINGS,
    check_free,
    check_writable,
    own,
    write_text,
)
from flowfactor.training.identity import differences, fingerprints

_POLL = 0.1
_PATIENCE = 60.0  # seconds that an interrupted training has to save itself


@dataclass
class Planned:
    """One run of a benchmark.

    Attributes:
        variant: What is trained.
        seed: Its seed.
        folder: Its folder.
        settings: What ``settings.json`` in it says.
        finished: Whether its figures are there already.
    """

    variant: Variant
    seed: int
    folder: Path
    settings: dict[str, Any]
    finished: bool = False

    @property
    def name(self) -> str:
        """Variant and seed in words."""
        return f"{self.variant.name}, seed {self.seed}"


@dataclass
class Benchmark:
    """A benchmark that is ready to start: all that can go wrong beforehand has been checked.

    Attributes:
        folder: Folder of the benchmark.
        runs: Its runs, seed by seed, so that an early report has every method.
        workers: How many run at a time; 0 for one after another in this process.
        threads: Threads of each.
    """

    folder: Path
    runs: list[Planned]
    workers: int
    threads: int
    failures: dict[str, str] = field(default_factory=dict)

    def run(self, tell: Callable[[str], None] = print) -> bool:
        """Trains and measures what is not finished yet.

        A run that fails is reported and does not stop the others.

        Args:
            tell: Called with a line for every run that ends.

        Returns:
            Whether all runs are finished.

        Raises:
            KeyboardInterrupt: After Ctrl-C, when trainings have been saved and workers have ended.
            OSError: If a run's folder cannot be written in.
        """
        waiting = [run for run in self.runs if not run.finished]
        skipped = len(self.runs) - len(waiting)
        if skipped:
            tell(f"{skipped} of {len(self.runs)} runs are finished already")
        for run in waiting:
            run.folder.mkdir(parents=True, exist_ok=True)
            own(run.folder, *OF_A_BENCHMARKS_RUN)
            write_text(run.folder / SETTINGS, json.dumps(run.settings, indent=2) + "\n")
        begun = time.monotonic()
        work = self._in_turn(waiting) if self.workers == 0 else self._beside(waiting)
        # Closed at once where this loop is interrupted: workers must not outlive it.
        with contextlib.closing(work):
            for ended, (run, code) in enumerate(work, start=1):
                run.finished = code == 0
                if not run.finished:
                    self.failures[run.name] = _reason(run.folder, code)
                left = len(waiting) - ended
                passed = format_duration(time.monotonic() - begun)
                tell(f"[{ended}/{len(waiting)}] {self._outcome(run)} | {passed}, {left} left")
        return not self.failures

    def _outcome(self, run: Planned) -> str:
        if not run.finished:
            return f"{run.name} FAILED: {self.failures[run.name]} (see {run.folder})"
        made = json.loads((run.folder / FIGURES).read_text(encoding="utf-8"))
        error = made["figures"]["equivariance"].get("mean")
        each = "no labels" if error is None else " ".join("-" if value is None else f"{value:.0f}" for value in error)
        return f"{run.name}: E_k {each} after {made['steps_made']:,} steps"

    def _in_turn(self, waiting: list[Planned]) -> Generator[tuple[Planned, int], None, None]:
        for run in waiting:
            code = main([str(run.folder)])
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            yield run, code

    def _beside(self, waiting: list[Planned]) -> Generator[tuple[Planned, int], None, None]:
        """Runs in processes of their own: one that dies takes no other with it."""
        queue = list(waiting)
        active: dict[subprocess.Popen[bytes], Planned] = {}
        with _terminable():
            try:
                while queue or active:
                    while queue and len(active) < self.workers:
                        run = queue.pop(0)
                        active[self._start(run)] = run
                    for process in [process for process in active if process.poll() is not None]:
                        yield active.pop(process), process.returncode
                    time.sleep(_POLL)
            finally:
                _stop(list(active))

    def _start(self, run: Planned) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with (run.folder / LOG).open("ab") as log:
            return subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "flowfactor.comparison.worker",
                    str(run.folder),
                    *run.settings["config"].get("imports", ()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends its workers in order
            )


def plan_benchmark(
    base: Config,
    variants: Sequence[Variant],
    output: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int | None = None,
    minutes: float | None = None,
    workers: int = 1,
    threads: int | None = None,
    evaluation: EvaluationConfig | None = None,
    command: str = "",
) -> Benchmark:
    """Makes a benchmark, and checks all of its runs before any work.

    Args:
        base: The settings that all runs share.
        variants: What to compare.
        output: Folder of the benchmark; each run gets a folder in it.
        seeds: The seeds.
        steps: Budget of every run in steps.
        minutes: Budget of every run in minutes of training; with neither, the budget of `base`.
        workers: How many runs at a time, each in a process of its own; 0 for one after another in this process.
        threads: Threads of all workers together; None for the number of cores.
        evaluation: How much to measure.
        command: The command line, for the report.

    Returns:
        The benchmark; its `Benchmark.run` starts it.

    Raises:
        FileNotFoundError: If data are missing.
        FileExistsError: If a run's folder holds one with other settings or on other data of the same name, or files that are
            not ours.
        OSError: If the folder cannot be written in.
        ValueError: If a setting is out of range or does not fit.
        TypeError: If a model takes no such setting.

    Example:
        >>> from flowfactor.comparison import choose_variants, plan_benchmark
        >>> from flowfactor.training import load_config
        >>> plan = plan_benchmark(load_config("demo"), choose_variants(["ours", "vae"]), "none", seeds=[0], steps=9)
        >>> [run.folder.name for run in plan.runs]
        ['ours-seed0', 'vae-seed0']
    """
    workers, total = _checked_workers(workers, threads)
    share = max(total // max(workers, 1), 1)
    if steps is not None and minutes is not None:
        raise ValueError("the budget is steps or minutes, not both: they would not be equal for all methods")
    if not variants or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"a benchmark needs methods and distinct seeds, got {len(variants)} methods and seeds {seeds}")
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"the output {folder} is a file: choose a folder")
    check_free(folder, (REPORT, FIGURE))
    check_writable(folder)
    values = base.as_dict()
    values["train"] |= {"threads": share, "progress": False, "tensorboard": False}
    if steps is not None or minutes is not None:
        values["train"] |= {"steps": steps, "minutes": minutes}
    values["train"]["checkpoint_minutes"] = min(values["train"]["checkpoint_minutes"], 1.0)
    base = Config.from_dict(values)
    if base.train.steps is None and base.train.minutes is None:
        raise ValueError("the trainings have no end: give a budget by steps or minutes")
    evaluation = EvaluationConfig() if evaluation is None else evaluation
    configs = {variant.name: configure(base, variant, seeds[0]) for variant in variants}
    data = _check_all(configs)
    runs = []
    for seed in seeds:
        for variant in variants:
            settings = {
                "variant": variant.name,
                "method": variant.method,
                "title": variant.title,
                "seed": seed,
                "budget": {"steps": base.train.steps, "minutes": base.train.minutes},
                "config": configs[variant.name].as_dict() | {"seed": seed},
                "data": data[variant.name],
                "evaluate": asdict(evaluation),
                "command": command,
            }
            settings["config"].pop("output")
            place = folder / f"{variant.name}-seed{seed}"
            runs.append(Planned(variant, seed, place, settings, _is_finished(place, settings)))
    return Benchmark(folder, runs, workers, share)


def _checked_workers(workers: int, threads: int | None) -> tuple[int, int]:
    workers = check_count("workers", workers, 0, "0 is this process alone")
    total = (os.cpu_count() or 1) if threads is None else threads
    if total < max(workers, 1):
        raise ValueError(f"{workers} workers need as many threads, got {total}: take fewer workers")
    return workers, total


def _check_all(configs: dict[str, Config]) -> dict[str, dict[str, Any]]:
    """Opens every data set and builds every model once; gives the fingerprints of each variant's data."""
    opened: dict[str, Any] = {}
    identities: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        key = json.dumps(config.as_dict()["data"], sort_keys=True)
        if key not in opened:
            train, test = config.data.dataset("train"), config.data.dataset("test")
            opened[key] = train, fingerprints(train, test)
        data, identities[name] = opened[key]
        SequenceData(data, config.train.batch_size, seed=config.seed, stratified=config.train.stratified)
        try:
            make_model(config, data)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error
    return identities


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a folder holds this very run, finished."""
    before = _settings_before(folder / SETTINGS)
    if before is not None:
        _check_data(folder, before, settings)
        different = sorted(_differences(_identity(before), _identity(settings)))
        if different:
            raise FileExistsError(
                f"{folder} holds a run with other settings ({'; '.join(different)}): choose another output, or delete it"
            )
        if (folder / FIGURES).is_file():
            return True  # nothing is going to be written there
    check_free(folder, (*OF_A_RUN, *OF_A_BENCHMARKS_RUN))
    return False


def _settings_before(path: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, or None where there is no run of a benchmark."""
    try:
        found = read_json(path, ": delete the folder")
    except FileNotFoundError:
        return None
    except ValueError:
        check_free(path.parent, [SETTINGS])
        raise
    config = found.get("config")
    if isinstance(config, dict) and isinstance(config.get("data"), dict):
        return found
    check_free(path.parent, [SETTINGS])
    raise ValueError(f"{path} does not hold the settings of a run: delete the folder")


def _check_data(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks that the data are those of the run that a folder holds."""
    if "data" not in before:
        warnings.warn(
            f"the run in {folder} does not say what its data were: make sure yourself that they are these", stacklevel=2
        )
        return
    if not isinstance(before["data"], dict):
        raise ValueError(f"{folder / SETTINGS} is damaged: it does not say what the data were: delete the folder")
    told = differences(before["data"], now["data"])
    if told:
        raise FileExistsError(
            f"{folder} holds a run on other data ({'; '.join(told)}): give the folder of its own data by data.root, or "
            "choose another output"
        )


def _identity(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a run this run: all but the command, titles, where code and data lie, and what data are (`_check_data`)."""
    plain = json.loads(json.dumps(settings))
    for name in ("command", "title", "data"):
        plain.pop(name, None)
    plain["config"].pop("imports", None)
    plain["config"]["data"] = data_identity(plain["config"]["data"])
    return plain


def _differences(one: Any, other: Any, name: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(key for key in other if key not in one)]
        parts = (_differences(one.get(key), other.get(key), f"{name}.{key}".strip(".")) for key in names)
        return [difference for part in parts for difference in part]
    return [] if one == other else [f"{name} was {one}, not {other}"]


def _reason(folder: Path, code: int) -> str:
    if code == BUSY:
        return "another process is at this run"
    path = folder / ERROR
    if path.is_file():
        return path.read_text(encoding="utf-8").strip().splitlines()[0]
    if code == INTERRUPTED:
        reason = "it was interrupted, and can be resumed"
    else:
        reason = f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
    write_error(folder, reason)
    return reason


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM end the benchmark as Ctrl-C does, so that no worker is left behind."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        old = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: whoever is has to see to it
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Asks workers to end, which lets trainings save themselves, and ends those that do not."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
