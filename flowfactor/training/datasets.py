"""Data sets by name, as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from flowfactor.training._settings import check_settings

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

    Args:
        data: The settings, as plain values.

    Returns:
        Those that must agree between two runs on the same data.

    Example:
        >>> data_identity({"name": "mnist", "root": "/old", "download": True, "options": {"colour": "red"}})
        {'name': 'mnist', 'options': {'colour': 'red'}}
    """
    kept = {name: value for name, value in data.items() if name not in ("root", "download")}
    options = {name: value for name, value in data.get("options", {}).items() if name != "cache"}
    return kept | {"options": options}


@dataclass
class DataConfig:
    """Which data set of sequences to train on.

    Args:
        name: ``mnist``, ``digits``, ``scenes``, ``shapes3d``, ``dsprites``, ``falcor3d``, ``isaac3d``, ``smallnorb``;
            ``mnist-combined`` or ``scenes-combined``, in whose training sequences transformations act together or one
            after another, and in whose test sequences they act alone; or ``sequences`` (your own folder of pictures).
        root: Folder or file of the data, where it has one.
        steps: Steps T of a sequence: T + 1 frames. Ignored by ``sequences``, which are as long as they are.
        flows: Names of the transformations, in the order of k: of `flowfactor.data.paper_transforms` for ``mnist`` and
            ``digits``, of the factors that move for the others; null takes the data set's usual ones.
        download: Fetch the data if they are missing, where the data set knows from where.
        limit: Use only the first so many elements of the training split.
        options: Further arguments of the data set's class, such as ``{colour: blue}``.

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

    def __post_init__(self) -> None:
        check_settings(self, "data.")

    @property
    def is_combined(self) -> bool:
        """Whether transformations combine in the training sequences."""
        return self.name.endswith("-combined")

    def dataset(self, split: Literal["train", "test"] = "train", *, combined: bool | None = None) -> SequenceDataset:
        """Opens the data set.

        Your own sequences are split by position: every tenth is for testing.

        Args:
            split: ``"train"`` or ``"test"``.
            combined: For ``mnist-combined`` and ``scenes-combined``: whether transformations combine in its sequences;
                where None, in those for training alone.

        Returns:
            The data set.

        Raises:
            FileNotFoundError: If files are missing.
            ValueError: If a file is damaged or of another format, or a setting does not fit.
            TypeError: If the data set takes no such option.
        """
        if self.name not in DATA_NAMES:
            raise ValueError(f"data.name is one of {', '.join(DATA_NAMES)}, got {self.name!r}")
        if self.download and self.name not in _FETCHED:
            raise ValueError(f"data.download fetches {', '.join(_FETCHED)}; {self.name} it cannot: leave it out")
        if combined and not self.is_combined:
            raise ValueError(f"transformations combine in mnist-combined and scenes-combined, not in {self.name}")
        combined = self.is_combined and split == "train" if combined is None else combined
        made = self._own(split) if self.name == "sequences" else self._known(split, combined)
        if self.limit is not None and split == "train":
            if self.limit < 1:
                raise ValueError(f"data.limit must be at least 1, got {self.limit}")
            made = made.subset(list(range(min(self.limit, len(made)))))
        return made

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

    def _own(self, split: str) -> SequenceDataset:
        from flowfactor.data import Sequences

        if self.root is None:
            raise ValueError("data.name 'sequences' needs data.root: the folder <class>/<sequence>/<frame>.png")
        every = Sequences(self.root, **self.options)
        test = [index % 10 == 9 for index in range(len(every))]
        return every.subset(test if split == "test" else [not chosen for chosen in test])
