"""What a training run is made of: its settings, and the presets that come with flowfactor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from flowfactor.errors import require
from flowfactor.training._folder import run_folder
from flowfactor.training.datasets import DataConfig

PRESETS = Path(__file__).parent.parent / "configs"
"""Folder of the presets."""

Settings = TypeVar("Settings")


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
        evaluate_limit: Test sequences of each transformation to measure at the end; null takes all.
        likelihood_limit: Test sequences of the likelihood at the end; 0 leaves it out.
        likelihood_samples: Samples of its importance-weighted bound.
        accelerator: Lightning's accelerator: ``auto``, ``cpu``, ``gpu``, ...
        devices: Number of devices.
        precision: Lightning's precision, such as ``32-true`` or ``bf16-mixed``.
        threads: Threads of a processor; null leaves PyTorch's choice.
        tensorboard: Write TensorBoard's log too, if it is installed.
        progress: Show the progress.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> TrainConfig(steps=0)
        Traceback (most recent call last):
        ...
        ValueError: train.steps must be above 0, got 0
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
    evaluate_limit: int | None = None
    likelihood_limit: int = 300
    likelihood_samples: int = 64
    accelerator: str = "auto"
    devices: int = 1
    precision: str = "32-true"
    threads: int | None = None
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        self.betas = (float(self.betas[0]), float(self.betas[1]))
        at_least_one = ("batch_size", "log_every", "likelihood_samples", "devices")
        above_zero = ("minutes", "steps", "learning_rate", "clip", "checkpoint_minutes", "checkpoint_steps")
        for name in (*at_least_one, *above_zero, "evaluate_limit", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"train.{name} must be above 0, got {value!r}")
        if self.clock not in ("wall", "processor"):
            raise ValueError(f"train.clock is 'wall' or 'processor', got {self.clock!r}")
        for name in ("likelihood_limit", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name} must not be negative, got {getattr(self, name)!r}")


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

    Raises:
        TypeError: If a section is not of its type; `from_dict` makes one of plain values.

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

    def __post_init__(self) -> None:
        for name, kind in (("data", DataConfig), ("train", TrainConfig), ("model", dict)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}")

    def as_dict(self) -> dict[str, Any]:
        """Gives the settings as plain values, ready for JSON and YAML."""
        plain = asdict(self)
        plain["train"]["betas"] = list(plain["train"]["betas"])
        return plain

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
        from flowfactor.models.methods import SHARED_OPTIONS, get_method

        get_method(method)
        shared = {name: value for name, value in self.model.items() if name in SHARED_OPTIONS}
        return Config.from_dict(self.as_dict() | {"method": method, "model": shared})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Makes a configuration from plain values, such as those of a YAML file.

        Args:
            values: Sections and their keys; what is missing takes its default.

        Returns:
            The configuration.

        Raises:
            ValueError: If a key is unknown or a value is out of range.
        """
        sections: dict[str, Any] = dict(values)
        if isinstance(sections.get("data"), Mapping):
            sections["data"] = _fill(DataConfig, sections["data"], "data.")
        if isinstance(sections.get("train"), Mapping):
            sections["train"] = _fill(TrainConfig, sections["train"], "train.")
        return _fill(cls, sections, "")


def _fill(kind: type[Settings], values: Mapping[str, Any], prefix: str) -> Settings:
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown key {', '.join(prefix + name for name in unknown)}: choose among {', '.join(known)}")
    return kind(**values)


def list_presets() -> list[str]:
    """Gives the names of the presets.

    Example:
        >>> "demo" in list_presets()
        True
    """
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_path(preset: str | Path) -> Path:
    """Finds the YAML file of a preset's name, or of a path.

    Args:
        preset: One of `list_presets`, or the path of a YAML file.

    Returns:
        The file.

    Raises:
        ValueError: If there is neither.
    """
    if str(preset) in list_presets():
        return PRESETS / f"{preset}.yaml"
    path = Path(preset).expanduser()
    if path.is_file():
        return path
    raise ValueError(
        f"unknown preset {str(preset)!r}: choose among {', '.join(list_presets())}, or give the path of a YAML file"
    )


def load_config(preset: str | Path) -> Config:
    """Reads a preset, or your own YAML file.

    The ``config.yaml`` in the folder of a run means that folder as its output, wherever the run was when it was written.

    Args:
        preset: One of `list_presets`, or the path of a YAML file.

    Returns:
        The configuration.

    Raises:
        ValueError: If there is no such preset or file, or it does not hold a configuration.
    """
    path = preset_path(preset)
    yaml = require("yaml", extra="train")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold sections such as data, model and train, got {type(values).__name__}")
    config = Config.from_dict(values)
    folder = run_folder(path)
    if folder is not None:
        config.output = str(folder)
    return config
