"""Seeded damage to every file that flowfactor reads: python -m experiments.mutations --count 5000 --seed 0.

Each case writes a good file, mutates it, and reads it by a public entry point, in a process of its own that has limits of
time and memory. Good outcomes are a right result, another result without an error (of formats without a checksum), and
a refusal (ValueError, TypeError or OSError) whose message names the file. All else is a failure: another exception, a
message without the file, a hang, a process that dies, or code that was run.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.files_read import KINDS, Kind

SECONDS, MEMORY = 20, 3 * 2**30
CANARY = "canary"
_SPAWNING = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")


class Payload:
    """What a malicious pickle holds: unpickled, it makes a file."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


_VALUES = (
    *("null", "-1", "1e999", "NaN", "true", '"x"', "[]", "{}", "[[1], {}]", "1000000000000", "0.5", "''", "~", "0"),
    *("!!python/object/apply:os.mkdir [canary]", "&a [*a]", "2026-01-01", '"\\ud800"', "'1e-3'"),
)


def mutate(content: bytes, draw: random.Random, canary: str) -> bytes:
    """Damages a file's content.

    Args:
        content: The content.
        draw: The source of chance.
        canary: What a payload would make.

    Returns:
        The damaged content.
    """
    made = bytearray(content)
    at = draw.randrange(len(made)) if draw.random() < 0.5 else draw.randrange(min(len(made), 200))
    way = draw.randrange(11)
    if way == 0:
        for _ in range(draw.choice((1, 1, 1, 8))):
            made[draw.randrange(len(made))] ^= 1 << draw.randrange(8)
    elif way == 1:
        del made[at:]
    elif way == 2:
        made += draw.randbytes(draw.choice((1, 64, 5000)))
    elif way == 3:
        other = draw.randrange(len(made))
        made[at], made[other] = made[other], made[at]
    elif way == 4:
        made[at : at + 4] = draw.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", draw.randbytes(4)))
    elif way == 5:
        made[at : at + draw.choice((8, 64, 512))] = bytes(draw.choice((8, 64, 512)))
    elif way == 6:
        made = bytearray(
            draw.choice((b"", b"[" * 50_000, b'{"a":' * 50_000, draw.randbytes(300), b"\x89PNG\r\n\x1a\n"))
        )
    elif way == 7:
        buffer = io.BytesIO()
        np.save(buffer, np.array([Payload(canary)], dtype=object), allow_pickle=True)
        made = bytearray(draw.choice((pickle.dumps(Payload(canary)), buffer.getvalue())))
    elif way == 8:
        buffer = io.BytesIO()
        torch.save({"state_dict": Payload(canary)}, buffer)
        made = bytearray(buffer.getvalue())
    else:
        made = bytearray(_mutate_text(bytes(made), draw, canary))
    return bytes(made)


def _mutate_text(content: bytes, draw: random.Random, canary: str) -> bytes:
    """Replaces a value or a key of text; of other content, a run of bytes."""
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError:
        at = draw.randrange(len(content))
        return content[:at] + draw.randbytes(12) + content[at + 12 :]
    places = [n for n, line in enumerate(lines) if ":" in line]
    if not places:  # a table
        n = draw.randrange(len(lines))
        cells = lines[n].split(",")
        cells[draw.randrange(len(cells))] = draw.choice(_VALUES)
        return "\r\n".join([*lines[:n], ",".join(cells), *lines[n + 1 :], ""]).encode()
    n = draw.choice(places)
    key, _, value = lines[n].partition(":")
    if draw.random() < 0.7:
        lines[n] = f"{key}: {draw.choice(_VALUES).replace('canary', canary)}{',' if value.endswith(',') else ''}"
    else:
        lines[n] = f"{key[: len(key) // 2]}zz{key[len(key) // 2 :]}:{value}"
    return "\n".join(lines).encode()


def outcome(kind: Kind, good: Any, folder: Path, canary: Path) -> tuple[str, str]:
    """Reads a mutated file, and says what came of it: good outcomes are the first three."""
    spawned: list[str] = []
    _hooked.append(spawned)
    told = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = "right" if kind.read(folder) == good else "other"
    except (ValueError, TypeError, OSError) as error:
        told = f"{type(error).__name__}: {error}"
        result = "refused" if str(folder) in str(error) else "NOT NAMED"
    except BaseException as error:  # whatever it is, it is what this looks for
        told, result = f"{type(error).__name__}: {error}", "RAW"
    finally:
        _hooked.clear()
    if canary.exists() or spawned:
        return "CODE RUN", told or str(spawned)
    return result, told


_hooked: list[list[str]] = []


def _audit(event: str, arguments: Any) -> None:
    if _hooked and event in _SPAWNING:
        _hooked[-1].append(event)


def _work(cases: list[tuple[int, str]], seed: int, masters: dict[str, Path], goods: dict[str, Any], pipe: Any) -> None:
    """Runs cases in turn, in a process of its own."""
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.addaudithook(_audit)
    sys.stderr = io.StringIO()
    for number, name in cases:
        draw = random.Random(f"{seed}-{number}")
        with tempfile.TemporaryDirectory() as place:
            folder, canary = Path(place) / "case", Path(place) / CANARY
            shutil.copytree(masters[name].parent if masters[name].is_file() else masters[name], folder)
            victim = folder / _victims[name]
            victim.write_bytes(mutate(victim.read_bytes(), draw, str(canary)))
            pipe.send((number, *outcome(KINDS[name], goods[name], folder, canary)))
    pipe.send(None)


_victims: dict[str, Path] = {}


def run(count: int, seed: int, kinds: list[str]) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Runs the cases.

    Args:
        count: Their number.
        seed: Seed of all damage.
        kinds: Names in `KINDS`.

    Returns:
        The number of cases by kind and outcome, and a line for every failure.
    """
    counts: Counter[tuple[str, str]] = Counter()
    failures: list[str] = []
    draw = random.Random(seed)
    names = draw.choices(kinds, [KINDS[name].share for name in kinds], k=count)
    cases = list(enumerate(names))
    with tempfile.TemporaryDirectory() as place:
        masters, goods = {}, {}
        for name in kinds:
            master = Path(place) / name
            master.mkdir()
            _victims[name] = KINDS[name].make(master).relative_to(master)
            copy = Path(place) / f"{name}-read"
            shutil.copytree(master, copy)
            masters[name], goods[name] = master, KINDS[name].read(copy)
        context = multiprocessing.get_context("fork")
        while cases:
            ours, theirs = context.Pipe(False)
            worker = context.Process(target=_work, args=(cases, seed, masters, goods, theirs))
            worker.start()
            theirs.close()
            done = _collect(ours, cases, counts, failures)
            worker.kill()
            worker.join()
            cases = cases[done:]
    return counts, failures


def _collect(pipe: Any, cases: list[tuple[int, str]], counts: Counter[tuple[str, str]], failures: list[str]) -> int:
    """Takes outcomes until the worker ends, hangs or dies; gives the number of cases that are done with."""
    for done, (number, name) in enumerate(cases):
        try:
            made = pipe.recv() if pipe.poll(SECONDS) else (number, "HANG", "")
        except EOFError:
            made = (number, "DIED", "")
        _, result, told = made
        counts[name, result] += 1
        if result.isupper():
            failures.append(f"{name} case {number}: {result} {told[:300]}")
        if result in ("HANG", "DIED"):
            return done + 1
    return len(cases)


def main() -> int:
    """Runs the cases that the command line asks for, and prints what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    asked = parser.parse_args()
    counts, failures = run(asked.count, asked.seed, asked.kinds)
    print("\n".join(failures))
    for (name, result), number in sorted(counts.items()):
        print(f"{name:15} {result:10} {number}")
    print(f"{sum(counts.values())} cases, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
