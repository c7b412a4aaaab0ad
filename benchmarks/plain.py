"""The same flow as a user would write it with torch and torchdiffeq alone: what flowfactor is measured against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import torchdiffeq
from torch import Tensor, nn

from flowfactor.potentials import MLPPotential


class PlainPotential(nn.Module):
    """One network of an `MLPPotential`, of torch's own layers, with the same weights.

    Works on a batch ``z [B, D]`` and, for torch.func, on one sample ``z [D]``.
    """

    def __init__(self, potential: MLPPotential) -> None:
        super().__init__()
        w = {name: value.detach()[0].clone() for name, value in potential.named_parameters(recurse=False)}
        self.first = _linear(w["w1"], w["b1"])
        self.first_time = _linear(w["v1"])
        self.second = _linear(w["w2"], w["b2"])
        self.second_time = _linear(w["v2"])
        self.third = _linear(w["w3"])
        self.quad = _linear(w["quad"])
        self.scale = nn.Parameter(w["scale"][0])
        self.linear = nn.Parameter(w["linear"][0])
        self.register_buffer("frequencies", potential.features.frequencies.clone())

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        angle = t * self.frequencies
        features = torch.cat([angle.sin(), angle.cos()])
        h = _logcosh(self.first(z) + self.first_time(features))
        h = _logcosh(self.second(h) + self.second_time(features))
        network = self.third(h).squeeze(-1)
        return network + 0.5 * (self.scale * self.quad(z).square()).sum(-1) + (self.linear * z).sum(-1)

    def laplacian(self, z: Tensor, t: Tensor) -> Tensor:
        """The Laplacian of a batch by the columns of the Jacobian of the second layer, written as one would at first."""
        angle = t * self.frequencies
        features = torch.cat([angle.sin(), angle.cos()])
        a1 = self.first(z) + self.first_time(features)
        s1 = torch.tanh(a1)
        s2 = torch.tanh(self.second(_logcosh(a1)) + self.second_time(features))
        w1, w2, w3 = self.first.weight, self.second.weight, self.third.weight[0]
        columns = (s1.unsqueeze(1) * w1.mT) @ w2.mT  # [B, D, H2]
        of_first = (((w3 * s2) @ w2) * (1 - s1.square()) * w1.square().sum(1)).sum(1)
        of_second = (w3 * (1 - s2.square()) * columns.square().sum(1)).sum(1)
        return of_first + of_second + (self.scale * self.quad.weight.square().sum(1)).sum()

    def named_weights(self) -> dict[str, nn.Parameter]:
        """The parameters by the names that `MLPPotential` has for them."""
        layers = {"w1": self.first, "v1": self.first_time, "w2": self.second, "v2": self.second_time, "w3": self.third}
        weights = {name: layer.weight for name, layer in layers.items()}
        biases = {"b1": self.first.bias, "b2": self.second.bias}
        return weights | biases | {"quad": self.quad.weight, "scale": self.scale, "linear": self.linear}


class PlainFlow(nn.Module):
    """dz/dt = grad u and d(log det)/dt = lap u by autograd, as torchdiffeq's right-hand side on ``[B, D + 1]``.

    Args:
        potential: u.
        probe: Hutchinson's probe; None for the exact trace, by one further backward pass for each dimension, all in
            one batch.
    """

    def __init__(self, potential: PlainPotential, probe: Tensor | None) -> None:
        super().__init__()
        self.potential = potential
        self.probe = probe
        self.nfe = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.nfe += 1
        keep = torch.is_grad_enabled()  # forward alone, the last derivative needs no graph
        with torch.enable_grad():
            z = y[:, :-1]
            z = z if z.requires_grad else z.requires_grad_()
            u = self.potential(z, t)
            (gradient,) = torch.autograd.grad(u.sum(), z, create_graph=True)
            if self.probe is not None:
                (along,) = torch.autograd.grad((gradient * self.probe).sum(), z, create_graph=keep)
                laplacian = (along * self.probe).sum(-1)
            else:
                # All D backward passes at once: several times faster than a loop over the dimensions.
                units = torch.eye(z.shape[1], dtype=z.dtype).unsqueeze(1).expand(-1, len(z), -1)
                (hessian,) = torch.autograd.grad(gradient, z, units, create_graph=keep, is_grads_batched=True)
                laplacian = hessian.diagonal(dim1=0, dim2=2).sum(-1)
        rate = torch.cat([gradient, laplacian.unsqueeze(-1)], -1)
        return rate if keep else rate.detach()

    def solve(self, z0: Tensor, t: Tensor, tolerance: float, *, adjoint: bool = False) -> tuple[Tensor, Tensor]:
        """Returns z ``[T, B, D]`` and log-determinants ``[T, B]``."""
        odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
        y0 = torch.cat([z0, z0.new_zeros(len(z0), 1)], -1)
        ys = odeint(self, y0, t, rtol=tolerance, atol=tolerance, method="dopri5")
        return ys[..., :-1], ys[..., -1]


def _logcosh(a: Tensor) -> Tensor:
    return F.softplus(2 * a) - a - math.log(2.0)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias[0])
    return layer
