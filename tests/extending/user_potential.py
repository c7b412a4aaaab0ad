"""A potential of one's own: a well around a point that each flow learns."""

import torch

import flowfactor as ff


@ff.register_potential("well")
class Well(ff.potentials.Potential):
    """u_k(z, t) = -depth/2 |z - c_k|^2, with a learned c_k."""

    def __init__(self, dim, num_flows=1, *, depth: float = 0.1):
        super().__init__(dim, num_flows)
        self.depth = depth
        self.centre = torch.nn.Parameter(torch.randn(num_flows, dim))

    def flow_potential(self, z, t, k):
        return -0.5 * self.depth * (z - self.centre[k]).square().sum(-1)
