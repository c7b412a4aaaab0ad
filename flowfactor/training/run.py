"""Training runs from a configuration: prepare, train, resume, evaluate."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

import flowfactor
from flowfactor.data import SequenceDataset
from flowfactor.errors import require
from flowfactor.models import METHODS, build_model, get_method, load_pretrained
from flowfactor.training._folder import (
    CHECKPOINT,
    CONFIG,
    METRICS,
    MODEL,
    OF_THE_MODEL,
    RESULT,
    TENSORBOARD,
    check_folder,
    claimed,
    clear,
    write_text,
)
from flowfactor.training._identity import check_data, fingerprints, write_data
from flowfactor.training.callbacks import GracefulStop, LastCheckpoint, Progress
from flowfactor.training.config import Config, load_config
from flowfactor.training.data import SequenceData
from flowfactor.training.datasets import data_identity
from flowfactor.training.evaluation import evaluate
from flowfactor.training.module import FlowModule
from flowfactor.training.schedule import Schedule

_MAY_CHANGE = (
    *("minutes", "steps", "log_every", "checkpoint_minutes", "checkpoint_steps", "tensorboard", "progress"),
    *("evaluate_limit", "likelihood_limit", "likelihood_samples", "accelerator", "threads"),
)
"""Settings of the training that may differ where a run is resumed: its length, and what does not move the weights."""

_QUIET = (
    ".*does not have many workers.*",  # batches are made whole by the data set: workers would only copy them
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*LeafSpec.*",  # deprecations of PyTorch's that Lightning has not followed yet
    ".*all_gather is deprecated.*",
)


@dataclass
class Run:
    """A training run that is ready to start: everything that can go wrong beforehand has been checked.

    Attributes:
        config: The settings.
        model: The model.
        data: The training data.
        test: The test data.
        folder: Folder of the run.
        resume: Whether to go on from its checkpoint.
        identity: What tells the data from others of the same name, by split.
    """

    config: Config
    model: Any
    data: SequenceData
    test: SequenceDataset
    folder: Path
    resume: bool
    identity: dict[str, Any]

    def fit(self, *, measure: bool = True) -> dict[str, Any]:
        """Trains, saves, evaluates, and writes the result.

        Args:
            measure: Whether to evaluate; without, the result holds what is known of the training alone.

        Returns:
            The result, as in ``result.json``. Of several processes all train, and the first alone writes and evaluates.

        Raises:
            FloatingPointError: If the loss became NaN.
            FileExistsError: If another process trains in the folder.
        """
        # Of several processes of one training, the first alone writes.
        alone = claimed(self.folder) if rank_zero_only.rank == 0 else contextlib.nullcontext()
        with alone, use_threads(self.config.train.threads):
            return self._fit(measure)

    def _fit(self, measure: bool) -> dict[str, Any]:
        config, train = self.config, self.config.train
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank_zero_only.rank == 0:  # other processes prepare while this one may have begun to write
            if not self.resume:
                clear(self.folder)
            yaml = require("yaml", extra="train")
            write_data(self.folder, self.identity)
            write_text(self.folder / CONFIG, yaml.safe_dump(config.as_dict(), sort_keys=False))
        module = FlowModule(
            self.model,
            _schedule(config),
            learning_rate=train.learning_rate,
            betas=train.betas,
            weight_decay=train.weight_decay,
            seed=config.seed,
            clock=train.clock,
        )
        stop = GracefulStop()
        with _quiet():
            trainer = self._trainer(stop)
            try:
                trainer.fit(
                    module,
                    datamodule=self.data,
                    ckpt_path=self.folder / CHECKPOINT if self.resume else None,
                    weights_only=True,
                )
            finally:
                stop.restore()
        result = self._result(module, trainer, stop.stopped)
        if not trainer.is_global_zero:
            return result
        for name in OF_THE_MODEL:
            (self.folder / name).unlink(missing_ok=True)
        self.model.save_pretrained(self.folder / MODEL)
        if measure and not stop.stopped:
            result |= evaluate(
                self.model,
                self.test,
                train=self.data.dataset,
                limit=train.evaluate_limit,
                likelihood_limit=train.likelihood_limit,
                samples=train.likelihood_samples,
                seed=config.seed,
            )
        write_text(self.folder / RESULT, json.dumps(result, indent=2) + "\n")
        return result

    def _trainer(self, stop: GracefulStop) -> pl.Trainer:
        train = self.config.train
        callbacks: list[pl.Callback] = [
            stop,
            LastCheckpoint(self.folder / CHECKPOINT, train.checkpoint_minutes, train.checkpoint_steps),
        ]
        if train.progress:
            callbacks.append(Progress(train.log_every))
        return pl.Trainer(
            accelerator=train.accelerator,
            devices=train.devices,
            # Warm-ups, alternating losses and lazy regularizers leave parameters without gradient in some steps.
            strategy="auto" if train.devices == 1 else "ddp_find_unused_parameters_true",
            precision=train.precision,  # type: ignore[arg-type]
            max_steps=-1 if train.steps is None else train.steps,
            max_epochs=-1,
            gradient_clip_val=train.clip,
            log_every_n_steps=train.log_every,
            logger=_loggers(self.folder, train.tensorboard, self.resume),
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )

    def _result(self, module: FlowModule, trainer: pl.Trainer, stopped: bool) -> dict[str, Any]:
        steps, seconds = trainer.global_step, module.elapsed
        return {
            "finished": not stopped,
            "steps": steps,
            "seconds": round(seconds, 3),
            "steps_per_second": round(steps / seconds, 3) if seconds else None,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "terms": module.latest,
            "seed": self.config.seed,
            "config": self.config.as_dict(),
            "versions": versions(),
        }


def prepare(config: Config | str | Path, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Makes all parts of a run and checks that they fit, before any work.

    Seeds PyTorch's global generator with the configuration's seed.

    Args:
        config: The settings, or the name of a preset, or the path of a YAML file.
        resume: Go on from the checkpoint in the output folder.
        overwrite: Begin anew in a folder that holds a run.

    Returns:
        The run; its `Run.fit` trains.

    Raises:
        FileNotFoundError: If data are missing, or there is nothing to resume.
        FileExistsError: If the output folder holds a run, and neither `resume` nor `overwrite` is set.
        ValueError: If settings are out of range, do not fit each other, or differ from the run to resume in more than its
            length, logging, checkpoints, evaluation, threads and accelerator, and where the data lie; or if the data are
            not those of the run to resume.
        TypeError: If the model takes no such setting.
    """
    config = config if isinstance(config, Config) else load_config(config)
    folder = Path(config.output).expanduser()
    check_folder(folder, resume, overwrite)
    _schedule(config)
    train, test = config.data.dataset("train"), config.data.dataset("test")
    data = SequenceData(train, config.train.batch_size, seed=config.seed, stratified=config.train.stratified)
    identity = fingerprints(train, test)
    if resume:
        _check_resumable(config, folder, train)
        check_data(folder, identity, "give the folder of its own data by data.root, or choose another output")
    return Run(config, make_model(config, train), data, test, folder, resume, identity)


def make_model(config: Config, data: SequenceDataset) -> Any:
    """Builds the model of a configuration for the data that it is to be trained on.

    Seeds PyTorch's global generator with the configuration's seed.

    Args:
        config: The settings.
        data: The training split, which gives the picture's shape and the numbers of transformations and frames.

    Returns:
        The model.

    Raises:
        ValueError: If the method is unknown, a setting is out of range, or sizes or transformations are not the data's.
        TypeError: If the model takes no such setting.
    """
    shape = {"image_shape": tuple(data.image_shape), "num_flows": data.num_flows, "num_frames": data.num_steps + 1}
    settings = dict(config.model)
    for name, value in shape.items():
        given = settings.pop(name, value)
        if (tuple(given) if isinstance(given, list) else given) != value:
            raise ValueError(
                f"model.{name} is {given}, but the data set {config.data.name} has {value} (transformations: "
                f"{', '.join(data.flow_names)}): leave it out, or choose others by data.flows and data.steps"
            )
    fixed = data.fixed_k
    if fixed is not None and bool((fixed < 0).any()) and get_method(config.method).labels != "inferred":
        given = [name for name, method in METHODS.items() if method.labels == "inferred"]
        raise ValueError(
            f"in the sequences of {config.data.name} no single transformation acts, so there is no k to give to the "
            f"method {config.method!r}: train by one that infers what acts ({', '.join(given)})"
        )
    torch.manual_seed(config.seed)
    return build_model(config.method, **shape, **settings)


def train(config: Config | str | Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Trains a model by a configuration, with checkpoints, logs and a result file.

    The folder of the run holds ``config.yaml``, ``last.ckpt``, ``metrics.csv``, the model in ``model/`` (for
    ``from_pretrained``) and ``result.json``. An interruption (Ctrl-C) ends the training behind the current step and
    saves it; the result then has ``"finished": false`` and no measurements.

    Args:
        config: The settings, or the name of a preset, or the path of a YAML file.
        resume: Go on from the checkpoint in the output folder: weights, optimiser, schedule, position in the data and
            random draws.
        overwrite: Begin anew in a folder that holds a run.

    Returns:
        The result: ``equivariance_error`` and ``doing_nothing`` by transformation, ``log_likelihood``, ``steps``,
        ``seconds``, ``config``, ``versions`` and more.

    Raises:
        FileNotFoundError: If data are missing, or there is nothing to resume.
        FileExistsError: If the output folder holds a run, and neither `resume` nor `overwrite` is set.
        ValueError: If settings are out of range, do not fit each other, or differ from the run to resume (see `prepare`).
        TypeError: If the model takes no such setting.

    Example:
        >>> train("demo")["equivariance_error"]  # doctest: +SKIP
        {'scaling': 420.5, 'rotation': 300.1, 'colouring': 410.7}
    """
    return prepare(config, resume=resume, overwrite=overwrite).fit()


def load_run(folder: str | Path) -> tuple[Any, Config]:
    """Loads the model and the settings of a run.

    Args:
        folder: Folder of the run.

    Returns:
        The model, in evaluation mode, and its configuration.

    Raises:
        FileNotFoundError: If the folder holds no run, or no model yet.
    """
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it holds no {CONFIG}")
    if not (folder / MODEL).is_dir():
        raise FileNotFoundError(f"{folder} holds no {MODEL}/ yet: the training has not ended; train with --resume")
    return load_pretrained(folder / MODEL), load_config(folder / CONFIG)


def versions() -> dict[str, str]:
    """Gives the versions of what a result depends on."""
    return {
        "flowfactor": flowfactor.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
    }


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Has PyTorch use so many threads, or as many as before where None; behind the block it uses those of before."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _schedule(config: Config) -> Schedule:
    train = config.train
    return Schedule(train.steps, train.minutes, train.warmup, train.schedule)


def _check_resumable(config: Config, folder: Path, data: SequenceDataset) -> None:
    """Checks that the run before had the same settings, but for those that may change."""
    before = load_config(folder / CONFIG)
    pairs = [(name, getattr(before, name), getattr(config, name)) for name in ("method", "seed")]
    pairs.append(("data", data_identity(asdict(before.data)), data_identity(asdict(config.data))))
    pairs += [
        (f"train.{name}", value, getattr(config.train, name))
        for name, value in vars(before.train).items()
        if name not in _MAY_CHANGE
    ]
    for name, old, new in pairs:
        if old != new:
            raise ValueError(
                f"the run in {folder} has {name} {old}, not {new}: make them agree, or choose another output"
            )
    made = [make_model(settings, data).config() for settings in (before, config)]
    if made[0] != made[1]:
        raise ValueError(f"the run in {folder} has model {before.model}, not {config.model}: make them agree")


def _loggers(folder: Path, tensorboard: bool, resume: bool) -> list[Logger]:
    table = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    earlier = (folder / METRICS).read_text(encoding="utf-8") if resume and (folder / METRICS).exists() else None
    _ = table.experiment  # Lightning deletes an earlier table here; a resumed run goes on with it
    if earlier is not None and rank_zero_only.rank == 0:
        write_text(folder / METRICS, earlier)
    loggers: list[Logger] = [table]
    if tensorboard:
        # Where it is not installed, the table alone has to do.
        with contextlib.suppress(ModuleNotFoundError):
            loggers.append(TensorBoardLogger(folder, name="", version=TENSORBOARD, default_hp_metric=False))
    return loggers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning's tips and its warnings about what is meant to be so to itself."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in _QUIET:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
