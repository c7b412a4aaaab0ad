"""Runs that are killed, and runs whose newest checkpoint is damaged: all have to end as if nothing had happened.

``python -m experiments.robustness --kills 50 --damaged 50 --seed 0`` trains a tiny model again and again, ends it by SIGKILL
at random moments, damages the newest checkpoint of every second part of the runs, and goes on. The weights then have to
be those of an undisturbed run bit for bit, and ``metrics.csv`` the same but for times. It prints JSON and ends with code 1
where a run is not so. Needs a system with ``fork``: each training is a process, without the seconds of its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowfactor.training import Config, train
from flowfactor.training.checkpoints import check_seal
from flowfactor.training.folder import holds_checkpoint

STEPS = 60
_SIZES = {
    "latent_dim": 4,
    "hidden": [8, 8],
    "frames_per_step": 2,
    "encoder": {"widths": [8]},
    "decoder": {"widths": [8]},
}
_TIMES = ("seconds", "steps_per_second")


def settings(folder: Path) -> Config:
    """A training of a second."""
    options = {"steps": STEPS, "batch_size": 6, "log_every": 1, "checkpoint_steps": 3, "tensorboard": False}
    options |= {"progress": False, "evaluate_limit": 2, "likelihood_limit": 0, "accelerator": "cpu"}
    data = {"name": "digits", "steps": 2, "limit": 21}
    return Config.from_dict({"data": data, "model": _SIZES, "train": options, "output": str(folder)})


def start(folder: Path) -> int:
    """Begins a training, or goes on with it, in a process of its own; what it says is added to a file beside the folder."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resume = holds_checkpoint(folder)
        train(settings(folder), resume=resume, overwrite=not resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(process: int) -> int:
    """Waits for a training, and gives its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(process: int) -> bool:
    """Ends a training at once; whether it was still at work."""
    os.kill(process, signal.SIGKILL)
    return finish(process) == -signal.SIGKILL


def state(folder: Path) -> tuple[bytes, list[list[str]]]:
    """Weights of a finished run, and its table without times."""
    rows = [row.split(",") for row in (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()]
    kept = [index for index, name in enumerate(rows[0]) if name not in _TIMES]
    return (folder / "model" / "model.safetensors").read_bytes(), [[row[index] for index in kept] for row in rows]


def truncate(path: Path, draws: random.Random) -> str:
    size = path.stat().st_size
    kept = draws.randrange(1, size)
    with path.open("r+b") as file:
        file.truncate(kept)
    return f"truncated to {kept} of {size} bytes"


def flip(path: Path, draws: random.Random) -> str:
    at, bit = draws.randrange(path.stat().st_size), draws.randrange(8)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {at} flipped"


def empty(path: Path, draws: random.Random) -> str:
    with path.open("r+b") as file:
        file.truncate(0)
    return "emptied"


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (truncate, flip, empty)


def killed(folder: Path, seconds: float, draws: random.Random) -> dict[str, Any]:
    """Trains to the end, killed one to three times on the way; what was done."""
    done: list[str] = []
    for _ in range(draws.randint(1, 3)):
        process = start(folder)
        time.sleep(draws.uniform(0, seconds))
        at_work = kill(process)
        done.append(f"{'killed' if at_work else 'ended'} at step {_step(folder)}")
    return {"done": done, "code": finish(start(folder))}


def damaged(folder: Path, seconds: float, draws: random.Random, kind: int) -> dict[str, Any]:
    """Trains to the end, killed once there are two checkpoints, and the newest one damaged; what was done."""
    process = start(folder)
    while not (folder / "previous.ckpt").exists():
        time.sleep(0.01)
    time.sleep(draws.uniform(0, 0.5 * seconds))
    at_work = kill(process)
    done = [f"{'killed' if at_work else 'ended'} at step {_step(folder)}"]
    done.append(DAMAGES[kind % len(DAMAGES)](folder / "last.ckpt", draws))
    made = {"done": done, "code": finish(start(folder))}
    log = folder.with_suffix(".log").read_text(encoding="utf-8")
    told = [line for line in log.splitlines() if "last.ckpt is damaged" in line]
    return made | {"told": len(told) == 1}


def _step(folder: Path) -> int | None:
    last = folder / "last.ckpt"
    return check_seal(last) if last.exists() else None


def robustness(kills: int, damages: int, seed: int, folder: Path) -> dict[str, Any]:
    """All runs, and how many of them ended as the undisturbed one did."""
    torch.set_num_threads(1)
    settings(folder / "whole").data.dataset("train")  # what it imports is then there in every process
    draws = random.Random(seed)
    for name in ("first", "whole"):  # the first one finds nothing in the machine's memory: its time says little
        begun = time.monotonic()
        if finish(start(folder / name)):
            raise RuntimeError((folder / f"{name}.log").read_text(encoding="utf-8"))
        seconds = time.monotonic() - begun
    weights, rows = state(folder / "whole")
    if state(folder / "first") != (weights, rows):
        raise RuntimeError("two undisturbed runs differ: nothing can be said of disturbed ones")
    result: dict[str, Any] = {"seed": seed, "seconds of a run": round(seconds, 2), "failures": []}
    for name, count in (("killed", kills), ("damaged", damages)):
        counts = {"runs": count, "same weights": 0, "same table": 0}
        for index in range(count):
            run = folder / f"{name}-{index}"
            made = killed(run, seconds, draws) if name == "killed" else damaged(run, seconds, draws, index)
            found = state(run) if made["code"] == 0 else (b"", [])
            same = found[0] == weights, found[1] == rows
            counts["same weights"] += same[0]
            counts["same table"] += same[1]
            if not all(same) or not made.get("told", True):
                log = run.with_suffix(".log").read_text(encoding="utf-8")
                result["failures"].append({"run": run.name, **made, "log": log[-2000:]})
            print(
                f"  {run.name}: {', '.join(made['done'])}; {'same' if all(same) else 'NOT THE SAME'}", file=sys.stderr
            )
        result[name] = counts
    return result


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="runs to kill")
    parser.add_argument("--damaged", type=int, default=50, help="runs whose newest checkpoint to damage")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and of the damage")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork.*")
    with tempfile.TemporaryDirectory() as folder:
        result = robustness(given.kills, given.damaged, given.seed, Path(folder))
    print(json.dumps(result, indent=2))
    raise SystemExit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
