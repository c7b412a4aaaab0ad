"""Encoders q(z|x), decoders p(x|z) and the likelihoods of frames."""

from flowfactor.encoders.base import Decoder, GaussianEncoder
from flowfactor.encoders.conv import ConvDecoder, ConvEncoder
from flowfactor.encoders.likelihoods import Bernoulli, Gaussian, Likelihood
from flowfactor.encoders.mlp import MLPDecoder, MLPEncoder

__all__ = [
    "Bernoulli",
    "ConvDecoder",
    "ConvEncoder",
    "Decoder",
    "Gaussian",
    "GaussianEncoder",
    "Likelihood",
    "MLPDecoder",
    "MLPEncoder",
]
