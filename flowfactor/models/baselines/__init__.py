"""The models that the flow-factorized ones are compared with, each after its own paper."""

from flowfactor.models.baselines.base import Baseline
from flowfactor.models.baselines.build import BASELINES, build_baseline
from flowfactor.models.baselines.factor_vae import FactorVAE, FactorVAETerms
from flowfactor.models.baselines.paper_code import PaperCodeTerms, PaperCodeVAE
from flowfactor.models.baselines.po_flow import PoFlow, PoFlowTerms
from flowfactor.models.baselines.slow_vae import SlowVAE
from flowfactor.models.baselines.topographic_vae import TopographicVAE
from flowfactor.models.baselines.vae import VAE, BetaVAE

__all__ = [
    "BASELINES",
    "VAE",
    "Baseline",
    "BetaVAE",
    "FactorVAE",
    "FactorVAETerms",
    "PaperCodeTerms",
    "PaperCodeVAE",
    "PoFlow",
    "PoFlowTerms",
    "SlowVAE",
    "TopographicVAE",
    "build_baseline",
]
