"""The two files of a saved model: whose they are, and whether they are whole."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowfactor._files import read_json
from flowfactor.errors import require

CONFIG, WEIGHTS = "config.json", "model.safetensors"

DIGEST = "flowfactor.sha256"
"""In the header of the weights: the digest of their values."""

SEALED = "digest"
"""In the config: what the digest is called. Where it says so, weights without one are not what was saved."""


def check_replaceable(directory: Path) -> None:
    """Checks that nothing but a model of flowfactor's would be replaced.

    Args:
        directory: Where a model is to be saved.

    Raises:
        FileExistsError: If it holds files of the names of a model's that are not shown to be one.
    """
    held = [name for name in (CONFIG, WEIGHTS) if (directory / name).exists()]
    if not held:
        return
    try:
        read_config(directory / CONFIG)
    except (OSError, ValueError):
        raise FileExistsError(
            f"{directory} holds {' and '.join(held)}, which no model of flowfactor wrote: choose another directory, or "
            "move them away"
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """Reads a model's config.

    Args:
        path: The file.

    Returns:
        The config, with its ``model``, ``parts`` and ``settings``.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not the config of a model.
    """
    config = read_json(path, ": this is not the config of a model")
    kinds = {"model": str, "parts": dict, "settings": dict}
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise ValueError(f"{path} is not the config of a model: its {key!r} is {str(config.get(key))[:40]!r}")
    return config


def digest(state: Mapping[str, Tensor]) -> str:
    """Gives the SHA-256 of tensors: of names, types, shapes and values.

    Args:
        state: The tensors, on the CPU.

    Returns:
        The digest in hexadecimal.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.ones(2)})
        False
    """
    made = hashlib.sha256()
    for name in sorted(state):
        value = state[name]
        made.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        made.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens weights; what is wrong with the file is reported with its name."""
    safetensors = require("safetensors", extra="io")
    with path.open("rb"):  # whose errors of access name the file
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, KeyError, RuntimeError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is not a whole safetensors file: {error}") from error


def held_numbers(path: Path) -> int:
    """Counts the numbers in a file of weights, without reading them.

    Args:
        path: The file.

    Returns:
        How many there are.

    Raises:
        ValueError: If the file is damaged.
    """
    with _opened(path) as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def check_fits(path: Path, held: int, expected: Mapping[str, int]) -> None:
    """Checks, before a model is made, that it is no larger than its file: a damaged config asks for any size.

    Args:
        path: The file.
        held: How many numbers it holds.
        expected: The numbers of weights of the model's parts.

    Raises:
        ValueError: If a part has more weights than the file.
    """
    for name, count in expected.items():
        if count > held:
            raise ValueError(
                f"{path} does not fit the model of its config: it holds {held:,} numbers, where the {name} alone "
                f"has {count:,}"
            )


def read_weights(path: Path, *, is_sealed: bool) -> dict[str, Tensor]:
    """Reads weights, and checks their digest.

    Args:
        path: The file.
        is_sealed: Whether it must have a digest; one of an earlier release, which wrote none, is taken as it is.

    Returns:
        The tensors by name.

    Raises:
        ValueError: If the file is damaged.
    """
    with _opened(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        header = file.metadata() or {}
    known = header.get(DIGEST)
    if known is None and is_sealed:
        raise ValueError(
            f"{path} is damaged, or none that save_pretrained wrote: it has no digest of its values, which its {CONFIG} "
            f"says that it has. To take weights of your own as they are, remove {SEALED!r} from {CONFIG}"
        )
    if known is not None and (digest(state) != known or header != metadata(known)):
        raise ValueError(f"{path} is damaged: its values are not those that were saved (their digest differs)")
    return state


def metadata(made: str) -> dict[str, str]:
    """What the header of the weights says apart from their names and places.

    Args:
        made: Their digest.

    Returns:
        The entries.
    """
    return {DIGEST: made}  # alone: of several entries the order in the file is any


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Puts weights into a model.

    Args:
        model: The model.
        state: Its weights.
        path: The file that they are from.

    Raises:
        ValueError: If they are not weights of such a model.

    Warns:
        UserWarning: If some are NaN or infinite.
    """
    for name, value in model.state_dict().items():
        given = state.get(name)
        if (
            given is not None
            and given.dtype != value.dtype
            and not (given.is_floating_point() and value.is_floating_point())
        ):
            raise ValueError(
                f"{path} does not fit the model of its config: {name} is {given.dtype}, where the model has {value.dtype}"
            )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model of its config: {error}") from error
    bad = [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]
    if bad:
        names = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
        warnings.warn(f"{path} holds weights that are NaN or infinite ({names}): the model is of no use", stacklevel=4)
