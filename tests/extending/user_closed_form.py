"""A potential of one's own whose solves are in closed form: its derivatives and their vector-Jacobian product."""

import torch

import flowfactor as ff
from flowfactor.networks import ClosedForm, VjpAdjoint


@ff.register_potential("spring")
class Spring(ff.potentials.Potential):
    """u_k(z, t) = -|z - c_k|^2 / 2, with a learned c_k."""

    def __init__(self, dim, num_flows=1):
        super().__init__(dim, num_flows)
        self.centre = torch.nn.Parameter(torch.randn(num_flows, 1, dim))

    def flow_potential(self, z, t, k):
        return -0.5 * (z - self.centre[k, 0]).square().sum(-1)

    def closed_form(self, layout, want, laplacian, probe):
        (stack,) = layout.select({"centre": self.centre})
        return ClosedForm(stack, lambda stack: VjpAdjoint(stack, evaluate, vjp))


def evaluate(p, z, t, want):
    """Everything at states [G, n, D]; the centres are [G, 1, D]."""
    v, zero = p["centre"] - z, torch.zeros_like(z[..., 0])
    value, divergence = -0.5 * v.square().sum(-1), zero - z.shape[-1]
    return {"velocity": v, "gradient": v, "value": value, "time": zero, "divergence": divergence}


def vjp(p, z, t, cotangents):
    """The cotangents of z and of the centres."""
    v_bar = torch.zeros_like(z) + cotangents.get("velocity", 0) + cotangents.get("gradient", 0)
    if "value" in cotangents:
        v_bar -= cotangents["value"].unsqueeze(-1) * (p["centre"] - z)
    return -v_bar, {"centre": v_bar.sum(1, keepdim=True)}
