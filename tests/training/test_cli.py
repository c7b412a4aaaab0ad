"""The command line and the presets."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import TINY

from flowfactor import __version__, data
from flowfactor.cli import main
from flowfactor.cli.runs import _spread
from flowfactor.cli.train import parse_train
from flowfactor.comparison import ABLATIONS, configure, get_variant
from flowfactor.models import METHODS, build_vae
from flowfactor.training import Config, list_presets, load_config
from flowfactor.training.building import make_model

SHORT = [
    *TINY,
    *("--train.minutes", "null", "--train.steps", "3", "--train.evaluate_limit", "3", "--train.likelihood_limit", "0"),
    *("--train.progress", "false"),
]


def test_images_to_draw_are_spread_over_every_factor() -> None:
    grid = torch.cartesian_prod(*(torch.arange(size) for size in (5, 3, 8, 10, 10, 10)))
    for factor in grid[_spread(3, len(grid))][:, 2:].T:
        assert len(factor.unique()) > 1
    for total in (1, 2, 6, 7, 100):
        assert sorted(_spread(total, total)) == list(range(total))


def test_there_are_the_presets() -> None:
    shipped = {"demo", "mnist-paper", "mnist-small", "scenes", "shapes3d"}
    shipped |= {f"{data}-{kind}" for data in ("mnist", "scenes") for kind in ("weak", "sparse", "any")}
    shipped |= {"demo-any"}
    assert shipped <= set(list_presets()) and list_presets() == sorted(list_presets())


@pytest.mark.parametrize("preset", list_presets())
def test_every_preset_builds_a_model_that_can_be_trained(preset: str) -> None:
    config, _, _ = parse_train([preset])
    read = load_config(preset)
    assert (config.data, config.train, config.output) == (read.data, read.train, read.output)
    if config.data.name in ("scenes", "shapes3d"):  # rooms of the same size
        options = {"orientations": 1, "hues": 8, "shapes": ["cube", "cone"], "supersampling": 1}
        dataset = data.Scenes("train", steps=config.data.steps, **options)
    else:
        dataset = data.Digits(steps=config.data.steps)
    assert dataset.num_flows <= config.train.batch_size <= 128
    model = make_model(config, dataset)
    assert model.config() == make_model(read, dataset).config()
    batch = dataset.batch(list(range(dataset.num_flows)), list(range(dataset.num_flows)))
    given = getattr(model, "supervision", "full") == "full"
    loss = model(batch["frames"], batch["t"], batch["k"] if given else None).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_the_papers_preset_is_the_papers() -> None:
    config = load_config("mnist-paper")
    model = build_vae(num_flows=3, **config.model)
    assert (config.train.steps, config.train.batch_size, config.train.learning_rate) == (90000, 128, 1e-4)
    assert model.flow.dim == 324 and model.objective == "marginal"
    assert type(model.prior).__name__ == "Diffusion" and type(model.flow.field).__name__ == "GradientField"


def test_any_key_is_overridden_and_later_ones_win(tmp_path: Path) -> None:
    later = ["--train.minutes", "5", "--train.minutes=6", "--train.betas", "[0.8,0.9]", "--data.root", "x"]
    config, resume, overwrite = parse_train(
        [
            "mnist-small",
            *later,
            "--model.field",
            "gradient",
            "--model.decoder.initial_mean",
            "0.2",
            "--seed",
            "7",
            "--resume",
        ]
    )
    assert config.model["field"] == "gradient" and config.model["decoder"] == {"local": True, "initial_mean": 0.2}
    assert (config.seed, config.train.minutes, config.train.betas, config.data.root) == (7, 6, (0.8, 0.9), "x")
    assert config.model["frames_per_step"] == 2 and resume and not overwrite
    assert Config.from_dict(config.as_dict()) == config


def test_a_file_is_as_good_as_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("data: {name: digits}\ntrain: {steps: 4}\nmodel: {encoder: {widths: [8]}}\n")
    config, _, _ = parse_train([str(file), "--train.steps", "5"])
    assert (config.data.name, config.train.steps, config.model) == ("digits", 5, {"encoder": {"widths": [8]}})
    assert load_config(file).train.steps == 4


@pytest.mark.parametrize("name", [*METHODS, *ABLATIONS])
def test_the_file_of_every_variant_is_read_as_it_was_meant(name: str, tmp_path: Path) -> None:
    meant = configure(load_config("demo"), get_variant(name), 0)
    meant.data.limit = 12
    (tmp_path / "config.yaml").write_text(meant.as_yaml())
    read, resume, _ = parse_train([str(tmp_path / "config.yaml"), "--resume"])
    assert resume and (read.data, read.train, read.method) == (meant.data, meant.train, meant.method)
    assert read == meant and load_config(tmp_path / "config.yaml") == meant
    dataset = meant.data.dataset()
    assert make_model(read, dataset).config() == make_model(meant, dataset).config()


def test_the_force_is_given_by_name_or_null(refused: Callable[[list[str]], str]) -> None:
    assert parse_train(["demo", "--model.force", "null"])[0].model["force"] is None
    assert parse_train(["demo", "--model.force", "negative_square"])[0].model["force"] == "negative_square"
    assert parse_train(["mnist-sparse", "--model.force", "null"])[0].model["force"] is None
    assert "model.force" in refused(["train", "demo", "--model.force", "torch.nn.Identity"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "begin with a preset"),
        (["train", "mnist-large"], "unknown preset 'mnist-large': did you mean"),
        (["train", "demo", "--model.colour", "red"], "model.colour"),
        (["train", "demo", "--train.steps", "many"], "train.steps"),
        (["train", "demo", "--train.steps", "-3"], "train.steps must be above 0"),
        (["train", "demo", "--train.minutes", "null"], "no end"),
        (["train", "demo", "--model.field", "magnetic"], "field must be one of"),
        (["train", "demo", "--data.options.colour", "reddish"], "reddish"),
        (["train", "demo", "--train.batch_size", "2"], "stratified batch needs at least 3"),
        (["train", "demo", "--resume"], "nothing to resume"),
        (["evaluate", "nowhere"], "not the folder of a run"),
        (["traverse", "nowhere"], "must end in .png and lie in a folder that exists"),
        (["demo", "--minutes", "-1"], "train.minutes must be above 0"),
        (["train", "demo", "--train.clock", "sand"], "clock"),
        (["fly"], "there is no command 'fly': choose among train, benchmark"),
        ([], "a command is required"),
    ],
)
def test_mistakes_end_with_code_2_before_any_work(
    arguments: list[str], message: str, refused: Callable[[list[str]], str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(arguments)
    assert not list(tmp_path.iterdir())


def test_missing_data_are_told(tmp_path: Path, refused: Callable[[list[str]], str]) -> None:
    arguments = ["train", "mnist-small", "--data.root", str(tmp_path / "none"), "--output", str(tmp_path / "run")]
    assert "holds no train-images-idx3-ubyte" in refused(arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["evaluate", "-h"], ["traverse", "-h"], ["benchmark", "-h"]]
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "usage: flowfactor" in text
    if arguments[0] == "train":
        assert all(
            key in text for key in ("--data.root", "--train.minutes", "--model.field", "--resume", "mnist-small")
        )


@pytest.mark.parametrize(
    "arguments",
    [
        *([command, "--help"] for command in ("train", "benchmark", "demo", "evaluate", "traverse")),
        *(
            ["--help"],
            ["--version"],
            ["trian"],
            [],
            ["train", "mnist-smal"],
            ["train", "demo", "--train.minutes", "abc"],
        ),
        *(
            ["train", "demo", "--method", "vea"],
            ["evaluate", "runs", "--limt", "3"],
            ["benchmark", "digits", "--methods", "vea"],
        ),
    ],
)
def test_nothing_heavy_is_imported_for_help_and_for_mistakes(arguments: list[str]) -> None:
    script = f"""
import sys
import flowfactor.cli
try:
    flowfactor.cli.main({arguments!r})
except SystemExit as ended:
    heavy = ("torch", "numpy", "lightning", "matplotlib", "sklearn", "jsonargparse", "flowfactor.models")
    print("code", ended.code, "loaded", [name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code = 0 if {"--help", "--version"} & set(arguments) else 2
    assert done.stdout.splitlines()[-1] == f"code {code} loaded []"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"flowfactor {__version__}\n"


def test_train_evaluate_traverse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str]], str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "demo", *SHORT, "--output", str(run)]) == 0
    assert "colouring" in capsys.readouterr().out
    trained = json.loads((run / "result.json").read_text())
    assert main(["evaluate", str(run), "--limit", "3", "--samples", "2"]) == 0
    measured = json.loads((run / "evaluation.json").read_text())
    assert measured["equivariance_error"] == pytest.approx(trained["equivariance_error"], rel=1e-5)
    assert measured["log_likelihood"]["samples"] == 2 and measured["log_likelihood"]["count"] == 9
    assert (measured["equivariance"]["limit"], measured["equivariance"]["seed"]) == (3, 0)
    others = ["--seed", "5", "--output", str(tmp_path / "others.json")]
    assert main(["evaluate", str(run), "--limit", "3", "--samples", "0", *others]) == 0
    drawn = json.loads((tmp_path / "others.json").read_text())
    assert drawn["equivariance"]["seed"] == 5 and drawn["doing_nothing"] != measured["doing_nothing"]
    assert "(of 3 test sequences each, drawn at random, seed 5)" in capsys.readouterr().out
    assert main(["traverse", str(run), "--gif", str(run / "a.gif"), "--images", "1", "--back", "1"]) == 0
    assert (run / "traversal.png").read_bytes()[:4] == b"\x89PNG" and (run / "a.gif").read_bytes()[:3] == b"GIF"
    grid = ["traverse", str(run), "--grid", "rotation", "2"]
    assert main([*grid, "--steps", "2", "--back", "1", "--gif", str(run / "grid.gif")]) == 0
    assert (run / "grid.png").read_bytes()[:4] == b"\x89PNG" and (run / "grid.gif").read_bytes()[:3] == b"GIF"
    assert main([*grid, "--steps", "1"]) == 0  # in place of the one that is its own
    assert "--grid draws one test image, got --images 2" in refused([*grid, "--images", "2"])
    for flows in (["rotation", "spin"], ["1", "rotation"], ["0", "3"]):
        assert "--grid takes two different flows of scaling, rotation" in refused(
            ["traverse", str(run), "--grid", *flows]
        )
    assert "--images must be between" in refused(["traverse", str(run), "--images", "0"])
    assert "holds a run" in refused(["train", "demo", *SHORT, "--output", str(run)])
    more = ["train", str(run / "config.yaml"), "--resume", "--train.steps", "4"]
    assert "has train.weight_decay 0.0, not 0.1" in refused([*more, "--train.weight_decay", "0.1"])
    assert main(more) == 0
    assert json.loads((run / "result.json").read_text())["steps"] == 4


def test_the_users_folder_is_what_a_tilde_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["demo", "--minutes", "0.002", "--output", "~/run"]) == 0
    assert (tmp_path / "run" / "traversal.png").is_file() and f"look at {tmp_path}/run" in capsys.readouterr().out
    (tmp_path / "run" / "traversal.png").unlink()
    assert main(["evaluate", "~/run", "--limit", "2", "--samples", "0"]) == 0
    assert (tmp_path / "run" / "evaluation.json").is_file()
    assert main(["traverse", "~/run", "--images", "1", "--gif", "~/a.gif"]) == 0
    assert main(["traverse", "~/run", "--images", "1", "--output", "~/b.png"]) == 0
    made = (tmp_path / "run" / "traversal.png", tmp_path / "a.gif", tmp_path / "b.png")
    assert all(path.is_file() for path in made) and not list((tmp_path / "here").iterdir())


def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--minutes", "0.005"]) == 0
    folder = tmp_path / "demo_output"
    assert {"model", "traversal.png", "transformations.gif", "result.json"} <= {path.name for path in folder.iterdir()}
    assert {"model", "traversal.png", "grid.png", "result.json"} <= {
        path.name for path in (folder / "composing").iterdir()
    }
    text = capsys.readouterr().out
    assert "doing nothing" in text and "rotation" in text and "what to try next" in text
