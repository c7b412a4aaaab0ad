"""The arguments of ``flowfactor train``: their help, and the configuration that they ask for."""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from flowfactor._methods import METHODS
from flowfactor._plugins import import_modules
from flowfactor.cli.errors import fail
from flowfactor.registry import parameters, registered
from flowfactor.training.config import (
    Config,
    DataConfig,
    TrainConfig,
    imports_of,
    list_presets,
    load_config,
    located,
    preset_path,
    read_file,
)
from flowfactor.training.folder import run_folder
from flowfactor.training.settings import SettingError, kinds, read_text, unknown_key
from flowfactor.training.signatures import Setting, data_settings, model_settings, of_dataclass

_TRAIN = """Train a model by a preset or by your own YAML file.

examples:
  flowfactor train demo
  flowfactor train mnist-small --data.root ~/mnist --seed 1
  flowfactor train mnist-small --train.minutes 5 --model.field gradient --output runs/gradient
  flowfactor train demo --method beta-vae --model.beta 8 --output runs/beta
  flowfactor train runs/gradient/config.yaml --resume
  flowfactor train demo --import mymethod.py --method mine

Any key can be overridden, in the order given; values are written as in YAML. Ctrl-C ends the training after the current step
and saves it."""

_SECTIONS: Mapping[str, type[Any]] = {"data": DataConfig, "train": TrainConfig}
_FLAGS = {
    "resume": "go on from the checkpoint in the output folder",
    "overwrite": "begin anew in a folder that holds a run, which goes when the new one has its first checkpoint",
}
_IMPORT = "import"
IMPORT_HELP = (
    "module of yours to run first, which registers methods, data or parts: a name or a .py file; may be given again"
)
_SIZES = ("dim", "num_flows", "latent_dim", "channels", "image_size", "num_frames", "likelihood", "generator")
_OF_THE_DATA = ("image_shape", "num_flows", "num_frames")


def train_settings(method: str) -> dict[str, list[Setting]]:
    """The keys that ``flowfactor train`` takes, by section; those of no section stand under ``""``.

    Args:
        method: The method, whose model's settings they are.

    Returns:
        The settings.
    """
    top = [setting for setting in of_dataclass(Config) if setting.name not in (*_SECTIONS, "model", "imports")]
    sections = {name: of_dataclass(kind) for name, kind in _SECTIONS.items()}
    return {"": top, **sections, "model": list(model_settings(method).values())}


def train_help(method: str, data: str = DataConfig.name) -> str:
    """Writes the help of ``flowfactor train``: every key, with its type and meaning.

    Args:
        method: The method, whose model's settings are shown.
        data: The data set whose options are shown.

    Returns:
        The help.
    """
    parser = argparse.ArgumentParser(
        prog="flowfactor train",
        usage=f"flowfactor train {{{','.join(list_presets())},FILE.yaml}} [--KEY VALUE ...] [--resume | --overwrite]",
        description=_TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    options = parser.add_argument_group("options")
    options.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    options.add_argument("--config", metavar="FILE", help="further YAML file, which overrides what stands before it")
    options.add_argument(f"--{_IMPORT}", metavar="MODULE", help=IMPORT_HELP)
    for name, text in _FLAGS.items():
        options.add_argument(f"--{name}", action="store_true", help=text)
    titles = {
        "model": f"model, of the method {method} (add --method NAME for those of another)",
        "data.options": f"data.options, of the data set {data} (add --data.name NAME for those of another)",
    }
    for section, settings in (train_settings(method) | {"data.options": list(data_settings(data).values())}).items():
        group = parser.add_argument_group(titles.get(section, section)) if section else options
        for setting in settings:
            key = f"{section}.{setting.name}".strip(".")
            group.add_argument(
                f"--{key}", metavar=_metavar(setting.kind), help=_help(section, setting).replace("%", "%%")
            )
    return parser.format_help()


def _metavar(kind: Any) -> str:
    plain = {bool: "true|false", int: "INTEGER", float: "NUMBER", str: "TEXT", types.NoneType: "null", Any: "VALUE"}
    if kind in plain:
        return plain[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return "|".join(map(_metavar, arguments))
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is dict or origin is Mapping or "Mapping" in str(origin):
        return "{KEY: VALUE, ...}"
    inner = [_metavar(argument) for argument in arguments]
    return f"[{', '.join(inner)}]" if origin is tuple else f"[{inner[0]}, ...]"


def _help(section: str, setting: Setting) -> str:
    if section == "model" and setting.name in _OF_THE_DATA:
        default = "the data's"
    elif setting.default is None:
        default = "null"
    else:
        default = str(list(setting.default) if isinstance(setting.default, tuple) else setting.default)
    names = ""
    if setting.name == "method":
        names = f" {', '.join(METHODS)}."
    elif section == "model" and registered(setting.name):
        names = (
            f" Registered: {', '.join(f'{name}{_options(part)}' for name, part in registered(setting.name).items())}."
        )
    return f"{setting.help}{names} (default: {default})".strip()


def _options(part: Any) -> str:
    """The options of a registered part, which stand beside its name in a mapping: those arguments that have a default."""
    taken = [p for p in parameters(part).values() if p.default is not p.empty and p.name not in _SIZES]
    return f" ({', '.join(f'{p.name}: {p.default}' for p in taken)})" if taken else ""


def parse_train(arguments: Sequence[str]) -> tuple[Config, bool, bool]:
    """Reads the arguments of ``flowfactor train``; what is wrong with them ends the program.

    Args:
        arguments: A preset or the path of a YAML file, and overrides.

    Returns:
        The configuration, whether to resume, and whether to overwrite.

    Raises:
        SystemExit: With code 2 where a preset or key is unknown, or a value is wrong; with 0 after the help.
        ImportError: If PyYAML is not installed.

    Example:
        >>> config, resume, overwrite = parse_train(["demo", "--train.steps", "10", "--model.field", "gradient"])
        >>> config.train.steps, config.model["field"], resume
        (10, 'gradient', False)
    """
    arguments = list(arguments)
    try:
        if "-h" in arguments or "--help" in arguments:
            print(train_help(*_to_help(arguments)), end="")
            raise SystemExit(0)
        return read_train(arguments)
    except (ValueError, OSError, ImportError) as error:
        fail("train", error)


def read_train(arguments: Sequence[str]) -> tuple[Config, bool, bool]:
    """Reads the arguments of ``flowfactor train``.

    Args:
        arguments: A preset or the path of a YAML file, and overrides.

    Returns:
        The configuration, whether to resume, and whether to overwrite.

    Raises:
        ValueError: If a preset or key is unknown, or a value is wrong.
        FileNotFoundError: If there is no such file.
        ImportError: If PyYAML is not installed.
    """
    path, given = _begun(arguments)
    imports = _imported(path, given)
    base = Config() if path is None else load_config(path)  # the settings of a run mean the folder that they lie in
    method = _method(base.method, given)
    values = (base if method == base.method else base.with_method(method)).as_dict()
    values["imports"] = imports
    flags = {name for name, _ in given} & set(_FLAGS)
    try:
        for key, text in given:
            if key == "config":
                _merge(values, method, preset_path(text))
            elif key not in (*_FLAGS, _IMPORT):
                _assign(values, method, key, text)
        config = Config.from_dict(values)
    except SettingError as error:
        raise ValueError(f"--{error}") from error
    folder = None if path is None else run_folder(path)
    if (
        path is not None
        and "resume" in flags
        and folder is not None
        and Path(config.output).expanduser().resolve() != folder.resolve()
    ):
        raise ValueError(
            f"{path} belongs to the run in {folder}, and the output is {config.output}: leave --output out to go on with "
            f"that run, or give {Path(config.output) / path.name} to go on with the other one"
        )
    return config, "resume" in flags, "overwrite" in flags


def _begun(arguments: Sequence[str]) -> tuple[Path | None, list[tuple[str, str]]]:
    """The file that the settings begin with, None where options alone name the data, and the options."""
    begun = bool(arguments) and not arguments[0].startswith("-")
    given = _given(arguments[begun:])
    if not begun and "data.name" not in dict(given):
        raise ValueError(
            f"begin with a preset ({', '.join(list_presets())}) or the path of a YAML file, or name the data by --data.name"
        )
    return preset_path(arguments[0]) if begun else None, given


def _imported(path: Path | None, given: Sequence[tuple[str, str]]) -> list[str]:
    """Imports what files and options ask for; gives what is to be kept of that."""
    files = [] if path is None else [path]
    files += [preset_path(text) for key, text in given if key == "config"]
    asked = [entry for file in files for entry in imports_of(file)]
    return import_modules([*asked, *(text for key, text in given if key == _IMPORT)])


def _given(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The options in their order, with what stands after each."""
    given, waiting = [], list(arguments)
    while waiting:
        option, equals, text = waiting.pop(0).partition("=")
        if not option.startswith("--"):
            raise ValueError(f"unexpected {option + equals + text!r}: options are --KEY VALUE")
        key = option.removeprefix("--")
        if key in _FLAGS:
            if equals:
                raise ValueError(f"{option} takes no value")
        elif not equals:
            if not waiting or waiting[0].startswith("--"):
                raise ValueError(f"{option} needs a value: {option} VALUE")
            text = waiting.pop(0)
        given.append((key, text))
    return given


def _method(method: str, given: Sequence[tuple[str, str]]) -> str:
    """The method that is asked for: by the last that says so."""
    for key, text in given:
        if key == "method":
            method = text
        elif key == "config":
            path = preset_path(text)
            values, lines = read_file(path)
            with located(path, lines):
                method = Config.from_dict({"method": values.get("method", method)}).method
    return Config(method=method).method  # tells now where there is none of that name


def _to_help(arguments: Sequence[str]) -> tuple[str, str]:
    """The method and the data set that the help is of."""
    wanted = [argument for argument in arguments if argument not in ("-h", "--help")]
    named = wanted[:1] if wanted and not wanted[0].startswith("-") else []
    path, given = preset_path(named[0]) if named else None, _given(wanted[len(named) :])
    _imported(path, given)
    base = Config() if path is None else load_config(path)
    data = [text for key, text in given if key == "data.name"]
    return _method(base.method, given), DataConfig(name=data[-1] if data else base.data.name).name


def _merge(values: dict[str, Any], method: str, path: Path) -> None:
    """Puts the keys of a file over the values."""
    more, lines = read_file(path)
    with located(path, lines):
        Config.from_dict({"method": method, **more})
    more.pop("imports", None)  # they are imported, and kept beside the others
    for name, value in more.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value


def _assign(values: dict[str, Any], method: str, key: str, text: str) -> None:
    """Puts one option's value in its place."""
    section, _, rest = key.partition(".")
    known = {name: {entry.name: entry.kind for entry in entries} for name, entries in train_settings(method).items()}
    every = [f"{part}.{name}".strip(".") for part, names in known.items() for name in names]
    if not rest and section in kinds(Config) and section != "imports":
        if section in (*_SECTIONS, "model"):
            values[section] |= read_text(key, dict[str, Any], text)
        else:
            values[section] = read_text(key, known[""][section], text)
        return
    name, *inner = rest.split(".")
    if name not in known.get(section, {}) or not section:
        raise unknown_key(key, [*every, "config", _IMPORT, *_FLAGS])
    if not inner:
        values[section][name] = read_text(key, known[section][name], text)
        return
    place = values[section]
    for part in (name, *inner[:-1]):
        if not isinstance(place.get(part), dict):
            place[part] = {}
        place = place[part]
    place[inner[-1]] = read_text(key, Any, text)
