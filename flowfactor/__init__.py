"""flowfactor: latent flows in PyTorch."""

__version__ = "0.1.0"

from flowfactor import potentials
from flowfactor.control import Schedule
from flowfactor.errors import FlowSolveError

__all__ = ["FlowSolveError", "Schedule", "potentials"]
