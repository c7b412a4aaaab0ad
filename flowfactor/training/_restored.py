"""What a Lightning checkpoint says of its model and module, so that both can be made of it alone."""

from __future__ import annotations

import json
import operator
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowfactor._config import plain_name, uncompiled
from flowfactor.models.methods import class_of
from flowfactor.models.pretrained import PretrainedMixin
from flowfactor.training.checkpoints import DamagedCheckpointError, check_seal
from flowfactor.training.schedule import LearningRateSchedule

SETTINGS = ("learning_rate", "betas", "weight_decay", "seed", "clock")
"""What a `FlowModule` is made with, apart from its model and schedule."""

_DAMAGED = (RuntimeError, EOFError, LookupError, OSError, TypeError, ValueError, pickle.UnpicklingError)
"""What `torch.load` raises about files that are no checkpoints, or damaged ones."""


def told(module: Any) -> dict[str, Any]:
    """Describes a module as JSON values: its ``model`` (None for one of the user's own), ``schedule`` and ``settings``."""
    model = uncompiled(module.model)
    config = None
    if isinstance(model, PretrainedMixin):
        try:
            config = json.loads(json.dumps(model.config(), default=operator.index))
        except TypeError:  # a subclass of the user's with settings that are no JSON: to be handed over
            config = None
    settings = {name: getattr(module, name) for name in SETTINGS}
    settings["betas"] = list(settings["betas"])
    return {"model": config, "schedule": asdict(module.schedule), "settings": settings}


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Gives weights by the names that they have where nothing is compiled."""
    return {plain_name(name): value for name, value in state.items()}


def named_for(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Gives weights by the names that they have in a module, some of whose parts may be compiled."""
    own = {plain_name(name): name for name in module.state_dict()}
    return {own.get(name, name): value for name, value in plain(state).items()}


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint of a `FlowModule`, once its digest is checked where it has one; no code in it is run.

    Args:
        path: The file.
        map_location: Where its tensors go.

    Returns:
        The checkpoint.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If it is damaged, or no checkpoint of a `FlowModule`; the message names the file.
    """
    path = Path(path)
    try:
        check_seal(path)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from None
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except _DAMAGED as error:
        raise DamagedCheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged, or no checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict) or not all(
        isinstance(checkpoint.get(key), dict) for key in ("state_dict", "flowfactor")
    ):
        raise ValueError(f"{path} is no checkpoint of a FlowModule")
    return checkpoint


def arguments(checkpoint: dict[str, Any], path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Gives what a module is made with: of what was handed over, and of a checkpoint otherwise.

    Args:
        checkpoint: The checkpoint.
        path: Its file, for messages.
        given: The model or parts of it, the schedule and settings.

    Returns:
        The arguments of `FlowModule`.

    Raises:
        ValueError: If the checkpoint does not say what was not handed over either, or does not fit it.
    """
    written = checkpoint["flowfactor"].get("module", {})
    try:
        settings = written.get("settings", {}) | {name: given[name] for name in SETTINGS if name in given}
        schedule = given.get("schedule") or LearningRateSchedule(**written.get("schedule", {}))
    except (AttributeError, TypeError, ValueError) as error:
        if "module" in checkpoint["flowfactor"]:
            raise ValueError(f"{path} does not say how its module was made ({error})") from error
        raise ValueError(
            f"{path} is of an earlier release and does not say how it was made: hand over model= and schedule="
        ) from None
    if "betas" in settings:
        settings["betas"] = tuple(settings["betas"])
    parts = {name: value for name, value in given.items() if name not in (*SETTINGS, "schedule", "model")}
    weights = {
        name.removeprefix("model."): value
        for name, value in plain(checkpoint["state_dict"]).items()
        if name.startswith("model.")
    }
    model = given.get("model")
    if model is None:
        model = _made(written.get("model"), weights, path, parts)
    else:
        if parts:
            raise ValueError(f"with a model of one's own, there is no use for {', '.join(sorted(parts))}")
        try:
            model.load_state_dict(named_for(model, weights))
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the model that was handed over: {error}") from error
    return {"model": model, "schedule": schedule, **settings}


def _made(config: Any, weights: dict[str, Tensor], path: Path, parts: dict[str, Any]) -> Any:
    """Makes the model that a checkpoint describes."""
    if config is None:
        raise ValueError(
            f"{path} does not say how its model was made: hand it over as load_from_checkpoint(path, model=...)"
        )
    kinds = {"model": str, "parts": dict, "settings": dict}
    if not isinstance(config, dict) or not all(isinstance(config.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"{path} does not hold the config of a model")
    return class_of(config["model"], path).from_state(config, weights, path, **parts)
