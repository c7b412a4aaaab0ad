"""The quadratic potential, whose flow is known exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowfactor.context import ContextSize
from flowfactor.networks.batching import ENTERS, Stack
from flowfactor.networks.probes import Probes
from flowfactor.networks.stacked import enter_context, own_tensors
from flowfactor.potentials._stacked import StackedPotential
from flowfactor.potentials.base import Laplacian


class QuadraticPotential(StackedPotential):
    r"""$u_k(z, t) = \tfrac12 z^\top S_k z + b_k^\top z$ with S symmetric, constant in time.

    Its flow $\dot z = S_k z + b_k$ is a matrix exponential and its log-determinant is $(t_1 - t_0)\,\mathrm{tr}\,S_k$,
    which makes it the oracle that solvers are tested against.

    Args:
        dim: D.
        num_flows: K.
        S: Matrices ``[K, D, D]`` (or ``[D, D]`` for one flow); only the symmetric part counts. Drawn where None.
        b: Vectors ``[K, D]`` (or ``[D]``). Zero where None.
        context: C, the number of features of a context c, which adds $E_k c$ to $b_k$; or a number for each name.
        generator: Source of the drawn matrices.

    Raises:
        ValueError: If a shape does not fit.

    Example:
        >>> import torch, flowfactor as ff
        >>> u = ff.potentials.QuadraticPotential(dim=2, S=torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
        >>> u.derivatives(torch.ones(1, 2), 0.0, laplacian="exact").laplacian
        tensor([1.], grad_fn=<...>)
    """

    def __init__(
        self,
        dim: int,
        num_flows: int = 1,
        S: Tensor | None = None,
        b: Tensor | None = None,
        *,
        context: ContextSize = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, num_flows, context)
        drawn = torch.randn(num_flows, dim, dim, generator=generator) / dim if S is None else S
        self.matrix = nn.Parameter(_shaped("S", drawn, (num_flows, dim, dim)))
        zero = self.matrix.detach().new_zeros(num_flows, dim)
        self.vector = nn.Parameter(_shaped("b", zero if b is None else b, (num_flows, dim)))
        enter_context(self, "vector", generator=generator)

    @property
    def S(self) -> Tensor:  # noqa: N802 - the formula's name
        """The symmetric matrices ``[K, D, D]``."""
        matrix = own_tensors(self)["matrix"]
        return 0.5 * (matrix + matrix.mT)

    @property
    def b(self) -> Tensor:
        """The vectors ``[K, D]``."""
        return own_tensors(self)["vector"]

    def _stack(self) -> Stack:
        stack = {"S": self.S, "b": self.b.unsqueeze(-2)}
        if self.context_dim:
            stack["b" + ENTERS] = own_tensors(self)["vector" + ENTERS]
        return stack

    def _bind_stack(
        self, stack: Stack, want: frozenset[str], laplacian: Laplacian | None, probe: Tensor | None
    ) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
        S, b = stack["S"], stack["b"]
        curvature: Tensor | None = None
        if "laplacian" in want:
            if laplacian == "hutchinson":
                assert probe is not None
                probes = Probes(probe, S.shape[-1])
                curvature = probes.mean(probes.product(probes.e, S) * probes.e).sum(-1)
            else:
                curvature = torch.diagonal(S, dim1=-2, dim2=-1).sum(-1, keepdim=True)

        def evaluate(z: Tensor, t: Tensor) -> dict[str, Tensor]:
            pulled = z @ S
            out: dict[str, Tensor] = {}
            if "value" in want:
                out["value"] = (z * (0.5 * pulled + b)).sum(-1)
            if "gradient" in want:
                out["gradient"] = pulled + b
            if "time" in want:
                out["time"] = torch.zeros_like(z[..., 0])
            if curvature is not None:
                out["laplacian"] = curvature.expand(z.shape[:-1])
            return out

        return evaluate


def _shaped(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    value = torch.as_tensor(value)
    if shape[0] == 1 and value.shape == shape[1:]:
        value = value.unsqueeze(0)
    if value.shape != shape or not value.is_floating_point():
        raise ValueError(f"{name} must be floats of shape {list(shape)}, got {value.dtype} {list(value.shape)}")
    return value.detach().clone()
