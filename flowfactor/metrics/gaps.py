"""Disentanglement as a gap: how far the best latent dimension is ahead of the second best, for each factor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowfactor._checks import check_count
from flowfactor.errors import require
from flowfactor.metrics._codes import check_codes, discretise, gap, joint_histograms
from flowfactor.metrics.estimates import CONFIDENCE, Estimate, bootstrapped, resample

SAP_METHODS = ("threshold", "regression", "svm")


@dataclass(frozen=True)
class GapScore:
    """A gap between the best and the second best latent dimension, mean over factors.

    Attributes:
        score: The score in [0, 1] with its confidence interval; higher is better.
        per_factor: The gap of each factor, ``[F]``.
        scores: What the gap is taken of: a score of each latent dimension for each factor, ``[D, F]``.
        method: How it was measured.
        standardized: Of SAP's ``svm``, whether codes were standardised; None where it makes no difference.
    """

    score: Estimate
    per_factor: Tensor
    scores: Tensor
    method: str
    standardized: bool | None = None

    def __float__(self) -> float:
        return self.score.value

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values, less the table of scores."""
        found = {"per_factor": self.per_factor.tolist(), "method": self.method}
        return {**self.score.as_dict(), **found, "standardized": self.standardized}


def mig(
    codes: Any,
    labels: Any,
    *,
    bins: int = 20,
    resamples: int = 100,
    confidence: float = CONFIDENCE,
    generator: torch.Generator | None = None,
) -> GapScore:
    r"""The mutual information gap (Chen et al., NeurIPS 2018, eq. 6).

    $$\frac1F \sum_f \frac{1}{H(v_f)} \Bigl( I(z_{j_f}; v_f) - \max_{j \ne j_f} I(z_j; v_f) \Bigr), \qquad
      j_f = \arg\max_j I(z_j; v_f)$$

    1 where each factor is held by one latent dimension and by no other; near 0 where codes are random, or where each
    factor is spread evenly over two dimensions (as by a rotation by 45 degrees). The information is that of histograms of
    the codes in bins of equal width, as is the custom (Locatello et al., ICML 2019).

    The plug-in estimate of an information is biased upwards by about (bins - 1)(classes - 1)/2N nats, most where two
    variables are independent: so that of the gap downwards, by more than its spread where samples are few. The value
    is the customary, uncorrected one; its interval, by the bootstrap over samples in fixed bins, is corrected.

    Args:
        codes: Codes ``[N, D]``, such as the means of posteriors.
        labels: The true factors ``[N, F]``, each discrete.
        bins: Number of bins.
        resamples: Bootstrap resamples for the interval; 0 for no interval.
        confidence: Confidence of the interval.
        generator: Source of the resamples.

    Returns:
        The score; its ``scores`` are the informations relative to the factors' entropies.

    Raises:
        TypeError: If codes or labels are no arrays of real numbers.
        ValueError: If a shape does not fit, a value is not finite, or a factor is constant or continuous.

    Example:
        >>> import torch, flowfactor as ff
        >>> factors = torch.cartesian_prod(torch.arange(4), torch.arange(5)).repeat(10, 1)
        >>> codes = torch.stack([-factors[:, 1], 3 * factors[:, 0]], 1)     # one dimension a factor
        >>> score = ff.metrics.mig(codes, factors).score
        >>> round(score.value, 3), score.count, 0.9 < score.low <= score.high <= 1
        (1.0, 200, True)
    """
    codes, classes, counts = check_codes(codes, labels)
    binned = discretise(codes, check_count("bins", bins, 2))

    def information(index: Tensor) -> Tensor:
        tables = joint_histograms(binned[index], classes[index], bins, counts)
        return torch.stack([_relative_information(table) for table in tables], 1)

    scores = information(torch.arange(len(codes)))
    resampled = resample(lambda index: gap(information(index)).mean(), len(codes), resamples, generator)
    gaps = gap(scores)
    score = bootstrapped(float(gaps.mean()), resampled, len(codes), confidence, correct_bias=True)
    return GapScore(score, gaps, scores, f"{bins} bins")


def _relative_information(table: Tensor) -> Tensor:
    """I(z_j; v)/H(v) of counts [D, bins, classes], as [D]."""
    joint = table / table.sum((1, 2), keepdim=True)
    classes = joint.sum(1)
    entropy = -torch.xlogy(classes, classes).sum(-1)
    cells = joint.sum(2)
    information = torch.xlogy(joint, joint).sum((1, 2)) - torch.xlogy(cells, cells).sum(-1) + entropy
    # A resample may miss all classes but one; such a factor tells nothing.
    return (information / entropy.clamp(min=1e-12)).clamp(0, 1)


def sap(
    codes: Any,
    labels: Any,
    *,
    method: Literal["threshold", "regression", "svm"] = "threshold",
    bins: int = 20,
    standardize: bool = False,
    resamples: int | None = None,
    confidence: float = CONFIDENCE,
    generator: torch.Generator | None = None,
) -> GapScore:
    r"""The separated attribute predictability score (Kumar et al., ICLR 2018, section 3).

    $$\frac1F \sum_f \Bigl( S_{j_f f} - \max_{j \ne j_f} S_{jf} \Bigr), \qquad j_f = \arg\max_j S_{jf}$$

    with $S_{jf}$ how well dimension j alone predicts factor f:

    - ``threshold``, for categories, and fast: the balanced accuracy, on the second half of the samples, of the
      classifier that cuts the dimension by thresholds (bins of equal width) fitted on the first half. A dimension that
      says nothing scores 1/classes, so the best total is 1 - 1/classes.
    - ``regression``, for ordered factors, in closed form: the $R^2$ of the linear regression,
      $\mathrm{cov}^2 / \mathrm{var}\,\mathrm{var}$. The best total is 1.
    - ``svm``: the accuracy on the second half of a linear support vector machine (C = 0.01, balanced classes), as in
      Locatello et al. (ICML 2019), who take codes as they are: its penalty makes the score depend on their scale.
      ``standardize=True`` removes that, and gives other figures than theirs. Cuts by a line can separate only two
      classes well; slow.

    The other two methods do not depend on the scale of codes. A collapsed dimension, of variance up to 1e-12, counts as
    constant in all three, as in the reference code (disentanglement_lib) of Locatello et al.: it predicts nothing.

    Samples are shuffled before they are halved. The interval is the standard bootstrap's over samples.

    Args:
        codes: Codes ``[N, D]``.
        labels: The true factors ``[N, F]``, each discrete.
        method: How a dimension predicts a factor.
        bins: Number of bins between thresholds.
        standardize: Scale codes to unit variance before ``svm``; the paper does not.
        resamples: Bootstrap resamples for the interval; 0 for no interval. By default 100, for ``svm`` 10.
        confidence: Confidence of the interval.
        generator: Source of the shuffle and the resamples.

    Returns:
        The score; its ``scores`` are the $S_{jf}$.

    Raises:
        TypeError: If codes or labels are no arrays of real numbers.
        ValueError: If a shape does not fit, a value is not finite, a factor is constant or continuous, or the method is
            unknown.
        ImportError: If ``svm`` is asked for and scikit-learn is not installed.

    Example:
        >>> import torch, flowfactor as ff
        >>> factors = torch.cartesian_prod(torch.arange(4), torch.arange(5)).repeat(10, 1)
        >>> round(ff.metrics.sap(factors.float(), factors, method="regression").score.value, 3)
        1.0
    """
    if method not in SAP_METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, SAP_METHODS))}, got {method!r}")
    codes, classes, counts = check_codes(codes, labels, least=4)
    binned = discretise(codes, check_count("bins", bins, 2))
    device = None if generator is None else generator.device
    first, second = torch.randperm(len(codes), generator=generator, device=device).cpu().chunk(2)
    values = torch.as_tensor(labels).detach().to("cpu", torch.float64)

    def scores_of(index: Tensor) -> Tensor:
        if method == "regression":
            return _squared_correlation(codes[index], values[index])
        # Draws stay on their side, so that no sample is both fitted to and judged by.
        fit, judge = first[index[: len(first)] % len(first)], second[index[len(first) :] % len(second)]
        if method == "threshold":
            fitted = joint_histograms(binned[fit], classes[fit], bins, counts)
            judged = joint_histograms(binned[judge], classes[judge], bins, counts)
            return torch.stack([_threshold_accuracy(a, b) for a, b in zip(fitted, judged, strict=True)], 1)
        return _svm_accuracy(codes, classes, fit, judge, standardize)

    resamples = (10 if method == "svm" else 100) if resamples is None else resamples
    scores = scores_of(torch.arange(len(codes)) if method == "regression" else _own(len(first), len(second)))
    resampled = resample(lambda index: gap(scores_of(index)).mean(), len(codes), resamples, generator)
    gaps = gap(scores)
    score = bootstrapped(float(gaps.mean()), resampled, len(codes), confidence)
    return GapScore(score, gaps, scores, method, standardize if method == "svm" else None)


def _own(first: int, second: int) -> Tensor:
    """Indices that name every sample of both halves once."""
    return torch.cat([torch.arange(first), torch.arange(second)])


def _squared_correlation(codes: Tensor, values: Tensor) -> Tensor:
    """Squared correlations of the columns of two matrices, [D, F]; 0 where one is constant."""
    codes, values = codes - codes.mean(0), values - values.mean(0)
    scale = codes.square().sum(0)[:, None] * values.square().sum(0)
    return torch.where(scale > 0, (codes.T @ values).square() / scale.clamp(min=1e-300), 0.0)


def _threshold_accuracy(fitted: Tensor, judged: Tensor) -> Tensor:
    """Balanced accuracy [D] on counts [D, bins, classes] of the rule that is best, cell by cell, on other counts."""
    share = fitted / fitted.sum(1, keepdim=True).clamp(min=1)
    rule = share.argmax(-1, keepdim=True)
    hits = torch.zeros_like(judged).scatter(-1, rule, judged.gather(-1, rule)).sum(1)
    present = judged.sum(1)
    return (hits / present.clamp(min=1)).sum(-1) / (present > 0).sum(-1).clamp(min=1)


def _svm_accuracy(codes: Tensor, classes: Tensor, fit: Tensor, judge: Tensor, standardize: bool) -> Tensor:
    svm = require("sklearn.svm", extra="data")
    if standardize:
        codes = (codes - codes[fit].mean(0)) / codes[fit].std(0).clamp(min=1e-12)
    scores = torch.zeros(codes.shape[1], classes.shape[1], dtype=torch.float64)
    for factor in range(classes.shape[1]):
        known, asked = classes[fit, factor].numpy(), classes[judge, factor].numpy()
        for dim in range(codes.shape[1]):
            if len(set(known.tolist())) < 2:
                continue  # a resample may hold one class only; nothing can be learned from it
            machine = svm.LinearSVC(C=0.01, class_weight="balanced", random_state=0, dual=False)
            machine.fit(codes[fit, dim : dim + 1].numpy(), known)
            scores[dim, factor] = float(machine.score(codes[judge, dim : dim + 1].numpy(), asked))
    return scores
