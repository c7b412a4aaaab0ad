"""An objective of one's own: the path bound with a divergence that counts only above a number of free nats."""

import flowfactor as ff


@ff.register_objective("free-nats")
class FreeNats(ff.objectives.PathBound):
    """The divergence of z_0 from the prior is not pressed below some nats (Kingma et al., NeurIPS 2016)."""

    def __init__(self, nats: float = 2.0):
        self.nats = nats

    def divergence(self, start, prior, path, t, control):
        return super().divergence(start, prior, path, t, control).clamp(min=self.nats)
