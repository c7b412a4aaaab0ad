"""Models assembled from the parts."""

from flowfactor.models.baselines import (
    VAE,
    BetaVAE,
    FactorVAE,
    PaperCodeVAE,
    PoFlow,
    SlowVAE,
    TopographicVAE,
    build_baseline,
)
from flowfactor.models.build import build_sparse_vae, build_vae
from flowfactor.models.estimators import (
    BalancedEstimator,
    EnumerateEstimator,
    FactorBatch,
    FactorEstimator,
    GumbelEstimator,
)
from flowfactor.models.flow_vae import FlowFactorizedVAE
from flowfactor.models.methods import METHODS, Method, build_model, get_method, load_pretrained, register_method
from flowfactor.models.protocols import SequenceModel
from flowfactor.models.responsibilities import balanced_responsibilities
from flowfactor.models.sparse import SparseTransformationVAE
from flowfactor.models.terms import SequenceTerms, Terms

__all__ = [
    "METHODS",
    "VAE",
    "BalancedEstimator",
    "BetaVAE",
    "EnumerateEstimator",
    "FactorBatch",
    "FactorEstimator",
    "FactorVAE",
    "FlowFactorizedVAE",
    "GumbelEstimator",
    "Method",
    "PaperCodeVAE",
    "PoFlow",
    "SequenceModel",
    "SequenceTerms",
    "SlowVAE",
    "SparseTransformationVAE",
    "Terms",
    "TopographicVAE",
    "balanced_responsibilities",
    "build_baseline",
    "build_model",
    "build_sparse_vae",
    "build_vae",
    "get_method",
    "load_pretrained",
    "register_method",
]
