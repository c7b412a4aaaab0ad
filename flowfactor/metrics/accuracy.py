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
from flowfactor.metrics.motion import Speed, Start, flow_of, follow, moving, starts
from flowfactor.models.protocols import MovesImages
from flowfactor.solver import Solver

_MOST_STEPS = 3_000  # what takes more is stiff, and would take hours


@dataclass(frozen=True)
class SolverGap(MeanInterval):
    """What an accurate solve makes of a model's flows.

    Attributes:
        own: E_k by the model's own solver, that of its ``eval()`` mode, ``[K]`` (see
            `flowfactor.metrics.equivariance_error`).
        accurate: E_k of the same flows, solved accurately, ``[K]``.
        path: Distance between the states of the two solves relative to the distance travelled, ``[K]``.
        mean: By how much E_k changes, ``accurate / own - 1``, ``[K]``: above 0 where the model was trained to be another
            map than the flow of its field, 0 where both agree.
        standard_error: Its standard error, ``[K]``, by the delta method.
        training: The same change from E_k by the solver of the training, ``[K]``: above 0 where that is too loose to train
            the flow. It is the mean where the model has one solver for both (see `flowfactor.LatentFlow`).
        training_path: Distance from the accurate states by the solver of the training, likewise.
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
    training: Tensor
    training_path: Tensor
    count: int
    tolerance: float
    flow_names: tuple[str, ...] = ()
    limit: int | None = None
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        names = "own", "accurate", "path", "mean", "standard_error", "low", "high", "training", "training_path"
        tensors = {name: getattr(self, name) for name in names}
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
    log-determinants, inverses and states between frames are then not those of what it computes. Where the model has an
    ``evaluation_solver``, its own solver is that one; what the solver of the training makes of the same flows stands beside.

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
    flow = flow_of(model)
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in range(data.num_flows)]
    for k, start in starts(model, data, limit, seed, batch_size):
        tolerance = max(tolerance, 10 * torch.finfo(start.z0.dtype).eps)
        finest = Solver(rtol=tolerance, atol=tolerance, max_steps=_MOST_STEPS)
        path = follow(model, start, solver=finest, costs={"length": Speed()})
        own = _judged(model, start, follow(model, start).z, path.z)
        one = flow.acting_solver == flow.solver
        trained = own if one else _judged(model, start, follow(model, start, solver=flow.solver).z, path.z)
        accurate, _ = _judged(model, start, path.z, path.z)
        found[k].append((accurate, path.costs["length"].sum(0), *own, *trained))
    rows = []
    for k, parts in enumerate(found):
        accurate, way, *both = (torch.cat(x).double() for x in zip(*parts, strict=True))
        changes = [_change(accurate, by) for by in both[::2]]
        paths = [apart.mean() / moving(way.mean(), k) for apart in both[1::2]]
        error = error_of_mean(accurate - (1 + changes[0]) * both[0]) / both[0].mean()
        rows.append(torch.stack([both[0].mean(), accurate.mean(), paths[0], changes[0], error, changes[1], paths[1]]))
    count = min(sum(len(part[0]) for part in parts) for parts in found)
    names, tolerance = tuple(getattr(data, "flow_names", ())), float(tolerance)
    own, accurate, path, gap, error, training, way = torch.stack(rows, 1).float().unbind(0)
    return SolverGap(own, accurate, path, gap, error, training, way, count, tolerance, names, limit, seed)


def _judged(model: MovesImages, start: Start, z: Tensor, accurate: Tensor) -> tuple[Tensor, Tensor]:
    """E_k of states ``[T, B, D]`` of one flow, and their distance from those of the accurate solve, ``[B]`` each."""
    error = summed(start.batch["frames"][:, 1:] - model.decode(z[1:]).movedim(0, 1), start.batch)
    return error, (z - accurate).norm(dim=-1).sum(0)


def _change(accurate: Tensor, by: Tensor) -> Tensor:
    """By how much E_k changes where it is accurate; 0 where nothing differs, a frame without error among it."""
    return accurate.mean() / by.mean() - 1 if bool((by != accurate).any()) else torch.zeros_like(by.mean())
