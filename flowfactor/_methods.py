"""Every method of comparison by name: what builds its model, and what is known of it before PyTorch is imported."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from flowfactor.registry import register

SHARED_OPTIONS = ("latent_dim", "encoder", "decoder", "likelihood", "frames_per_step")
"""Settings that every method's builder takes, of those that are flowfactor's own."""

_OF_THE_FLOW = (
    *("field", "potential", "hidden", "activation", "skew", "prior", "solver", "divergence"),
    *("evaluation_solver", "augment_dim", "augment_scale"),
    *("kl_weight", "hj_weight", "start_weight", "solenoidal_weight", "acceleration_weight", "commutator_weight"),
    *("error_weight", "code_weight", "relative_weights", "force", "regularize_every"),
)


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
        build: Makes the model: ``build(image_shape, num_flows, latent_dim, **settings)``.
        fixed: Settings that make the method what it is.
        defaults: Settings that it has where nothing else is said.
        settings_from: What takes the settings, ``build`` first: functions and classes, or, for flowfactor's own, the places
            where their source is read, such as ``"models/build.py:build_vae"``.
        num_frames: Whether ``build`` takes ``num_frames``.
        shares: Settings that it takes over from a preset of another method.
        companion: Ending of the presets of the same data that show what else it needs, or None.
        model: The class of its model, by which saved models of one's own are found again.
    """

    name: str
    title: str
    source: str
    labels: Literal["given", "inferred", "unused"]
    transforms: bool
    build: Callable[..., Any]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    settings_from: tuple[str | Callable[..., Any], ...] = ()
    num_frames: bool = False
    shares: tuple[str, ...] = SHARED_OPTIONS
    companion: str | None = None
    model: type[Any] | None = None

    def __call__(
        self,
        image_shape: Sequence[int],
        num_flows: int,
        latent_dim: int | None = None,
        *,
        num_frames: int | None = None,
        **options: Any,
    ) -> Any:
        """Builds the method's model.

        Args:
            image_shape: ``(C, H, W)``.
            num_flows: K.
            latent_dim: D; the builder's own where None (48 for flowfactor's).
            num_frames: T+1, the number of frames of a sequence, for the methods that need to know it.
            **options: Further arguments of the method's builder. All of flowfactor's take ``encoder``, ``decoder``,
                ``likelihood`` and ``frames_per_step``.

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
        if latent_dim is not None:
            settings["latent_dim"] = latent_dim
        if self.num_frames and num_frames is not None:
            settings["num_frames"] = num_frames
        return self.build(tuple(image_shape), num_flows, **settings)


def _ours(builder: str, model: str, *first: str) -> dict[str, Any]:
    """What a method of flowfactor's is built by, imported when it builds."""
    file, _, name = builder.partition(":")
    module = f"flowfactor.{file.removesuffix('.py').replace('/', '.')}"

    def build(*sizes: Any, **settings: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*first, *sizes, **settings)

    return {"build": build, "settings_from": (builder, model)}


def _vae(**fixed: Any) -> dict[str, Any]:
    made = _ours("models/build.py:build_vae", "models/flow_vae.py:FlowFactorizedVAE")
    return {**made, "num_frames": True, "fixed": fixed}


def _baseline(name: str, place: str, **defaults: Any) -> dict[str, Any]:
    made = _ours("models/baselines/build.py:build_baseline", f"models/baselines/{place}", name)
    return {**made, "num_frames": True, "defaults": defaults}


NO_PDE: Mapping[str, float] = dict.fromkeys(
    ("hj_weight", "start_weight", "solenoidal_weight", "acceleration_weight", "bending_weight"), 0.0
)
"""Settings of a model whose flows nothing asks for transport."""
_PAPER = "Song et al., NeurIPS 2023"

_ALL = (
    Method("ours", "flow-factorized VAE, supervised", _PAPER, "given", True, **_vae()),
    Method(
        "ours-weak", "flow-factorized VAE, weakly supervised", _PAPER, "inferred", True, companion="weak",
        **_vae(supervision="weak"),
    ),
    Method(
        "sta", "sparse transformation analysis, unsupervised", "Song et al., TPAMI 2025", "inferred", True,
        shares=(*SHARED_OPTIONS, *_OF_THE_FLOW), companion="sparse",
        **_ours("models/build.py:build_sparse_vae", "models/sparse.py:SparseTransformationVAE"),
    ),
    Method(
        "free", "control: a free velocity field, no PDE", "Chen et al., NeurIPS 2018", "given", True,
        **_vae(field="free", augment_dim=0, **NO_PDE),
    ),
    Method(
        "euler-no-pde", "control: unit Euler steps of a Helmholtz field, no PDE", _PAPER, "given", True,
        **_vae(
            field="helmholtz", augment_dim=0, solver={"method": "euler", "step_size": 1.0}, evaluation_solver=None, **NO_PDE
        ),
    ),
    Method(
        "paper-code", "control: the paper's objective as its code has it", _PAPER, "given", True,
        **_baseline("paper-code", "paper_code.py:PaperCodeVAE"),
    ),
    Method(
        "vae", "VAE of single frames", "Kingma and Welling, ICLR 2014", "unused", False, **_baseline("vae", "vae.py:VAE")
    ),
    Method(
        "beta-vae", "beta-VAE of single frames", "Higgins et al., ICLR 2017", "unused", False,
        **_baseline("beta-vae", "vae.py:BetaVAE"),
    ),
    Method(
        "factor-vae", "FactorVAE", "Kim and Mnih, ICML 2018", "unused", False,
        **_baseline("factor-vae", "factor_vae.py:FactorVAE"),
    ),
    Method(
        "slow-vae", "SlowVAE", "Klindt et al., ICLR 2021", "unused", False,
        **_baseline("slow-vae", "slow_vae.py:SlowVAE"),
    ),
    Method(
        "topographic-vae", "TopographicVAE, a share of the capsules to each transformation",
        "Keller and Welling, NeurIPS 2021", "given", True,
        **_baseline("topographic-vae", "topographic_vae.py:TopographicVAE", supervised=True),
    ),
    Method(
        "po-flow", "PoFlow, wave potentials", "Song et al., ICML 2023", "given", True,
        **_baseline("po-flow", "po_flow.py:PoFlow"),
    ),
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""All methods by name: ours first, then those that are registered."""

_BUILT_IN = tuple(METHODS)
_SIZES = ("image_shape", "num_flows", "latent_dim")


def register_method(
    name: str,
    build: Callable[..., Any] | None = None,
    *,
    title: str = "",
    source: str = "",
    labels: Literal["given", "inferred", "unused"] = "given",
    transforms: bool = True,
    fixed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    model: type[Any] | None = None,
) -> Any:
    """Registers a method of one's own, for `METHODS`, ``flowfactor train`` and ``flowfactor benchmark``; also a decorator.

    Its settings on the command line and in files are the builder's further arguments, by their annotations, defaults and
    the docstring's ``Args``, and, where it ends in ``**settings``, those of the class of the model.

    Args:
        name: Its name: a letter, then letters, digits, ``-`` and ``_``.
        build: Makes the model: ``build(image_shape, num_flows, latent_dim, **settings)``. One that takes ``num_frames`` is
            given T+1. A class whose constructor takes these will do. Where left out, this is a decorator.
        title: What it is, in a few words, for reports; the name where empty.
        source: The paper that it follows.
        labels: What it is told about k: ``"given"``, ``"inferred"`` (the model has ``infer_factor``) or ``"unused"``.
        transforms: Whether the model knows how a transformation moves a latent.
        fixed: Settings of the builder that make the method what it is.
        defaults: Settings that it has where nothing else is said.
        model: The class of the model, by whose name a saved one is found again; where None, `build` itself if it is a
            class, else what `build` is annotated to return.

    Returns:
        The builder, or a decorator of it.

    Raises:
        TypeError: If `build` does not take the sizes by these names, or is no function or class.
        ValueError: If the name is taken, or `labels` is none of the three.

    Example:
        >>> import flowfactor as ff
        >>> build = ff.register_method("still", ff.models.build_vae, title="no equation", fixed={"hj_weight": 0.0})
        >>> ff.models.build_model("still", (1, 8, 8), 2, 4).hj_weight
        0.0
    """
    if build is None:
        options = {"title": title, "source": source, "labels": labels, "transforms": transforms}
        return lambda made: register_method(name, made, fixed=fixed, defaults=defaults, model=model, **options)
    if labels not in ("given", "inferred", "unused"):
        raise ValueError(f'labels must be "given", "inferred" or "unused", got {labels!r}')
    taken = _taken(name, build)
    model = _class_of_model(build) if model is None else model
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    settings_from = tuple(map(_place, (build, model) if passes_on and model not in (None, build) else (build,)))
    register("method", name, build, _BUILT_IN)
    default = {"latent_dim": 48} if taken["latent_dim"].default is inspect.Parameter.empty else {}
    METHODS[name] = Method(
        name, title or name, source, labels, transforms, build, dict(fixed or {}), default | dict(defaults or {}),
        settings_from, "num_frames" in taken, model=model,
    )  # fmt: skip
    return build


def _taken(name: str, build: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a builder, once it is known to take the sizes."""
    if not callable(build):
        raise TypeError(f"the builder of the method {name!r} must be a function or a class, got {build!r}")
    taken = inspect.signature(build).parameters
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = tuple(found.name for found in taken.values() if found.kind in by_position)[:3]
    if first != _SIZES:
        raise TypeError(
            f"the method {name!r} is built by build(image_shape, num_flows, latent_dim, **settings), and {build!r} takes "
            f"({', '.join(taken)})"
        )
    return taken


def _place(thing: Callable[..., Any]) -> str | Callable[..., Any]:
    """Where the source of what is flowfactor's own is read, by which methods of the same builder are told; else itself."""
    package, _, module = thing.__module__.partition(".")
    return f"{module.replace('.', '/')}.py:{thing.__qualname__}" if package == "flowfactor" else thing


def _class_of_model(build: Any) -> type[Any] | None:
    if isinstance(build, type):
        return build
    try:
        made = get_type_hints(build).get("return")
    except NameError:  # imported for type checkers alone
        return None
    return made if isinstance(made, type) and hasattr(made, "save_pretrained") else None
