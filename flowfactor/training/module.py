"""The Lightning module of flow-factorized models."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from flowfactor.errors import FlowSolveError
from flowfactor.models.inputs import beside
from flowfactor.models.protocols import infers_k, knows_transformations
from flowfactor.training._diverged import Watch, not_finite, shown
from flowfactor.training._restored import arguments, named_for, plain, read_checkpoint, told
from flowfactor.training.checkpoints import Checkpoints
from flowfactor.training.data import SequenceData
from flowfactor.training.schedule import LearningRateSchedule


class FlowModule(pl.LightningModule):
    """A model of sequences with its optimiser and schedule, for Lightning's Trainer.

    The optimiser is AdamW. The learning rate follows a `LearningRateSchedule` over steps or minutes; time is counted
    from the first step and goes on where a checkpoint left it. A checkpoint also holds the state of the random draws. Every
    ``log_every_n_steps`` of the Trainer the terms of the objective, the learning rate and the speed are logged; in
    between no step waits for the device. A loss or gradient that became NaN or infinite ends the training with a
    FloatingPointError: at that step on a CPU, before its weights move, and two steps later elsewhere. It names the term, the
    step, what to try, and the file ``diverged-stepN.npz`` in the run's folder (or the logger's) that holds the batch and
    random states with which the step began. No checkpoint is written of weights that are not finite. A checkpoint says how
    the model and the module were made, see `load_from_checkpoint`, and names weights as if nothing were compiled.

    Args:
        model: A model whose ``model(frames, t, k, generator=...)`` gives terms with ``.loss`` and ``.as_dict()``, such
            as `flowfactor.models.FlowFactorizedVAE`. One whose ``supervision`` is not ``"full"`` gets None for k. Where a
            batch holds a ``"context"`` or a ``"mask"``, it is called with them by these names.
        schedule: Course of the learning rate, and the end of the training.
        learning_rate: Peak learning rate.
        betas: Decay rates of AdamW's two averages.
        weight_decay: AdamW's weight decay; at 0 it is Adam.
        seed: Seed of the draws of the training (each process adds its rank).
        clock: What minutes are minutes of: ``"wall"`` time, or ``"processor"`` time, that of this process shared out among
            PyTorch's threads, which other programs on the machine do not shorten.

    Raises:
        ValueError: If there is no such clock.

    Example:
        >>> from torch import nn
        >>> module = FlowModule(nn.Linear(2, 2), LearningRateSchedule(steps=10), learning_rate=0.1)
        >>> module.configure_optimizers().param_groups[0]["lr"]
        0.1
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: LearningRateSchedule,
        *,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        seed: int = 0,
        clock: Literal["wall", "processor"] = "wall",
    ) -> None:
        super().__init__()
        if clock not in ("wall", "processor"):
            raise ValueError(f"the clock is 'wall' or 'processor', got {clock!r}")
        self.clock = clock
        self.model, self.schedule = model, schedule
        self.learning_rate, self.betas, self.weight_decay, self.seed = learning_rate, betas, weight_decay, seed
        self.latest: dict[str, float] = {}
        self.generator: torch.Generator | None = None
        self._before = 0.0
        self._begun: float | None = None
        self._draws: list[Tensor] | None = None
        self._mark = (0, 0.0)
        self._watch = Watch()

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, those before a checkpoint included."""
        return self._before + (0.0 if self._begun is None else self._now() - self._begun)

    @property
    def progress(self) -> float:
        """How far the training is: 0 at the beginning, 1 or more at the end."""
        return self.schedule.progress(self.global_step, self.elapsed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Makes AdamW, in one kernel per step where the device has it; a model may have ``parameter_groups()``."""
        own = getattr(self.model, "parameter_groups", None)
        groups = [{"params": self.parameters()}] if own is None else own()
        groups = [group | {"params": [p for p in group["params"] if p.requires_grad]} for group in groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        return torch.optim.AdamW(
            groups,
            lr=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            fused=all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters),
        )

    def on_train_start(self) -> None:
        """Starts the clock and the draws, from scratch or where the checkpoint left them."""
        generator = torch.Generator(self.device)
        if self._draws is None:
            generator.manual_seed(self.seed + self.global_rank)
        else:
            generator.set_state(self._draws[min(self.global_rank, len(self._draws) - 1)])
        self.generator = generator
        self._begun = self._now()
        self._mark = (self.global_step, self._begun)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Sets the learning rate of the step that comes."""
        # By steps the rate belongs to the middle of the step: neither the first nor the last step is then wasted.
        factor = self.schedule(self.schedule.progress(self.global_step + 0.5, self._agreed_elapsed()))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate * factor

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Gives the loss of a batch of sequences."""
        step = self.global_step + 1
        self._watch.begin(step, batch, self.generator)
        try:
            also = beside(batch, "context", "mask")
            terms = self.model(batch["frames"], batch["t"], self._given(batch), generator=self.generator, **also)
        except (ValueError, FlowSolveError) as error:
            # What torch's distributions say of parameters such as NaN, and a latent flow of its start or its path.
            if isinstance(error, FlowSolveError):
                if error.reason not in ("nan", "blowup"):
                    raise
            elif "found invalid values" not in str(error) and "holds NaN" not in str(error):
                raise
            self._watch.check(*self._aside)  # an earlier step may be to blame
            raise self._watch.error(
                f"the model's states are no valid numbers ({_first_line(error)})", *self._aside
            ) from error
        values = terms.as_dict()
        self._watch.terms(values)
        if step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(values, step, len(batch["frames"]))
        return terms.loss

    def _given(self, batch: dict[str, Tensor]) -> Tensor | None:
        """The k of a batch, for models that are given it: sequences may be without labels for those that are not."""
        # Who infers k does not get to see it, and who has no use for it needs none.
        return batch["k"] if knows_transformations(self.model) and not infers_k(self.model) else None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Ends the training where the loss or the gradient is NaN or infinite."""
        # Where a scaler looks for a scale, infinite gradients are part of its search.
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        self._watch.end(self.model.named_parameters(), not scaled, *self._aside)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``val_loss`` and the other terms of a batch, as ``val_<term>``; the mean over batches is their value."""
        self._measured_step(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Logs ``test_loss`` and the other terms of a batch."""
        self._measured_step(batch, batch_idx, "test")

    def _measured_step(self, batch: dict[str, Tensor], batch_idx: int, name: str) -> None:
        # Draws of its own, the same every time: validations can be compared, and the training goes on as without.
        generator = torch.Generator(self.device).manual_seed(self.seed + batch_idx)
        also = beside(batch, "context", "mask")
        terms = self.model(batch["frames"], batch["t"], self._given(batch), generator=generator, **also).as_dict()
        values = {f"{name}_{term}": torch.as_tensor(value, dtype=torch.float32) for term, value in terms.items()}
        own = any(isinstance(callback, Checkpoints) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        # A run of the command logs them itself, by the step and before the state is saved.
        self.log_dict(
            values,
            batch_size=len(batch["frames"]),
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            logger=False if own else None,
        )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ends the training when its time is up."""
        if self.schedule.progress(self.global_step, self._agreed_elapsed()) >= 1:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Stops the clock."""
        self._before, self._begun = self.elapsed, None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds elapsed time and random draws to a checkpoint; none is made of a state that is not finite."""
        self._watch.check(*self._aside)
        bad = not_finite(self.model.named_parameters())
        if bad:
            raise self._watch.error(f"the weights {shown(bad)} became NaN or infinite", *self._aside)
        generator = torch.Generator(self.device) if self.generator is None else self.generator
        draws = [generator.get_state()]
        if self.trainer.world_size > 1:
            draws = [state.cpu() for state in self.all_gather(draws[0].to(self.device))]
        checkpoint["flowfactor"] = {
            "elapsed": self.elapsed,
            "draws": draws,
            "rng": torch.get_rng_state(),
            "module": told(self),
        }
        checkpoint["state_dict"] = plain(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes elapsed time and random draws out of a checkpoint."""
        state = checkpoint["flowfactor"]
        # Copies: torch reads the state of a generator at the beginning of the storage, wherever in it the tensor begins.
        self._before, self._draws = state["elapsed"], [draws.cpu().clone() for draws in state["draws"]]
        torch.set_rng_state(state["rng"].cpu())
        checkpoint["state_dict"] = named_for(self, checkpoint["state_dict"])
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, SequenceData) and "loops" in checkpoint:
            data.reopen_epoch(checkpoint["loops"]["fit_loop"])

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | os.PathLike[str], map_location: Any = "cpu", **given: Any
    ) -> FlowModule:
        """Makes a module, and its model, of a checkpoint: of ``flowfactor train``, or of Lightning's ``ModelCheckpoint``.

        Args:
            checkpoint_path: The file. No code in it is run, and its digest is checked where it has one.
            map_location: The device to load to.
            **given: Parts of your own (such as ``encoder``), as for ``from_pretrained``, or all of the ``model``; their
                weights are loaded. The schedule and settings too may be replaced, such as ``learning_rate``.

        Returns:
            The module, in training mode, with the model's weights. To resume a training, give the file to the Trainer.

        Raises:
            OSError: If there is no such file, or it cannot be read.
            ValueError: If the file is damaged or no checkpoint of such a module, or a part of one's own is not handed over.

        Example:
            >>> FlowModule.load_from_checkpoint("runs/demo/last.ckpt").model.latent_dim  # doctest: +SKIP
            32
        """
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        module = cls(**arguments(checkpoint, Path(checkpoint_path), given))
        if isinstance(map_location, (str, torch.device)):
            module.to(map_location)
        return module

    @property
    def _aside(self) -> tuple[Path, str]:
        """Where the batch of a step that diverged is put, and what its name ends with in this process."""
        # The folder of a run is known before its logs are opened.
        folders = [callback.folder for callback in self.trainer.callbacks if isinstance(callback, Checkpoints)]  # type: ignore[attr-defined]
        place = folders[0] if folders else self.loggers[0].log_dir if self.loggers else None
        rank = "" if self.trainer.world_size == 1 else f"-process{self.global_rank}"
        return Path(place or self.trainer.default_root_dir), rank

    def _now(self) -> float:
        """Seconds on the clock."""
        return time.monotonic() if self.clock == "wall" else time.process_time() / torch.get_num_threads()

    def _agreed_elapsed(self) -> float:
        """Gives the elapsed time on which all processes agree, so that all stop at the same step."""
        if self.trainer.world_size == 1 or self.schedule.minutes is None:
            return self.elapsed
        return self.trainer.strategy.broadcast(self.elapsed)

    def _log(self, terms: dict[str, Any], step: int, batch_size: int) -> None:
        now = self._now()
        speed = (step - self._mark[0]) / max(now - self._mark[1], 1e-9)
        self._mark = (step, now)
        self.latest = {name: float(value) for name, value in terms.items()}
        if not math.isfinite(self.latest["loss"]):
            return  # the training ends before the weights move, and nothing of this step is written
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        logged = self.latest | {"learning_rate": rate, "seconds": self.elapsed, "steps_per_second": speed}
        self.latest["steps_per_second"] = speed
        self.log_dict(logged, batch_size=batch_size, logger=False)
        # Straight to the loggers: Lightning's own count of batches is one off in runs resumed from their last step.
        for logger in self.loggers:
            logger.log_metrics(logged, step)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
