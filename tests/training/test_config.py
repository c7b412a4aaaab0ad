"""Settings: what files, mappings, command lines and Python may give for them, and how mistakes are told."""

from __future__ import annotations

import importlib
import inspect
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from flowfactor.cli.arguments import parse_train, train_help, train_settings
from flowfactor.comparison import ABLATIONS, configure, get_variant
from flowfactor.models import METHODS
from flowfactor.training import Config, DataConfig, EvaluationConfig, TrainConfig, list_presets, load_config
from flowfactor.training.settings import describe_kind, kinds, read
from flowfactor.training.signatures import data_settings, model_settings, of_dataclass, of_source


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a file of settings."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "own.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def value_of(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    made = getattr(config, section)
    return made[name] if isinstance(made, dict) else getattr(made, name)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.learning_rate", "1e-3", 0.001),
        ("train.learning_rate", "1E-3", 0.001),
        ("train.learning_rate", "'1e-3'", 0.001),
        ("train.minutes", "5", 5.0),
        ("train.minutes", "null", None),
        ("train.steps", "10", 10),
        ("train.steps", "'10'", 10),
        ("train.steps", "010", 10),  # eight in YAML 1.1
        ("train.steps", "10_000", 10000),
        ("train.betas", "[0.9, 99e-2]", (0.9, 0.99)),
        ("train.tensorboard", "no", False),
        ("train.tensorboard", "'no'", False),  # true, were it taken for the text that it is
        ("train.clip", "~", None),
        ("model.hj_weight", "1e-2", 0.01),
        ("model.hidden", "[8, 8]", [8, 8]),
        ("model.solver", "{rtol: 1e-3}", {"rtol": 0.001}),
        ("model.evaluation_solver", "{rtol: 1e-6}", {"rtol": 1e-6}),
        ("model.solenoidal_weight", "3", 3.0),
        ("model.acceleration_weight", "1e-1", 0.1),
        ("model.likelihood", "gaussian", "gaussian"),
        ("data.root", "2024-01-01", "2024-01-01"),  # a date in YAML 1.1
        ("data.flows", "[rotation, perspective]", ["rotation", "perspective"]),
        ("data.options", "{seed: 3, name: '3'}", {"seed": 3, "name": "3"}),
    ],
)
def test_a_value_is_the_same_from_a_file_and_from_the_command_line(
    key: str, text: str, value: Any, written: Callable[[str], Path]
) -> None:
    section, _, name = key.partition(".")
    path = written(f"{section}:\n  {name}: {text}\n")
    of_file, of_both = load_config(path), parse_train([str(path)])[0]
    of_line, _, _ = parse_train([str(written("seed: 0")), f"--{key}", text])
    for config in (of_file, of_both, of_line):
        found = value_of(config, key)
        assert found == value and type(found) is type(value)


def test_what_other_readers_of_yaml_take_for_text_is_a_number_where_one_is_expected() -> None:
    values = yaml.safe_load("train: {learning_rate: 1e-3, warmup: 1e-1}")
    assert values["train"]["learning_rate"] == "1e-3"
    assert Config.from_dict(values).train.learning_rate == 0.001


WRONG = [
    ({"train": {"learning_rate": "fast"}}, "train.learning_rate must be a number, got 'fast'"),
    ({"train": {"learning_rate": True}}, "train.learning_rate must be a number, got True"),
    ({"train": {"learning_rate": None}}, "train.learning_rate must be a number, got None"),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate must be a finite number, got nan"),
    ({"train": {"learning_rate": float("inf")}}, "train.learning_rate must be a finite number, got inf"),
    ({"train": {"learning_rate": 10**400}}, "train.learning_rate must be a number, got 1000"),
    ({"train": {"steps": 10.5}}, "train.steps must be a whole number or null, got 10.5"),
    ({"train": {"steps": [10]}}, "train.steps must be a whole number or null, got [10]"),
    ({"train": {"minutes": True}}, "train.minutes must be a number or null, got True"),
    ({"train": {"minutes": "abc"}}, "train.minutes must be a number or null, got 'abc'"),
    ({"train": {"minutes": ""}}, "train.minutes must be a number or null, got ''"),
    ({"train": {"tensorboard": "nope"}}, "train.tensorboard must be true or false, got 'nope'"),
    ({"train": {"tensorboard": 1}}, "train.tensorboard must be true or false, got 1"),
    ({"train": {"betas": 0.9}}, "train.betas must be a list of 2 numbers, got 0.9"),
    ({"train": {"betas": [0.9]}}, "train.betas must be a list of 2 numbers, got [0.9]"),
    ({"train": {"betas": [0.9, "x"]}}, "train.betas must be a list of 2 numbers, got [0.9, 'x']"),
    ({"train": {"betas": [0.9, 1.5]}}, "train.betas are two decay rates in [0, 1)"),
    ({"train": {"warmup": 1.5}}, "train.warmup is a share of the training in [0, 1), got 1.5"),
    (
        {"train": {"schedule": "cosin"}},
        "train.schedule must be one of cosine, constant, got 'cosin': did you mean cosine?",
    ),
    ({"train": {"clock": None}}, "train.clock must be one of wall, processor, got None"),
    ({"train": {"devices": "2.5"}}, "train.devices must be a whole number, got '2.5'"),
    ({"train": {"accelerator": 1}}, "train.accelerator must be text, got 1"),
    ({"train": {"stepz": 3}}, "train.stepz is no setting: did you mean train.steps?"),
    ({"train": None}, "train must be a mapping, got None"),
    ({"train": [3]}, "train must be a mapping, got [3]"),
    ({"train": {3: 4}}, "train must be a mapping whose keys are text"),
    ({"data": None}, "data must be a mapping, got None"),
    ({"data": "digits"}, "data must be a mapping, got 'digits'"),
    ({"data": {"name": "mnits"}}, "did you mean mnist?"),
    ({"data": {"name": 3}}, "data.name must be one of mnist, digits"),
    ({"data": {"flows": "rotation"}}, "data.flows must be a list of texts or null, got 'rotation'"),
    ({"data": {"flows": [1, 2]}}, "data.flows must be a list of texts or null, got [1, 2]"),
    ({"data": {"options": None}}, "data.options must be a mapping, got None"),
    ({"data": {"options": {"a": {"b": float("nan")}}}}, "data.options.a.b must be a finite number, got nan"),
    ({"data": {"steps": 8.0}}, "data.steps must be a whole number, got 8.0"),
    ({"model": None}, "model must be a mapping, got None"),
    ({"model": {"latent_dims": 3}}, "model.latent_dims is no setting: did you mean model.latent_dim?"),
    ({"model": {"hidden": "big"}}, "model.hidden must be a list of whole numbers, got 'big'"),
    ({"model": {"encoder": 3}}, "model.encoder must be a mapping or null, got 3"),
    ({"method": "vea"}, "unknown method 'vea': did you mean vae?"),
    ({"method": None}, "method must be text, got None"),
    ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ({"seed": 2**63}, "seed must be below 2^63 in size, got 9223372036854775808"),
    ({"seed": 10**5000}, "seed must be below 2^63 in size, got a number of more than 4300 digits"),
    ({"output": None}, "output must be text, got None"),
    ({"trian": {}}, "trian is no setting: did you mean train?"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_wrong_values_name_their_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.from_dict(values)


def test_settings_made_in_python_are_checked_too() -> None:
    for kind, values, message in (
        (TrainConfig, {"steps": 10.5}, "train.steps must be a whole number or null, got 10.5"),
        (TrainConfig, {"tensorboard": 3}, "train.tensorboard must be true or false"),
        (DataConfig, {"name": "mnits"}, "did you mean mnist?"),
        (Config, {"seed": "zero"}, "seed must be a whole number, got 'zero'"),
        (Config, {"model": {"colour": "red"}}, "model.colour is no setting"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            kind(**values)
    with pytest.raises(TypeError, match="data must be a DataConfig, got dict"):
        Config(data={"name": "digits"})  # type: ignore[arg-type]
    assert Config(output=Path("runs") / "a").output == str(Path("runs") / "a")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: 3\n  learning_rate: fast\n", "line 3: train.learning_rate must be a number, got 'fast'"),
        ("train:\n  steps: 0\n", "line 2: train.steps must be above 0, got 0"),
        ("seed: 0\ntrain:\n  stepz: 3\n", "line 3: train.stepz is no setting: did you mean train.steps?"),
        ("seed: 0\noutput: 7\n", "line 2: output must be text, got 7"),
        ("model:\n  solver:\n    rtol: .nan\n", "line 3: model.solver.rtol must be a finite number, got nan"),
        ("data: null\n", "line 1: data must be a mapping, got None"),
        ("model: null\n", "line 1: model must be a mapping, got None"),
        ("train:\n  steps: 3\n  steps: 4\n", "line 3 is not YAML: the key steps stands twice, first in line 2"),
        ("train:\n\tsteps: 3\n", "line 2 is not YAML: found character '\\t'"),
        ("train: [3\n", "is not YAML: expected ',' or ']'"),
        ("a: &a [*a]\n", "nested too deeply"),
        ("- 3\n", "must hold sections such as data, model and train, got [3]"),
        ("", "must hold sections such as data, model and train, got None"),
        ("output: 2024-01-01\nseed: 1:30\n", "line 2: seed must be a whole number, got '1:30'"),
        (b"output: caf\xe9\n", "is not a text file in UTF-8: byte 11 cannot be read"),
        (b"\x80\x02ckpt\x00", "is not a text file in UTF-8"),
        (b"PK\x03\x04\x00\x00", "is not YAML"),
        (b"seed: 0\n" * 200_000, "is no file of settings: it has 1,600,000 bytes"),
    ],
)
def test_mistakes_in_a_file_name_the_file_the_line_and_the_key(
    text: str | bytes, message: str, written: Callable[[str | bytes], Path], refused: Callable[[list[str]], str]
) -> None:
    path = written(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        load_config(path)
    assert message in str(error.value) and "\n" not in str(error.value)
    told = refused(["train", str(path)])
    assert told == f"flowfactor train: error: {error.value}\n"


def test_a_file_of_endless_aliases_ends(written: Callable[[str], Path]) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ValueError, match="too many entries"):
        load_config(written("data:\n  options:\n    " + "\n    ".join(levels)))


def test_a_folder_is_no_file_of_settings(tmp_path: Path, refused: Callable[[list[str]], str]) -> None:
    assert "is a folder: give a YAML file" in refused(["train", str(tmp_path)])
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert f"is a folder: give {tmp_path / 'config.yaml'}" in refused(["train", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_config(tmp_path / "none.yaml")


def every_config() -> list[Config]:
    base = load_config("demo")
    made = [load_config(preset) for preset in list_presets()]
    return made + [configure(base, get_variant(name), 1) for name in (*METHODS, *ABLATIONS)]


def test_files_of_all_presets_and_variants_are_read_back_exactly(tmp_path: Path) -> None:
    for config in every_config():
        (tmp_path / "config.yaml").write_text(config.as_yaml())
        assert load_config(tmp_path / "config.yaml") == config == Config.from_dict(config.as_dict())
        assert parse_train([str(tmp_path / "config.yaml")])[0] == config
        assert Config.from_dict(yaml.safe_load(config.as_yaml())) == config


TEXTS = [
    "1e-3",
    "null",
    "~",
    "no",
    "010",
    "1:30",
    "2024-01-01",
    "",
    " x",
    "x ",
    "#",
    ": ",
    "- a",
    "é\n",
    "'",
    '"',
    "{",
    "*a",
    "=",
    "<<",
]


def drawn(draw: random.Random, kind: Any) -> Any:
    """A value of a type."""
    if kind is Any:
        kind = draw.choice([int, float, str, bool, list[int], dict[str, Any], type(None)])
    members = get_args(kind)
    words = describe_kind(kind)
    if " or " in words and "one of" not in words and words != "true or false":
        return drawn(draw, draw.choice(members))
    if words.startswith("one of"):
        return draw.choice(members)
    if words == "negative_square":
        return words
    if words.startswith("a list of 2 "):
        return (draw.random(), draw.random())
    if words.startswith("a list"):
        return [drawn(draw, members[0]) for _ in range(draw.randrange(3))]
    if words == "a mapping":
        return {draw.choice(TEXTS): drawn(draw, Any) for _ in range(draw.randrange(3))}
    simple: dict[str, Callable[[], Any]] = {
        "null": lambda: None,
        "true or false": lambda: draw.random() < 0.5,
        "a whole number": lambda: draw.randrange(1, 10**6),
        "a number": lambda: draw.random() * 10.0 ** draw.randrange(-12, 1),
        "text": lambda: draw.choice([*TEXTS, "".join(draw.choices(string.printable[:95], k=6))]),
    }
    return simple[words]()


def test_random_settings_are_read_back_exactly(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(150):
        method = draw.choice(list(METHODS))
        values: dict[str, Any] = {"method": method, "seed": draw.randrange(10**6), "output": draw.choice(TEXTS)}
        for section, kind in (("data", DataConfig), ("train", TrainConfig)):
            chosen = draw.sample(list(kinds(kind)), 6)
            values[section] = {name: drawn(draw, kinds(kind)[name]) for name in chosen}
        if values["train"].get("patience") is not None and values["train"].get("validate_every") is None:
            values["train"]["validate_every"] = 7  # patience counts validations
        known = model_settings(method)
        values["model"] = {name: drawn(draw, known[name].kind) for name in draw.sample(list(known), 5)}
        config = Config.from_dict(values)
        for section in ("data", "train"):
            assert all(getattr(getattr(config, section), name) == value for name, value in values[section].items())
        assert config.model == values["model"] and config.output == values["output"]
        (tmp_path / "config.yaml").write_text(config.as_yaml(), encoding="utf-8")
        assert load_config(tmp_path / "config.yaml") == config == Config.from_dict(config.as_dict())
        assert Config.from_dict(yaml.safe_load(config.as_yaml())) == config


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_a_model_are_those_of_its_builder_and_class(method: str) -> None:
    found = model_settings(method)
    expected: dict[str, inspect.Parameter] = {}
    for place in reversed(METHODS[method].settings_from):
        file, _, name = str(place).partition(":")
        owner = getattr(importlib.import_module(f"flowfactor.{file.removesuffix('.py').replace('/', '.')}"), name)
        expected |= dict(inspect.signature(owner).parameters)
    # Parts are made in Python, and cannot be written down.
    parts = {"name", "generator", "settings", "flow", "scale_encoder"}
    parts |= {"prior", "force", "potential"} if "baselines" in str(METHODS[method].settings_from[0]) else set()
    assert set(found) - parts == set(expected) - parts
    for name, setting in found.items():
        assert setting.default == expected[name].default and setting.help
        read(name, setting.kind, setting.default)


def test_the_settings_of_an_evaluation_are_those_of_its_class() -> None:
    known = of_source("training/evaluation.py:EvaluationConfig")
    assert {name: entry.default for name, entry in known.items()} == vars(EvaluationConfig())
    assert all(entry.kind is int and entry.help for entry in known.values())


@pytest.mark.parametrize("method", ["ours", "sta", "beta-vae"])
def test_help_shows_what_is_taken(method: str) -> None:
    shown = set(re.findall(r"^  --([\w.]+)", train_help(method), re.MULTILINE)) - {
        "config",
        "import",
        "resume",
        "overwrite",
    }
    taken = {f"data.{name}" for name in kinds(DataConfig)} | {f"train.{name}" for name in kinds(TrainConfig)}
    taken |= {f"model.{name}" for name in model_settings(method)} | {"method", "seed", "output"}
    taken |= {f"data.options.{name}" for name in data_settings("mnist")}
    assert shown == taken
    assert all(setting.help for settings in train_settings(method).values() for setting in settings)
    for section, settings in train_settings(method).items():
        for setting in settings:
            if setting.name == "method" or (section, setting.name) in (("data", "name"), ("model", "num_frames")):
                continue
            value = setting.default
            text = "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
            parse_train(["demo", "--method", method, f"--{section}.{setting.name}".replace("--.", "--") + f"={text}"])


def test_every_setting_is_explained() -> None:
    assert all(setting.help for kind in (Config, DataConfig, TrainConfig) for setting in of_dataclass(kind))


def test_further_files_and_options_override_in_their_order(tmp_path: Path, written: Callable[[str], Path]) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("train: {steps: 7}\nmodel: {decoder: {initial_mean: 0.3}}\n")
    own = written("train: {steps: 5, batch_size: 4}\nmodel: {decoder: {widths: [8]}, latent_dim: 8}\n")
    config, _, _ = parse_train([str(own), "--train.steps", "6", "--config", str(more), "--model.decoder.local=true"])
    assert config.train.steps == 7 and config.train.batch_size == 4 and config.model["latent_dim"] == 8
    assert config.model["decoder"] == {"initial_mean": 0.3, "local": True}
    assert parse_train([str(own), "--config", str(more), "--train.steps", "6"])[0].train.steps == 6
    more.write_text("train:\n  steps: many\n")
    with pytest.raises(SystemExit):
        parse_train([str(own), "--config", str(more)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demo", "--train.minutes", "abc"], "--train.minutes must be a number or null, got 'abc'"),
        (["train", "demo", "--train.minuts", "3"], "--train.minuts is no setting: did you mean train.minutes?"),
        (["train", "demo", "--minutes", "3"], "--minutes is no setting: did you mean train.minutes?"),
        (["train", "demo", "--resum"], "--resum needs a value"),
        (["train", "demo", "--resum", "x"], "--resum is no setting: did you mean resume?"),
        (["train", "demo", "--train.steps"], "--train.steps needs a value"),
        (["train", "demo", "--train.steps", "--seed", "1"], "--train.steps needs a value"),
        (["train", "demo", "--train.steps.x", "1"], "train.steps must be a whole number or null, got {'x': 1}"),
        (["train", "demo", "--resume=yes"], "--resume takes no value"),
        (["train", "demo", "more"], "unexpected 'more'"),
        (["train", "demo", "--data.name", "mnits"], "did you mean mnist?"),
        (["train", "demo", "--method", "ve"], "unknown method 've': did you mean vae?"),
        (["train", "demo", "--train.schedule", "cosin"], "did you mean cosine?"),
        (["train", "demo", "--model.latent_dims", "4"], "did you mean model.latent_dim?"),
        (["train", "demo", "--config", "nope.yaml"], "there is no file nope.yaml"),
        (["train", "mnist-smal"], "unknown preset 'mnist-smal': did you mean mnist-small?"),
        (["train", "nope.yaml"], "there is no file nope.yaml"),
        (["train", "demo.yaml"], "there is no file demo.yaml: did you mean demo?"),
        (["train", "nowhere/nope"], "there is no file nowhere/nope"),
        (["trian", "demo"], "there is no command 'trian': did you mean train?"),
        (["evaluate", "runs", "--limt", "3"], "did you mean --limit?"),
        (["traverse", "runs", "--gfi", "a.gif"], "did you mean --gif?"),
        (["demo", "--minute", "3"], "did you mean --minutes?"),
        (["benchmark", "mnst"], "unknown preset 'mnst': did you mean mnist?"),
        (["benchmark", "digits", "--metods", "ours"], "unknown option --metods: did you mean --methods?"),
        (["benchmark", "digits", "--ablations", "feld"], "unknown ablation 'feld': did you mean field?"),
        (["benchmark", "digits", "--methods", "our"], "unknown method 'our': did you mean ours?"),
        (["benchmark", "digits", "--train.batchsize", "4"], "did you mean train.batch_size?"),
    ],
)
def test_close_names_are_offered_and_mistakes_told_in_a_line(
    arguments: list[str], message: str, refused: Callable[[list[str]], str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    told = refused(arguments)
    assert message in told.splitlines()[-1]
    # What is shown of usage is the command's own.
    command = "" if arguments[0] == "trian" else f"{arguments[0]} "
    assert all(line.startswith(f"usage: flowfactor {command}") for line in told.splitlines() if "usage" in line)
    assert not list(tmp_path.iterdir())
