"""A method of one's own: a VAE whose latents are pulled from frame to frame."""

from dataclasses import replace

import flowfactor as ff


class SteadyVAE(ff.models.VAE):
    """A VAE of frames that also pays for the distance between the latents of neighbouring frames."""

    _settings = (*ff.models.VAE._settings, "pull")  # what a saved model remembers

    def __init__(self, encoder, decoder, num_flows=1, *, pull=1.0, frames_per_step=None):
        super().__init__(encoder, decoder, num_flows, frames_per_step=frames_per_step)
        self.pull = pull

    def forward(self, frames, t, k=0, *, generator=None):
        terms = super().forward(frames, t, k, generator=generator)
        z = self.encode(frames).mean
        distance = (z[:, 1:] - z[:, :-1]).square().sum(-1).mean()
        return replace(terms, loss=terms.loss + self.pull * distance)


@ff.register_method("steady", title="VAE with steady latents", labels="unused", transforms=False)
def build(image_shape, num_flows, latent_dim, *, width: int = 8, pull: float = 1.0) -> SteadyVAE:
    """Builds the model.

    Args:
        width: Channels of encoder and decoder.
        pull: Weight of the distance between neighbouring latents.
    """
    sizes = {"channels": image_shape[0], "image_size": image_shape[1:], "widths": (width,)}
    encoder, decoder = ff.encoders.ConvEncoder(latent_dim, **sizes), ff.encoders.ConvDecoder(latent_dim, **sizes)
    return SteadyVAE(encoder, decoder, num_flows, pull=pull)
