"""What models find unsupervised, compared with the truth after the best matching of learned to true factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.errors import require
from flowfactor.metrics._checks import check_order
from flowfactor.metrics.estimates import CONFIDENCE, Estimate, normal_quantile, wilson


@dataclass(frozen=True)
class FactorAccuracy:
    """Accuracy of inferred factors after the best matching.

    Attributes:
        accuracy: Share of samples whose inferred factor is the one matched to the true one, with Wilson's interval.
        order: The learned factor matched to each true one, ``[K]``: ``model.transform(x0, t, order[k])`` does k.
        confusion: Samples of each true factor (rows) inferred as each learned one (columns), ``[K, K]``.
        limit: The most samples of each that were to be drawn; None where all were taken.
        seed: Seed of that draw.
    """

    accuracy: Estimate
    order: Tensor
    confusion: Tensor
    limit: int | None = None
    seed: int = 0

    def __float__(self) -> float:
        return self.accuracy.value

    @property
    def per_factor(self) -> Tensor:
        """Accuracy on the samples of each true factor, ``[K]``; NaN where there are none."""
        return self.confusion[torch.arange(len(self.order)), self.order] / self.confusion.sum(1)

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        found = {"order": self.order.tolist(), "confusion": self.confusion.tolist()}
        return {**self.accuracy.as_dict(), **found, "limit": self.limit, "seed": self.seed}


def factor_accuracy(
    predicted: Any, true: Any, num_factors: int, *, order: Tensor | None = None, confidence: float = CONFIDENCE
) -> FactorAccuracy:
    r"""The accuracy of inferred factors, whatever their numbering.

    $$\max_\pi \frac1N \sum_n \bigl[ \pi(k_n) = \hat k_n \bigr]$$

    over the one-to-one matchings $\pi$ of true to learned factors, found as an assignment problem (Kuhn 1955; known as
    the clustering accuracy). The matching is chosen on the samples that it is judged by, which flatters where they are
    few: to be strict, choose it on training data and hand it over as ``order``.

    Args:
        predicted: Inferred factors ``[N]``, integers in [0, K), such as ``model.infer_factor(frames).probs.argmax(-1)``.
        true: True factors ``[N]``.
        num_factors: K.
        order: The learned factor of each true one, ``[K]``, where it is known already.
        confidence: Confidence of the interval.

    Returns:
        The accuracy and the matching.

    Raises:
        TypeError: If factors are no integers.
        ValueError: If the shapes differ, there are no samples, or a factor or the order is out of range.
        ImportError: If SciPy is not installed.

    Example:
        >>> import torch, flowfactor as ff
        >>> result = ff.metrics.factor_accuracy(torch.tensor([1, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), 2)
        >>> result.order.tolist(), print(result.accuracy)
        0.750 [0.301, 0.954], n=4
        ([1, 0], None)
    """
    num_factors = check_count("num_factors", num_factors)
    predicted, true = (_factors(v, n, num_factors) for v, n in ((predicted, "predicted"), (true, "true")))
    if predicted.shape != true.shape or not len(true):
        shapes = f"{list(predicted.shape)} and {list(true.shape)}"
        raise ValueError(f"predicted and true must hold one factor a sample, shape [N] with N > 0, got {shapes}")
    confusion = torch.bincount(true * num_factors + predicted, minlength=num_factors**2).reshape(num_factors, -1)
    order = _assign(confusion)[1] if order is None else check_order(order, num_factors).cpu()
    hits = int(confusion[torch.arange(num_factors), order].sum())
    return FactorAccuracy(wilson(hits, len(true), confidence=confidence), order, confusion)


def _factors(values: Any, name: str, num_factors: int) -> Tensor:
    values = torch.as_tensor(values).detach().cpu()
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers (indices of factors), got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"{name} must hold one factor a sample, shape [N], got {list(values.shape)}")
    if len(values) and not (int(values.min()) >= 0 and int(values.max()) < num_factors):
        raise ValueError(f"{name} factors must lie in [0, {num_factors}), got {values.unique().tolist()}")
    return values.long()


def _assign(gain: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the one-to-one matching with the greatest total gain."""
    rows, columns = require("scipy.optimize", extra="data").linear_sum_assignment(gain.numpy(), maximize=True)
    return torch.as_tensor(rows), torch.as_tensor(columns)


@dataclass(frozen=True)
class SpikeMetrics:
    """Precision and recall of inferred spikes after the best matching of learned to true factors.

    Attributes:
        precision: Share of the inferred spikes that are true ones; learned factors without partner count as wrong.
        recall: Share of the true spikes that are found.
        f1: Their harmonic mean.
        order: The learned factor matched to each true one, ``[K]``; -1 where none is left.
        precision_per_factor: Precision by true factor, ``[K]``; NaN where nothing is inferred.
        recall_per_factor: Recall by true factor, ``[K]``; NaN where the factor never acts.
        limit: The most sequences that were to be drawn; None where all were taken.
        seed: Seed of that draw.
    """

    precision: Estimate
    recall: Estimate
    f1: float
    order: Tensor
    precision_per_factor: Tensor
    recall_per_factor: Tensor
    limit: int | None = None
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values; what is undefined is None."""
        each = {"precision_per_factor": self.precision_per_factor, "recall_per_factor": self.recall_per_factor}
        return {
            "precision": self.precision.as_dict(),
            "recall": self.recall.as_dict(),
            "f1": None if self.f1 != self.f1 else self.f1,
            "order": self.order.tolist(),
            **{name: [None if v != v else v for v in values.tolist()] for name, values in each.items()},
            "limit": self.limit,
            "seed": self.seed,
        }


def spike_metrics(
    predicted_active: Any, true_active: Any, *, order: Tensor | None = None, confidence: float = CONFIDENCE
) -> SpikeMetrics:
    r"""Precision and recall of which factors act when, whatever the numbering of the learned ones.

    $$\mathrm{precision} = \frac{\sum_k |\hat S_{\pi(k)} \cap S_k|}{\sum_j |\hat S_j|}, \qquad
      \mathrm{recall} = \frac{\sum_k |\hat S_{\pi(k)} \cap S_k|}{\sum_k |S_k|}$$

    with $S_k$ the steps at which true factor k acts, $\hat S_j$ those at which learned factor j is inferred to, and the
    one-to-one matching $\pi$ that makes the common numerator, and so both, as great as possible (the assignment problem,
    Kuhn 1955). There may be more or fewer learned factors than true ones.

    Spikes of one sequence (an entry of the first dimension) hang together: the Wilson intervals count the spikes for as
    many independent ones as the spread between sequences shows them to be worth (Kish's design effect).

    Args:
        predicted_active: Inferred activity ``[N, ..., J]``, booleans or 0 and 1.
        true_active: True activity ``[N, ..., K]`` with the same leading dimensions.
        order: The learned factor of each true one, ``[K]``, -1 for none, where it is known already.
        confidence: Confidence of the intervals.

    Returns:
        Precision, recall and the matching. A precision without inferred spikes, or a recall without true ones, is NaN.

    Raises:
        ValueError: If the shapes do not fit, or the values are not 0 and 1.
        ImportError: If SciPy is not installed.

    Example:
        >>> import torch, flowfactor as ff
        >>> true = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
        >>> found = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 0]])    # numbered the other way round, one spike missed
        >>> result = ff.metrics.spike_metrics(found, true)
        >>> result.order.tolist(), result.precision.value, result.recall.value
        ([1, 0], 1.0, 0.75)
    """
    predicted, true = _activity(predicted_active, "predicted_active"), _activity(true_active, "true_active")
    if predicted.shape[:-1] != true.shape[:-1] or not true.shape[0]:
        shapes = f"{list(predicted.shape)} and {list(true.shape)}"
        raise ValueError(
            f"predicted_active and true_active must be [N, ..., K], alike but in K, with N > 0; got {shapes}"
        )
    predicted, true = (a.reshape(len(a), -1, a.shape[-1]) for a in (predicted, true))
    common = torch.einsum("nsk,nsj->kj", true, predicted)
    factors, learned = common.shape
    if order is None:
        order = torch.full((factors,), -1)
        rows, columns = _assign(common)
        order[rows] = columns
    order = _checked_order(order, factors, learned)
    # A further learned factor that never acts is the partner of those that have none.
    partner = torch.cat([predicted, torch.zeros_like(predicted[..., :1])], -1)[..., order]
    hits = true * partner
    precision = _clustered(hits.sum((1, 2)), predicted.sum((1, 2)), confidence)
    recall = _clustered(hits.sum((1, 2)), true.sum((1, 2)), confidence)
    total = precision.count + recall.count
    f1 = 2 * float(hits.sum()) / total if total else float("nan")
    found = hits.sum((0, 1))
    return SpikeMetrics(
        precision, recall, f1, order, (found / partner.sum((0, 1))).float(), (found / true.sum((0, 1))).float()
    )


def _activity(active: Any, name: str) -> Tensor:
    active = torch.as_tensor(active).detach().cpu()
    if active.ndim < 2 or not active.shape[-1]:
        raise ValueError(f"{name} must have shape [N, ..., K] with at least one factor, got {list(active.shape)}")
    active = active.double()
    if not bool(((active == 0) | (active == 1)).all()):
        raise ValueError(f"{name} must hold booleans, or 0 and 1: compare probabilities with a threshold first")
    return active


def _checked_order(order: Tensor, factors: int, learned: int) -> Tensor:
    order = torch.as_tensor(order).cpu().long()
    used = [j for j in order.flatten().tolist() if j != -1]
    if order.shape != (factors,) or len(set(used)) < len(used) or not all(0 <= j < learned for j in used):
        raise ValueError(
            f"order must name a different learned factor from 0 to {learned - 1}, or -1, for each of the {factors} true "
            f"ones, got {order.tolist()}"
        )
    return order


def _clustered(hits: Tensor, trials: Tensor, confidence: float) -> Estimate:
    """The share of hits [N] in trials [N], with an interval that counts on samples within a sequence being alike."""
    normal_quantile(confidence)
    total, hit = float(trials.sum()), float(hits.sum())
    sequences = int((trials > 0).sum())
    if not total or sequences < 2:
        return wilson(hit, int(total), confidence=confidence)
    share = hit / total
    if 0 < share < 1:
        between = (hits - share * trials).square().sum() / total**2 * sequences / (sequences - 1)
        effect = float(between) / (share * (1 - share) / total)
        # Fewer than the spikes, and no fewer than a sequence each.
        independent = min(max(total / max(effect, 1.0), 1.0), total)
    else:
        independent = float(sequences)  # where nothing varies, nothing shows how alike the spikes of a sequence are
    return wilson(hit, int(total), confidence=confidence, independent=independent)
