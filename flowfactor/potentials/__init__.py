"""Scalar potentials u_k(z, t), whose gradients drive latent flows."""

from flowfactor.potentials.base import Derivatives, Potential
from flowfactor.potentials.convex import ConvexPotential
from flowfactor.potentials.displacement import DisplacementPotential
from flowfactor.potentials.mlp import MLPPotential
from flowfactor.potentials.module import from_module
from flowfactor.potentials.paper import PaperPotential
from flowfactor.potentials.quadratic import QuadraticPotential
from flowfactor.potentials.resnet import ResNetPotential
from flowfactor.potentials.stationary import Stationary

__all__ = [
    "ConvexPotential",
    "Derivatives",
    "DisplacementPotential",
    "MLPPotential",
    "PaperPotential",
    "Potential",
    "QuadraticPotential",
    "ResNetPotential",
    "Stationary",
    "from_module",
]
