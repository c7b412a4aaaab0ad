"""What is measured: equivariance, composition, likelihood, disentanglement, factors found, transport."""

from flowfactor.metrics.accuracy import SolverGap, solver_gap
from flowfactor.metrics.combining import combining_errors
from flowfactor.metrics.composition import CompositionError, ErrorCurve, composition_error, extrapolation_error
from flowfactor.metrics.dci import DCI, dci
from flowfactor.metrics.density import GridMass, inverse_error, kl_divergence, mass_on_grid
from flowfactor.metrics.equivariance import (
    EquivarianceError,
    NoLatentFlowError,
    equivariance_error,
    latent_equivariance_error,
)
from flowfactor.metrics.estimates import Estimate, wilson
from flowfactor.metrics.gaps import GapScore, mig, sap
from flowfactor.metrics.group import CommutatorError, GroupError, commutator_error, group_error
from flowfactor.metrics.likelihood import LogLikelihood, log_likelihood, paper_log_likelihood
from flowfactor.metrics.matched import MatchedModel, match_flows, match_spikes
from flowfactor.metrics.matching import FactorAccuracy, SpikeMetrics, factor_accuracy, spike_metrics
from flowfactor.metrics.motion import PathFigure, arc_over_chord, gradient_share, translation_share
from flowfactor.metrics.predictability import VPScore, vp_score, vp_score_from_pairs
from flowfactor.metrics.transport import transport_gap
from flowfactor.metrics.traversal import (
    Traversal,
    TraversalError,
    TraversalModel,
    best_traversal,
    latent_traversal_error,
)

__all__ = [
    "DCI",
    "CommutatorError",
    "CompositionError",
    "EquivarianceError",
    "ErrorCurve",
    "Estimate",
    "FactorAccuracy",
    "GapScore",
    "GridMass",
    "GroupError",
    "LogLikelihood",
    "MatchedModel",
    "NoLatentFlowError",
    "PathFigure",
    "SolverGap",
    "SpikeMetrics",
    "Traversal",
    "TraversalError",
    "TraversalModel",
    "VPScore",
    "arc_over_chord",
    "best_traversal",
    "combining_errors",
    "commutator_error",
    "composition_error",
    "dci",
    "equivariance_error",
    "extrapolation_error",
    "factor_accuracy",
    "gradient_share",
    "group_error",
    "inverse_error",
    "kl_divergence",
    "latent_equivariance_error",
    "latent_traversal_error",
    "log_likelihood",
    "mass_on_grid",
    "match_flows",
    "match_spikes",
    "mig",
    "paper_log_likelihood",
    "sap",
    "solver_gap",
    "spike_metrics",
    "translation_share",
    "transport_gap",
    "vp_score",
    "vp_score_from_pairs",
    "wilson",
]
