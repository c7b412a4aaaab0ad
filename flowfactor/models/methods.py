"""Models by the name of their method, and saved ones by the name of their class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from flowfactor._checks import choices
from flowfactor._methods import METHODS, Method, register_method
from flowfactor.models._saved import CONFIG, read_config
from flowfactor.models.baselines import BASELINES
from flowfactor.models.flow_vae import FlowFactorizedVAE
from flowfactor.models.sparse import SparseTransformationVAE

__all__ = ["METHODS", "Method", "build_model", "class_of", "get_method", "load_pretrained", "register_method"]


def get_method(name: str) -> Method:
    """Gives a method by its name.

    Args:
        name: One of `METHODS`.

    Returns:
        The method.

    Raises:
        ValueError: If there is no such method.

    Example:
        >>> get_method("free").title
        'control: a free velocity field, no PDE'
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}{choices(name, METHODS)}")
    return METHODS[name]


def build_model(
    name: str,
    image_shape: Sequence[int] = (3, 28, 28),
    num_flows: int = 3,
    latent_dim: int | None = None,
    *,
    num_frames: int | None = None,
    **options: Any,
) -> Any:
    """Builds the model of a method.

    Args:
        name: One of `METHODS`.
        image_shape: ``(C, H, W)``, H and W divisible by 4.
        num_flows: K.
        latent_dim: D; the builder's own where None (48 for flowfactor's).
        num_frames: T+1, the number of frames of a sequence, for the methods that need to know it.
        **options: Further arguments of the method's builder (`build_vae`, `build_sparse_vae`, `build_baseline`, or that of a
            method of one's own).

    Returns:
        The model.

    Raises:
        ValueError: If the method is unknown, or an option contradicts it or is out of range.
        TypeError: If the builder has no such option, or makes no model that can be saved.

    Example:
        >>> import flowfactor as ff
        >>> model = ff.models.build_model("po-flow", (1, 16, 16), num_flows=2, latent_dim=8)
        >>> type(model).__name__
        'PoFlow'
    """
    model = get_method(name)(image_shape, num_flows, latent_dim, num_frames=num_frames, **options)
    if not isinstance(model, nn.Module) or not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"the method {name!r} builds a {type(model).__name__}, which is no model of flowfactor.models: derive it from "
            "one of its classes, so that it can be trained, measured and saved"
        )
    return model


def load_pretrained(directory: str | os.PathLike[str], **parts: Any) -> Any:
    """Loads a model of whatever class that ``save_pretrained`` wrote.

    Args:
        directory: Where its two files lie.
        **parts: Parts of your own, as for ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or names a class that is neither flowfactor's nor that of a registered method.

    Example:
        >>> import tempfile, flowfactor as ff
        >>> folder = ff.models.build_model("vae", (1, 8, 8), latent_dim=4).save_pretrained(tempfile.mkdtemp())
        >>> type(load_pretrained(folder)).__name__
        'VAE'
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {CONFIG}; it is written by model.save_pretrained(directory)")
    return class_of(read_config(path)["model"], path).from_pretrained(directory, **parts)


def class_of(name: str, source: Path) -> Any:
    """Gives the class that a saved model's config names.

    Args:
        name: Name of the class.
        source: The file that names it, for messages.

    Returns:
        The class.

    Raises:
        ValueError: If it is none of flowfactor's nor of a registered method: nothing is imported by a name in a file.
    """
    kinds: tuple[type[Any], ...] = (FlowFactorizedVAE, SparseTransformationVAE, *BASELINES.values())
    known = {method.model.__name__: method.model for method in METHODS.values() if method.model is not None}
    known |= {kind.__name__: kind for kind in kinds}
    if name not in known:
        raise ValueError(
            f"{source} names the model {name!r}; this flowfactor has {', '.join(known)}. Import what registers a method of "
            "your own first"
        )
    return known[name]
