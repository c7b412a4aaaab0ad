"""A velocity field of one's own: each flow turns latents in the planes of their pairs of coordinates."""

import torch

import flowfactor as ff


@ff.register_field("swirl")
class Swirl(ff.fields.Field):
    """v_k(z, t) = w_k J z, with a learned speed for every pair of coordinates."""

    def __init__(self, dim, num_flows=1, *, speed: float = 0.5):
        super().__init__(dim, num_flows)
        self.rate = torch.nn.Parameter(speed * torch.randn(num_flows, dim // 2))

    def flow_velocity(self, z, t, k):
        first, second = z.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-self.rate[k] * second, self.rate[k] * first], -1).flatten(-2)
