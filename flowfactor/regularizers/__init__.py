"""What a flow can be asked for beyond fitting data: dynamic optimal transport, short paths, smooth fields, given states."""

from flowfactor.regularizers.bending import Bending
from flowfactor.regularizers.commutator import Commutator
from flowfactor.regularizers.costs import (
    Acceleration,
    HamiltonJacobi,
    JacobianNorm,
    NegativeSquare,
    Solenoidal,
    TransportCost,
)
from flowfactor.regularizers.endpoints import LatentEquivariance, SinkhornMatch, StartAtRest
from flowfactor.regularizers.matching import ActionMatching, FlowMatching
from flowfactor.regularizers.solver_error import SolverError

__all__ = [
    "Acceleration",
    "ActionMatching",
    "Bending",
    "Commutator",
    "FlowMatching",
    "HamiltonJacobi",
    "JacobianNorm",
    "LatentEquivariance",
    "NegativeSquare",
    "SinkhornMatch",
    "Solenoidal",
    "SolverError",
    "StartAtRest",
    "TransportCost",
]
