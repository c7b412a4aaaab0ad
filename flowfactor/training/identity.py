"""Whether the data of a run are the ones that it was trained on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowfactor._files import read_json
from flowfactor.data import SequenceDataset
from flowfactor.training.folder import DATA, write_text

_WORDS = {
    "class": "a data set of class",
    "elements": "a number of elements of",
    "image_shape": "pictures of shape",
    "steps": "steps",
    "flows": "the transformations",
    "sha256": "contents of SHA-256",
}


def fingerprints(train: SequenceDataset, test: SequenceDataset) -> dict[str, dict[str, Any]]:
    """What tells the data of a run from others of the same name.

    Args:
        train: The training split.
        test: The test split.

    Returns:
        The fingerprints by split.
    """
    return {"train": train.fingerprint(), "test": test.fingerprint()}


def write_data(folder: Path, made: Mapping[str, Any]) -> None:
    """Writes down in a run's folder what its data are.

    Args:
        folder: The folder.
        made: The `fingerprints`.
    """
    write_text(folder / DATA, json.dumps(made, indent=2) + "\n")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Says how data differ from those of before, split by split.

    Args:
        before: Their fingerprints, by split.
        now: The fingerprints of some of the splits.

    Returns:
        What differs, in words; nothing where they agree.

    Example:
        >>> differences({"test": {"elements": 9}}, {"test": {"elements": 7}})
        ['test: a number of elements of 9, not 7']
    """
    told = []
    for split, made in now.items():
        old = before.get(split)
        if not isinstance(old, Mapping):
            continue
        parts = [(_WORDS.get(name, name), old.get(name), value) for name, value in made.items()]
        told += [f"{split}: {words} {_short(was)}, not {_short(value)}" for words, was, value in parts if was != value]
    return told


def data_of(folder: Path) -> dict[str, Any] | None:
    """Reads what the data of a run were.

    Args:
        folder: Folder of the run.

    Returns:
        The fingerprints by split, or None for a run of before they were written down.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / DATA
    if not path.is_file():
        return None
    return read_json(path)


def check_data(folder: Path, now: Mapping[str, Any], cure: str) -> None:
    """Checks that data are those that the run in a folder was trained on.

    Warns where that cannot be known, since the run says nothing of its data.

    Args:
        folder: Folder of the run.
        now: The fingerprints of some of the splits.
        cure: What to do about other data.

    Raises:
        ValueError: If they are others.
    """
    before = data_of(folder)
    if before is None:
        warnings.warn(
            f"the run in {folder} does not say which data it was trained on (it holds no {DATA}): make sure yourself "
            "that they are these",
            stacklevel=2,
        )
        return
    missing = [split for split in now if not isinstance(before.get(split), Mapping)]
    if missing:
        raise ValueError(f"{folder / DATA} is damaged: it does not say what the data of {' and '.join(missing)} were")
    told = differences(before, now)
    if told:
        raise ValueError(f"the run in {folder} was trained on other data ({'; '.join(told)}): {cure}")


def _short(value: Any) -> Any:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value
