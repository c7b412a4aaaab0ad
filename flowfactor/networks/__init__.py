"""What potentials and fields are both made of: stacked layers, their closed-form derivatives and these' adjoints.

`VjpAdjoint` is for closed forms of one's own; the rest is for flowfactor's parts.
"""

from flowfactor.networks.stage_adjoint import ClosedForm, NoClosedForm
from flowfactor.networks.vjp_adjoint import VjpAdjoint

__all__ = ["ClosedForm", "NoClosedForm", "VjpAdjoint"]
