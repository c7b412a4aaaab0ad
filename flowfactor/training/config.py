"""What a training run is made of: its settings, and the presets that come with flowfactor."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowfactor._checks import choices, did_you_mean
from flowfactor._methods import METHODS, SHARED_OPTIONS
from flowfactor._plugins import import_modules, is_imported, load_plugins
from flowfactor.errors import require
from flowfactor.training.datasets import DataConfig
from flowfactor.training.folder import run_folder
from flowfactor.training.settings import SettingError, check_settings, kinds, read, short, unknown_key
from flowfactor.training.signatures import model_settings, read_model

PRESETS = Path(__file__).parent.parent / "configs"
"""Folder of the presets."""


@dataclass
class TrainConfig:
    """How to train.

    Args:
        minutes: Length of the training in minutes; resumed runs go on counting.
        steps: Length of the training in steps. With both, whichever is reached first.
        clock: What minutes are minutes of: ``wall`` time, or ``processor`` time (that of all threads, divided by their
            number), which other programs on the machine do not shorten; for trainings on the CPU.
        batch_size: Sequences per step.
        stratified: Equal shares of all transformations in every batch.
        learning_rate: Peak learning rate.
        schedule: ``cosine`` (to zero at the end) or ``constant``.
        warmup: Share of the training over which the learning rate rises from zero.
        betas: Decay rates of AdamW's two averages.
        weight_decay: AdamW's weight decay; at 0 it is Adam.
        clip: Largest norm of the gradient; null does not clip.
        log_every: Steps between log entries.
        checkpoint_minutes: Minutes between checkpoints.
        checkpoint_steps: Steps between checkpoints; null goes by minutes alone.
        validate_every: Steps between validations, on data that are cut out of the training split; null does without.
        patience: Validations without a lower ``val_loss`` after which the training ends; null for no such end.
        validation_fraction: Share of the training split that is cut out where there are validations: of every label, and
            whole groups of your own sequences.
        evaluate_limit: Test sequences of each transformation to measure at the end; null takes all.
        likelihood_limit: Test sequences of the likelihood at the end; 0 leaves it out.
        likelihood_samples: Samples of its importance-weighted bound.
        accelerator: Lightning's accelerator: ``auto``, ``cpu``, ``gpu``, ...
        devices: Number of devices of each node.
        num_nodes: Number of nodes. On one device of one node a process trains alone, whatever variables of a cluster's job
            it finds in its environment.
        precision: Lightning's precision, such as ``32-true`` or ``bf16-mixed``.
        threads: Threads of a processor; null leaves PyTorch's choice.
        tensorboard: Write TensorBoard's log too, if it is installed.
        progress: Show the progress.

    Raises:
        ValueError: If a setting is of another type or out of range.

    Example:
        >>> TrainConfig(steps=0)
        Traceback (most recent call last):
        ...
        flowfactor.training.settings.SettingError: train.steps must be above 0, got 0
    """

    minutes: float | None = None
    steps: int | None = None
    clock: Literal["wall", "processor"] = "wall"
    batch_size: int = 96
    stratified: bool = True
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.04
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float | None = None
    log_every: int = 50
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int | None = None
    validate_every: int | None = None
    patience: int | None = None
    validation_fraction: float = 0.1
    evaluate_limit: int | None = None
    likelihood_limit: int = 300
    likelihood_samples: int = 64
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: str = "32-true"
    threads: int | None = None
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        check_settings(self, "train.")
        at_least_one = ("batch_size", "log_every", "likelihood_samples", "devices", "num_nodes")
        above_zero = ("minutes", "steps", "learning_rate", "clip", "checkpoint_minutes", "checkpoint_steps")
        for name in (*at_least_one, *above_zero, "validate_every", "patience", "evaluate_limit", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(f"train.{name}", f"must be above 0, got {value!r}")
        for name in ("likelihood_limit", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"train.{name}", f"must not be negative, got {getattr(self, name)!r}")
        if not 0 <= self.warmup < 1:
            raise SettingError("train.warmup", f"is a share of the training in [0, 1), got {self.warmup!r}")
        if not 0 < self.validation_fraction < 1:
            raise SettingError(
                "train.validation_fraction",
                f"is a share of the training data in (0, 1), got {self.validation_fraction!r}",
            )
        if self.patience is not None and self.validate_every is None:
            raise SettingError(
                "train.patience", "counts validations: give the steps between them, train.validate_every"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SettingError("train.betas", f"are two decay rates in [0, 1), got {list(self.betas)}")


@dataclass
class Config:
    """All settings of a run.

    Args:
        data: The data set.
        train: The training.
        model: Arguments of `flowfactor.models.build_vae` (or of what builds the method's model), less ``image_shape``,
            ``num_flows`` and ``num_frames``, which the data give.
        method: Name of the method in `flowfactor.models.METHODS`.
        seed: Seed of the initial weights and of all draws.
        output: Folder of the run.
        imports: Modules of your own that register methods, data sets or parts: names, or paths of ``.py`` files. They are
            not imported here: in Python import them first, on the command line give ``--import``.

    Raises:
        TypeError: If a section is not of its type; `from_dict` makes one of plain values.
        ValueError: If the method is unknown, or its model has no such setting, or a value is of another type, or a module
            of `imports` has not been imported.

    Example:
        >>> config = load_config("demo")
        >>> config.data.name, Config.from_dict(config.as_dict()) == config
        ('digits', True)
    """

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: dict[str, Any] = field(default_factory=dict)
    method: str = "ours"
    seed: int = 0
    output: str = "runs/latest"
    imports: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, kind in (("data", DataConfig), ("train", TrainConfig), ("model", dict)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}")
        for name in ("model", "method", "seed", "output", "imports"):
            setattr(self, name, read(name, kinds(Config)[name], getattr(self, name)))
        if abs(self.seed) >= 2**63:
            raise SettingError("seed", f"must be below 2^63 in size, got {short(self.seed)}")
        missing = [entry for entry in self.imports if not is_imported(entry)]
        if missing:
            raise SettingError(
                "imports",
                f"names code of the user's ({', '.join(missing)}), which runs when it is imported: if you trust it, allow "
                f"it by {' '.join(f'--import {entry}' for entry in missing)}, or import it first in Python",
            )
        if self.method not in METHODS:
            load_plugins()
        if self.method not in METHODS:
            raise SettingError(
                "method",
                f"names the unknown method {self.method!r}{choices(self.method, METHODS)}; one of your own comes by "
                "--import",
            )
        self.model = read_model(self.method, self.model)

    def as_dict(self) -> dict[str, Any]:
        """Gives the settings as plain values, ready for JSON and YAML."""
        plain = asdict(self)
        plain["train"]["betas"] = list(plain["train"]["betas"])
        if not self.imports:
            del plain["imports"]
        return plain

    def as_yaml(self) -> str:
        """Writes the settings as a file that `load_config` reads back as they are.

        Example:
            >>> print(Config(output="runs/one").as_yaml().splitlines()[-1])
            output: runs/one
        """
        require("yaml", extra="train")
        from flowfactor.training._yaml import dump

        return dump(self.as_dict())

    def with_method(self, method: str) -> Config:
        """Gives the same settings for another method: of the model's, only those that all methods share.

        Args:
            method: A name in `flowfactor.models.METHODS`.

        Returns:
            The configuration.

        Raises:
            ValueError: If there is no such method.

        Example:
            >>> load_config("demo").with_method("vae").model
            {'latent_dim': 32, 'frames_per_step': 2, 'decoder': {'initial_mean': 0.1}}
        """
        known = model_settings(Config(method=method).method)  # tells where there is no such method
        shared = {name: value for name, value in self.model.items() if name in SHARED_OPTIONS and name in known}
        return Config.from_dict(self.as_dict() | {"method": method, "model": shared})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Makes a configuration from plain values, such as those of a YAML file.

        Text where a number, a list or a mapping is expected is read as on the command line.

        Args:
            values: Sections and their keys; what is missing takes its default.

        Returns:
            The configuration.

        Raises:
            ValueError: If a key is unknown, or a value is of another type or out of range.

        Example:
            >>> Config.from_dict({"train": {"learning_rate": "1e-3"}}).train.learning_rate
            0.001
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"settings are sections such as data, model and train, got {short(values)}")
        made: dict[str, Any] = {}
        for name, value in values.items():
            if name not in kinds(cls):
                raise unknown_key(str(name), list(kinds(cls)))
            kind = {"data": DataConfig, "train": TrainConfig}.get(name)
            if kind is None:
                made[name] = read(name, kinds(cls)[name], value)
                continue
            section = read(name, dict[str, Any], value)
            for key in section:
                if key not in kinds(kind):
                    raise unknown_key(f"{name}.{key}", list(kinds(kind)))
            made[name] = kind(**section)
        return cls(**made)


def list_presets() -> list[str]:
    """Gives the names of the presets.

    Example:
        >>> "demo" in list_presets()
        True
    """
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_path(preset: str | Path, also: Iterable[str] = ()) -> Path:
    """Finds the YAML file of a preset's name, or of a path.

    Args:
        preset: One of `list_presets`, or the path of a YAML file.
        also: Other names that whoever asks would have taken, to offer where there is no such preset.

    Returns:
        The file.

    Raises:
        ValueError: If there is no such preset, or it is a folder.
        FileNotFoundError: If there is no such file: names that end in ``.yaml`` or ``.yml`` or hold a ``/`` are files.
    """
    name = os.fspath(preset)
    if name in list_presets():
        return PRESETS / f"{name}.yaml"
    path = Path(preset).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        inside = path / "config.yaml"
        cure = f"give {inside}" if inside.is_file() else "give a YAML file, or a preset"
        raise ValueError(f"{name} is a folder: {cure}")
    presets = [*also, *(known for known in list_presets() if known not in set(also))]
    if path.suffix in (".yaml", ".yml") or os.sep in name or "/" in name:
        near = did_you_mean(path.stem, presets) if path.name == name else ""
        raise FileNotFoundError(f"there is no file {name}{near}")
    raise ValueError(f"unknown preset {name!r}{choices(name, presets)}, or give the path of a YAML file")


def load_config(preset: str | Path, *, imports: Iterable[str] = ()) -> Config:
    """Reads a preset, or your own YAML file.

    The ``config.yaml`` in the folder of a run means that folder as its output, wherever the run was when it was written.
    What a file says in ``imports`` is never imported because it says so.

    Args:
        preset: One of `list_presets`, or the path of a YAML file.
        imports: Modules of yours to import first, which register methods, data sets or parts: names, or paths of ``.py``
            files.

    Returns:
        The configuration.

    Raises:
        ValueError: If there is no such preset, or the file does not hold a configuration: the message names the file, the
            line and the key.
        FileNotFoundError: If there is no such file.
        ImportError: If a module cannot be imported.
    """
    import_modules(imports)
    path = preset_path(preset)
    values, lines = read_file(path)
    with located(path, lines):
        config = Config.from_dict(values)
    folder = run_folder(path)
    if folder is not None:
        config.output = str(folder)
    return config


def imports_of(path: Path) -> list[str]:
    """What a file of settings says is to be imported; nothing where it lies in the folder of a run, which may be anybody's.

    Args:
        path: The file.

    Returns:
        Names of modules, and paths of ``.py`` files.

    Raises:
        ValueError: If they are not a list of these.
    """
    values, lines = read_file(path)
    with located(path, lines):
        return [] if run_folder(path) is not None else read("imports", list[str], values.get("imports", []))


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Reads a YAML file of settings, unchecked.

    Args:
        path: The file.

    Returns:
        Its values, and the line of every key.

    Raises:
        ValueError: If it is not YAML, or holds no sections.
    """
    require("yaml", extra="train")
    from flowfactor.training._yaml import read_yaml

    values, lines = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold sections such as data, model and train, got {short(values)}")
    return values, lines


@contextlib.contextmanager
def located(path: Path, lines: Mapping[str, int]) -> Iterator[None]:
    """Adds to what is wrong with a setting where it stands.

    Args:
        path: The file.
        lines: The line of every key in it.

    Raises:
        ValueError: Where a setting is wrong, with the file, and with the line where the key has one.
    """
    try:
        yield
    except SettingError as error:
        key = error.key
        while key and key not in lines:
            key = key.rpartition(".")[0]
        line = f", line {lines[key]}" if key else ""
        raise ValueError(f"{path}{line}: {error}") from error
