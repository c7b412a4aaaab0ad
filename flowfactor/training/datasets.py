"""Data sets by name, as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from flowfactor.training.own import open_own
from flowfactor.training.settings import check_settings

if TYPE_CHECKING:
    from flowfactor.data import SequenceDataset

DataName = Literal[
    "mnist",
    "digits",
    "scenes",
    "shapes3d",
    "dsprites",
    "falcor3d",
    "isaac3d",
    "smallnorb",
    "mnist-combined",
    "scenes-combined",
    "sequences",
]
DATA_NAMES: tuple[str, ...] = get_args(DataName)
"""Every data set that a configuration can name."""

_GRIDS: Mapping[str, str] = {
    "scenes": "Scenes", "shapes3d": "Shapes3D", "dsprites": "DSprites", "falcor3d": "Falcor3D", "isaac3d": "Isaac3D",
    "smallnorb": "SmallNORB",
}  # fmt: skip
_ON_DISK = ("mnist", "mnist-combined", "shapes3d", "dsprites", "falcor3d", "isaac3d", "smallnorb")
_FETCHED = ("mnist", "mnist-combined", "shapes3d", "dsprites", "smallnorb")


def data_identity(data: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the sequences what they are: all settings of the data but where files lie and whether they are fetched.

    Of a folder for testing only whether there is one counts.

    Args:
        data: The settings, as plain values.

    Returns:
        Those that must agree between two runs on the same data.

    Example:
        >>> data_identity({"name": "mnist", "root": "/old", "download": True, "options": {"colour": "red"}})
        {'name': 'mnist', 'options': {'colour': 'red'}}
    """
    kept = {name: value for name, value in data.items() if name not in ("root", "download", "test_root")}
    if data.get("test_root") is not None:
        kept["test_root"] = True
    options = {name: value for name, value in data.get("options", {}).items() if name != "cache"}
    return kept | {"options": options}


@dataclass
class DataConfig:
    """Which data set of sequences to train on.

    Args:
        name: ``mnist``, ``digits``, ``scenes``, ``shapes3d``, ``dsprites``, ``falcor3d``, ``isaac3d``, ``smallnorb``;
            ``mnist-combined`` or ``scenes-combined``, in whose training sequences transformations act together or one
            after another, and in whose test sequences they act alone; or ``sequences`` (your own pictures and films).
        root: Folder or file of the data, where it has one.
        steps: Steps T of a sequence: T + 1 frames. Ignored by ``sequences``, which are as long as they are.
        flows: Names of the transformations, in the order of k: of `flowfactor.data.paper_transforms` for ``mnist`` and
            ``digits``, of the factors that move for the others; null takes the data set's usual ones.
        download: Fetch the data if they are missing, where the data set knows from where.
        limit: Use only so many elements of the training split, drawn at random; where they have labels, as equal
            numbers of each as there are.
        options: Further arguments of the data set's class, such as ``{colour: blue}``, or ``{window: 9}`` for
            ``sequences``.
        test_root: For ``sequences``: another folder or file, all of which is for testing, as all of `root` is then for
            training.
        test_fraction: For ``sequences`` without `test_root`: share of each class for testing, in whole groups; see
            `flowfactor.data.Sequences.split`.
        seed: Seed of the draws of `limit` and `test_fraction`.

    Raises:
        ValueError: If a setting is of another type, or no data set has that name.

    Example:
        >>> len(DataConfig("digits").dataset("test"))
        297
        >>> DataConfig("digits", flows=["rotation", "perspective"]).dataset("test").flow_names
        ('rotation', 'perspective')
    """

    name: DataName = "mnist"
    root: str | None = None
    steps: int = 8
    flows: list[str] | None = None
    download: bool = False
    limit: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    test_root: str | None = None
    test_fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, "data.")

    @property
    def is_combined(self) -> bool:
        """Whether transformations combine in the training sequences."""
        return self.name.endswith("-combined")

    def dataset(self, split: Literal["train", "test"] = "train", *, combined: bool | None = None) -> SequenceDataset:
        """Opens the data set.

        Your own sequences are split at random, with some of every class on both sides and sequences of one film, or
        one group, on one.

        Args:
            split: ``"train"`` or ``"test"``.
            combined: For ``mnist-combined`` and ``scenes-combined``: whether transformations combine in its sequences;
                where None, in those for training alone.

        Returns:
            The data set.

        Raises:
            FileNotFoundError: If files are missing.
            ValueError: If a file is damaged or of another format, a setting does not fit, or your own sequences cannot
                be split.
            TypeError: If the data set takes no such option.
        """
        if self.name not in DATA_NAMES:
            raise ValueError(f"data.name is one of {', '.join(DATA_NAMES)}, got {self.name!r}")
        if self.download and self.name not in _FETCHED:
            raise ValueError(f"data.download fetches {', '.join(_FETCHED)}; {self.name} it cannot: leave it out")
        if combined and not self.is_combined:
            raise ValueError(f"transformations combine in mnist-combined and scenes-combined, not in {self.name}")
        if self.test_root is not None and self.name != "sequences":
            raise ValueError(f"data.test_root is for your own sequences; {self.name} has a test split: leave it out")
        combined = self.is_combined and split == "train" if combined is None else combined
        made = open_own(self, split) if self.name == "sequences" else self._known(split, combined)
        return made if self.limit is None or split != "train" else self._limited(made)

    def _limited(self, made: SequenceDataset) -> SequenceDataset:
        from flowfactor.data.splits import draw

        try:
            return made.subset(draw(len(made), self.limit or 0, made.fixed_k, self.seed))
        except (ValueError, TypeError) as error:
            raise type(error)(f"data.{error}") from None

    def _known(self, split: Literal["train", "test"], combined: bool) -> SequenceDataset:
        from flowfactor import data

        base = self.name.removesuffix("-combined")
        settings: dict[str, Any] = dict(self.options)
        # What makes the training sequences of the combined sets, and would mean nothing to the plain ones.
        mixing = {
            name: settings.pop(name)
            for name in ("modes", "strength", "seed", "count")
            if self.is_combined and name in settings
        }
        settings["steps"] = self.steps
        if self.name in _ON_DISK and self.root is not None:
            settings["root"] = self.root
        if self.download:
            settings["download"] = True
        if base in _GRIDS:
            if self.flows is not None:
                settings["vary"] = tuple(self.flows)
            grid = getattr(data, _GRIDS[base])(split=split, **settings)
            return data.CombinedScenes(grid, **mixing) if combined else grid
        if self.flows is not None:
            settings["transforms"] = data.paper_transforms(self.steps, self.flows)
        plain = (data.MNIST if base == "mnist" else data.Digits)(split=split, **settings)
        if not combined:
            return plain
        return data.CombinedImages(
            plain.images,
            plain.transforms,
            self.steps,
            colour=settings.get("colour", "red"),
            labels=plain.labels,
            **mixing,
        )
