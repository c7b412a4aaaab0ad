"""Checks and schedules of `SparseTransformationVAE`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowfactor.control import Schedule
from flowfactor.encoders import SparseWeights
from flowfactor.fields import HelmholtzField
from flowfactor.latent_flow import LatentFlow
from flowfactor.models.inputs import Inputs
from flowfactor.path import FlowPath, SolveStats
from flowfactor.priors import SpikeAndSlab

# Share of an old value in the running mean of the strengths, per step.
_UNIT_MEMORY = 0.99


def check_pair_encoder(pair_encoder: Any, flow: LatentFlow) -> None:
    """Checks that a pair encoder fits a flow; raises ValueError or TypeError where it does not."""
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


def sparse_schedule(weights: Tensor, t: Tensor | Sequence[float]) -> Schedule:
    """The control that applies weights ``[*batch, T, K, C]`` over the intervals between the times ``t [T+1]``."""
    if getattr(t, "ndim", 1) != 1:
        raise ValueError(
            f"a schedule switches at times that all sequences share, t [T+1], got shape {list(torch.as_tensor(t).shape)}"
        )
    # Times that ask for their gradient stay tensors, as switching times that are learned.
    times = [v if isinstance(v, Tensor) and v.requires_grad else float(v) for v in t]
    if weights.ndim < 3 or weights.shape[-3] != len(times) - 1:
        raise ValueError(
            f"weights must be [*batch, {len(times) - 1}, K, C] for {len(times)} times, got {list(weights.shape)}"
        )
    flat = flattened(weights)
    pieces = [(min(times[s], times[s + 1]), flat[..., s, :]) for s in range(len(times) - 1)]
    pieces.sort(key=lambda piece: float(torch.as_tensor(piece[0]).detach()))
    return Schedule([(-math.inf, pieces[0][1]), *pieces[1:]])


def flattened(weights: Tensor) -> Tensor:
    """Weights ``[..., K, C]`` as controls ``[..., C*K]``: the K of the gradient part, then those of the other."""
    return weights.mT.flatten(-2)


def follow_intervals(
    flow_for: Callable[[Tensor], LatentFlow], z0: Tensor, t: Tensor, weights: Tensor, **named: Any
) -> FlowPath:
    """Follows weights that change at every frame, where each sequence has its own times: interval by interval.

    Args:
        flow_for: Gives the flow that follows a control.
        z0: States ``[*batch, D]``.
        t: Times ``[T+1, *batch]``.
        weights: Weights of each interval ``[*batch, T, K, C]``.
        **named: Further arguments of the flow.

    Returns:
        The path, with the costs but without log-determinants.
    """
    z, costs, stats = [z0], dict[str, list[Tensor]](), SolveStats()
    for interval, acting in enumerate(flattened(weights).unbind(-2)):
        part = flow_for(acting)(z[-1], t[interval : interval + 2], acting, **named)
        z.append(part.z[-1])
        stats.method = part.stats.method
        stats.add(part.stats)
        for name, cost in part.costs.items():
            before = costs.setdefault(name, [torch.zeros_like(cost[0])])
            before.append(before[-1] + cost[-1])
    return FlowPath(t, torch.stack(z), None, {name: torch.stack(sums) for name, sums in costs.items()}, stats)


def stretch(given: Inputs, span: int | None, generator: torch.Generator | None) -> Inputs:
    """What a step of the warm-up looks at: all frames, or a stretch at a place drawn for the whole batch."""
    steps = len(given.t) - 1
    if span is None or span >= steps:
        return given
    begin = int(torch.randint(steps - span + 1, (), generator=generator, device=given.frames.device))
    return given.part(begin, begin + span + 1)


def intervals_seen(mask: Tensor | None) -> Tensor | None:
    """Which intervals lie before the last observed frame ``[B, T]``, of masks ``[B, T+1]``; None where all do."""
    if mask is None:
        return None
    step = torch.arange(mask.shape[1], device=mask.device)
    return step[:-1] < torch.where(mask, step, 0).amax(1, keepdim=True)


def typical_strength(q: SparseWeights, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean strength of each flow while it acts ``[K, C]``, and the share of the time in which it does ``[K, 1]``."""
    on = q.spike_probs.detach().unsqueeze(-1)
    if counted is not None:
        on = on * counted[..., None, None] / counted.to(on).mean().clamp(min=1e-6)
    dims = tuple(range(on.ndim - 2))
    acting = on.mean(dims)
    return (on * q.slab_strength).mean(dims) / acting.clamp(min=1e-6), acting


def follow_unit(unit: Tensor, q: SparseWeights, counted: Tensor | None = None) -> Tensor:
    """Moves the unit ``[K, C]`` towards the typical strength of a batch; a flow that never acts keeps its own.

    Returns:
        The unit as it was, with the gradient of the batch's typical strength. A common factor of the slabs then changes
        nothing: without it slabs and unit would chase each other wherever the flow should be slower or faster, which is
        for the field to learn.
    """
    typical, acting = typical_strength(q, counted)
    before, follows = unit.clone(), (acting > 0.01).to(unit)
    with torch.no_grad():
        unit.lerp_(typical.to(unit), (1 - _UNIT_MEMORY) * follows)
    return before + follows * (typical - typical.detach()) * before / typical.detach().clamp(min=1e-6)
