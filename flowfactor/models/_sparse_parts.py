"""Checks, schedules and the written form of `SparseTransformationVAE`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowfactor._config import describe, solver_config
from flowfactor.control import Schedule
from flowfactor.encoders import PairEncoder, SparseWeights
from flowfactor.fields import HelmholtzField
from flowfactor.latent_flow import LatentFlow
from flowfactor.priors import SpikeAndSlab

# Share of an old value in the running mean of the strengths, per step.
_UNIT_MEMORY = 0.99

SETTINGS = (
    "kl_weight", "factor_weight", "hj_weight", "start_weight", "frames_per_step", "temperature", "anneal_steps",
    "warmup_steps", "warmup_temperature", "warmup_span",
)  # fmt: skip


def check_sizes(encoder: Any, decoder: Any, flow: LatentFlow, pair_encoder: Any, prior: Any) -> None:
    """Checks that the parts of a model fit each other; raises ValueError or TypeError where they do not."""
    if not isinstance(flow, LatentFlow):
        raise TypeError(f"flow must be a flowfactor.LatentFlow, got {type(flow).__name__}")
    for name, part in (("encoder", encoder), ("decoder", decoder), ("prior", prior)):
        size = getattr(part, "latent_dim", getattr(part, "dim", flow.dim))
        if size != flow.dim:
            raise ValueError(f"the {name} has latents of size {size} and the flow of size {flow.dim}")
    for name in ("num_flows", "controls"):
        if not isinstance(getattr(pair_encoder, name, None), int):
            raise TypeError(
                f"pair_encoder must be a PairEncoder, its config, or a module with integers num_flows and controls, "
                f"got {type(pair_encoder).__name__}"
            )
    if pair_encoder.num_flows != flow.num_flows:
        raise ValueError(f"the pair_encoder has {pair_encoder.num_flows} flows and the flow {flow.num_flows}")
    if pair_encoder.controls == 2 and not isinstance(flow.field, HelmholtzField):
        raise ValueError(
            f"double control weighs the two parts of a HelmholtzField, and the flow has a {type(flow.field).__name__}: "
            "take a HelmholtzField, or controls=1"
        )


def check_force(force: object) -> None:
    """Checks the force of the Hamilton-Jacobi equation; raises ValueError for an unknown name."""
    if isinstance(force, str) and force != "negative_square":
        raise ValueError(f'force must be "negative_square", None or a module f(z, t), got {force!r}')


def make_weights_prior(given: SpikeAndSlab | Mapping[str, Any] | None, pair_encoder: Any, num_flows: int) -> Any:
    """The prior of the weights from what a user gives; raises TypeError or ValueError where it does not fit."""
    slab: Any = getattr(pair_encoder, "slab", "half_normal")
    if given is None:
        given = SpikeAndSlab(num_flows, initial=1 / max(num_flows, 2), persistence=0.9, slab=slab)
    if isinstance(given, Mapping):
        given = SpikeAndSlab(**{"num_flows": num_flows, "slab": slab, **given})
    if not isinstance(given, SpikeAndSlab):
        raise TypeError(f"weights_prior must be a SpikeAndSlab, its config or None, got {type(given).__name__}")
    if given.num_flows != num_flows or given.slab != slab:
        raise ValueError(
            f"the weights_prior has {given.num_flows} flows and a {given.slab} slab; the model has {num_flows} flows and "
            f"its pair_encoder a {slab} slab"
        )
    return given


def course(name: str, values: Sequence[float]) -> tuple[float, float]:
    """Checks the start and end of a temperature."""
    if isinstance(values, (int, float, str)) or len(values) != 2 or not all(0 < v < float("inf") for v in values):
        raise ValueError(f"{name} must be two positive numbers, its start and its end, got {values!r}")
    return float(values[0]), float(values[1])


def weights_schedule(weights: Tensor, t: Tensor | Sequence[float]) -> Schedule:
    """The control that applies weights ``[*batch, T, K, C]`` over the intervals between the times ``t [T+1]``."""
    times = [float(v) for v in t]
    if weights.ndim < 3 or weights.shape[-3] != len(times) - 1:
        raise ValueError(
            f"weights must be [*batch, {len(times) - 1}, K, C] for {len(times)} times, got {list(weights.shape)}"
        )
    flat = weights.mT.flatten(-2)  # the K weights of the gradient part, then those of the other
    pieces = [(min(times[s], times[s + 1]), flat[..., s, :]) for s in range(len(times) - 1)]
    pieces.sort(key=lambda piece: piece[0])
    return Schedule([(-math.inf, pieces[0][1]), *pieces[1:]])


def stretch(frames: Tensor, t: Tensor, span: int | None, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The frames that a step of the warm-up looks at: all, or a stretch at a place drawn for the whole batch."""
    steps = frames.shape[1] - 1
    if span is None or span >= steps:
        return frames, t
    begin = int(torch.randint(steps - span + 1, (), generator=generator, device=frames.device))
    return frames[:, begin : begin + span + 1], t[begin : begin + span + 1]


def typical_strength(q: SparseWeights) -> tuple[Tensor, Tensor]:
    """Mean strength of each flow while it acts ``[K, C]``, and the share of the time in which it does ``[K, 1]``."""
    on = q.spike_probs.detach().unsqueeze(-1)
    dims = tuple(range(on.ndim - 2))
    acting = on.mean(dims)
    return (on * q.slab_strength).mean(dims) / acting.clamp(min=1e-6), acting


def follow_unit(unit: Tensor, q: SparseWeights) -> Tensor:
    """Moves the unit ``[K, C]`` towards the typical strength of a batch; a flow that never acts keeps its own.

    Returns:
        The unit as it was, with the gradient of the batch's typical strength. A common factor of the slabs then changes
        nothing: without it slabs and unit would chase each other wherever the flow should be slower or faster, which is
        for the field to learn.
    """
    typical, acting = typical_strength(q)
    before, follows = unit.clone(), (acting > 0.01).to(unit)
    with torch.no_grad():
        unit.lerp_(typical.to(unit), (1 - _UNIT_MEMORY) * follows)
    return before + follows * (typical - typical.detach()) * before / typical.detach().clamp(min=1e-6)


def written(model: Any) -> dict[str, Any]:
    """How a model was made, as JSON values; parts of the user's own appear as None."""
    flow, prior, force = model.flow, model.prior, model.force
    parts: dict[str, Any] = {
        "encoder": describe(model.encoder),
        "decoder": describe(model.decoder),
        "flow": {
            "field": describe(flow.field), "solver": solver_config(flow.solver), "divergence": flow.divergence
        },
        "prior": prior.config if type(prior).__module__.startswith("flowfactor.priors") else None,
        "force": "none" if force is None else describe(force),
    }  # fmt: skip
    settings = {name: getattr(model, name) for name in SETTINGS} | {"weights_prior": model.weights_prior.config}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    pair_encoder: nn.Module = model.pair_encoder
    if type(pair_encoder) is PairEncoder:
        settings["pair_encoder"] = pair_encoder.config
    else:
        parts["pair_encoder"] = None  # has to be handed over again by whoever loads the model
    return {"model": type(model).__name__, "parts": parts, "settings": settings}
