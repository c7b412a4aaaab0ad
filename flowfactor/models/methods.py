"""Every method of comparison by name: how to build its model from the same few sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowfactor._checks import choices
from flowfactor.models._saved import CONFIG, read_config
from flowfactor.models.baselines import BASELINES, build_baseline
from flowfactor.models.build import build_sparse_vae, build_vae
from flowfactor.models.flow_vae import FlowFactorizedVAE
from flowfactor.models.sparse import SparseTransformationVAE


@dataclass(frozen=True)
class Method:
    """A method that can be trained and compared with others.

    Attributes:
        name: Its name in `METHODS`.
        title: What it is, in a few words.
        source: The paper that it follows.
        labels: What it is told about k: ``"given"``, ``"inferred"`` (the model has ``infer_factor``) or ``"unused"``.
        transforms: Whether the model knows how a transformation moves a latent; where it does not, its ``transform``
            leaves the latent where it is, and the best single latent dimension has to be searched.
        fixed: Settings that make the method what it is.
        defaults: Settings that it has where nothing else is said.
        build: Makes the model: ``build(image_shape, num_flows, latent_dim, **settings)``.
    """

    name: str
    title: str
    source: str
    labels: Literal["given", "inferred", "unused"]
    transforms: bool
    build: Callable[..., Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        image_shape: Sequence[int],
        num_flows: int,
        latent_dim: int = 48,
        *,
        num_frames: int | None = None,
        **options: Any,
    ) -> Any:
        """Builds the method's model.

        Args:
            image_shape: ``(C, H, W)``.
            num_flows: K.
            latent_dim: D.
            num_frames: T+1, the number of frames of a sequence, for the methods that need to know it.
            **options: Further arguments of the method's builder. All take ``encoder``, ``decoder``, ``likelihood`` and
                ``frames_per_step``.

        Returns:
            The model.

        Raises:
            ValueError: If an option contradicts the method or is out of range.
            TypeError: If the builder has no such option.
        """
        for name, value in self.fixed.items():
            if name in options and options[name] != value:
                raise ValueError(f"the method {self.name!r} has {name}={value!r} by definition, got {options[name]!r}")
        settings = {**self.defaults, **options, **self.fixed}
        if settings.get("supervision") == "weak":
            if num_frames is None:
                raise ValueError(f"the method {self.name!r} needs num_frames, the number of frames of a sequence")
            settings["num_frames"] = num_frames
        if self.name == "paper-code" and num_frames is not None and num_frames > 1:
            settings = {"max_steps": num_frames - 1} | settings
        if self.name == "topographic-vae" and num_frames is not None:
            settings = {"num_frames": num_frames} | settings
        return self.build(tuple(image_shape), num_flows, latent_dim, **settings)


def _baseline(name: str) -> Callable[..., Any]:
    def build(*sizes: Any, **settings: Any) -> Any:
        return build_baseline(name, *sizes, **settings)

    return build


_NO_PDE = {"hj_weight": 0.0, "start_weight": 0.0}
_PAPER = "Song et al., NeurIPS 2023"

_ALL = (
    Method("ours", "flow-factorized VAE, supervised", _PAPER, "given", True, build_vae),
    Method(
        "ours-weak", "flow-factorized VAE, weakly supervised", _PAPER, "inferred", True, build_vae,
        {"supervision": "weak"},
    ),
    Method(
        "sta", "sparse transformation analysis, unsupervised", "Song et al., TPAMI 2025", "inferred", True,
        build_sparse_vae,
    ),
    Method(
        "free", "control: a free velocity field, no PDE", "Chen et al., NeurIPS 2018", "given", True, build_vae,
        {"field": "free", **_NO_PDE},
    ),
    Method(
        "euler-no-pde", "control: unit Euler steps, no PDE", _PAPER, "given", True, build_vae,
        {"solver": {"method": "euler", "step_size": 1.0}, **_NO_PDE},
    ),
    Method(
        "paper-code", "control: the paper's objective as its code has it", _PAPER, "given", True,
        _baseline("paper-code"),
    ),
    Method("vae", "VAE of single frames", "Kingma and Welling, ICLR 2014", "unused", False, _baseline("vae")),
    Method("beta-vae", "beta-VAE of single frames", "Higgins et al., ICLR 2017", "unused", False, _baseline("beta-vae")),
    Method("factor-vae", "FactorVAE", "Kim and Mnih, ICML 2018", "unused", False, _baseline("factor-vae")),
    Method("slow-vae", "SlowVAE", "Klindt et al., ICLR 2021", "unused", False, _baseline("slow-vae")),
    Method(
        "topographic-vae", "TopographicVAE, a share of the capsules to each transformation",
        "Keller and Welling, NeurIPS 2021", "given", True, _baseline("topographic-vae"),
        defaults={"supervised": True},
    ),
    Method("po-flow", "PoFlow, wave potentials", "Song et al., ICML 2023", "given", True, _baseline("po-flow")),
)  # fmt: skip

SHARED_OPTIONS = ("latent_dim", "encoder", "decoder", "likelihood", "frames_per_step")
"""Settings that every method's builder takes."""

METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
"""All methods by name, ours first."""


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
    latent_dim: int = 48,
    *,
    num_frames: int | None = None,
    **options: Any,
) -> Any:
    """Builds the model of a method.

    Args:
        name: One of `METHODS`.
        image_shape: ``(C, H, W)``, H and W divisible by 4.
        num_flows: K.
        latent_dim: D.
        num_frames: T+1, the number of frames of a sequence, for the methods that need to know it.
        **options: Further arguments of the method's builder (`build_vae`, `build_sparse_vae` or `build_baseline`).

    Returns:
        The model.

    Raises:
        ValueError: If the method is unknown, or an option contradicts it or is out of range.
        TypeError: If the builder has no such option.

    Example:
        >>> import flowfactor as ff
        >>> model = ff.models.build_model("po-flow", (1, 16, 16), num_flows=2, latent_dim=8)
        >>> type(model).__name__
        'PoFlow'
    """
    return get_method(name)(image_shape, num_flows, latent_dim, num_frames=num_frames, **options)


def load_pretrained(directory: str | os.PathLike[str], **parts: Any) -> Any:
    """Loads a model of whatever class that ``save_pretrained`` wrote.

    Args:
        directory: Where its two files lie.
        **parts: Parts of your own, as for ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or names a class that is not flowfactor's.

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
        ValueError: If it is none of flowfactor's.
    """
    kinds: tuple[type[Any], ...] = (FlowFactorizedVAE, SparseTransformationVAE, *BASELINES.values())
    known = {kind.__name__: kind for kind in kinds}
    if name not in known:
        raise ValueError(f"{source} names the model {name!r}; this flowfactor has {', '.join(known)}")
    return known[name]
