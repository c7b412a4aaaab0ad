"""Nothing of the user's is deleted or replaced: folders of their files before every command, and runs begun anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import TINY, Snapshot, small_run, snapshot

from flowfactor.cli import main
from flowfactor.training import FlowModule, _place, prepare, train
from flowfactor.training.folder import (
    LIST,
    OF_A_BENCHMARKS_RUN,
    OF_A_RUN,
    check_writable,
    foreign,
    kind_of,
    own,
    remove,
)

SHORT = [*TINY, "--train.steps", "2", "--train.evaluate_limit", "2", "--train.likelihood_limit", "0"]
BENCHMARK = [
    *("--methods", "vae", "--seeds", "0", "--steps", "1", "--workers", "0", "--threads", "1", *TINY),
    *("--evaluate.images", "3", "--evaluate.likelihood_images", "0", "--evaluate.vp_images", "0"),
    *("--evaluate.latent_images", "0", "--evaluate.search_images", "2"),
]
NAMES = (*OF_A_RUN, *OF_A_BENCHMARKS_RUN, "report.md", "report.png", LIST)
TOP = [name for name in OF_A_RUN if "/" not in name]


def fill(folder: Path, name: str, content: str = "the user's own") -> None:
    """Writes a file of the user's, or a tree where flowfactor would make a folder."""
    if name in ("model", "tensorboard"):
        (folder / name / "deep" / "deeper").mkdir(parents=True, exist_ok=True)
        (folder / name / "deep" / "deeper" / "net.py").write_text(content)
        (folder / name / "empty").mkdir(exist_ok=True)
    else:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder of the user's with every name that flowfactor writes; so is each folder that a benchmark would use."""
    folder = tmp_path / "proj"
    for place in (folder, folder / "vae-seed0"):
        for name in NAMES:
            fill(place, name, '{"the": "user\'s own"}' if name.endswith(".json") else "the user's own")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train(small_run(tmp_path / "run", steps=1, likelihood_limit=0))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "demo", *SHORT, "--output", "proj"],
        ["train", "demo", *SHORT, "--output", "proj", "--overwrite"],
        ["train", "demo", *SHORT, "--output", "proj", "--resume"],
        ["train", "proj/config.yaml", "--resume"],
        ["train", "proj/config.yaml", "--overwrite"],
        ["demo", "--minutes", "0.002", "--output", "proj"],
        ["benchmark", "digits", *BENCHMARK, "--output", "proj"],
        ["benchmark", "report", "proj"],
        ["evaluate", "proj"],
        ["evaluate", "proj", "--overwrite"],
        ["evaluate", "run", "--limit", "1", "--samples", "0", "--output", "proj/evaluation.json"],
        ["traverse", "proj"],
        ["traverse", "proj", "--overwrite"],
        ["traverse", "run", "--output", "proj/traversal.png"],
        ["traverse", "run", "--gif", "proj/transformations.gif"],
    ],
)
def test_a_folder_of_the_users_is_the_same_after_every_command(
    arguments: list[str],
    project: Path,
    run: Path,
    refused: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(project.parent)
    before = snapshot(project)
    assert len(refused(arguments).splitlines()) >= 1
    assert snapshot(project) == before


@pytest.mark.parametrize("how", [[], ["--overwrite"], ["--resume"]])
@pytest.mark.parametrize("checkpoint", [b"weights", None])
def test_a_file_of_settings_that_is_right_shows_no_run(
    how: list[str], checkpoint: bytes | None, project: Path, run: Path, refused: Callable[[list[str]], str]
) -> None:
    (project / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    if checkpoint is None:  # another program's, by the same library
        torch.save({"state_dict": {}, "global_step": 3}, project / "last.ckpt")
    before = snapshot(project)
    assert "which no flowfactor.json there shows" in refused(
        ["train", str(project / "config.yaml"), "--output", str(project), *how]
    )
    assert snapshot(project) == before


def test_the_working_directory_itself_is_no_place_for_a_run(
    project: Path, refused: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    before = snapshot(project)
    for command in (["demo"], ["train", "demo", *SHORT], ["benchmark", "digits", *BENCHMARK]):
        assert "model, " in refused([*command, "--output", "."]) or command[0] == "benchmark"
    assert snapshot(project) == before


@pytest.mark.parametrize("how", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", TOP)
def test_one_such_name_is_enough_and_is_told(
    name: str, how: list[str], tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    fill(tmp_path, name)
    before = snapshot(tmp_path)
    assert f"holds {name}, which no flowfactor.json" in refused(
        ["train", "demo", *SHORT, "--output", str(tmp_path), *how]
    )
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", [*OF_A_BENCHMARKS_RUN, "last.ckpt", "model"])
def test_a_benchmark_leaves_such_a_name_in_a_runs_folder(
    name: str, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    fill(tmp_path / "vae-seed0", name, "{}" if name == "settings.json" else "the user's own")
    before = snapshot(tmp_path)
    refused(["benchmark", "digits", *BENCHMARK, "--output", str(tmp_path)])
    assert snapshot(tmp_path) == before


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("the user's own")
    assert train(small_run(tmp_path, steps=1, likelihood_limit=0))["finished"]
    assert (tmp_path / "notes" / "a.txt").read_text() == "the user's own"


def test_begun_anew_a_run_takes_away_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    options = {"likelihood_limit": 0, "tensorboard": True}
    train(small_run(tmp_path, steps=1, **options))
    before = snapshot(tmp_path)
    events = [name for name in before if "tfevents" in name]
    assert len(events) == 1
    added = (
        "notes.txt",
        "model/notes.txt",
        "model/deep/a.txt",
        "tensorboard/events.out.tfevents.1.host.2.0",
        "best.pt",
    )
    for name in added:
        fill(tmp_path, name)
    (tmp_path / "evaluation.json").write_text("{}")  # by a name of ours that the run has not written
    with pytest.raises(FileExistsError, match=r"holds evaluation\.json, which"):
        train(small_run(tmp_path, steps=2, **options), overwrite=True)
    (tmp_path / "evaluation.json").unlink()
    assert train(small_run(tmp_path, steps=2, **options), overwrite=True)["steps"] == 2
    after = snapshot(tmp_path)
    assert all(after[name] == b"the user's own" for name in added) and events[0] not in after
    assert len([name for name in after if "tfevents" in name]) == 2
    remove(tmp_path, OF_A_RUN)  # all of it, and folders only where they are empty
    files = {name for name, content in snapshot(tmp_path).items() if content is not None}
    assert files == {*added, LIST}


def test_a_list_names_only_what_flowfactor_writes(tmp_path: Path) -> None:
    """A forged list takes nothing away by other names, nor what a link leads to."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("the user's own")
    (tmp_path / "thesis.tex").write_text("the user's own")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model").symlink_to(tmp_path / "elsewhere")
    forged = {"written_by": "flowfactor", "kind": "run", "mark": "0" * 8}
    (folder / LIST).write_text(json.dumps(forged | {"files": ["../thesis.tex", "model", "model/config.json", 3]}))
    remove(folder, ["../thesis.tex", *OF_A_RUN])
    assert (tmp_path / "thesis.tex").exists() and (tmp_path / "elsewhere" / "config.json").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"written_by": "flowfactor"}', "[" * 100_000, "\udcff"])
def test_a_list_that_is_none_shows_nothing_to_be_ours(content: str, tmp_path: Path) -> None:
    (tmp_path / LIST).write_bytes(content.encode("utf-8", "surrogateescape"))
    (tmp_path / "last.ckpt").write_text("the user's own")
    assert foreign(tmp_path, ["last.ckpt"]) == ["last.ckpt", LIST]
    with pytest.raises(FileExistsError, match=f"last.ckpt, {LIST}"):
        own(tmp_path, "last.ckpt")


@pytest.mark.parametrize(
    "mistake",
    [
        ["--train.precision", "fp16"],
        ["--train.accelerator", "tpu"],
        ["--train.accelerator", "abacus"],
        ["--train.accelerator", "cuda", "--train.devices", "99"],
        ["--data.limit", "0"],
        ["--model.field", "magnetic"],
    ],
)
def test_a_later_mistake_leaves_the_run_that_was_to_be_overwritten(
    mistake: list[str], run: Path, refused: Callable[[list[str]], str]
) -> None:
    before = snapshot(run)
    told = refused(["train", "demo", *SHORT, "--output", str(run), "--overwrite", *mistake])
    assert "Traceback" not in told
    assert snapshot(run) == before


def failing(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, error: BaseException) -> None:
    """Has something of the training fail."""

    def fail(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(kind, name, fail)


@pytest.mark.parametrize(
    ("kind", "name", "error"),
    [
        (FlowModule, "configure_optimizers", RuntimeError("out of memory")),
        (FlowModule, "training_step", RuntimeError("out of memory")),
        (FlowModule, "on_save_checkpoint", FloatingPointError("the loss became NaN")),
        (pl.Trainer, "save_checkpoint", OSError(28, "No space left on device")),
    ],
)
@pytest.mark.parametrize("earlier", [True, False])
def test_a_run_that_dies_before_its_first_checkpoint_leaves_what_was_there(
    kind: type, name: str, error: Exception, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    if earlier:
        train(small_run(folder, steps=1, likelihood_limit=0, tensorboard=True))
    before = snapshot(folder)
    with monkeypatch.context() as patched:
        failing(patched, kind, name, error)
        with pytest.raises(type(error)):
            train(small_run(folder, likelihood_limit=0, log_every=1), overwrite=earlier)
    assert snapshot(folder) == before
    assert train(small_run(folder, likelihood_limit=0, log_every=1), overwrite=earlier)["steps"] == 8
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert len(rows) == 9  # also those from before the first checkpoint


@pytest.mark.parametrize("name", ["remove", "own"])
def test_a_run_that_is_killed_where_it_takes_the_place_blocks_no_other(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, killed = getattr(_place, name), run.with_name("killed")

    def at_the_moment(folder: Path, *arguments: Any, **named: Any) -> None:
        original(folder, *arguments, **named)
        shutil.copytree(folder, killed)

    with monkeypatch.context() as patched:
        patched.setattr(_place, name, at_the_moment)
        train(small_run(run, likelihood_limit=0), overwrite=True)
    assert len(list(killed.glob(".*.part"))) == 2 and not list(run.glob(".*"))
    assert train(small_run(killed, likelihood_limit=0), overwrite=True)["steps"] == 8
    assert not list(killed.glob(".*"))


def test_a_run_that_came_meanwhile_is_left(tmp_path: Path) -> None:
    late = prepare(small_run(tmp_path))
    train(small_run(tmp_path, steps=1, likelihood_limit=0))
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="holds a run"):
        late.fit()
    assert snapshot(tmp_path) == before


def test_a_run_of_a_release_without_a_list_is_resumed_and_not_overwritten(
    run: Path, refused: Callable[[list[str]], str]
) -> None:
    for name in (LIST, "data.json", "previous.ckpt", "best.ckpt"):
        (run / name).unlink(missing_ok=True)
    before = snapshot(run)
    for how in ([], ["--overwrite"]):
        told = refused(["train", str(run / "config.yaml"), "--output", str(run), *how])
        assert "holds config.yaml, last.ckpt, model, result.json, which no" in told
    (run / "traversal.png").write_text("perhaps the user's own")
    with pytest.raises(FileExistsError, match=r"holds traversal\.png, which"):
        train(small_run(run, steps=2, likelihood_limit=0), resume=True)
    (run / "traversal.png").unlink()
    assert snapshot(run) == before
    with pytest.warns(UserWarning, match="does not say which data"):
        assert train(small_run(run, steps=2, likelihood_limit=0), resume=True)["steps"] == 2
    assert kind_of(run) == "run"
    assert train(small_run(run, steps=1, likelihood_limit=0), overwrite=True)["steps"] == 1


def test_a_demo_takes_the_place_of_a_demo_alone(
    tmp_path: Path, refused: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(small_run(Path("demo_output"), steps=1, likelihood_limit=0))
    before = snapshot(tmp_path)
    assert "holds a run that is no demo" in refused(["demo", "--minutes", "0.002"])
    assert snapshot(tmp_path) == before
    for _ in range(2):
        assert main(["demo", "--minutes", "0.002", "--output", "other"]) == 0
    assert kind_of(Path("other")) == "demo"
    # Gone on with as a training, it is one.
    assert main(["train", "other/config.yaml", "--resume", "--train.minutes", "0.003"]) == 0
    assert "no demo" in refused(["demo", "--output", "other"])


def test_measurements_and_pictures_replace_those_of_before_alone(
    run: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str]], str]
) -> None:
    measure, draw = ["evaluate", str(run), "--limit", "1", "--samples", "0"], ["traverse", str(run), "--images", "1"]
    for command in (measure, measure, draw, draw):
        assert main(command) == 0
    own_files = {"a.json": [*measure, "--output"], "a.png": [*draw, "--output"], "a.gif": [*draw, "--gif"]}
    for name, command in own_files.items():
        fill(run, name)
        assert "nothing shows that flowfactor wrote it" in refused([*command, str(run / name)])
        assert (run / name).read_text() == "the user's own"
        assert main([*command, str(run / name), "--overwrite"]) == 0
        assert (run / name).read_bytes() != b"the user's own"
    assert train(small_run(run, steps=1, likelihood_limit=0), overwrite=True)
    left = {path.name for path in run.iterdir()}
    assert set(own_files) <= left and not {"evaluation.json", "traversal.png"} & left


def test_a_probe_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before: Snapshot = snapshot(tmp_path)
    check_writable(tmp_path / "new" / "deeper")
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "new")
    with pytest.raises(OSError, match="MB are needed"):
        check_writable(tmp_path, 2**60)
    assert snapshot(tmp_path) == before and torch.get_num_threads() == 1
