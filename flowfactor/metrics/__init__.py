"""What is measured: equivariance, likelihood, transport."""

from flowfactor.metrics.equivariance import EquivarianceError, equivariance_error
from flowfactor.metrics.likelihood import LogLikelihood, log_likelihood
from flowfactor.metrics.transport import transport_gap

__all__ = ["EquivarianceError", "LogLikelihood", "equivariance_error", "log_likelihood", "transport_gap"]
