"""What a benchmark compares: the methods, and ablations of ours by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowfactor._checks import choices
from flowfactor._datasets import DATASETS
from flowfactor._methods import METHODS, NO_PDE, Method
from flowfactor._plugins import load_plugins
from flowfactor.training.config import Config, list_presets, load_config
from flowfactor.training.signatures import model_settings

if TYPE_CHECKING:
    from flowfactor.data import SequenceDataset

BENCHMARKS: Mapping[str, str] = {"mnist": "mnist-small", "scenes": "scenes", "digits": "demo"}
"""Presets by the short names that ``flowfactor benchmark`` takes in addition to those of the presets themselves."""


@dataclass(frozen=True)
class Variant:
    """What one row of a benchmark's table is.

    Attributes:
        name: Its name.
        method: The method, a name in `flowfactor.models.METHODS`.
        title: What it is, in a few words.
        group: What the ablation varies; ``"method"`` for the methods themselves.
        model: The settings of the model that differ from the preset's.
        flows: Number of transformations, where it differs from the preset's.
        steps: Steps T of the sequences, where they differ from the preset's.
    """

    name: str
    method: str
    title: str
    group: str = "method"
    model: Mapping[str, Any] = field(default_factory=dict)
    flows: int | None = None
    steps: int | None = None


# What is trained by a solver is measured by it: `solver_gap` has the figures of an accurate one beside.
_EULER, _RK4 = ({"solver": {"method": name, "step_size": 1.0}, "evaluation_solver": None} for name in ("euler", "rk4"))
_DOPRI5 = {"solver": {"method": "dopri5", "rtol": 1e-3, "atol": 1e-3}, "evaluation_solver": None}
# Under the path bound only the prior of z_0 counts, and a diffusion is then what it starts from. The marginal bound has a
# prior at every frame. Its determinants are estimated in training, and exact where the bound is measured.
_MARGINAL = {"objective": "marginal", **_RK4, "divergence": "hutchinson"}
# A prior that stays as it is makes whatever a flow writes into room at rest dear: these go without.
_STILL = {**_MARGINAL, "augment_dim": 0}

_ALL = (
    Variant("prior-normal", "ours", "marginal bound, standard normal prior", "prior", {**_STILL, "prior": "normal"}),
    Variant("prior-mixture", "ours", "marginal bound, mixture of Gaussians", "prior", {**_STILL, "prior": "mixture"}),
    Variant("prior-vamp", "ours", "marginal bound, VampPrior", "prior", {**_STILL, "prior": "vamp"}),
    Variant("prior-diffusion", "ours", "marginal bound, diffusing prior", "prior", {**_MARGINAL, "prior": "diffusion"}),
    Variant("pde-none", "ours", "no equation, no start at rest", "pde", NO_PDE),
    Variant("pde-hj", "ours", "the plain Hamilton-Jacobi equation, f = 0", "pde", {"force": None}),
    Variant(
        "pde-generalised", "ours", "the generalised Hamilton-Jacobi equation, f learned", "pde",
        {"force": "negative_square"},
    ),
    Variant(
        "pde-wave", "po-flow", "PoFlow's wave equation, without its Jacobian regularizer", "pde",
        {"potential": "mlp", "jacobian_weight": 0.0},
    ),
    Variant("field-gradient", "ours", "gradient field: curl-free", "field", {"field": "gradient", "solenoidal_weight": 0.0}),
    Variant(
        "field-helmholtz", "ours", "Helmholtz field: gradient and ridge functions without divergence", "field",
        {"field": "helmholtz"},
    ),
    Variant(
        "field-skew", "ours", "Helmholtz field: gradient and J grad h, canonical J", "field",
        {"field": "helmholtz", "skew": "canonical"},
    ),
    Variant("field-free", "ours", "free velocity field, no equation", "field", {"field": "free", **NO_PDE}),
    Variant("room-none", "ours", "no room at rest: every dimension is coded", "room", {"augment_dim": 0}),
    Variant("k-2", "ours", "K = 2 transformations", "k", flows=2),
    Variant("k-5", "ours", "K = 5 transformations", "k", flows=5),
    Variant("t-4", "ours", "T = 4 steps", "t", steps=4),
    Variant("t-12", "ours", "T = 12 steps", "t", steps=12),
    Variant("solver-euler", "ours", "unit Euler steps", "solver", _EULER),
    Variant("solver-rk4", "ours", "unit rk4 steps", "solver", _RK4),
    Variant("solver-dopri5", "ours", "adaptive dopri5, tolerances 1e-3", "solver", _DOPRI5),
    Variant("objective-path", "ours", "the path bound", "objective", {"objective": "path"}),
    Variant(
        "objective-marginal", "ours", "the marginal bound, diffusing prior", "objective",
        {**_MARGINAL, "prior": "diffusion"},
    ),
)  # fmt: skip

ABLATIONS: Mapping[str, Variant] = {variant.name: variant for variant in _ALL}
"""Ablations of our method by name."""

ABLATION_GROUPS: tuple[str, ...] = tuple(dict.fromkeys(variant.group for variant in _ALL))
"""What ablations vary."""

_WEAK = ("supervision", "estimator", "tau", "anneal_steps", "factor_encoder")
"""Settings of a preset that a method with given labels has no use for."""

_PAPER_FLOWS = ("scaling", "rotation", "colouring", "perspective", "rotation+hue")


def get_variant(name: str) -> Variant:
    """Gives a method or an ablation by its name.

    Args:
        name: One of `flowfactor.models.METHODS` or of `ABLATIONS`.

    Returns:
        The variant.

    Raises:
        ValueError: If there is no such name.

    Example:
        >>> get_variant("field-helmholtz").model
        {'field': 'helmholtz'}
        >>> get_variant("vae").title
        'VAE of single frames'
    """
    if name in ABLATIONS:
        return ABLATIONS[name]
    if name not in METHODS:
        load_plugins()
    if name in METHODS:
        return Variant(name, name, METHODS[name].title)
    raise ValueError(
        f"unknown method {name!r}{choices(name, [*METHODS, *ABLATIONS])}; one of your own comes by --import"
    )


def choose_variants(methods: Sequence[str] | None = None, groups: Sequence[str] | None = None) -> list[Variant]:
    """Gives what is to be compared.

    Args:
        methods: Names of methods and ablations; None for all methods, or, where ablations are asked for, ours alone.
        groups: Which `ABLATION_GROUPS` to add; empty for all of them, None for none.

    Returns:
        The variants, each once.

    Raises:
        ValueError: If a name or a group is unknown.

    Example:
        >>> [variant.name for variant in choose_variants(groups=["field"])]
        ['ours', 'field-gradient', 'field-helmholtz', 'field-skew', 'field-free']
    """
    names = list(methods or (METHODS if groups is None else ("ours",)))
    for group in ABLATION_GROUPS if groups is not None and not groups else groups or ():
        if group not in ABLATION_GROUPS:
            raise ValueError(f"unknown ablation {group!r}{choices(group, ABLATION_GROUPS)}")
        names += [variant.name for variant in _ALL if variant.group == group]
    return [get_variant(name) for name in dict.fromkeys(names)]


def configure(base: Config, variant: Variant, seed: int) -> Config:
    """Gives the settings of one run of a benchmark: those of the preset, with what makes the variant.

    All methods share the data, the optimiser and the sizes of encoder and decoder. Methods that are built like ours
    also take the preset's settings of the flow. What else a method needs comes from the presets of the same data
    that are named after it: ``<data>-weak`` and ``<data>-sparse``.

    Args:
        base: The preset's settings.
        variant: The variant.
        seed: The seed.

    Returns:
        The settings.

    Raises:
        ValueError: If the data set has not so many transformations, or its sequences cannot have such a length.
    """
    method, before = METHODS[variant.method], METHODS[base.method]
    known = set(model_settings(variant.method)) - set(method.fixed)
    inferred = method.labels == "inferred"
    plain = {name: value for name, value in base.model.items() if name not in _WEAK}
    if method.settings_from == before.settings_from:
        model = base.model if inferred else plain
    else:
        model = {name: value for name, value in plain.items() if name in method.shares}
    model = {
        name: v for name, v in model.items() if name in known or (name in method.fixed and v == method.fixed[name])
    }
    own = _companion(base, method.companion)
    if own is not None:
        model |= {name: value for name, value in own.model.items() if name in known and name not in plain}
    asked = (("steps", variant.steps), ("flows", variant.flows))
    if any(value and name not in DATASETS[base.data.name].takes for name, value in asked):
        raise ValueError(f"{variant.name} changes the sequences, which are recorded: leave it out")
    data = base.as_dict()["data"]
    if variant.steps is not None:
        data["steps"] = variant.steps
    if variant.flows is not None:
        data["flows"] = _names_of_flows(base, variant.flows)
    values = base.as_dict() | {
        "method": variant.method,
        "seed": seed,
        "data": data,
        "model": _with_turning_flows({**model, **variant.model}, method, data.get("flows")),
    }
    if inferred:  # batches of equal shares, sorted by k, would tell what these methods have to find
        values["train"]["stratified"] = False
    return Config.from_dict(values)


def _with_turning_flows(model: dict[str, Any], method: Method, flows: Sequence[str] | None) -> dict[str, Any]:
    """Leaves of ``turning`` what there is: flows of known transformations, of a Helmholtz field."""
    turning = model.pop("turning", None)
    field = method.fixed.get("field", model.get("field"))
    if turning is None or method.labels != "given" or field != "helmholtz":
        return model
    kept = [flow for flow in turning if flows is None or flow in flows or flow in range(len(flows))]
    return {**model, "turning": kept} if kept else model


def _companion(base: Config, kind: str | None) -> Config | None:
    """The preset of the same data that shows the settings of a method, if there is one."""
    name = f"{base.data.name.removesuffix('-combined')}-{kind}"
    return load_config(name) if name in list_presets() else None


def _names_of_flows(base: Config, count: int) -> list[str]:
    test: SequenceDataset = base.data.dataset("test")
    known = getattr(test, "factor_names", _PAPER_FLOWS)
    names = list(dict.fromkeys([*test.flow_names, *known]))
    if len(names) < count:
        raise ValueError(f"{base.data.name} has {len(names)} transformations, not {count}: {', '.join(names)}")
    return names[:count]
