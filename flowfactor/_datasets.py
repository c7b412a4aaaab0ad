"""Every data set by name: what opens it, and what is known of it before PyTorch is imported."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flowfactor.registry import register


@dataclass(frozen=True)
class NamedDataset:
    """A data set that ``data.name`` can name.

    Attributes:
        name: Its name.
        open: Opens a split: ``open(split="train", **settings)``.
        takes: Which settings of the data section it is given, beside its options: of ``root``, ``steps``, ``flows``,
            ``download``, ``combined``, ``test_root``, ``test_fraction`` and ``seed``.
        options_from: What takes its options: functions and classes, or the places where their source is read.
        hidden: Their arguments that are no options.
        open_ended: Whether it takes options that its signature does not name.
    """

    name: str
    open: Callable[..., Any]
    takes: tuple[str, ...]
    options_from: tuple[str | Callable[..., Any], ...]
    hidden: tuple[str, ...] = ()
    open_ended: bool = False


_FILES = ("root", "download")
_HIDDEN = ("split", "transforms", "images", "labels", "data", "source")


def _ours(name: str, function: str, kind: str, place: str, *takes: str, also: str = "") -> NamedDataset:
    def opened(split: str, **settings: Any) -> Any:
        return getattr(importlib.import_module("flowfactor.data.named"), function)(kind, split, **settings)

    options_from = tuple(f"data/{part}" for part in (place, also) if part)
    return NamedDataset(name, opened, takes, options_from, (*_HIDDEN, *takes))


_MNIST, _SCENES = "readers/mnist.py:MNIST", "scenes.py:Scenes"
_ALL = (
    _ours("mnist", "open_images", "MNIST", _MNIST, "steps", "flows", *_FILES),
    _ours("digits", "open_images", "Digits", "readers/digits.py:Digits", "steps", "flows"),
    _ours("scenes", "open_grid", "Scenes", _SCENES, "steps", "flows"),
    _ours("shapes3d", "open_grid", "Shapes3D", "readers/shapes3d.py:Shapes3D", "steps", "flows", *_FILES),
    _ours("dsprites", "open_grid", "DSprites", "readers/dsprites.py:DSprites", "steps", "flows", *_FILES),
    _ours("falcor3d", "open_grid", "Falcor3D", "readers/rendered.py:Falcor3D", "steps", "flows", "root"),
    _ours("isaac3d", "open_grid", "Isaac3D", "readers/rendered.py:Isaac3D", "steps", "flows", "root"),
    _ours("smallnorb", "open_grid", "SmallNORB", "readers/norb.py:SmallNORB", "steps", "flows", *_FILES),
    _ours(
        "mnist-combined", "open_combined", "mnist", _MNIST, "steps", "flows", "combined", *_FILES,
        also="combined.py:CombinedImages",
    ),
    _ours(
        "scenes-combined", "open_combined", "scenes", _SCENES, "steps", "flows", "combined",
        also="combined.py:CombinedScenes",
    ),
    _ours(
        "sequences", "open_sequences", "Sequences", "readers/sequences.py:Sequences",
        *("root", "test_root", "test_fraction", "seed"),
    ),
)  # fmt: skip

DATASETS: dict[str, NamedDataset] = {entry.name: entry for entry in _ALL}
"""All data sets by name: ours first, then those that are registered."""

_BUILT_IN = tuple(DATASETS)
_OFFERED = ("root", "steps", "flows", "download")


def register_dataset(name: str, factory: Callable[..., Any] | None = None) -> Any:
    """Registers a data set of one's own, for ``data.name`` in ``flowfactor train`` and ``flowfactor benchmark``.

    The factory is called as ``factory(split="train", **options)`` and ``factory(split="test", **options)``. Those of
    ``root``, ``steps``, ``flows`` and ``download`` that it takes are what ``data.root``, ``data.steps``, ... say; its other
    arguments are the options in ``data.options``, by their annotations, defaults and the docstring's ``Args``.

    Args:
        name: Its name: a letter, then letters, digits, ``-`` and ``_``.
        factory: A function that gives a `SequenceDataset`, or a class of one. Where left out, this is a decorator.

    Returns:
        The factory, or a decorator of it.

    Raises:
        TypeError: If the factory takes no ``split``, or is no function or class.
        ValueError: If the name is taken.

    Example:
        >>> import torch, flowfactor as ff
        >>> @ff.register_dataset("noise")
        ... def open_noise(split, steps=4, *, count: int = 6):
        ...     images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(len(split)))
        ...     return ff.data.TransformedImages(images, {"turn": (ff.data.Rotate(), 0, 40)}, steps)
        >>> config = ff.training.DataConfig("noise", steps=2, options={"count": 3})
        >>> len(config.dataset("test")), config.dataset("test").num_steps
        (3, 2)
    """
    if factory is None:
        return lambda made: register_dataset(name, made)
    if not callable(factory):
        raise TypeError(f"the factory of the data set {name!r} must be a function or a class, got {factory!r}")
    taken = inspect.signature(factory).parameters
    if "split" not in taken:
        raise TypeError(
            f"the data set {name!r} is opened by factory(split, **options), and {factory!r} takes ({', '.join(taken)})"
        )
    takes = tuple(option for option in _OFFERED if option in taken)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    register("dataset", name, factory, _BUILT_IN)
    DATASETS[name] = NamedDataset(name, factory, takes, (factory,), ("split", *takes), open_ended)
    return factory
