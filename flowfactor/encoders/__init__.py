"""Encoders q(z|x), decoders p(x|z) and the likelihoods of frames."""

from flowfactor.encoders.augmented import AugmentedEncoder
from flowfactor.encoders.base import Decoder, GaussianEncoder
from flowfactor.encoders.conv import ConvDecoder, ConvEncoder
from flowfactor.encoders.factor import FactorEncoder
from flowfactor.encoders.likelihoods import Bernoulli, Gaussian, Likelihood
from flowfactor.encoders.mlp import MLPDecoder, MLPEncoder
from flowfactor.encoders.pair import PairEncoder
from flowfactor.encoders.sparse_weights import SparseSample, SparseWeights

__all__ = [
    "AugmentedEncoder",
    "Bernoulli",
    "ConvDecoder",
    "ConvEncoder",
    "Decoder",
    "FactorEncoder",
    "Gaussian",
    "GaussianEncoder",
    "Likelihood",
    "MLPDecoder",
    "MLPEncoder",
    "PairEncoder",
    "SparseSample",
    "SparseWeights",
]
