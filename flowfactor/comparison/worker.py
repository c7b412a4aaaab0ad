"""One run of a benchmark: trains, measures, and writes down what came out."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from flowfactor._files import read_json
from flowfactor._plugins import import_modules, load_plugins
from flowfactor.training.config import Config
from flowfactor.training.evaluation import EvaluationConfig, measure
from flowfactor.training.folder import (
    ERROR,
    FIGURES,
    RESULT,
    SETTINGS,
    BusyError,
    claimed,
    holds_checkpoint,
    own,
    remove,
    write_text,
)
from flowfactor.training.identity import differences, fingerprints
from flowfactor.training.process import prepare_process
from flowfactor.training.run import load_run, prepare, use_threads, versions

INTERRUPTED, BUSY = 130, 75


def execute(folder: str | Path) -> dict[str, Any] | None:
    """Does what ``settings.json`` in a run's folder asks for: from where an earlier attempt left it.

    Args:
        folder: Folder of the run.

    Returns:
        What ``benchmark.json`` now holds, or None where the training was interrupted; it can then be resumed.

    Raises:
        BusyError: If another process is at it.
        OSError: If a file cannot be read or written.
    """
    folder = Path(folder)
    settings = read_json(folder / SETTINGS)
    config, evaluation = _configured(folder, settings)
    with claimed(folder), use_threads(config.train.threads):
        remove(folder, [ERROR])
        return _trained_and_measured(folder, config, evaluation, settings)


def _configured(folder: Path, settings: dict[str, Any]) -> tuple[Config, EvaluationConfig]:
    """What is to be trained and how it is to be measured; what is wrong with the file is reported with its name."""
    try:
        if not isinstance(settings.get("data", {}), dict):
            raise ValueError("data must be a mapping")
        load_plugins()
        config = Config.from_dict(settings["config"] | {"output": str(folder)})
        return config, EvaluationConfig(**settings["evaluate"])
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / SETTINGS} does not hold the settings of a run: {error}") from error


def _trained_and_measured(
    folder: Path, config: Config, evaluation: EvaluationConfig, settings: dict[str, Any]
) -> dict[str, Any] | None:
    result = _finished_training(folder)
    if result is None:
        resume = holds_checkpoint(folder)
        run = prepare(config, resume=resume, overwrite=not resume)
        _check_data(folder, settings, run.identity)
        result = run.fit(measure=False)
        if not result["finished"]:
            return None
        model, train, test = run.model, run.train, run.test
    else:
        model, _ = load_run(folder)
        train, test = config.data.dataset("train"), config.data.dataset("test")
        _check_data(folder, settings, fingerprints(train, test))
    begun = time.monotonic()
    combined = config.data.dataset("test", combined=True) if config.data.is_combined else None
    figures = measure(model, train, test, evaluation, combined=combined)
    made = {
        **settings,
        "flows": list(test.flow_names),
        "steps_made": result["steps"],
        "seconds": result["seconds"],
        "parameters": result["parameters"],
        "terms": {name: _plain(value) for name, value in result["terms"].items()},
        "figures": _plain(figures),
        "evaluation_seconds": round(time.monotonic() - begun, 3),
        "versions": versions(),
        "machine": machine(),
    }
    own(folder, FIGURES)
    write_text(folder / FIGURES, json.dumps(made, indent=2) + "\n")
    return made


def _check_data(folder: Path, settings: dict[str, Any], now: dict[str, Any]) -> None:
    """Checks that the data are still those that the benchmark was planned with."""
    told = differences(settings.get("data", {}), now)
    if told:
        raise ValueError(
            f"the data have changed since the benchmark was planned ({'; '.join(told)}), as {folder / SETTINGS} says"
        )


def _finished_training(folder: Path) -> dict[str, Any] | None:
    """The result of a training that ended before it could be measured, or None."""
    if not (folder / RESULT).is_file():
        return None
    result = read_json(folder / RESULT, ": delete it to go on from the checkpoint")
    number = (int, float)
    kinds = {"finished": bool, "steps": int, "seconds": number, "parameters": int, "terms": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(result.get(name), kind)]
    if wrong:
        raise ValueError(
            f"{folder / RESULT} is damaged: it does not hold the result of a training ({', '.join(wrong)}): delete it to "
            "go on from the checkpoint"
        )
    return result if result["finished"] else None


def _plain(value: Any) -> Any:
    """The same with None for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not (value == value and abs(value) != float("inf")):
        return None
    return value


def machine() -> dict[str, Any]:
    """Describes the machine that a figure comes from."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main(arguments: list[str] | None = None) -> int:
    """Executes the run in a folder; an error is written down, and ends it with code 1.

    Args:
        arguments: The folder, and modules of the user's to import first; the program's own arguments where None.

    Returns:
        The exit code: 0, 1 after an error, 75 where another process is at it, 130 after an interruption.
    """
    folder, *imports = sys.argv[1:] if arguments is None else arguments
    try:
        import_modules(imports)
        return INTERRUPTED if execute(folder) is None else 0
    except BusyError as error:  # whose folder it is
        print(error, file=sys.stderr)
        return BUSY
    except Exception as error:
        traceback.print_exc()
        write_error(Path(folder), f"{type(error).__name__}: {error}")
        return 1


def write_error(folder: Path, reason: str) -> None:
    """Writes down why a run is not finished; where even that cannot be written, it is printed."""
    try:
        own(folder, ERROR)
        write_text(folder / ERROR, reason + "\n")
    except OSError as error:
        print(f"{folder / ERROR} cannot be written: {error}", file=sys.stderr)


if __name__ == "__main__":
    prepare_process()
    raise SystemExit(main())
