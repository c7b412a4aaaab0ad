"""Data sets by name, as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flowfactor._datasets import DATASETS
from flowfactor._plugins import load_plugins
from flowfactor.training.settings import check_settings
from flowfactor.training.signatures import read_options

if TYPE_CHECKING:
    from flowfactor.data import SequenceDataset


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
            after another, and in whose test sequences they act alone; ``sequences`` (your own pictures and films); or what
            you have registered by `flowfactor.register_dataset`.
        root: Folder or file of the data, where it has one.
        steps: Steps T of a sequence: T + 1 frames. Ignored by ``sequences`` and by registered data sets that take no
            ``steps``, whose sequences are as long as they are.
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

    name: Annotated[str, DATASETS] = "mnist"
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
        if self.name not in DATASETS:
            load_plugins()
        check_settings(self, "data.")

    @property
    def is_combined(self) -> bool:
        """Whether transformations combine in the training sequences."""
        return "combined" in DATASETS[self.name].takes

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
        check_settings(self, "data.")  # what was set since it was made is checked too
        source = DATASETS[self.name]
        self._check_taken(source.takes)
        if combined and not self.is_combined:
            raise ValueError(f"transformations combine in mnist-combined and scenes-combined, not in {self.name}")
        given = {name: getattr(self, name, None) for name in source.takes}
        settings = {name: value for name, value in given.items() if value is not None and value is not False}
        if self.is_combined:
            settings["combined"] = split == "train" if combined is None else combined
        made = source.open(split=split, **read_options(self.name, self.options), **settings)
        _check_opened(made, self.name)
        return made if self.limit is None or split != "train" else self._limited(made)

    def _check_taken(self, takes: tuple[str, ...]) -> None:
        """Refuses what is set and the data set does not take."""
        if self.download and "download" not in takes:
            fetched = ", ".join(name for name, source in DATASETS.items() if "download" in source.takes)
            raise ValueError(f"data.download fetches {fetched}; {self.name} it cannot: leave it out")
        if self.test_root is not None and "test_root" not in takes:
            raise ValueError(f"data.test_root is for your own sequences; {self.name} has a test split: leave it out")
        if self.root is not None and "root" not in takes:
            raise ValueError(f"data.root is for data sets that lie in files, and {self.name} does not: leave it out")
        if self.flows is not None and "flows" not in takes:
            raise ValueError(
                f"data.flows chooses among what a data set offers; those of {self.name} are its own: leave it out"
            )

    def _limited(self, made: SequenceDataset) -> SequenceDataset:
        from flowfactor.data.splits import draw

        try:
            return made.subset(draw(len(made), self.limit or 0, made.fixed_k, self.seed))
        except (ValueError, TypeError) as error:
            raise type(error)(f"data.{error}") from None


def _check_opened(made: Any, name: str) -> None:
    from flowfactor.data import SequenceDataset

    if not isinstance(made, SequenceDataset):
        raise TypeError(
            f"the data set {name!r} gives a {type(made).__name__}, not a flowfactor.data.SequenceDataset: derive one from it"
        )
