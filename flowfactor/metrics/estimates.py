"""Estimates: a value, how many samples it is based on, and how sure one can be of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from flowfactor._checks import check_count

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A measured value with its confidence interval.

    Attributes:
        value: The value.
        low: Lower end of the confidence interval; NaN where none was asked for.
        high: Upper end.
        count: Number of samples that the value is based on.
        confidence: Confidence of the interval.

    Example:
        >>> import flowfactor as ff
        >>> accuracy = ff.metrics.wilson(90, 100)
        >>> print(accuracy)
        0.900 [0.826, 0.945], n=100
        >>> float(accuracy)
        0.9
    """

    value: float
    low: float
    high: float
    count: int
    confidence: float = CONFIDENCE

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n={self.count}"

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values; what is NaN, such as an interval that was not asked for, is None."""
        figures = {"value": self.value, "low": self.low, "high": self.high}
        return {
            **{name: None if math.isnan(figure) else figure for name, figure in figures.items()},
            "count": self.count,
            "confidence": self.confidence,
        }


def wilson(hits: float, trials: int, *, confidence: float = CONFIDENCE, independent: float | None = None) -> Estimate:
    r"""A share with Wilson's score interval (Wilson 1927).

    $$\frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}$$

    It keeps to [0, 1] and has a width where all trials agree, as accuracies near 1 need it.

    Args:
        hits: Number of successes.
        trials: Number of trials.
        confidence: Confidence of the interval.
        independent: How many independent trials they are worth, n in the formula; all of them where None.

    Returns:
        The share with its interval; without trials, NaN within [0, 1].

    Raises:
        ValueError: If there are more hits than trials, or the confidence is not in (0, 1).

    Example:
        >>> print(wilson(10, 10))
        1.000 [0.722, 1.000], n=10
    """
    z = normal_quantile(confidence)
    if not 0 <= hits <= trials:
        raise ValueError(f"hits must lie between 0 and the number of trials, got {hits} hits in {trials} trials")
    if not trials:
        return Estimate(math.nan, 0.0, 1.0, 0, confidence)
    share = hits / trials
    n = trials if independent is None else independent
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # Rounding alone must not push the value out of its own interval.
    low, high = min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)
    return Estimate(share, low, high, int(trials), confidence)


class MeanInterval:
    """The 95% confidence intervals of results that have a ``mean`` and its ``standard_error``."""

    mean: Tensor
    standard_error: Tensor

    @property
    def low(self) -> Tensor:
        """Lower ends of the 95% confidence intervals."""
        return mean_bounds(self.mean, self.standard_error)[0]

    @property
    def high(self) -> Tensor:
        """Upper ends of the 95% confidence intervals."""
        return mean_bounds(self.mean, self.standard_error)[1]


def normal_quantile(confidence: float) -> float:
    """The z with which value ± z standard errors has a two-sided confidence; raises ValueError outside (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, for example 0.95, got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def student_quantile(confidence: float, freedom: int) -> float:
    """Student's counterpart of `normal_quantile`, by its Cornish-Fisher expansion (within 1% from 4 degrees on)."""
    z = normal_quantile(confidence)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def resample(
    statistic: Callable[[Tensor], Tensor], count: int, resamples: int, generator: torch.Generator | None
) -> Tensor | None:
    """Evaluates a statistic on bootstrap resamples.

    Args:
        statistic: Maps indices ``[count]``, drawn with replacement, to values ``[V]``.
        count: Number of samples.
        resamples: R; 0 for none.
        generator: Source of the draws.

    Returns:
        The values of the resamples ``[R, V]``, or None without.

    Raises:
        ValueError: If ``resamples`` is negative or 1, which shows no spread.
    """
    if check_count("resamples", resamples, 0) == 1:
        raise ValueError("resamples must be 0, for no interval, or at least 2: a single one shows no spread")
    if not resamples:
        return None
    device = None if generator is None else generator.device
    draws = (torch.randint(count, (count,), generator=generator, device=device).cpu() for _ in range(resamples))
    return torch.stack([statistic(draw) for draw in draws])


def bootstrapped(
    value: float, resampled: Tensor | None, count: int, confidence: float, *, correct_bias: bool = False
) -> Estimate:
    """An estimate in [0, 1] with the standard bootstrap interval: so many standard errors to both sides.

    The percentiles of the resamples would not do here. A resample repeats samples, which inflates mutual information and
    impairs what is fitted to it, and so shifts them; their spread is not shifted.

    Args:
        value: The value.
        resampled: Its values on resamples ``[R]``, or None for no interval.
        count: Number of samples.
        confidence: Confidence of the interval.
        correct_bias: Whether to put the interval round the value less its bias, as the shift of the resamples shows it
            (Efron and Tibshirani 1993, chapter 10). For plug-in estimates; what is fitted to half as many distinct
            samples is worse for another reason. The interval is stretched to hold the value itself.

    Returns:
        The estimate.
    """
    normal_quantile(confidence)
    if resampled is None:
        return Estimate(value, math.nan, math.nan, count, confidence)
    # Student's, for a spread that few resamples show is itself uncertain.
    half = student_quantile(confidence, len(resampled) - 1) * float(resampled.std())
    centre = 2 * value - float(resampled.mean()) if correct_bias else value
    low, high = min(max(centre - half, 0.0), value), max(min(centre + half, 1.0), value)
    return Estimate(value, low, high, count, confidence)


def mean_bounds(mean: Tensor, standard_error: Tensor, confidence: float = CONFIDENCE) -> tuple[Tensor, Tensor]:
    """The normal confidence interval of means: lower and upper ends, of their shape."""
    half = normal_quantile(confidence) * standard_error
    return mean - half, mean + half


def standard_error(samples: Tensor, dim: int = -1) -> Tensor:
    """The standard error of the mean along a dimension; NaN for a single sample."""
    count = samples.shape[dim]
    if count < 2:
        return torch.full_like(samples.mean(dim), math.nan)
    return samples.std(dim) / count**0.5
