"""Data sets as a configuration asks for them by name: what opens them, and how one's own sequences are split."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import flowfactor.data as sets
from flowfactor._datasets import DATASETS
from flowfactor.data.base import SequenceDataset
from flowfactor.data.combined import CombinedImages, CombinedScenes
from flowfactor.data.factors import FactorSequences
from flowfactor.data.readers.mnist import paper_transforms
from flowfactor.data.readers.sequences import Sequences

Split = Literal["train", "test"]

_MIXING = ("modes", "strength", "seed", "count")
"""What makes the training sequences of the combined sets, and would mean nothing to the plain ones."""


def open_images(kind: str, split: Split, *, steps: int, flows: Sequence[str] | None = None, **options: Any) -> Any:
    """Opens a data set of transformed pictures; `flows` are names of `flowfactor.data.paper_transforms`."""
    if flows is not None:
        options["transforms"] = paper_transforms(steps, flows, start=options.get("start", "first"))
    return getattr(sets, kind)(split=split, steps=steps, **options)


def open_grid(kind: str, split: Split, *, flows: Sequence[str] | None = None, **options: Any) -> Any:
    """Opens a grid of factors; `flows` are names of those that move."""
    if flows is not None:
        options["vary"] = tuple(flows)
    return getattr(sets, kind)(split=split, **options)


def open_combined(name: str, split: Split, *, combined: bool, **settings: Any) -> SequenceDataset:
    """Opens the plain data set of a name, and has its transformations combine where asked to."""
    mixing = {option: settings.pop(option) for option in _MIXING if option in settings}
    plain = DATASETS[name].open(split=split, **settings)
    if not combined:
        return plain
    if isinstance(plain, FactorSequences):
        return CombinedScenes(plain, **mixing)
    return CombinedImages.of(plain, **mixing)


def open_sequences(
    kind: str,
    split: Split,
    *,
    test_fraction: float,
    seed: int,
    root: str | None = None,
    test_root: str | None = None,
    **options: Any,
) -> Sequences:
    """Opens one's own sequences.

    Args:
        kind: What they are called.
        split: ``"train"`` or ``"test"``.
        test_fraction: Share of each class for testing.
        seed: Seed of its draw.
        root: Folder or file of the sequences.
        test_root: Another folder, all of which is for testing.
        **options: Further arguments of `Sequences`.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If a setting does not fit, a file cannot be read, or there is no test split to be had.
        TypeError: If there is no such option.
    """
    if root is None:
        raise ValueError(
            "data.name 'sequences' needs data.root: a folder <class>/<sequence>/<frame>.png, or with films in place of "
            "the folders of frames"
        )
    if test_root is None:
        return Sequences(root, **options).split(test_fraction, seed)[split == "test"]
    _check_places(Path(root).expanduser(), Path(test_root).expanduser())
    train = Sequences(root, **options)
    if split == "train":
        return train
    test = Sequences(test_root, **options)
    _check_alike(train, test, root, test_root)
    _check_apart(train, test, root, test_root)
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
