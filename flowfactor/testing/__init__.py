"""The promises that parts make, checked on a part of your own: what flowfactor's own tests run over every part it has.

Each check takes a part as it is, looks at it from all sides, and raises `ContractError` at the first promise that does not
hold; it returns None where all do. The part is left as it was, and so is the state of PyTorch's global generator.
"""

from __future__ import annotations

from flowfactor.testing.contract import PROMISES, ContractError
from flowfactor.testing.data import check_dataset
from flowfactor.testing.distributions import check_decoder, check_encoder, check_prior
from flowfactor.testing.flows import check_field, check_potential
from flowfactor.testing.models import check_model
from flowfactor.testing.objectives import check_estimator, check_objective

__all__ = [
    "PROMISES",
    "ContractError",
    "check_dataset",
    "check_decoder",
    "check_encoder",
    "check_estimator",
    "check_field",
    "check_model",
    "check_objective",
    "check_potential",
    "check_prior",
]
