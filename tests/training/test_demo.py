"""The demo: two trainings, each in a folder of its own, and what is said of them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_demo, snapshot

from flowfactor.cli import demo, main
from flowfactor.cli.demo import side_by_side
from flowfactor.training import load_run, train
from flowfactor.training.folder import kind_of, resume_command

Interrupt = Callable[[int], None]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The demo, with small trainings."""
    monkeypatch.setattr(demo, "load_config", small_demo)
    return ["demo", "--output", str(tmp_path / "a demo")]


@pytest.fixture
def undrawn(command: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The same, with empty files for pictures."""

    def touch(model: Any, test: Any, *arguments: Any, **named: Any) -> None:
        for path in arguments:
            if isinstance(path, Path):
                path.touch()

    for name in ("draw", "draw_grid"):
        monkeypatch.setattr(demo, name, touch)
    return command


def told_command(text: str, before: str) -> list[str]:
    """The command that a text tells after some words, as arguments of the program."""
    _, found, rest = text.partition(before)
    assert found, text
    words = shlex.split(rest.strip().splitlines()[0])
    assert words[0] == "flowfactor"
    return words[1:]


def pixels(path: Path) -> tuple[int, int]:
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as picture:
        return picture.size


def test_both_models_are_trained_measured_drawn_and_set_side_by_side(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Path, dict[str, Any]]] = []
    for name in ("draw", "draw_grid"):
        original = getattr(demo, name)

        def noting(model: Any, test: Any, *arguments: Any, original: Any = original, **named: Any) -> None:
            drawn.append((next(path for path in arguments if isinstance(path, Path)), named))
            original(model, test, *arguments, **named)

        monkeypatch.setattr(demo, name, noting)
    assert main([*command, "--seed", "2"]) == 0
    text, folder = capsys.readouterr().out, tmp_path / "a demo"
    composing = folder / "composing"
    pictures = [folder / "traversal.png", composing / "traversal.png", composing / "grid.png"]
    assert all(min(pixels(path)) > 100 and str(path) in text for path in pictures)
    animations = [place / "transformations.gif" for place in (folder, composing)]
    assert all(path.is_file() and str(path) in text for path in animations)
    assert drawn == list(zip(pictures, [{}, {"back": 2}, {"steps": 4, "back": 4}], strict=True))
    first, second = (json.loads((place / "result.json").read_text()) for place in (folder, composing))
    assert first["seed"] == second["seed"] == 2 and first["config"]["data"]["options"] == {}
    assert second["config"]["data"]["options"] == {"start": "any", "direction": "both"}
    assert second["combining"]["start"] == "any" and "error" in second["combining"]["switch"]
    assert kind_of(folder) == kind_of(composing) == "demo"
    for name, error in first["equivariance_error"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"E_k from the untouched digit, {name} "))
        assert row.split()[-3] == f"{error:.1f}" and row.split()[-1] == f"{first['doing_nothing'][name]:.1f}"
    parts = ("E_k", str(pictures[0]), "side by side", str(pictures[2]), "what to try")
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


def test_the_first_is_the_preset_demo_and_the_second_demo_any(undrawn: list[str], tmp_path: Path) -> None:
    assert main(undrawn) == 0
    for preset, place in (("demo", ""), ("demo-any", "composing")):
        config = small_demo(preset)
        config.output = str(tmp_path / preset)
        train(config)
        models = [load_run(folder)[0] for folder in (tmp_path / preset, tmp_path / "a demo" / place)]
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(one, other)


def test_what_stands_where_the_second_goes_is_left_and_told_before_any_work(
    undrawn: list[str], refused: Callable[[list[str]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a demo"
    folder.mkdir()
    (folder / "composing").write_text("the user's own")
    before = snapshot(tmp_path)
    assert "composing is a file: choose a folder" in refused(undrawn)
    assert snapshot(tmp_path) == before
    (folder / "composing").unlink()
    (folder / "composing").mkdir()
    (folder / "composing" / "grid.png").write_text("the user's own")
    before = snapshot(tmp_path)
    assert "composing holds grid.png, which no flowfactor.json" in refused(undrawn)
    assert snapshot(tmp_path) == before
    (folder / "composing" / "grid.png").rename(folder / "composing" / "mine.png")
    assert main(undrawn) == 0
    assert (folder / "composing" / "mine.png").read_text() == "the user's own"
    # Gone on with as a training, the second is one.
    assert main(["train", str(folder / "composing" / "config.yaml"), "--resume", "--train.steps", "4"]) == 0
    before = snapshot(tmp_path)
    assert "composing holds a run that is no demo" in refused(undrawn)
    assert snapshot(tmp_path) == before


def test_ctrl_c_in_the_first_training_tells_how_to_make_both(
    undrawn: list[str], interrupt: Interrupt, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "a demo"
    for again in (False, True):
        interrupt(1)
        assert main(undrawn) == 130
        text = capsys.readouterr().out
        assert "side by side" not in text and (folder / "composing").exists() == again
        assert main(told_command(text, "Go on: ")) == 0
        rest = told_command(text, "The second model comes after it: ")
        assert ("--overwrite" in rest) == again and rest[:2] == ["train", "demo-any"]
        small = ["--train.steps", "1", "--train.minutes", "null", "--train.evaluate_limit", "1", "--data.limit", "9"]
        assert main([*rest, *small, "--train.batch_size", "3"]) == 0
        assert (folder / "composing" / "result.json").is_file()
        for place in (folder, folder / "composing"):  # as a demo leaves them
            listed = json.loads((place / "flowfactor.json").read_text())
            (place / "flowfactor.json").write_text(json.dumps(listed | {"kind": "demo"}))


def test_ctrl_c_in_the_second_training_leaves_the_first_whole(
    undrawn: list[str],
    interrupt: Interrupt,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, original = tmp_path / "a demo", demo._draw_first

    def then_interrupted(run: Any) -> None:
        original(run)
        interrupt(1)

    monkeypatch.setattr(demo, "_draw_first", then_interrupted)
    assert main(undrawn) == 130
    text = capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["finished"] and (folder / "traversal.png").is_file()
    assert resume_command(folder / "composing") in text and "what to try" not in text
    assert main(told_command(text, "interrupted after 2 steps. Go on: ")) == 0
    assert json.loads((folder / "composing" / "result.json").read_text())["steps"] == 3


def test_ctrl_c_while_the_second_is_drawn(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    grid = tmp_path / "a demo" / "composing" / "grid.png"
    with monkeypatch.context() as patched:
        patched.setattr(demo, "draw_grid", interrupted)
        assert main(command) == 130
    told = capsys.readouterr()
    assert not grid.exists() and "side by side" in told.out
    every, two = told.err.strip().splitlines()[-1].partition("but not drawn. Draw it: ")[2].split("; ")
    for again in (every, two):
        assert main(shlex.split(again)[1:]) == 0
    assert grid.is_file() and (grid.parent / "traversal.png").is_file()


def test_no_other_process_works_in_the_folder_while_the_second_is_trained(
    undrawn: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="nothing keeps processes apart here")
    original, tried = demo.report, []

    def tells(result: dict[str, Any]) -> None:
        original(result)
        descriptor = os.open(tmp_path / "a demo", os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        tried.append(result["config"]["output"])

    monkeypatch.setattr(demo, "report", tells)
    assert main(undrawn) == 0
    assert [Path(output).name for output in tried] == ["a demo", "composing"]


def test_what_could_not_be_measured_is_a_dash() -> None:
    single = {"error": {"a": 2.0, "b": 6.0}}
    ways = {"single": single, "backward": {"error": {"a": 5.0, "b": 7.0}}, "superpose": {"missing": "no solve"}}
    ways["switch"] = {"error": {"a+b": 9.0}, "over_singles": {"a+b": 2.25}}
    ways["together"] = {"error": {"a+b+c": 7.0}, "over_singles": {"a+b+c": 1.75}}
    first = {"equivariance_error": {"a": 1.0}, "doing_nothing": {"a": 3.0}, "combining": ways}
    second = {"combining": {name: {"missing": "no solve"} for name in ways}}
    rows = [line.split()[-2:] for line in side_by_side(first, second, {"a": 4.0}).splitlines()[2:]]
    assert rows == [["1.50", "-"], ["-", "-"], ["2.25", "-"], ["1.75", "-"]]
