"""The adaptive solve that flowfactor and its peers are all timed on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flowfactor as ff
from benchmarks.plain import PlainFlow, PlainPotential
from flowfactor.fields.base import Divergence
from flowfactor.networks.probes import rademacher_like
from flowfactor.potentials import MLPPotential

BATCH = 128
TOLERANCE = 1e-5
OUTPUTS = 8
_SEED_OF_PROBE = 1


@dataclass
class Outcome:
    """What a training step computed: path, log-determinants, and gradients by what they belong to."""

    z: Tensor
    log_det: Tensor
    gradients: dict[str, Tensor]


class Problem:
    """A gradient flow with log-determinants: one potential, one batch, eight output times.

    Args:
        dim: D.
        divergence: ``"exact"`` or ``"hutchinson"``.
        batch: Samples.
        dtype: Of states and weights.
        init_scale: Scale of the potential's output layer; by default one that makes adaptive steps necessary.
        tolerance: ``rtol`` and ``atol``.
    """

    def __init__(
        self,
        dim: int,
        divergence: Divergence = "hutchinson",
        *,
        batch: int = BATCH,
        dtype: torch.dtype = torch.float32,
        init_scale: float | None = None,
        tolerance: float = TOLERANCE,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        scale = init_scale if init_scale is not None else 1.0 if dim > 100 else 0.1
        self.dim, self.tolerance = dim, tolerance
        self.divergence: Divergence = divergence
        self.potential = MLPPotential(dim, hidden=(64, 64), init_scale=scale, generator=generator).to(dtype)
        self.z0 = torch.randn(batch, dim, generator=generator).to(dtype)
        self.t = torch.arange(float(OUTPUTS), dtype=dtype)
        signs = torch.Generator().manual_seed(_SEED_OF_PROBE)
        self.probe = rademacher_like(self.z0, signs) if divergence == "hutchinson" else None
        self.outcomes: dict[str, Outcome] = {}
        self.nfe: dict[str, int] = {}

    def ours(self, gradient: Any = "direct", norm: Any = "batch", **settings: Any) -> Callable[[bool], None]:
        """flowfactor's solve: a function of whether to go back as well."""
        options = {"method": "dopri5", "rtol": self.tolerance, "atol": self.tolerance} | settings
        flow = ff.LatentFlow(self.potential, ff.Solver(gradient=gradient, norm=norm, **options), self.divergence)
        name = f"{gradient}/{norm}"

        def solve(z: Tensor) -> tuple[Tensor, Tensor]:
            path = flow(z, self.t, log_det=True, generator=torch.Generator().manual_seed(_SEED_OF_PROBE))
            self.nfe[name] = path.stats.nfe
            assert path.log_det is not None
            return path.z, path.log_det

        weights = dict(self.potential.named_parameters(recurse=False))
        return lambda backward: self._run(name, flow, solve, weights, backward)

    def plain(self, adjoint: bool = False) -> Callable[[bool], None]:
        """The same by torch and torchdiffeq alone."""
        module = PlainFlow(PlainPotential(self.potential), self.probe)
        name = "plain odeint_adjoint" if adjoint else "plain odeint"

        def solve(z: Tensor) -> tuple[Tensor, Tensor]:
            module.nfe = 0
            result = module.solve(z, self.t, self.tolerance, adjoint=adjoint)
            self.nfe[name] = module.nfe
            return result

        return lambda backward: self._run(name, module, solve, module.potential.named_weights(), backward)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that a peer in another process needs to do the same."""
        weights = {f"w/{n}": p.detach().numpy()[0] for n, p in self.potential.named_parameters(recurse=False)}
        probe = torch.zeros(0) if self.probe is None else self.probe
        return weights | {
            "frequencies": self.potential.features.frequencies.numpy(),
            "z0": self.z0.numpy(),
            "t": self.t.numpy(),
            "probe": probe.numpy(),
        }

    def _run(
        self, name: str, module: nn.Module, solve: Callable[[Tensor], tuple[Tensor, Tensor]], weights: dict, back: bool
    ) -> None:
        if not back:
            with torch.no_grad():
                z, log_det = solve(self.z0)
                self.outcomes[f"{name}, forward"] = Outcome(z, log_det, {})
            return
        module.zero_grad()
        start = self.z0.clone().requires_grad_()
        z, log_det = solve(start)
        (z.square().mean() - log_det.mean()).backward()
        gradients = {n: w.grad.reshape(-1) for n, w in weights.items()} | {"z0": start.grad.reshape(-1)}
        self.outcomes[name] = Outcome(z.detach(), log_det.detach(), gradients)


def largest_difference(a: Outcome, b: Outcome) -> tuple[float, str]:
    """The largest relative difference (Euclidean norms) of path, log-determinants and each gradient, and where it is."""
    pairs = {"z": (a.z, b.z), "log_det": (a.log_det, b.log_det)}
    pairs |= {f"d/d{name}": (a.gradients[name], b.gradients[name]) for name in a.gradients.keys() & b.gradients.keys()}
    return max((relative(x, y), name) for name, (x, y) in pairs.items())


def relative(a: Tensor, b: Tensor) -> float:
    """The difference of two tensors over the size of the second."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def same(a: Tensor, b: Tensor, tolerance: float, what: str) -> float:
    """Stops the benchmark unless both sides agree; gives by how much they differ, relative to the second."""
    error = relative(a, b)
    if not error <= tolerance:
        raise RuntimeError(f"{what}: the two sides differ by {error:.2g} relative, more than {tolerance:g}")
    return error
