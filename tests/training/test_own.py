"""One's own sequences from the command line: splits, limits, films, and what is refused before training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowfactor.cli import main
from flowfactor.training import DataConfig
from flowfactor.training.datasets import data_identity

MODEL = [
    *("--model.latent_dim", "4", "--model.hidden", "[8,8]", "--model.encoder", "{widths: [8]}"),
    *("--model.decoder", "{widths: [8]}", "--train.batch_size", "4", "--train.steps", "2", "--train.minutes", "null"),
    *("--train.likelihood_limit", "2", "--train.likelihood_samples", "2", "--train.progress", "false"),
    *("--train.accelerator", "cpu"),
]


def write_films(
    root: Path, names: list[str], frames: int = 12, seed: int = 0, shape: tuple[int, ...] = (9, 10)
) -> Path:
    for n, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(100 * seed + n)
        np.save(root / f"{name}.npy", generator.integers(0, 256, (frames, *shape), dtype=np.uint8))
    return root


def few(tmp_path: Path) -> Path:
    return write_films(tmp_path / "films", ["left/a", "left/b", "right/a", "right/b", "up/a", "up/b"])


def run(tmp_path: Path, root: Path, *more: str) -> dict:
    given = ["--data.name", "sequences", "--data.root", str(root), "--output", str(tmp_path / "run")]
    assert main(["train", "demo", *given, *MODEL, *more]) == 0
    return json.loads((tmp_path / "run" / "result.json").read_text())


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], root: Path, *more: str) -> str:
    given = ["--data.name", "sequences", "--data.root", str(root), "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main(["train", "demo", *given, *MODEL, *more])
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    return capsys.readouterr().err


def test_a_small_folder_of_films_is_trained_on_and_measured(tmp_path: Path) -> None:
    options = ["--data.options.window", "4", "--data.options.size", "8", "--data.options.fit", "crop"]
    result = run(tmp_path, few(tmp_path), *options)
    assert set(result["equivariance_error"]) == {"left", "right", "up"} and result["finished"]
    assert result["config"]["data"]["options"] == {"window": 4, "size": 8, "fit": "crop"}


def test_few_sequences_leave_every_class_on_both_sides(tmp_path: Path) -> None:
    data = DataConfig("sequences", root=str(few(tmp_path)))
    train, test = data.dataset("train"), data.dataset("test")
    assert sorted(train.fixed_k.tolist()) == sorted(test.fixed_k.tolist()) == [0, 1, 2]


def test_films_are_split_by_class_and_film_whatever_the_seed(tmp_path: Path) -> None:
    root = write_films(tmp_path, [f"{label}/{n}" for label in ("left", "right") for n in range(8)])
    drawn = set()
    for seed in range(6):
        data = DataConfig(
            "sequences", root=str(root), seed=seed, test_fraction=0.25, options={"window": 4, "stride": 2}
        )
        train, test = data.dataset("train"), data.dataset("test")
        assert not set(train.groups) & set(test.groups) and len(train) == 60 and len(test) == 20
        assert test.fixed_k.bincount().tolist() == [10, 10]
        drawn.add(test.groups)
    assert len(drawn) > 1


def test_unlabelled_films_are_split_too(tmp_path: Path) -> None:
    data = DataConfig("sequences", root=str(write_films(tmp_path, [f"clip{n}" for n in range(20)])), limit=7)
    train, test = data.dataset("train"), data.dataset("test")
    assert train.num_flows == 0 and len(train) == 7 and len(test) == 2
    assert not set(train.groups) & set(test.groups)


def test_a_folder_for_testing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_films(tmp_path / "a", [f"{label}/{n}" for label in ("left", "right") for n in range(3)])
    other = write_films(tmp_path / "b", ["left/0", "right/0"], seed=1)
    data = DataConfig("sequences", root=str(root), test_root=str(other))
    assert len(data.dataset("train")) == 6 and len(data.dataset("test")) == 2
    result = run(tmp_path, root, "--data.test_root", str(other), "--data.options.size", "8")
    assert set(result["equivariance_error"]) == {"left", "right"}
    moved = tmp_path / "other"
    (tmp_path / "run").rename(moved)
    refusals = {
        write_films(tmp_path / "c", ["left/0", "down/0"], seed=1): "name the classes' folders alike",
        write_films(tmp_path / "d", ["left/0"], seed=1): "name the classes' folders alike",
        write_films(tmp_path / "e", ["left/0", "right/0"], seed=1, frames=7): "has frames 12, but",
        write_films(tmp_path / "f", ["left/0", "right/0"], seed=1, shape=(8, 8)): "give data.options.size",
        write_films(tmp_path / "g", ["left/0", "right/0"]): "2 of the 2 test sequences in .* lie in .* too",
        root: "lie one in the other",
        root / "left": "lie one in the other",
    }
    for folder, message in refusals.items():
        with pytest.raises(ValueError, match=message):
            DataConfig("sequences", root=str(root), test_root=str(folder)).dataset("test")
        refused(tmp_path, capsys, root, "--data.test_root", str(folder))
    with pytest.raises(ValueError, match=r"data\.test_root is for your own sequences"):
        DataConfig("digits", test_root=str(root)).dataset()


def test_single_frames_in_common_are_warned_of(tmp_path: Path) -> None:
    write_films(tmp_path / "a", ["left/0", "left/1"])
    film = np.load(tmp_path / "a" / "left" / "0.npy")
    film[3:] = film[3:][:, ::-1]
    (tmp_path / "b" / "left").mkdir(parents=True)
    np.save(tmp_path / "b" / "left" / "0.npy", film)
    with pytest.warns(UserWarning, match="1 of the 1 test sequences .* hold frames that are in"):
        DataConfig("sequences", root=str(tmp_path / "a"), test_root=str(tmp_path / "b")).dataset("test")


def test_what_cannot_be_split_is_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_films(tmp_path / "films", ["left/a", "left/b", "right/a"])
    told = refused(tmp_path, capsys, root, "--data.options.window", "4", "--data.options.size", "8")
    assert "class 'right': 3 sequences of 1 film" in told and "data.test_root" in told
    told = refused(tmp_path, capsys, few(tmp_path), "--train.batch_size", "3")
    assert "divisible by 4, got 9 x 10" in told and "data.options.size" in told
    told = refused(tmp_path, capsys, few(tmp_path), "--data.options.size", "8", "--data.flows", "[left, right]")
    assert "data.flows" in told


def test_an_order_of_axes_from_the_command_line(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (20, 40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "mnist_test_seq.npy", frames)
    data = DataConfig("sequences", root=str(tmp_path / "mnist_test_seq.npy"), options={"layout": "t n h w"})
    assert len(data.dataset("train")) == 36 and data.dataset("test").num_steps == 19


@pytest.mark.parametrize("name", ["digits", "scenes", "mnist-combined"])
def test_a_limit_is_drawn_at_random(name: str, tmp_path: Path) -> None:
    from small_runs import write_mnist

    scenes = {"size": 8, "hues": 3, "scales": 3, "orientations": 2, "supersampling": 1}
    settings = {"steps": 2, "options": scenes if name == "scenes" else {}}
    settings |= {"root": str(write_mnist(tmp_path))} if name == "mnist-combined" else {}
    every = DataConfig(name, **settings).dataset()
    chosen = DataConfig(name, **settings, limit=8).dataset()
    again = DataConfig(name, **settings, limit=8).dataset()
    others = DataConfig(name, **settings, limit=8, seed=1).dataset()

    def seen(data, count: int = 8) -> torch.Tensor:
        return data.batch(list(range(count)), None if data.fixed_k is not None else 0)["frames"]

    assert len(chosen) == len(others) == 8
    assert torch.equal(seen(chosen), seen(again))
    assert not torch.equal(seen(chosen), seen(others)) and not torch.equal(seen(chosen), seen(every))
    if name == "scenes":  # the first eight are one room in eight states of what moves
        states = chosen.scenes(torch.arange(8))
        held = [n for n in range(states.shape[1]) if n not in chosen._moved]
        assert len(states[:, held].unique(dim=0)) > 1 == len(every.scenes(torch.arange(8))[:, held].unique(dim=0))


def test_a_limit_takes_some_of_every_class(tmp_path: Path) -> None:
    root = write_films(tmp_path, [f"{label}/{n}" for label in ("a", "b", "c") for n in range(10)])
    for limit in (3, 6, 7):
        counts = DataConfig("sequences", root=str(root), limit=limit).dataset().fixed_k.bincount(minlength=3).tolist()
        assert sum(counts) == limit and max(counts) - min(counts) <= 1
    with pytest.raises(ValueError, match=r"data\.limit must be at least 3"):
        DataConfig("sequences", root=str(root), limit=2).dataset()


def test_where_a_folder_for_testing_lies_is_no_identity() -> None:
    plain = {"name": "sequences", "root": "/a", "test_root": "/b", "options": {}}
    assert (
        data_identity(plain) == data_identity(plain | {"test_root": "/c"}) != data_identity(plain | {"test_root": None})
    )
