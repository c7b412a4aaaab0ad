"""Whether a model is the flow of its field, or a map that its solver makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowfactor.data import SequenceDataset
from flowfactor.metrics.equivariance import summed
from flowfactor.metrics.estimates import MeanInterval
from flowfactor.metrics.estimates import standard_error as error_of_mean
from flowfactor.metrics.motion import Speed, flow_of, follow, moving, starts
from flowfactor.models.protocols import MovesImages
from flowfactor.solver import Solver

_MOST_STEPS = 3_000  # what takes more is stiff, and would take hours


@dataclass(frozen=True)
class SolverGap(MeanInterval):
    """What an accurate solve makes of a model's flows.

    Attributes:
        own: E_k by the model's own solver, ``[K]`` (see `flowfactor.metrics.equivariance_error`).
        accurate: E_k of the same flows, solved accurately, ``[K]``.
        path: Distance between the states of the two solves relative to the distance travelled, ``[K]``.
        mean: By how much E_k changes, ``accurate / own - 1``, ``[K]``: above 0 where the model was trained to be another
            map than the flow of its field, 0 where both agree.
        standard_error: Its standard error, ``[K]``, by the delta method.
        count: Number of images that each is based on.
        tolerance: Relative and absolute tolerance of the accurate solve.
        flow_names: Names of the flows, where the data set has them.
        limit: The most images that were to be drawn; None where all were taken.
        seed: Seed of that draw.
    """

    own: Tensor
    accurate: Tensor
    path: Tensor
    mean: Tensor
    standard_error: Tensor
    count: int
    tolerance: float
    flow_names: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        tensors = {
            name: getattr(self, name) for name in ("own", "accurate", "path", "mean", "standard_error", "low", "high")
        }
        return {
            "flows": list(self.flow_names),
            **{name: value.tolist() for name, value in tensors.items()},
            "count": self.count,
            "tolerance": self.tolerance,
            "limit": self.limit,
            "seed": self.seed,
        }


@torch.no_grad()
def solver_gap(
    model: MovesImages,
    data: SequenceDataset,
    *,
    tolerance: float = 1e-6,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> SolverGap:
    r"""Whether a model is the flow of its field: its equivariance errors and paths by its own solver, and solved accurately.

    $$\frac{E_k^\mathrm{accurate}}{E_k^\mathrm{own}} - 1 \qquad\text{and}\qquad
      \frac{\sum_{t=1}^T E\, |z_t^\mathrm{own} - z_t^\mathrm{accurate}|}{\sum_{t=1}^T E \int_0^t |v|\, ds}$$

    A model that is trained with steps too long for its field is another map than the field's flow: its densities,
    log-determinants, inverses and states between frames are then not those of what it computes.

    Args:
        model: The model, with ``encode``, ``decode``, ``num_flows`` and a `flowfactor.LatentFlow` ``flow``.
        data: Sequences of true transformations; take the test split.
        tolerance: Relative and absolute tolerance of the accurate solve, by dopri5; at least 10 roundings of the latents'
            precision are taken (1.2e-6 in float32).
        limit: As for `gradient_share`.
        seed: Seed of that draw.
        batch_size: Images per batch.

    Returns:
        The gap of each flow, ``[K]``.

    Raises:
        NoLatentFlowError: If the model has no latent flow.
        ValueError: If the tolerance is not positive, nothing moves, or the model has other flows than the data set.
        FlowSolveError: If a solve fails, or the accurate one takes more than 3,000 steps.

    Example:
        >>> import torch, flowfactor as ff
        >>> data = ff.data.TransformedImages(torch.rand(4, 1, 8, 8), {"turn": (ff.data.Rotate(), 0, 40)}, steps=2)
        >>> coarse = {"method": "euler"}
        >>> model = ff.models.build_vae((1, 8, 8), num_flows=1, latent_dim=4, hidden=(8, 8), solver=coarse)
        >>> gap = ff.metrics.solver_gap(model, data)
        >>> bool(gap.path > 0), bool(gap.mean.isclose(gap.accurate / gap.own - 1, atol=1e-6))
        (True, True)
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, such as 1e-6, got {tolerance!r}")
    flow_of(model)
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in range(data.num_flows)]
    for k, start in starts(model, data, limit, seed, batch_size):
        tolerance = max(tolerance, 10 * torch.finfo(start.z0.dtype).eps)
        own = follow(model, start).z
        finest = Solver(rtol=tolerance, atol=tolerance, max_steps=_MOST_STEPS)
        path = follow(model, start, solver=finest, costs={"length": Speed()})
        frames = start.batch["frames"][:, 1:]
        errors = [summed(frames - model.decode(z[1:]).movedim(0, 1), start.batch) for z in (own, path.z)]
        found[k].append((*errors, (own - path.z).norm(dim=-1).sum(0), path.costs["length"].sum(0)))
    rows = []
    for k, parts in enumerate(found):
        own, accurate, apart, way = (torch.cat(x).double() for x in zip(*parts, strict=True))
        changed = accurate.mean() / own.mean() if bool((own != accurate).any()) else torch.ones_like(own.mean())
        error = error_of_mean(accurate - changed * own) / own.mean()
        path = apart.mean() / moving(way.mean(), k)
        rows.append(torch.stack([own.mean(), accurate.mean(), path, changed - 1, error]))
    count = min(sum(len(part[0]) for part in parts) for parts in found)
    names = tuple(getattr(data, "flow_names", ()))
    own, accurate, path, gap, error = torch.stack(rows, 1).float().unbind(0)
    return SolverGap(own, accurate, path, gap, error, count, float(tolerance), names, limit, seed)
