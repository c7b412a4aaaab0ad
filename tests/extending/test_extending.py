"""Methods, data sets and parts of a user's own, each in a short file outside the package, in trainings and benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import TINY

import flowfactor as ff
from flowfactor import cli
from flowfactor.training import DataConfig, load_config, load_run

HERE = Path(__file__).parent
SHORT = [
    *("--train.minutes", "null", "--train.steps", "3", "--train.evaluate_limit", "2", "--train.likelihood_limit", "3"),
    *("--train.likelihood_samples", "2", "--train.progress", "false", "--output", "run"),
]
COMPARED = [
    *("--steps", "2", "--seeds", "0", "--workers", "0", "--threads", "1", "--output", "compared"),
    *("--evaluate.images", "2", "--evaluate.likelihood_images", "2", "--evaluate.likelihood_samples", "2"),
    *("--evaluate.latent_images", "2", "--evaluate.search_images", "2", "--evaluate.vp_images", "0"),
]

# What each file brings, how it is asked for, and what the trained model then has.
PARTS: dict[str, tuple[list[str], Callable[[Any], Any], str]] = {
    "user_potential": (
        ["--model.field", "gradient", "--model.potential", "{name: well, depth: 0.3}"],
        lambda model: model.flow.field.potential,
        "Well",
    ),
    "user_closed_form": (
        ["--model.field", "gradient", "--model.potential", "spring"],
        lambda model: model.flow.field.potential,
        "Spring",
    ),
    "user_field": (["--model.field", "swirl"], lambda model: model.flow.field, "Swirl"),
    "user_objective": (["--model.objective", "{name: free-nats, nats: 3}"], lambda model: model.objective, "FreeNats"),
    "user_estimator": (
        ["--model.supervision", "weak", "--model.estimator", "likeliest"],
        lambda model: model.estimator,
        "Likeliest",
    ),
}


def result() -> dict[str, Any]:
    return json.loads(Path("run/result.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(HERE.glob("user_*.py")), ids=lambda path: path.stem)
def test_users_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def test_a_method_is_trained_resumed_measured_and_loaded(work: Path) -> None:
    asked = ["train", "demo", "--import", "user_method.py", "--method", "steady", *TINY[:4], "--train.batch_size", "6"]
    assert cli.main([*asked, "--model.pull", "2", "--model.width", "4", *SHORT]) == 0
    assert result()["config"]["model"] == {"latent_dim": 32, "width": 4, "pull": 2.0}
    assert load_config("run/config.yaml").imports == [str(work / "user_method.py")]
    model, config = load_run("run")
    assert type(model).__name__ == "SteadyVAE" and model.pull == 2.0 and config.method == "steady"
    again = ff.models.load_pretrained("run/model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    more = ["--import", "user_method.py"]
    assert cli.main(["train", "run/config.yaml", "--resume", "--train.steps", "4", *more]) == 0
    assert result()["steps"] == 4
    assert cli.main(["evaluate", "run", "--limit", "2", "--samples", "2", *more]) == 0
    assert cli.main(["traverse", "run", "--images", "1", *more]) == 0


def test_a_method_is_compared_in_this_process_and_in_workers(work: Path) -> None:
    asked = ["benchmark", "digits", "--methods", "ours", "steady", "--import", "user_method.py", *TINY, *COMPARED]
    assert cli.main(asked) == 0
    report = Path("compared/report.md").read_text(encoding="utf-8")
    assert "| `steady` | 1 |" in report and "- `steady`: VAE with steady latents" in report
    figures = json.loads(Path("compared/steady-seed0/benchmark.json").read_text(encoding="utf-8"))
    assert figures["config"]["model"] == {"latent_dim": 4} and figures["steps_made"] == 2
    asked[asked.index("--workers") + 1] = "1"
    asked[asked.index("compared")] = "others"
    asked.remove("ours")
    assert cli.main(asked) == 0
    assert Path("others/steady-seed0/benchmark.json").is_file(), Path("others/steady-seed0/log.txt").read_text()


def test_a_data_set_is_trained_on_and_compared_by_a_file_of_settings(work: Path) -> None:
    asked = ["--import", "user_data.py", "--data.name", "dots", "--data.options.count", "12", *TINY[2:], *SHORT]
    assert cli.main(["train", *asked]) == 0  # without a preset
    assert set(result()["equivariance_error"]) == {"right", "down"}
    _, config = load_run("run")
    data = config.data.dataset("test")
    assert type(data).__name__ == "Dots" and len(data) == 12 and data.image_shape == (1, 8, 8)
    Path("dots.yaml").write_text("imports: [user_data.py]\ndata: {name: dots, steps: 3, options: {size: 12}}\n")
    assert cli.main(["benchmark", "dots.yaml", "--methods", "ours", "vae", *TINY[2:], *COMPARED]) == 0
    assert "# Benchmark: dots" in Path("compared/report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_trained_compared_and_loaded(name: str, work: Path) -> None:
    options, part, kind = PARTS[name]
    method = ["--method", "ours-weak"] if "weak" in options else []
    file = ["--import", f"{name}.py"]
    assert cli.main(["train", "demo", *file, *method, *TINY, *options, *SHORT]) == 0
    model, _ = load_run("run")
    assert type(part(model)).__name__ == kind
    compared = "ours-weak" if method else "ours"
    assert cli.main(["benchmark", "digits", "--methods", compared, *file, *TINY, *options, *COMPARED]) == 0
    saved = json.loads(Path(f"compared/{compared}-seed0/benchmark.json").read_text(encoding="utf-8"))
    assert saved["steps_made"] == 2
    loaded, _ = load_run(f"compared/{compared}-seed0")
    assert type(part(loaded)).__name__ == kind


def test_help_shows_what_is_registered(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "user_data.py").rename("my_data.py")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help", "--import", "user_method.py", "--import", "my_data", "--method", "steady"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--model.pull NUMBER Weight of the distance between neighbouring latents. (default: 1.0)" in told
    assert "po-flow, steady." in told and "|dots" in told and "--model.hj_weight" not in told
    with pytest.raises(SystemExit):
        cli.main(["train", "--data.name", "dots", "--import", "user_potential.py", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "--data.options.size INTEGER Height and width of a frame. (default: 8)" in told
    assert "Registered: well (depth: 0.1)." in told
    with pytest.raises(SystemExit):
        cli.main(["benchmark", "--help", "--import", "user_method.py"])
    assert "po-flow, steady)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "stedy", "--import", "user_method.py"], "unknown method 'stedy': did you mean steady?"),
        (["--method", "steady"], "unknown method 'steady'"),
        (
            ["--method", "steady", "--import", "user_method.py", "--model.pul", "1"],
            "--model.pul is no setting: did you mean model.pull?",
        ),
        (
            ["--method", "steady", "--import", "user_method.py", "--model.pull", "much"],
            "--model.pull must be a number, got 'much'",
        ),
        (["--data.name", "dos", "--import", "user_data.py"], "did you mean dots?"),
        (
            ["--data.name", "dots", "--import", "user_data.py", "--data.options.siz", "4"],
            "data.options.siz is no setting: did you mean data.options.size?",
        ),
        (
            ["--data.name", "dots", "--import", "user_data.py", "--data.options.size", "big"],
            "data.options.size must be a whole number, got 'big'",
        ),
        (["--data.name", "dots", "--import", "user_data.py", "--data.root", "."], "data.root is for data sets"),
        (["--data.name", "dots", "--import", "user_data.py", "--data.flows", "[down]"], "data.flows chooses"),
        (["--import", "nowhere.py"], "there is no file"),
        (["--import", "nowhere"], "there is no module nowhere"),
        (["--import", "my_broken.py"], "my_broken.py, line 2: ZeroDivisionError"),
        (["--import", "string.py"], "the name string is that of"),
        (["--import", "my_tuple.py", "--data.name", "pairs"], "gives a tuple, not a flowfactor.data.SequenceDataset"),
        (["--import", "my_tuple.py", "--method", "nothing"], "builds a Linear, which is no model"),
        (["--imports", "[user_method.py]"], "--imports is no setting: did you mean import?"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str], message: str, work: Path, refused: Callable[[list[str]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my_broken.py").write_text("x = 1\nx / 0\n")
    Path("string.py").write_text("")
    Path("my_tuple.py").write_text(
        "import flowfactor as ff, torch\n"
        "ff.register_dataset('pairs', lambda split: (1, 2))\n"
        "ff.register_method('nothing', lambda image_shape, num_flows, latent_dim: torch.nn.Linear(1, 1))\n"
    )
    before = set(work.iterdir())
    assert message in refused(["train", "demo", *arguments])
    assert set(work.iterdir()) - before <= {work / "__pycache__"}


def test_no_file_of_a_run_has_code_imported(work: Path) -> None:
    Path("my_trojan.py").write_text(
        "import pathlib; pathlib.Path('sprung').touch()\n" + (work / "user_method.py").read_text()
    )
    asked = ["train", "demo", "--import", "my_trojan.py", "--method", "steady", *TINY[:4], "--train.batch_size", "6"]
    assert cli.main([*asked, *SHORT]) == 0
    Path("sprung").unlink()
    script = (
        "import sys, flowfactor.cli, flowfactor.training as t\n"
        "from flowfactor.models import load_pretrained\n"
        "from flowfactor.comparison.worker import main\n"
        "command = lambda line: flowfactor.cli.main(line.split())\n"
        "work = {'train': lambda: command('train run/config.yaml --resume --train.steps 4'),\n"
        "        'more': lambda: command('train demo --config run/config.yaml --output more'),\n"
        "        'evaluate': lambda: command('evaluate run'),\n"
        "        'benchmark': lambda: command('benchmark run/config.yaml --methods vae --seeds 0 --steps 1'),\n"
        "        'worker': lambda: main(['run']),\n"
        "        'load_run': lambda: t.load_run('run'), 'load_config': lambda: t.load_config('run/config.yaml'),\n"
        "        'prepare': lambda: t.prepare('run/config.yaml'), 'model': lambda: load_pretrained('run/model')}\n"
        "for name, call in work.items():\n"
        "    try:\n"
        "        print(name, 'code', call())\n"
        "    except (ValueError, SystemExit) as error:\n"
        "        print(name, 'refused', error)\n"
    )
    settings = {"config": load_config("run/config.yaml").as_dict(), "evaluate": {}}
    Path("run/settings.json").write_text(json.dumps(settings))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    told = run.stdout.splitlines()
    assert len(told) == 9 and not [line for line in told if "refused" not in line and line != "worker code 1"], (
        run.stdout
    )
    assert not Path("sprung").exists()
    assert "if you trust it, allow it by --import" in run.stderr and "my_trojan.py" in run.stderr
    assert load_run("run", imports=["my_trojan.py"])[1].method == "steady"


def test_installed_plugins_are_found_and_a_broken_one_is_told(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("their_flows", "user_method"), ("their_ruin", "user_ruin")):
        info = work / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[flowfactor.plugins]\n{name} = {module}\n")
    Path("user_ruin.py").write_text("raise RuntimeError('no luck')\n")
    monkeypatch.syspath_prepend(str(work))
    with pytest.warns(UserWarning, match=r"their_ruin .*RuntimeError: no luck"):
        assert cli.main(["train", "demo", "--method", "steady", *TINY[:4], "--train.batch_size", "6", *SHORT]) == 0
    assert load_run("run")[1].imports == []


def test_names_are_taken_once(work: Path) -> None:
    def build(image_shape, num_flows, latent_dim):
        raise NotImplementedError

    def other(image_shape, num_flows, latent_dim):
        raise NotImplementedError

    assert ff.register_method("once", build) is build and ff.register_method("once", build) is build
    with pytest.raises(ValueError, match="already that of"):
        ff.register_method("once", other)
    with pytest.raises(ValueError, match="flowfactor's own"):
        ff.register_method("ours", build)
    with pytest.raises(TypeError, match=r"build\(image_shape, num_flows, latent_dim"):
        ff.register_method("twice", lambda width: None)
    with pytest.raises(TypeError, match="must be a function or a class"):
        ff.register_method("twice", "models.Mine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must be"):
        ff.register_method("twice", build, labels="told")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="flowfactor's own"):
        ff.register_dataset("mnist", lambda split: None)
    with pytest.raises(TypeError, match=r"factory\(split"):
        ff.register_dataset("films", lambda folder: None)
    with pytest.raises(TypeError, match="must be a function or a class"):
        ff.register_dataset("films", 3)  # type: ignore[arg-type]


def test_a_variant_of_ours_keeps_the_presets_settings() -> None:
    ff.register_method("still", ff.models.build_vae, title="ours without an equation", fixed={"hj_weight": 0.0})
    base = load_config("mnist-small")
    made = ff.comparison.configure(base, ff.comparison.get_variant("still"), 0)
    assert made.model == {name: value for name, value in base.model.items() if name != "hj_weight"}
    model = ff.models.build_model("still", (1, 8, 8), 2, 4, hidden=(8, 8))
    assert model.hj_weight == 0 and type(model).__name__ == "FlowFactorizedVAE"
    with pytest.raises(ValueError, match="by definition"):
        ff.models.build_model("still", (1, 8, 8), 2, 4, hj_weight=1.0)


def test_a_factory_may_take_any_option(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    @ff.register_dataset("open")
    def factory(split, **options):
        seen.append({"split": split, **options})
        return ff.data.Digits(split, steps=2)

    DataConfig("open", options={"whatever": 3, "mode": "fast"}).dataset("test")
    assert seen == [{"split": "test", "whatever": 3, "mode": "fast"}]
