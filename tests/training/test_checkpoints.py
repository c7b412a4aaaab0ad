"""Checkpoints: whole or told, the newest whole one taken up, the best one kept, and the table that goes with them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SIZES, small_run

from flowfactor.training import FlowModule, load_run, prepare, train
from flowfactor.training._logs import LateLoggers
from flowfactor.training.checkpoints import (
    DamagedCheckpointError,
    check_seal,
    newest_checkpoint,
    seal,
)

NAMES = ("last.ckpt", "previous.ckpt", "best.ckpt")
UNEQUAL = ("seconds", "steps_per_second")
QUICK = {"likelihood_limit": 0, "evaluate_limit": 2}


def table(folder: Path) -> list[list[str]]:
    """The table of a run but for what differs between any two runs."""
    rows = [row.split(",") for row in (folder / "metrics.csv").read_text().splitlines()]
    kept = [index for index, name in enumerate(rows[0]) if name not in UNEQUAL]
    return [[row[index] for index in kept] for row in rows]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the next training end in an error before the step after so many; those after it run on."""

    def plan(steps: int) -> None:
        original = FlowModule.on_train_batch_start

        def start(self: FlowModule, batch: dict, batch_idx: int) -> None:
            if self.global_step == steps:
                monkeypatch.setattr(FlowModule, "on_train_batch_start", original)
                raise OSError("the power went")
            original(self, batch, batch_idx)

        monkeypatch.setattr(FlowModule, "on_train_batch_start", start)

    return plan


@pytest.fixture
def crashed(tmp_path: Path, crash: Callable[[int], None]) -> Path:
    """A run that ended in an error after step 7 of 8, with checkpoints of steps 4 and 6."""
    crash(7)
    with pytest.raises(OSError, match="power"):
        train(small_run(tmp_path / "parts", checkpoint_steps=2, log_every=1, **QUICK))
    return tmp_path / "parts"


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "a.ckpt"
    torch.save({"w": torch.rand(7), "global_step": 12}, path)
    seal(path, 12)
    return path


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def test_every_flipped_bit_is_noticed_and_every_cut(sealed: Path) -> None:
    whole = sealed.read_bytes()
    assert check_seal(sealed) == 12
    for index in range(len(whole)):
        for bit in range(8) if index > len(whole) - 200 else (index % 8,):
            sealed.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :])
            with pytest.raises(DamagedCheckpointError):
                check_seal(sealed)
    for size in range(0, len(whole), 1 if len(whole) < 5000 else 7):
        sealed.write_bytes(whole[:size])
        with pytest.raises(DamagedCheckpointError):
            check_seal(sealed)


def test_a_sealed_checkpoint_is_read_by_pytorch(sealed: Path) -> None:
    for mmap in (False, True):
        assert torch.load(sealed, weights_only=True, mmap=mmap)["w"].shape == (7,)
    with pytest.raises(ValueError, match="no archive"):
        seal(sealed, 13)


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    result = train(small_run(tmp_path, checkpoint_steps=2, log_every=1, schedule="constant", **QUICK))
    assert [step_of(tmp_path / name) for name in NAMES[:2]] == [8, 6]
    assert all(check_seal(tmp_path / name) == step_of(tmp_path / name) for name in NAMES)
    rows = table(tmp_path)
    losses = [float(row[rows[0].index("loss")]) for row in rows[1:]]
    means = {step: (losses[step - 2] + losses[step - 1]) / 2 for step in (2, 4, 6, 8)}
    best = min(means, key=lambda step: means[step])
    assert step_of(tmp_path / "best.ckpt") == best
    told = result["best_checkpoint"]
    assert told["step"] == best and told["value"] == pytest.approx(means[best]) and "training loss" in told["monitored"]


@pytest.mark.parametrize("damage", [truncate, flip, empty, zero])
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_used(
    damage: Callable[[Path], None], crashed: Path, tmp_path: Path
) -> None:
    train(small_run(tmp_path / "whole", checkpoint_steps=2, log_every=1, **QUICK))
    damage(crashed / "last.ckpt")
    with pytest.warns(
        UserWarning, match=r"last\.ckpt is damaged: .*; going on from previous\.ckpt, step 4, instead"
    ) as told:
        train(small_run(crashed, checkpoint_steps=2, log_every=1, **QUICK), resume=True)
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert weights(crashed) == weights(tmp_path / "whole")
    assert table(crashed) == table(tmp_path / "whole")
    assert [step_of(crashed / name) for name in NAMES] == [step_of(tmp_path / "whole" / name) for name in NAMES]


def test_a_run_goes_on_with_the_steps_it_remembered(tmp_path: Path, crash: Callable[[int], None]) -> None:
    solver = {"method": "bosh3", "rtol": 1e-3, "atol": 1e-3, "remember_steps": True}
    how: dict[str, Any] = {"model": SIZES | {"solver": solver}, "checkpoint_steps": 2, "log_every": 1, **QUICK}
    train(small_run(tmp_path / "whole", **how))
    crash(7)
    with pytest.raises(OSError, match="power"):
        train(small_run(tmp_path / "parts", **how))
    train(small_run(tmp_path / "parts", **how), resume=True)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    state = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)["state_dict"]
    assert next(x for name, x in state.items() if "step_memory" in name)[0] > 0


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(
    crashed: Path, crash: Callable[[int], None]
) -> None:
    truncate(crashed / "last.ckpt")
    crash(6)  # after one more checkpoint, which is that of step 6 again
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(OSError, match="power"):
        train(small_run(crashed, checkpoint_steps=2, log_every=1), resume=True)
    assert [check_seal(crashed / name) for name in NAMES[:2]] == [6, 4]


def test_where_all_checkpoints_are_damaged_the_error_names_them(crashed: Path) -> None:
    for name in NAMES:
        truncate(crashed / name)
    with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt.*previous\.ckpt.*best\.ckpt"):
        prepare(small_run(crashed, checkpoint_steps=2, log_every=1), resume=True)


def test_the_best_one_serves_where_the_last_two_are_damaged(crashed: Path) -> None:
    best = torch.load(crashed / "best.ckpt", weights_only=True)
    (crashed / "best.ckpt").unlink()
    torch.save(best, crashed / "best.ckpt")
    seal(crashed / "best.ckpt", best["global_step"])
    for name in NAMES[:2]:
        empty(crashed / name)
    with pytest.warns(UserWarning, match="damaged"):
        assert newest_checkpoint(crashed).path.name == "best.ckpt"


def test_every_flipped_bit_of_a_checkpoint_is_noticed(crashed: Path) -> None:
    path, draw = crashed / "last.ckpt", random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        damaged, at = bytearray(whole), draw.randrange(8 * len(whole))
        damaged[at // 8] ^= 1 << at % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(DamagedCheckpointError):
            check_seal(path)


def test_an_archive_with_code_in_it_is_no_checkpoint(crashed: Path) -> None:
    for name in NAMES:
        torch.save({"state_dict": random.Random(0)}, crashed / name)
    with pytest.raises(DamagedCheckpointError, match=r"last\.ckpt is damaged: it has no digest and does not load"):
        newest_checkpoint(crashed)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"loss,step\r\n3.0,2\r\n\x80,4\r\n"])
def test_a_table_that_is_no_text_is_told_before_the_training(crashed: Path, content: bytes) -> None:
    (crashed / "metrics.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.csv is damaged"):
        prepare(small_run(crashed, checkpoint_steps=2, log_every=1, **QUICK), resume=True)
    assert (crashed / "metrics.csv").read_bytes() == content


def test_a_checkpoint_of_an_earlier_release_is_taken_with_a_warning(tmp_path: Path) -> None:
    train(small_run(tmp_path, steps=2, **QUICK))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.save(state, tmp_path / "last.ckpt")
    for name in NAMES[1:]:
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.warns(UserWarning, match="no digest"):
        assert train(small_run(tmp_path, steps=3, **QUICK), resume=True)["steps"] == 3
    assert check_seal(tmp_path / "last.ckpt") == 3


@pytest.mark.parametrize("at", range(8))
def test_at_every_moment_there_is_a_whole_checkpoint(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before one of the changes of names that a checkpoint is made of."""
    calls: list[Path] = []
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if Path(target).suffix == ".ckpt":
            calls.append(Path(target))
            if len(calls) == at + 1:
                raise OSError("the power went")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(OSError, match="power"):
        train(small_run(tmp_path, checkpoint_steps=1, **QUICK))
    monkeypatch.setattr(Path, "replace", replace)
    if at:  # before that there is nothing
        assert newest_checkpoint(tmp_path).step >= len([path for path in calls[:-1] if path.name == "last.ckpt"])
        last, previous = (tmp_path / name for name in NAMES[:2])
        if previous.exists():  # never one file by two names: damage to the last one would be damage to both
            assert not last.samefile(previous)
            empty(last)
            with pytest.warns(UserWarning, match="going on from previous.ckpt"):
                assert newest_checkpoint(tmp_path).path == previous
            last.unlink()
        assert not list(tmp_path.glob(".*"))
        assert train(small_run(tmp_path, **QUICK), resume=True)["steps"] == 8


def test_a_new_run_does_not_go_on_from_the_one_that_it_overwrote(tmp_path: Path, crash: Callable[[int], None]) -> None:
    train(small_run(tmp_path, checkpoint_steps=2, **QUICK))
    crash(3)
    with pytest.raises(OSError, match="power"):
        train(small_run(tmp_path, checkpoint_steps=2, learning_rate=1e-4, **QUICK), overwrite=True)
    # The earlier run had eight steps; a new one writes its first checkpoint after one.
    assert [step_of(tmp_path / name) for name in ("last.ckpt", "previous.ckpt")] == [2, 1]
    assert step_of(tmp_path / "best.ckpt") in (1, 2)


def test_rows_after_the_checkpoint_go_and_line_ends_stay(crashed: Path, tmp_path: Path) -> None:
    train(small_run(tmp_path / "whole", checkpoint_steps=2, log_every=1, **QUICK))
    made = crashed / "metrics.csv"
    before = made.read_bytes()
    assert len(before.splitlines()) == 1 + 7  # seven steps, the last of which comes after the checkpoint
    made.write_bytes(before + b"0.001,0.5")  # killed in the middle of a row
    train(small_run(crashed, checkpoint_steps=2, log_every=1, **QUICK), resume=True)
    assert table(crashed) == table(tmp_path / "whole")
    whole = made.read_bytes()
    assert whole.count(b"\r\n") == whole.count(b"\n") == 1 + 8


def test_a_run_that_dies_right_after_its_first_checkpoint_has_its_first_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was logged before the first checkpoint does not come again."""
    train(small_run(tmp_path / "whole", checkpoint_steps=2, log_every=1, **QUICK))

    def dies(*_: object) -> None:
        raise OSError("power")

    with monkeypatch.context() as patched:
        patched.setattr(LateLoggers, "on_train_batch_end", dies)
        with pytest.raises(OSError, match="power"):
            train(small_run(tmp_path / "dead", checkpoint_steps=2, log_every=1, **QUICK))
    assert step_of(tmp_path / "dead" / "last.ckpt") == 1
    train(small_run(tmp_path / "dead", checkpoint_steps=2, log_every=1, **QUICK), resume=True)
    assert table(tmp_path / "dead") == table(tmp_path / "whole")


def test_line_ends_of_another_kind_stay_too(crashed: Path) -> None:
    made = crashed / "metrics.csv"
    made.write_bytes(made.read_bytes().replace(b"\r\n", b"\n"))
    train(small_run(crashed, checkpoint_steps=2, log_every=1, **QUICK), resume=True)
    assert b"\r" not in made.read_bytes() and len(made.read_bytes().splitlines()) == 1 + 8


def test_what_tensorboard_shows_after_the_checkpoint_is_purged(crashed: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    train(small_run(crashed, checkpoint_steps=2, log_every=1, tensorboard=True, **QUICK), resume=True)
    (file,) = (crashed / "tensorboard").glob("events*")
    starts = [event.step for event in loader.LegacyEventFileLoader(str(file)).Load() if event.HasField("session_log")]
    assert starts == [7]


@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)])
@pytest.mark.parametrize("slurm", [False, True])
def test_signals_of_clusters_save_the_state(
    number: signal.Signals, slurm: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each comes twice, and once more while the checkpoint is written; none may go to whoever had it before."""
    others: list[int] = []
    before = signal.signal(number, lambda *_: others.append(1))
    if slurm:
        for name, value in {"JOB_ID": 7, "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "JOB_NAME": "a"}.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
    step, save = FlowModule.training_step, FlowModule.on_save_checkpoint

    def signalled(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            signal.raise_signal(number)
            signal.raise_signal(number)
        return step(self, batch, batch_idx)

    def saving(self: FlowModule, checkpoint: dict) -> None:
        if self.global_step > 1:  # the first checkpoint comes after the first step
            signal.raise_signal(number)
        save(self, checkpoint)

    monkeypatch.setattr(FlowModule, "training_step", signalled)
    monkeypatch.setattr(FlowModule, "on_save_checkpoint", saving)
    try:
        result = train(small_run(tmp_path, accelerator="cpu", **QUICK))
    finally:
        signal.signal(number, before)
    assert not result["finished"] and result["steps"] == 3 and others == []
    assert check_seal(tmp_path / "last.ckpt") == 3
    assert not list(tmp_path.glob("hpc_ckpt*"))


def test_a_signal_before_the_first_step_saves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = FlowModule.configure_optimizers

    def signalled(self: FlowModule) -> torch.optim.Optimizer:
        signal.raise_signal(signal.SIGTERM)
        return start(self)

    monkeypatch.setattr(FlowModule, "configure_optimizers", signalled)
    result = train(small_run(tmp_path, **QUICK))
    assert not result["finished"] and result["steps"] == 1
    assert check_seal(tmp_path / "last.ckpt") == 1
    monkeypatch.setattr(FlowModule, "configure_optimizers", start)
    assert load_run(tmp_path) and train(small_run(tmp_path, **QUICK), resume=True)["finished"]


def test_random_damage_of_a_checkpoint_is_noticed(crashed: Path) -> None:
    draws = random.Random(0)
    path = crashed / "last.ckpt"
    whole = path.read_bytes()
    for _ in range(300):
        at, bit = draws.randrange(len(whole)), draws.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        assert newest_checkpoint(crashed, tell=False).path.name == "previous.ckpt"


def test_the_command_tells_a_damaged_checkpoint_in_one_line(tmp_path: Path) -> None:
    config = small_run(tmp_path, checkpoint_steps=2, steps=4, **QUICK)
    train(config)
    truncate(tmp_path / "last.ckpt")
    done = subprocess.run(
        [sys.executable, "-m", "flowfactor", "train", str(tmp_path / "config.yaml"), "--resume"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("flowfactor train: warning: ") and "last.ckpt is damaged" in line
