"""Benchmarks: plans, runs in this process and in others, resuming, failures."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import TINY, write_mnist

from flowfactor.cli import main
from flowfactor.cli.train import parse_train
from flowfactor.comparison import (
    ABLATION_GROUPS,
    ABLATIONS,
    choose_variants,
    configure,
    get_variant,
    plan_benchmark,
    worker,
)
from flowfactor.comparison.plan import _reason
from flowfactor.data import Digits, Scenes
from flowfactor.models import METHODS, build_model
from flowfactor.training import (
    Config,
    EvaluationConfig,
    FlowModule,
    LearningRateSchedule,
    evaluation,
    load_config,
    load_run,
    measure,
)
from flowfactor.training import module as module_of_training
from flowfactor.training.building import make_model

LITTLE = [
    *("--evaluate.images", "4", "--evaluate.likelihood_images", "2", "--evaluate.likelihood_samples", "2"),
    *("--evaluate.latent_images", "2", "--evaluate.search_images", "2", "--evaluate.vp_images", "0"),
]


def command(output: Path, *arguments: str, steps: int = 2, workers: int = 0) -> list[str]:
    budget = ["--steps", str(steps), "--workers", str(workers), "--threads", str(max(workers, 1))]
    return ["benchmark", "digits", *budget, *TINY, *LITTLE, "--output", str(output), *arguments]


def figures(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/benchmark.json")}


def test_two_methods_and_two_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str]], str]
) -> None:
    asked = command(tmp_path, "--methods", "ours", "vae", "--seeds", "0", "1")
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "[1/4] ours, seed 0: E_k" in told and "3 left" in told and "[4/4] vae, seed 1" in told and "0 left" in told
    made = figures(tmp_path)
    assert set(made) == {"ours-seed0", "ours-seed1", "vae-seed0", "vae-seed1"}
    for name, run in made.items():
        assert (run["method"], f"seed{run['seed']}") == tuple(name.split("-"))
        assert run["budget"] == {"steps": 2, "minutes": None} and run["steps_made"] == 2 and run["parameters"] > 0
        assert run["machine"]["threads"] == 1 and run["versions"]["torch"] == torch.__version__
        error, likelihood = run["figures"]["equivariance"], run["figures"]["likelihood"]
        assert error["flows"] == ["scaling", "rotation", "colouring"] and error["count"] == 4
        assert all(
            low < value < high for low, value, high in zip(error["low"], error["mean"], error["high"], strict=True)
        )
        assert likelihood["count"] == 6 and likelihood["low"] < likelihood["per_frame"] < likelihood["high"]
        assert "missing" in run["figures"]["mig"] and run["figures"]["vp"] == {"missing": "not asked for"}
    assert made["ours-seed0"]["figures"] != made["ours-seed1"]["figures"]
    nothing = [run["figures"]["equivariance"]["doing_nothing"] for run in made.values()]
    assert all(one == nothing[0] for one in nothing)  # all runs are measured on the same images
    assert "traversals" in made["vae-seed0"]["figures"]["equivariance"]
    assert "traversals" not in made["ours-seed0"]["figures"]["equivariance"]
    report = (tmp_path / "report.md").read_text()
    assert "| `vae` | 2 |" in report and "flowfactor benchmark digits" in report and "doing nothing" in report
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    model, config = load_run(tmp_path / "vae-seed1")  # the folder is that of a run as any other
    assert type(model).__name__ == "VAE" and config.seed == 1

    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/benchmark.json")}
    assert main(asked) == 0
    assert "4 of 4 runs are finished already" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/benchmark.json")}
    other = command(tmp_path, "--methods", "ours", "--seeds", "0", steps=3)
    error = refused(other)
    assert "ours-seed0 holds a run with other settings" in error and "budget.steps was 2, not 3" in error
    (tmp_path / "report.md").unlink()
    assert main(["benchmark", "report", str(tmp_path)]) == 0 and (tmp_path / "report.md").is_file()


def test_a_run_that_crashes_takes_no_other_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--methods", "vae", "--seeds", "0")) == 0
    damaged = tmp_path / "vae-seed0"
    for name in ("benchmark.json", "result.json"):
        (damaged / name).unlink()
    for checkpoint in damaged.glob("*.ckpt"):
        checkpoint.write_bytes(b"no checkpoint")
    asked = command(tmp_path, "--methods", "ours", "vae", "--seeds", "0", workers=2)
    assert main(asked) == 1
    told = capsys.readouterr().out
    assert "vae, seed 0 FAILED: DamagedCheckpointError" in told and str(damaged) in told
    assert set(figures(tmp_path)) == {"ours-seed0"}
    report = (tmp_path / "report.md").read_text()
    assert (
        "## Not finished" in report and "- vae-seed0: DamagedCheckpointError" in report and "| `ours` | 1 |" in report
    )
    assert "Traceback" in (damaged / "log.txt").read_text()
    shutil.rmtree(damaged)
    assert main(command(tmp_path, "--methods", "ours", "vae", "--seeds", "0")) == 0
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    assert "Not finished" not in (tmp_path / "report.md").read_text()


def test_how_a_worker_ended_is_told(tmp_path: Path) -> None:
    assert _reason(tmp_path, -9) == "it was killed by SIGKILL"
    (tmp_path / "error.txt").write_text("ValueError: too small\nmore\n")
    assert _reason(tmp_path, 1) == "ValueError: too small"


def test_an_interrupted_benchmark_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, made = FlowModule.training_step, []

    def step(self: FlowModule, batch: dict, batch_idx: int) -> torch.Tensor:
        made.append(self.global_step)
        if made == [0, 1, 2]:
            signal.raise_signal(signal.SIGINT)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(FlowModule, "training_step", step)
    asked = command(tmp_path, "--methods", "ours", "--seeds", "3", steps=5)
    assert main(asked) == 130
    assert "interrupted" in capsys.readouterr().out and not figures(tmp_path)
    assert main(asked) == 0
    assert made == [0, 1, 2, 3, 4] and figures(tmp_path)["ours-seed3"]["steps_made"] == 5
    # A run that was trained and not yet measured is not trained again.
    before = figures(tmp_path)["ours-seed3"]["figures"]
    (tmp_path / "ours-seed3" / "benchmark.json").unlink()
    assert main(asked) == 0 and made == [0, 1, 2, 3, 4]
    assert figures(tmp_path)["ours-seed3"]["figures"]["equivariance"] == before["equivariance"]


def test_an_interrupted_benchmark_goes_on_where_its_data_have_moved(
    tmp_path: Path, interrupt: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = write_mnist(tmp_path / "old"), tmp_path / "new"

    def asked(root: Path) -> list[str]:
        given = command(tmp_path / "made", "--methods", "vae", "--seeds", "0", "--data.root", str(root), steps=4)
        return [given[0], "mnist", *given[2:]]

    interrupt(1)
    assert main(asked(old)) == 130 and (tmp_path / "made" / "vae-seed0" / "last.ckpt").is_file()
    old.rename(new)
    assert main(asked(new)) == 0
    made = figures(tmp_path / "made")["vae-seed0"]
    assert made["steps_made"] == 4 and made["config"]["data"]["root"] == str(new)


def test_a_benchmark_in_this_process_leaves_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(worker, "prepare_process", lambda: asked.append("prepare"))
    base, _, _ = parse_train(["demo", *TINY])
    little = EvaluationConfig(2, 0, 1, 0, 1, 0, 0)
    before = torch.get_num_threads()
    plan = plan_benchmark(
        base, choose_variants(["vae"]), tmp_path, seeds=[0], steps=1, workers=0, threads=before + 1, evaluation=little
    )
    assert plan.run(lambda line: None)
    assert figures(tmp_path)["vae-seed0"]["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before and asked == []


def test_mistakes_in_a_metric_are_not_told_as_missing_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object, **named: object) -> None:
        raise TypeError("unsupported operand")

    data = Digits("test", steps=2)
    sizes = {"latent_dim": 9, "encoder": {"widths": [8]}, "decoder": {"widths": [8]}}
    settings = EvaluationConfig(2, 0, 1, 2, 1, 0, 0)
    model = build_model("topographic-vae", (3, 28, 28), 3, **sizes)
    assert "has no latent flow" in measure(model, data, data, settings)["latent_equivariance"]["missing"]
    monkeypatch.setattr(evaluation, "latent_equivariance_error", wrong)
    with pytest.raises(TypeError, match="unsupported operand"):
        measure(model, data, data, settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--methods", "ours", "vea"], "unknown method 'vea': did you mean vae"),
        (["digits", "--methods", "field-magnetic"], "field-gradient"),
        (["digits", "--ablations", "colour"], "unknown ablation 'colour': choose among prior, pde"),
        (["digits", "--steps", "5", "--minutes", "1"], "not both"),
        (["digits", "--steps", "0"], "train.steps must be above 0"),
        (["digits", "--train.steps", "5"], "give --steps"),
        (["digits", "--steps", "2", "--workers", "-1"], "workers must be"),
        (["digits", "--steps", "2", "--workers", "3", "--threads", "2"], "take fewer workers"),
        (["digits", "--steps", "2", "--seeds", "1", "1"], "distinct seeds"),
        (["digits", "--steps", "2", "--evaluate.images", "0"], "evaluate.images must be at least 1"),
        (["digits", "--steps", "2", "--evaluate.resamples", "1"], "a single one shows no spread"),
        (["digits", "--steps", "2", "--model.colour", "red"], "model.colour"),
        (["digits", "--steps", "2", "--colour", "red"], "unknown option --colour"),
        (["digits", "--steps", "2", "--data.flows", "[growth]"], "scaling, rotation, colouring"),
        (["numerals", "--steps", "2"], "unknown preset 'numerals'"),
        (["mnist", "--steps", "2", "--data.root", "nowhere"], "holds no train-images-idx3-ubyte"),
        (["report"], "report takes the folder"),
        (["report", "."], "is not the folder of a benchmark"),
        (["digits", "runs"], "unexpected 'runs'"),
    ],
)
def test_mistakes_are_told_before_any_work(
    arguments: list[str], message: str, refused: Callable[[list[str]], str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(["benchmark", *arguments])
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_named(tmp_path: Path) -> None:
    base = load_config("demo")
    base.model["potential"] = "magnetic"
    with pytest.raises(ValueError, match=r"^field-gradient: potential must be"):
        plan_benchmark(base, choose_variants(["vae", "field-gradient"]), tmp_path / "new", steps=1)
    assert not list(tmp_path.iterdir())


def test_variants_are_chosen_by_name_and_group() -> None:
    assert [variant.name for variant in choose_variants()] == list(METHODS)
    assert [v.name for v in choose_variants(["vae"], ["t"])] == ["vae", "t-4", "t-12"]
    assert [v.name for v in choose_variants(groups=[])] == ["ours", *ABLATIONS]
    assert {variant.group for variant in ABLATIONS.values()} == set(ABLATION_GROUPS)
    assert {"prior", "pde", "field", "room", "k", "t", "solver", "objective"} == set(ABLATION_GROUPS)


def test_methods_share_sizes_data_and_optimiser() -> None:
    base = load_config("mnist-small")
    made = {name: configure(base, get_variant(name), 1) for name in METHODS}
    for name, config in made.items():
        assert config.data == base.data and config.seed == 1 and config.method == name
        assert all(
            config.model[key] == base.model[key] for key in ("latent_dim", "encoder", "decoder", "frames_per_step")
        )
        assert config.train.stratified == (METHODS[name].labels != "inferred")
    weak, sparse = load_config("mnist-weak"), load_config("mnist-sparse")
    told = ("estimator", "tau", "anneal_steps", "factor_encoder")
    assert made["ours-weak"].model == {**base.model, **{name: weak.model[name] for name in told}}
    other = ("objective", "bending_weight")  # which it has not
    assert made["sta"].model == {k: v for k, v in {**sparse.model, **base.model}.items() if k not in other}
    assert made["free"].model["hidden"] == base.model["hidden"] and "field" not in made["free"].model
    assert "hidden" not in made["vae"].model
    # From a preset without labels the supervised method is supervised all the same.
    assert "supervision" not in configure(weak, get_variant("ours"), 0).model
    assert configure(weak, get_variant("ours-weak"), 0).model["tau"] == 300.0


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_builds_a_model_that_can_be_trained(name: str) -> None:
    base, _, _ = parse_train(["demo", *TINY])
    config = configure(base, get_variant(name), 0)
    data = config.data.dataset("train")
    variant = ABLATIONS[name]
    assert data.num_flows == (variant.flows or 3) and data.num_steps == (variant.steps or 2)
    model = make_model(config, data)
    batch = data.batch(list(range(4)), [0, 0, 1, 1])
    loss = model(batch["frames"], batch["t"], batch["k"]).loss
    loss.backward()
    assert torch.isfinite(loss)
    for setting, value in variant.model.items():
        assert config.model[setting] == value


def test_ablations_differ_in_what_they_say() -> None:
    base, _, _ = parse_train(["demo", *TINY])

    def made(name: str):
        config = configure(base, get_variant(name), 0)
        return make_model(config, config.data.dataset("train"))

    fields = [type(made(f"field-{name}").flow.field).__name__ for name in ("gradient", "helmholtz", "free")]
    assert fields == ["GradientField", "HelmholtzField", "FreeField"]
    assert type(made("prior-vamp").prior).__name__ == "VampPrior" and made("prior-vamp").objective == "marginal"
    assert type(made("prior-diffusion").prior).__name__ == "Diffusion"
    assert made("ours").prior.at_rest == (64, 0.05) and made("room-none").prior.at_rest is None
    assert (
        made("pde-none").hj_weight == 0 and made("pde-hj").force is None and made("pde-generalised").force is not None
    )
    assert [made(f"solver-{name}").flow.solver.method for name in ("euler", "rk4", "dopri5")] == [
        "euler",
        "rk4",
        "dopri5",
    ]


def test_ablations_and_controls_leave_out_what_the_preset_asks_of_other_flows() -> None:
    weights = {"solenoidal_weight": 3.0, "acceleration_weight": 1.0}
    base, _, _ = parse_train(["demo", *TINY])
    asking = {**base.model, **weights, "field": "helmholtz", "evaluation_solver": {"method": "dopri5"}}
    base = Config.from_dict(base.as_dict() | {"model": asking})

    def made(name: str):
        config = configure(base, get_variant(name), 0)
        return make_model(config, config.data.dataset("train"))

    assert made("ours").solenoidal_weight == made("sta").solenoidal_weight == 3
    assert made("sta").acceleration_weight == 1 and made("sta").flow.evaluation_solver.method == "dopri5"
    assert (made("field-gradient").solenoidal_weight, made("field-gradient").acceleration_weight) == (0, 1)
    for name in ("field-free", "pde-none", "free", "euler-no-pde"):
        assert (made(name).solenoidal_weight, made(name).acceleration_weight) == (0, 0)
    for name in ("solver-euler", "solver-rk4", "solver-dopri5", "euler-no-pde", "objective-marginal"):
        assert made(name).flow.evaluation_solver is None  # measured as it was trained
    assert made("field-free").flow.evaluation_solver.method == "dopri5"


def test_which_flows_turn_is_asked_of_helmholtz_fields_of_known_transformations() -> None:
    base, _, _ = parse_train(["demo", *TINY])
    asking = {**base.model, "field": "helmholtz", "turning": ["rotation", 2]}
    base = Config.from_dict(base.as_dict() | {"model": asking})

    def turning(name: str):
        return configure(base, get_variant(name), 0).model.get("turning")

    assert turning("ours") == turning("field-skew") == turning("euler-no-pde") == ["rotation", 2]
    assert turning("k-2") == ["rotation"] and turning("k-5") == ["rotation", 2]
    for name in ("field-gradient", "field-free", "free", "ours-weak", "sta", "vae"):
        assert turning(name) is None
    config = configure(base, get_variant("ours"), 0)
    assert make_model(config, config.data.dataset("train")).flow.field.turning == (1, 2)


def test_a_model_with_a_vampprior_is_saved_and_loaded(tmp_path: Path) -> None:
    sizes = {"latent_dim": 4, "hidden": (8, 8), "encoder": {"widths": [8]}, "decoder": {"widths": [8]}}
    for name in ("ours", "sta"):
        model = build_model(name, (3, 28, 28), 2, prior="vamp", augment_dim=0, **sizes)
        z = torch.randn(3, 4)
        expected = model.prior.at(0.0).log_prob(z)
        assert model.prior.encoder is model.encoder  # and not a copy that nothing trains
        loaded = type(model).from_pretrained(model.save_pretrained(tmp_path / name))
        torch.testing.assert_close(loaded.prior.at(0.0).log_prob(z), expected)


def test_recorded_sequences_have_no_ablation_of_their_length(tmp_path: Path) -> None:
    base = Config.from_dict({"data": {"name": "sequences", "root": str(tmp_path)}})
    with pytest.raises(ValueError, match="t-4 changes the sequences, which are recorded"):
        configure(base, get_variant("t-4"), 0)


def test_what_is_measured_of_scenes() -> None:
    small = {"size": 8, "steps": 2, "hues": 3, "scales": 3, "orientations": 3, "shapes": ("cube", "cone", "sphere")}
    train, test = Scenes("train", **small), Scenes("test", **small)
    settings = EvaluationConfig(6, 2, 2, 2, 3, factor_samples=60, vp_images=16, resamples=2)
    sizes = {"latent_dim": 4, "encoder": {"widths": [8]}, "decoder": {"widths": [8]}}
    models = {name: build_model(name, (3, 8, 8), 4, num_frames=3, **sizes) for name in ("ours-weak", "vae")}
    made = {name: measure(model, train, test, settings) for name, model in models.items()}
    for name, got in made.items():
        assert got["equivariance"]["count"] == 6 and len(got["latent_equivariance"]["mean"]) == 4
        assert got["mig"]["count"] == got["dci"]["informativeness"]["count"] == got["sap"]["count"] == 60
        assert {"floor_hue", "wall_hue", "object_hue", "scale"} <= set(got["mig"]["factors"])
        assert got["mig"]["low"] <= got["mig"]["value"] <= got["mig"]["high"]
        assert 0 <= got["vp"]["value"] <= 1 and got["likelihood"]["count"] == 8
        assert ("value" in got["factor_accuracy"]) == (name == "ours-weak")
        combining = got["combining"]  # of the vae that of its traversals
        assert [len(combining[way]["error"]) for way in ("backward", "superpose", "switch", "together")] == [4, 6, 6, 4]
    assert made["ours-weak"]["factor_accuracy"]["count"] == 24


def test_estimated_divergences_are_exact_where_the_bound_is_measured() -> None:
    data = Digits("test", steps=2)
    settings = EvaluationConfig(2, 2, 2, 0, 1, 0, 0)
    sizes = {"latent_dim": 4, "hidden": (8, 8), "encoder": {"widths": [8]}, "decoder": {"widths": [8]}}
    model = build_model("ours", (3, 28, 28), 3, objective="marginal", divergence="hutchinson", **sizes)
    got = measure(model, data, data, settings)["likelihood"]["per_frame"]
    assert model.flow.divergence == "hutchinson"
    model.flow.divergence = "exact"
    assert got == measure(model, data, data, settings)["likelihood"]["per_frame"]


def test_processor_time_is_what_the_process_works(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(module_of_training.time, "process_time", lambda: now[0])
    module = FlowModule(torch.nn.Linear(1, 1), LearningRateSchedule(minutes=1), clock="processor")
    module._begun = module._now()
    now[0] += 30.0 * torch.get_num_threads()
    assert module.progress == 0.5
    with pytest.raises(ValueError, match="'wall' or 'processor'"):
        FlowModule(torch.nn.Linear(1, 1), LearningRateSchedule(minutes=1), clock="sand")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", "["),
        ("settings.json", "{}"),
        ("settings.json", '{"config": {"train": {"steps": 1.5}}, "evaluate": {}}'),
        ("settings.json", '{"config": {}, "evaluate": {"zz": 1}}'),
        ("settings.json", '{"config": {}, "evaluate": {}, "data": 1}'),
        ("result.json", "{"),
        ("result.json", '{"finished": "yes"}'),
    ],
)
def test_a_damaged_file_of_a_benchmarks_run_is_told_by_name(tmp_path: Path, name: str, content: str) -> None:
    settings = {"config": load_config("demo").as_dict(), "evaluate": {}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name.replace('.', chr(92) + '.')} (is damaged|does not hold)"):
        worker.execute(tmp_path)
