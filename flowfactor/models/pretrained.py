"""Saving models as config.json and model.safetensors, and loading them again."""

from __future__ import annotations

import contextlib
import json
import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from flowfactor._config import describe, plain_name, read, rebuild, uncompiled
from flowfactor._files import replacing
from flowfactor.errors import require
from flowfactor.latent_flow import LatentFlow
from flowfactor.models._saved import (
    CONFIG,
    DIGEST,
    SEALED,
    WEIGHTS,
    check_fits,
    check_replaceable,
    digest,
    fill,
    held_numbers,
    metadata,
    read_config,
    read_weights,
)
from flowfactor.priors import build as build_prior
from flowfactor.registry import UnknownPartError, make
from flowfactor.solver import Solver

_UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError)
"""What constructors raise about arguments of a kind that nobody would give them; a file may hold anything."""


class PretrainedMixin:
    """Gives a model `save_pretrained` and `from_pretrained`: it is written as its parts and settings, by their names."""

    _parts: ClassVar[tuple[str, ...]]
    """Names of the modules that the constructor takes."""

    _settings: ClassVar[tuple[str, ...]]
    """Names of what else it takes."""

    def config(self) -> dict[str, Any]:
        """How the model was made, as JSON values; parts of the user's own appear as None."""
        settings = {name: getattr(self, name) for name in self._settings}
        return {
            "model": type(self).__name__,
            "parts": {name: _write_part(getattr(self, name)) for name in self._parts},
            "settings": {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()},
        }

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Writes ``config.json`` and ``model.safetensors`` into a directory, each whole or not at all.

        Args:
            directory: Made where it is missing.

        Returns:
            The directory.

        Raises:
            ImportError: If safetensors is not installed.
            FileExistsError: If the directory holds files of these names that are no model of flowfactor's.
            OSError: If a file cannot be written.
        """
        safetensors = require("safetensors.torch", extra="io")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        check_replaceable(directory)
        assert isinstance(self, nn.Module)
        # Copies, since safetensors refuses tensors that share memory, as those of a part used twice do.
        values = {plain_name(name): value.detach().cpu() for name, value in self.state_dict().items()}
        state = {name: value.contiguous().clone() for name, value in values.items()}
        failed: type[Exception] = require("safetensors", extra="io").SafetensorError
        with replacing(directory / WEIGHTS) as weights, replacing(directory / CONFIG) as text:
            try:
                safetensors.save_file(state, weights, metadata=metadata(digest(state)))
            except failed as error:  # how safetensors reports a full disk
                raise OSError(f"{directory / WEIGHTS} cannot be written: {error}") from error
            config = self.config() | {SEALED: DIGEST}
            written = json.dumps(config, indent=2, default=operator.index)  # integers may be NumPy's
            text.write_text(written + "\n", encoding="utf-8")
        return directory

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **parts: Any) -> Any:
        """Loads a model that `save_pretrained` wrote.

        Only classes of flowfactor are made from the file; it cannot name code to import.

        Args:
            directory: Where the two files lie.
            **parts: Parts of your own (``encoder``, ``decoder``, ``flow``, ``prior``, ``force``, ``objective``,
                ``factor_encoder``, ``estimator``) whose classes are not registered, made as they were when the model was
                saved; their weights are loaded.

        Returns:
            The model, in evaluation mode and the precision in which it was saved.

        Raises:
            FileNotFoundError: If a file is missing.
            PermissionError: If a file may not be read.
            ValueError: If a file is damaged, the weights have no digest where the config says that they have one, it is of
                another model, or a part of one's own is not handed over.

        Warns:
            UserWarning: If weights are NaN or infinite.
        """
        require("safetensors.torch", extra="io")
        directory = Path(directory)
        for name in (CONFIG, WEIGHTS):
            if not (directory / name).is_file():
                raise FileNotFoundError(
                    f"{directory} holds no {name}; it is written by model.save_pretrained(directory)"
                )
        config = read_config(directory / CONFIG)
        if config["model"] != cls.__name__:
            raise ValueError(f"{directory} holds a {config['model']}, not a {cls.__name__}")
        held = held_numbers(directory / WEIGHTS)
        model = cls._made(config, parts, held, directory / CONFIG, directory / WEIGHTS)
        state = read_weights(directory / WEIGHTS, is_sealed=SEALED in config)
        return _filled(model, state, directory / WEIGHTS).eval()

    @classmethod
    def from_state(cls, config: dict[str, Any], state: Mapping[str, torch.Tensor], source: Path, **parts: Any) -> Any:
        """Makes a model of its config and weights, which another file than `save_pretrained`'s holds.

        Args:
            config: As `config` gives it.
            state: The weights.
            source: The file, for messages.
            **parts: As for `from_pretrained`.

        Returns:
            The model.

        Raises:
            ValueError: As `from_pretrained` does.
        """
        held = sum(value.numel() for value in state.values())
        return _filled(cls._made(config, parts, held, source, source), state, source)

    @classmethod
    def _made(cls, config: dict[str, Any], parts: dict[str, Any], held: int, path: Path, weights: Path) -> Any:
        """Makes the model of a config, with fresh weights, once it is known to be no larger than the weights held."""
        unknown = sorted(set(parts) - set(config["parts"]))
        if unknown:
            raise ValueError(f"a {cls.__name__} has no parts {unknown}; it has {sorted(config['parts'])}")
        with _naming(path, cls.__name__):
            check_fits(weights, held, _sizes(config["parts"], parts))
            return cls._assemble(config, parts)

    @classmethod
    def _assemble(cls, config: dict[str, Any], given: dict[str, Any]) -> Any:
        """Makes the model of a config, with fresh weights."""
        written = config["parts"]
        parts = dict(given)
        for name in sorted(set(written) - set(given)):  # the encoder, which a prior may borrow, comes before it
            parts[name] = _read_part(name, written[name], parts)
        return cls(**parts, **config["settings"])


def _filled(model: Any, state: Mapping[str, torch.Tensor], source: Path) -> Any:
    """Puts weights into a model, in the precision in which they were saved."""
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    fill(model, state, source)
    return model


def _write_part(part: Any) -> Any:
    """A part as JSON values: ``"none"`` where there is none, None where it is the user's own."""
    if part is None:
        return "none"
    part = uncompiled(part)
    if isinstance(part, LatentFlow):
        how: dict[str, Any] = {"solver": asdict(part.solver), "divergence": part.divergence}
        if part.divergence == "hutchinson" and part.probes > 1:
            how["probes"] = part.probes
        if part.evaluation_solver is not None:
            how["evaluation_solver"] = asdict(part.evaluation_solver)
        return {"field": describe(part.field), **how}
    return describe(part)


def _sizes(written: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of the weights of the parts that a config describes; nothing of their size is made."""
    parts, sizes = dict(given), {}
    for name in sorted(set(written) - set(given)):
        if '"vamp"' in json.dumps(written[name]):
            continue  # asks its encoder for values, which there are none of here
        with torch.device("meta"):
            part = parts[name] = _read_part(name, written[name], parts)
        if isinstance(part, nn.Module):
            sizes[name] = sum(value.numel() for value in part.state_dict().values())
    return sizes


def _read_part(name: str, written: Any, parts: dict[str, Any]) -> Any:
    """Makes a part anew, with the help of those that are there."""
    if written == "none":
        return None
    if written is None or (name == "flow" and written["field"] is None):
        raise ValueError(
            f"this model's {name} is a part of the user's own: hand it over as {_handed(name)}; or register its class "
            "(flowfactor.register_potential and the like) before the model is saved, and again before it is loaded"
        )
    try:
        if name == "flow":
            field: Any = rebuild(written["field"])
            solver, other = (one and Solver(**one) for one in (written["solver"], written.get("evaluation_solver")))
            more = {"probes": written.get("probes", 1), "evaluation_solver": other}
            return LatentFlow(field, solver, written["divergence"], **more)
        if name == "prior":
            return build_prior(read(written), parts["encoder"])
        return make(name, read(written)) if "name" in written else rebuild(written)
    except UnknownPartError as error:
        raise ValueError(f"{error}. Or hand the {name} over: {_handed(name)}") from error


def _handed(name: str) -> str:
    return f"from_pretrained(directory, {name}=...), or as load_from_checkpoint(path, {name}=...)"


@contextlib.contextmanager
def _naming(path: Path, model: str) -> Iterator[None]:
    """Has errors about what a file says name the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(path.parent) in str(error) else f"{path}: {error}") from error
    except _UNFIT as error:
        raise ValueError(
            f"{path} does not describe a {model} that can be made ({type(error).__name__}: {error})"
        ) from error
