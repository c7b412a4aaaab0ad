"""Training runs from a configuration: prepare, train, resume, evaluate."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

import flowfactor
from flowfactor._plugins import import_modules, load_plugins
from flowfactor.data import SequenceDataset
from flowfactor.models import load_pretrained
from flowfactor.training._cluster import settle
from flowfactor.training._collapse import LEAST_STEPS, warn_of_collapse
from flowfactor.training._logs import quiet
from flowfactor.training._place import Place
from flowfactor.training._table import check_table
from flowfactor.training._trainer import make_trainer
from flowfactor.training._validation import Validation, hold_out
from flowfactor.training.building import make_model
from flowfactor.training.callbacks import GracefulStop
from flowfactor.training.checkpoints import Checkpoints, newest_checkpoint
from flowfactor.training.config import Config, load_config
from flowfactor.training.data import SequenceData
from flowfactor.training.datasets import data_identity
from flowfactor.training.evaluation import evaluate
from flowfactor.training.folder import (
    CONFIG,
    METRICS,
    MODEL,
    OF_A_MODEL,
    OF_THE_MODEL,
    RESULT,
    check_folder,
    check_writable,
    import_options,
    own,
    remove,
    write_text,
)
from flowfactor.training.identity import check_data, fingerprints
from flowfactor.training.module import FlowModule
from flowfactor.training.schedule import LearningRateSchedule

_MAY_CHANGE = (
    *("minutes", "steps", "log_every", "checkpoint_minutes", "checkpoint_steps", "tensorboard", "progress"),
    *("evaluate_limit", "likelihood_limit", "likelihood_samples", "accelerator", "threads"),
)
"""Settings of the training that may differ where a run is resumed: its length, and what does not move the weights."""


@dataclass
class Run:
    """A training run that is ready to start: everything that can go wrong beforehand has been checked.

    Attributes:
        config: The settings.
        model: The model.
        data: The batches that it is trained on, and what it is validated on.
        train: The training data, those for validation included.
        test: The test data.
        folder: Folder of the run.
        resume: Whether to go on from its checkpoint.
        identity: What tells the data from others of the same name, by split.
        overwrite: Whether it may take the place of a run in the folder: it does with its first checkpoint.
        kind: What its folder is called in its list: ``"run"``, or ``"demo"``, which the next demo begins anew.
    """

    config: Config
    model: Any
    data: SequenceData
    train: SequenceDataset
    test: SequenceDataset
    folder: Path
    resume: bool
    identity: dict[str, Any]
    overwrite: bool = False
    kind: str = "run"

    def check(self) -> None:
        """Makes the Trainer and tries the folder, so that what they do not take is reported before any work.

        Raises:
            ValueError: If Lightning takes no such accelerator, number of devices or precision.
            OSError: If the folder cannot be written in, or has no space.
        """
        try:
            with quiet():
                make_trainer(self.folder, self.config.train, self.resume, GracefulStop())
        except MisconfigurationException as error:
            raise ValueError(f"the training cannot be set up as train.* asks: {error}") from error
        parameters = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        # A checkpoint holds the weights and Adam's two averages; it is written beside the one before, and then the model.
        check_writable(self.folder, 7 * parameters)

    def fit(self, *, measure: bool = True, tell: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Trains, saves, evaluates, and writes the result.

        Args:
            measure: Whether to evaluate; without, the result holds what is known of the training alone.
            tell: Called with the result before it is written: a full disk then loses no figures.

        Returns:
            The result, as in ``result.json``. Of several processes all train, and the first alone writes and evaluates.

        Raises:
            FloatingPointError: If the loss or a gradient became NaN or infinite.
            FileExistsError: If another process trains in the folder, or it holds what is not ours.
            OSError: If a file cannot be written; the checkpoints before are left.
            KeyboardInterrupt: After an interruption that could not end the training in order, or while it is measured; it
                says how to go on.
        """
        # Of several processes of one training, the first alone writes.
        place = Place(self.folder, self.config, self.identity, self.resume, self.overwrite, self.kind)
        with place.entered() if rank_zero_only.rank == 0 else nullcontext(), use_threads(self.config.train.threads):
            return self._fit(place, measure, tell)

    def _fit(self, place: Place, measure: bool, tell: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
        config, train = self.config, self.config.train
        module = FlowModule(
            self.model,
            _schedule(config),
            learning_rate=train.learning_rate,
            betas=train.betas,
            weight_decay=train.weight_decay,
            seed=config.seed,
            clock=train.clock,
        )
        found = newest_checkpoint(self.folder, tell=False) if self.resume else None
        stop = GracefulStop()
        with quiet():
            trainer = make_trainer(self.folder, train, self.resume, stop, found, None if self.resume else place.begin)
            try:
                trainer.fit(
                    module,
                    datamodule=self.data,
                    ckpt_path=None if found is None else found.path,
                    weights_only=True,
                )
            except SystemExit as error:  # how Lightning ends after a second interruption, or one before the first step
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from None
                raise
            finally:
                stop.restore()
        result = self._result(module, trainer, stop.stopped)
        if trainer.is_global_zero:
            if not stop.stopped and trainer.global_step >= LEAST_STEPS:
                result["warnings"] = warn_of_collapse(self.model, self.data.dataset, seed=config.seed)
            self._close(result, measure and not stop.stopped, tell)
        return result

    def _close(self, result: dict[str, Any], measure: bool, tell: Callable[[dict[str, Any]], None] | None) -> None:
        """Saves the model, measures it and writes the result, which gets the figures."""
        failure: OSError | None = None
        try:
            remove(self.folder, OF_THE_MODEL)
            own(self.folder, *OF_A_MODEL, RESULT)
            self.model.save_pretrained(self.folder / MODEL)
            write_text(self.folder / RESULT, json.dumps(result, indent=2) + "\n")
        except OSError as error:  # reported after the figures, which would be lost otherwise
            failure = error
        if measure:
            try:
                result |= self._measured()
            except KeyboardInterrupt:
                if failure is not None:
                    raise failure from None
                how = f"flowfactor evaluate {shlex.quote(str(self.folder.absolute()))}{import_options(self.config.imports)}"
                raise KeyboardInterrupt(
                    f"The model is trained and saved, but not measured. Measure it: {how}"
                ) from None
        if tell is not None:
            tell(result)
        if failure is not None:
            raise failure
        write_text(self.folder / RESULT, json.dumps(result, indent=2) + "\n")

    def _measured(self) -> dict[str, Any]:
        train = self.config.train
        return evaluate(
            self.model,
            self.test,
            train=self.train,
            limit=train.evaluate_limit,
            likelihood_limit=train.likelihood_limit,
            samples=train.likelihood_samples,
            seed=self.config.seed,
        )

    def _result(self, module: FlowModule, trainer: pl.Trainer, stopped: bool) -> dict[str, Any]:
        steps, seconds = trainer.global_step, module.elapsed
        return {
            "finished": not stopped,
            "ended": self._ended(trainer, stopped),
            "steps": steps,
            "seconds": round(seconds, 3),
            "steps_per_second": round(steps / seconds, 3) if seconds else None,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "terms": module.latest,
            "best_checkpoint": next(c.told() for c in trainer.callbacks if isinstance(c, Checkpoints)),  # type: ignore[attr-defined]
            "warnings": [],
            "seed": self.config.seed,
            "config": self.config.as_dict(),
            "versions": versions(),
        }

    def _ended(self, trainer: pl.Trainer, stopped: bool) -> str:
        """Why the training ended."""
        checks = [callback for callback in trainer.callbacks if isinstance(callback, Validation)]  # type: ignore[attr-defined]
        if stopped:
            return "interrupted"
        if checks and checks[0].exhausted:
            return checks[0].told()
        steps = self.config.train.steps
        return "all steps made" if steps is not None and trainer.global_step >= steps else "time up"


def prepare(config: Config | str | Path, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Makes all parts of a run and checks that they fit, before any work.

    Seeds PyTorch's global generator with the configuration's seed.

    Args:
        config: The settings, or the name of a preset, or the path of a YAML file.
        resume: Go on from the checkpoint in the output folder.
        overwrite: Begin anew in a folder that holds a run, which is there until the new one has its first checkpoint.

    Returns:
        The run; its `Run.fit` trains.

    Raises:
        FileNotFoundError: If data are missing, or there is nothing to resume.
        FileExistsError: If the output folder holds a run, and neither `resume` nor `overwrite` is set; or if it holds files
            by names that a run writes, which are not on the list of a run.
        OSError: If the output folder cannot be written in.
        ValueError: If settings are out of range, do not fit each other, or differ from the run to resume in more than its
            length, logging, checkpoints, evaluation, threads and accelerator, and where the data lie; if the data are not
            those of the run to resume; or if its table or all of its checkpoints are damaged.
        TypeError: If the model takes no such setting.
    """
    load_plugins()
    config = config if isinstance(config, Config) else load_config(config)
    config = Config.from_dict(config.as_dict())  # what was set in a section since it was made is checked too
    settle(config.train)
    folder = Path(config.output).expanduser()
    check_folder(folder, resume, overwrite)
    check_writable(folder)
    _schedule(config)
    train, test = config.data.dataset("train"), config.data.dataset("test")
    order = {"seed": config.seed, "stratified": config.train.stratified}
    kept, val = train, None
    if config.train.validate_every is not None:
        kept, val = hold_out(train, config.train.validation_fraction, config.seed)
    data = SequenceData(kept, config.train.batch_size, **order, val=val, endless=True)
    identity = fingerprints(train, test)
    if resume:
        _check_resumable(config, folder, train)
        check_data(folder, identity, "give the folder of its own data by data.root, or choose another output")
        newest_checkpoint(folder, tell=rank_zero_only.rank == 0)
        check_table(folder / METRICS)
    run = Run(config, make_model(config, train), data, train, test, folder, resume, identity, overwrite)
    run.check()
    return run


def train(config: Config | str | Path, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Trains a model by a configuration, with checkpoints, logs and a result file.

    The folder of the run holds ``config.yaml``, the checkpoints ``last.ckpt``, ``previous.ckpt`` and ``best.ckpt``,
    ``metrics.csv``, the model in ``model/`` (for ``from_pretrained``), ``result.json``, and in ``flowfactor.json`` the list
    of these files: nothing that is not on it is ever deleted or replaced. An interruption (Ctrl-C, SIGTERM, SIGUSR1) ends
    the training after the current step and saves it; the result then has ``"finished": false`` and no measurements.

    Args:
        config: The settings, or the name of a preset, or the path of a YAML file.
        resume: Go on from the checkpoint in the output folder: weights, optimiser, schedule, position in the data and
            random draws.
        overwrite: Begin anew in a folder that holds a run, which is there until the new one has its first checkpoint.

    Returns:
        The result: ``equivariance_error`` and ``doing_nothing`` by transformation, ``log_likelihood``, ``steps``,
        ``seconds``, ``config``, ``versions`` and more.

    Raises:
        FileNotFoundError: If data are missing, or there is nothing to resume.
        FileExistsError: If the output folder holds a run, and neither `resume` nor `overwrite` is set; or if it holds files
            by names that a run writes, which are not on the list of a run.
        OSError: If a file cannot be written.
        ValueError: If settings are out of range, do not fit each other, or differ from the run to resume (see `prepare`).
        TypeError: If the model takes no such setting.

    Example:
        >>> train("demo")["equivariance_error"]  # doctest: +SKIP
        {'scaling': 420.5, 'rotation': 300.1, 'colouring': 410.7}
    """
    return prepare(config, resume=resume, overwrite=overwrite).fit()


def load_run(folder: str | Path, *, imports: Iterable[str] = ()) -> tuple[Any, Config]:
    """Loads the model and the settings of a run.

    No file of the folder, which anybody may have sent, has code imported: where the run was made with methods, data or parts
    of one's own, say from where they come, or import that first.

    Args:
        folder: Folder of the run.
        imports: Modules of yours to import first: names, or paths of ``.py`` files.

    Returns:
        The model, in evaluation mode, and its configuration.

    Raises:
        FileNotFoundError: If the folder holds no run, or no model yet.
        ImportError: If a module cannot be imported.
        ValueError: If a file is damaged, or the run was made with modules that have not been imported; it names them.
    """
    import_modules(imports)
    load_plugins()
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it holds no {CONFIG}")
    if not (folder / MODEL).is_dir():
        raise FileNotFoundError(f"{folder} holds no {MODEL}/ yet: the training has not ended; train with --resume")
    config = load_config(folder / CONFIG)  # first: it says what a model of one's own needs
    return load_pretrained(folder / MODEL), config


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
    """Has PyTorch use so many threads, or as many as before where None; after the block it uses those of before."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _schedule(config: Config) -> LearningRateSchedule:
    train = config.train
    return LearningRateSchedule(train.steps, train.minutes, train.warmup, train.schedule)


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
