"""Velocity fields v_k(z, t): what a latent flow follows."""

from flowfactor.fields.base import Field
from flowfactor.fields.evaluation import Evaluation
from flowfactor.fields.free import FreeField, from_module
from flowfactor.fields.potential_fields import GradientField, HelmholtzField, SkewGradientField
from flowfactor.fields.solenoidal import SolenoidalField

__all__ = [
    "Evaluation",
    "Field",
    "FreeField",
    "GradientField",
    "HelmholtzField",
    "SkewGradientField",
    "SolenoidalField",
    "from_module",
]
