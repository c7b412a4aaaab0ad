"""What a flow can be asked for beyond fitting data: dynamic optimal transport, short paths, smooth fields."""

from flowfactor.regularizers.costs import (
    Acceleration,
    HamiltonJacobi,
    JacobianNorm,
    NegativeSquare,
    Solenoidal,
    TransportCost,
)
from flowfactor.regularizers.endpoints import SinkhornMatch, StartAtRest

__all__ = [
    "Acceleration",
    "HamiltonJacobi",
    "JacobianNorm",
    "NegativeSquare",
    "SinkhornMatch",
    "Solenoidal",
    "StartAtRest",
    "TransportCost",
]
