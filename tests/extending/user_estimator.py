"""An estimator of one's own: every sequence trains the flow that is likeliest for it."""

import flowfactor as ff


@ff.register_estimator("likeliest")
class Likeliest(ff.models.FactorEstimator):
    """E over q(k|x) is taken at its mode, and q itself is trained by the losses under all flows."""

    def __init__(self, frames: int = 1):
        super().__init__()
        self.frames = frames

    def expectation(self, batch):
        terms = batch.under(batch.log_q.argmax(-1))
        judged = (batch.log_q.exp() * batch.judged(self.frames).detach()).sum(-1)
        terms = terms.with_factor(batch.divergence(batch.log_q))
        return type(terms)(**{**vars(terms), "loss": terms.loss + judged - judged.detach()})
