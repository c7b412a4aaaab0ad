"""Models assembled from the parts."""

from flowfactor.models.build import build_vae
from flowfactor.models.flow_vae import FlowFactorizedVAE
from flowfactor.models.terms import Terms

__all__ = ["FlowFactorizedVAE", "Terms", "build_vae"]
