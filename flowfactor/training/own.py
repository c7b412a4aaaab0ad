"""One's own sequences, as a configuration asks for them: the split into training and test, and what may not be."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from flowfactor.data import Sequences
    from flowfactor.training.datasets import DataConfig


def open_own(data: DataConfig, split: Literal["train", "test"]) -> Sequences:
    """Opens one's own sequences.

    Args:
        data: The settings.
        split: ``"train"`` or ``"test"``.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If a setting does not fit, a file cannot be read, or there is no test split to be had.
        TypeError: If there is no such option.
    """
    from flowfactor.data import Sequences

    if data.root is None:
        raise ValueError(
            "data.name 'sequences' needs data.root: a folder <class>/<sequence>/<frame>.png, or with films in place of "
            "the folders of frames"
        )
    if data.flows is not None:
        raise ValueError(
            f"data.flows chooses among what a data set offers; the transformations in {data.root} are those of its "
            "folders, in the order of their names: leave it out"
        )
    if data.test_root is None:
        return Sequences(data.root, **data.options).split(data.test_fraction, data.seed)[split == "test"]
    _check_places(Path(data.root).expanduser(), Path(data.test_root).expanduser())
    train = Sequences(data.root, **data.options)
    if split == "train":
        return train
    test = Sequences(data.test_root, **data.options)
    _check_alike(train, test, data.root, data.test_root)
    _check_apart(train, test, data.root, data.test_root)
    return test


def _check_places(root: Path, test_root: Path) -> None:
    one, other = root.resolve(), test_root.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(
            f"data.root {root} and data.test_root {test_root} lie one in the other, so that training would see the test "
            "sequences: put them side by side"
        )


def _check_alike(train: Sequences, test: Sequences, root: str, test_root: str) -> None:
    pairs = {
        "transformations": (", ".join(train.flow_names) or "none", ", ".join(test.flow_names) or "none"),
        "channels": (train.image_shape[0], test.image_shape[0]),
        "pixels (height, width)": (train.image_shape[1:], test.image_shape[1:]),
        "frames": (train.num_steps + 1, test.num_steps + 1),
    }
    cures = {
        "transformations": "name the classes' folders alike",
        "channels": "give data.options.channels, 1 or 3",
        "pixels (height, width)": "give data.options.size",
        "frames": "give data.options.window",
    }
    for what, (one, other) in pairs.items():
        if one != other:
            raise ValueError(f"{root} has {what} {one}, but {test_root} {other}: {cures[what]}")


def _check_apart(train: Sequences, test: Sequences, root: str, test_root: str) -> None:
    """Refuses test sequences that lie in the training data too, and warns of single frames that do."""
    seen = {frame for own in train.frame_digests() for frame in own}
    shared = [sum(frame in seen for frame in own) for own in test.frame_digests()]
    whole = sum(count == test.num_steps + 1 for count in shared)
    if whole:
        raise ValueError(
            f"{whole} of the {len(test)} test sequences in {test_root} lie in {root} too, frame by frame, so that what is "
            "measured on them is memory: take them out of one of the two"
        )
    if some := sum(count > 0 for count in shared):
        warnings.warn(
            f"{some} of the {len(test)} test sequences in {test_root} hold frames that are in {root} too: if they are "
            "parts of the same films, what is measured on them is memory",
            stacklevel=2,
        )
