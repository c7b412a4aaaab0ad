"""Which learned flow does what: matches the flows of a weakly supervised model to true transformations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowfactor.control import Control, Schedule
from flowfactor.data import SequenceDataset
from flowfactor.errors import require
from flowfactor.metrics.equivariance import evaluating, every_flow


@dataclass(frozen=True)
class FactorMatch:
    """How well inferred factors agree with the true ones, after the best one-to-one matching.

    Attributes:
        accuracy: Share of sequences whose inferred flow is the one matched to their transformation.
        standard_error: Standard error of the accuracy over sequences.
        order: The learned flow of each true transformation, ``[K]``.
        confusion: Sequences of each true transformation (rows) inferred as each learned flow (columns), ``[K, K]``.
        count: Number of sequences.
    """

    accuracy: float
    standard_error: float
    order: Tensor
    confusion: Tensor
    count: int

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "order": self.order.tolist(),
            "confusion": self.confusion.tolist(),
            "count": self.count,
        }


def match_factors(predicted: Tensor, true: Tensor, num_factors: int) -> FactorMatch:
    """Matches inferred to true factors one to one so that most sequences agree (the assignment problem).

    Args:
        predicted: Inferred factors ``[N]``, integers.
        true: True factors ``[N]``.
        num_factors: K.

    Returns:
        The matching and its accuracy.

    Raises:
        ValueError: If the shapes differ, there are no sequences, or a factor is out of range.
        ImportError: If SciPy is not installed.

    Example:
        >>> import torch
        >>> match = match_factors(torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), 2)
        >>> match.accuracy, match.order.tolist()
        (0.75, [1, 0])
    """
    if predicted.shape != true.shape or predicted.ndim != 1 or not len(true):
        shapes = f"{list(predicted.shape)} and {list(true.shape)}"
        raise ValueError(f"predicted and true must hold one factor a sequence, shape [N] with N > 0, got {shapes}")
    predicted, true = predicted.cpu().long(), true.cpu().long()
    for name, factors in (("predicted", predicted), ("true", true)):
        if int(factors.min()) < 0 or int(factors.max()) >= num_factors:
            raise ValueError(f"{name} factors must lie in [0, {num_factors}), got {factors.unique().tolist()}")
    confusion = torch.bincount(true * num_factors + predicted, minlength=num_factors**2).reshape(num_factors, -1)
    assign = require("scipy.optimize", extra="data").linear_sum_assignment
    order = torch.as_tensor(assign(confusion.numpy(), maximize=True)[1])
    accuracy = float(confusion[torch.arange(num_factors), order].sum() / len(true))
    error = (accuracy * (1 - accuracy) / len(true)) ** 0.5
    return FactorMatch(accuracy, error, order, confusion, len(true))


@torch.no_grad()
def match_flows(model: Any, data: SequenceDataset, *, limit: int | None = None, batch_size: int = 256) -> FactorMatch:
    """Infers the factor of every sequence of a data set, and matches the flows of a model to its transformations.

    Args:
        model: A model with ``infer_factor``.
        data: Sequences of known transformations; take the test split.
        limit: Sequences of each transformation; None for all.
        batch_size: Sequences per batch.

    Returns:
        The matching and its accuracy.

    Raises:
        ValueError: If the model has other flows than the data set.
    """
    if model.num_flows != data.num_flows:
        raise ValueError(f"the model has {model.num_flows} flows and the data set {data.num_flows} transformations")
    predicted, true = [], []
    with evaluating(model):
        for k, batch in every_flow(data, limit, batch_size):
            predicted.append(model.infer_factor(batch["frames"]).probs.argmax(-1))
            true.append(torch.full((len(batch["frames"]),), k))
    return match_factors(torch.cat(predicted), torch.cat(true), data.num_flows)


def flow_names(model: Any, data: SequenceDataset, limit: int = 200) -> tuple[str, ...]:
    """Names the flows of a model by what they do: those of the data set, in the order that the model has them.

    Args:
        model: The model.
        data: Sequences of known transformations.
        limit: Sequences of each transformation to match by, where the model found the flows itself.

    Returns:
        The names, ``[K]``.
    """
    if getattr(model, "supervision", "full") == "full":
        return data.flow_names
    order = match_flows(model, data, limit=limit).order
    return tuple(data.flow_names[k] for k in order.argsort().tolist())


class Matched:
    """A model seen with its flows in another order: flow k is the one that `FactorMatch.order` gives for k.

    Everything but `transform` and `log_likelihood` is the model's own.

    Args:
        model: The model.
        order: The model's flow of each k, ``[K]``.
    """

    def __init__(self, model: Any, order: Tensor) -> None:
        self.model, self.order = model, order

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def _own(self, control: Control) -> Control:
        """The model's control for one of this order."""
        if isinstance(control, Schedule):
            pieces = zip(control.starts, control.controls, strict=True)
            return Schedule([(start, self._own(piece)) for start, piece in pieces])  # type: ignore[misc]
        if not isinstance(control, Tensor):
            return int(self.order[control])
        if control.is_floating_point():
            return control[..., self.order.argsort().to(control.device)]
        return self.order.to(control.device)[control]

    def transform(self, x0: Tensor, t: Any, control: Control = 0) -> Tensor:
        """Transforms images by the flows in this order, as the model's own ``transform`` does."""
        return self.model.transform(x0, t, self._own(control))

    def log_likelihood(self, frames: Tensor, t: Tensor, k: Control, *arguments: Any, **named: Any) -> Tensor:
        """Bounds the likelihood under the flows in this order, as the model's own ``log_likelihood`` does."""
        return self.model.log_likelihood(frames, t, self._own(k), *arguments, **named)
